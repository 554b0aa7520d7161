"""How a tokenizer writes a prompt and its response: all that the rows of a prompt domain depend on.

    chat messages   prompt: what the template makes of all messages but the last, and how an answer begins
                    response: what it adds when it gets the last message, up to the end of the turn
    plain fields    prompt: the card's template, filled in
                    response: the field as it is

The token that ends a turn is found by asking the template about a conversation whose answer is known.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ddkmix.card import PromptResponse
from ddkmix.documents import PromptFields
from ddkmix.errors import ConfigError, ModelError
from ddkmix.prompts.chat import Refused, named_tokens, read_chat_template, render
from ddkmix.tokenizer import TokenizerCard, special_tokens, token_ids

_QUESTION, _ANSWER = "zwei und zwei", "vier"
"""A conversation that no template has an opinion on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptFormat:
    """How examples become text and tokens; plain values, which packing processes are sent."""

    fields: PromptFields
    template: str | None
    """Of plain fields."""
    chat_template: str | None
    """Jinja, of messages."""
    named_tokens: Mapping[str, str]
    """What the chat template may call `bos_token` and so on."""
    end_of_turn: str
    end_of_turn_id: int
    tail: str | None
    """What the chat template writes behind an answer, if it does not write `end_of_turn`."""
    special_tokens: Mapping[str, int]
    """They may come from a template, and must not stand in an example."""
    long_responses: Literal["leave_out", "cut"]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for fingerprints."""
        return asdict(self)


def find_format(prompts: PromptResponse, tokenizer: TokenizerCard, *, where: str) -> PromptFormat:
    """How a tokenizer writes the examples of a card.

    Args:
        prompts: the card's `prompt_response`.
        tokenizer: of the rows.
        where: the card, for messages.

    Raises:
        ModelError: the tokenizer has no chat template, or one that cannot write a question and its answer.
        ConfigError: nobody says which token ends a turn, or it is none.
    """
    fields = PromptFields(
        messages=prompts.messages, prompt=prompts.prompt, response=prompts.response, context=prompts.context
    )
    named = named_tokens(tokenizer.name, tokenizer.revision)
    special = special_tokens(tokenizer)
    chat, tail, end = None, None, prompts.end_of_turn
    if prompts.messages is not None:
        chat = read_chat_template(tokenizer.name, tokenizer.revision)
        tail = _tail(chat, named, tokenizer.name)
        end = end or _first_of(tail, special) or _first_of(tail, named.values())
        if end is None:
            raise ConfigError(
                f"{where}: the chat template of {tokenizer.name} ends an answer with {tail!r}, which has no "
                "special token, so a model could not say that it has finished; name one under "
                f"prompt_response: end_of_turn: {list(special)[:8]}."
            )
    elif end is None:
        end = named.get("eos_token")
        if end is None:
            raise ConfigError(
                f"{where}: {tokenizer.name} names no eos_token to end a response with; name a token under "
                f"prompt_response: end_of_turn: {list(special)[:8]}."
            )
    ids = token_ids(tokenizer)
    if end not in ids or end not in {*special, *named.values()}:
        # a word would end a response wherever somebody writes it
        kind = "a token" if end not in ids else "a special token"
        raise ConfigError(
            f"{where}: prompt_response.end_of_turn = {end!r} is not {kind} of {tokenizer.name}; use one of "
            f"its special tokens: {list(special)[:8]}."
        )
    return PromptFormat(
        fields=fields,
        template=prompts.template,
        chat_template=chat,
        named_tokens=named,
        end_of_turn=end,
        end_of_turn_id=ids[end],
        tail=None if tail is None or end in tail else tail,
        special_tokens=special,
        long_responses=prompts.long_responses,
    )


def _tail(template: str, named: Mapping[str, str], name: str) -> str:
    """What a template writes behind an answer."""
    question = {"role": "user", "content": _QUESTION}
    answer = {"role": "assistant", "content": _ANSWER}
    try:
        prompt = render(template, [question], named, generation_prompt=True)
        whole = render(template, [question, answer], named, generation_prompt=False)
    except Refused as error:
        raise ModelError(
            f"the chat template of {name} cannot write a question and its answer ({error}); use a tokenizer "
            "whose template can, or name plain fields in the card."
        ) from None
    if not whole.startswith(prompt) or _ANSWER not in whole[len(prompt) :]:
        raise ModelError(
            f"the chat template of {name} writes a conversation with its answer otherwise than one that "
            f"waits for it ({prompt!r}, {whole!r}), so it does not tell what a response is; use another one."
        )
    return whole[len(prompt) :].rpartition(_ANSWER)[2]


def _first_of(text: str, tokens: Iterable[str]) -> str | None:
    """The token that begins first in a text, the longest of several."""
    found = [(text.index(token), -len(token), token) for token in tokens if token in text]
    return min(found)[2] if found else None

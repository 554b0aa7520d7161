"""A document of a prompt domain as two texts: what a model is given, and what it is to say.

An example that cannot be had so is left out for a reason, which is counted; it never becomes another example.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ddkmix.prompts.chat import Refused, render
from ddkmix.prompts.format import PromptFormat

EMPTY_PROMPT = "empty prompt"
EMPTY_RESPONSE = "empty response"
NO_ANSWER = "last message not the assistant's"
REWRITTEN = "prompt rewritten by the chat template"
NO_END = "no end of turn"
SPECIAL = "special token in the text"
_MOST_OF_A_REASON = 60


@dataclass(frozen=True, slots=True)
class Example:
    """Behind `response` comes the end of the turn, which is not text."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Why a document is no example."""

    reason: str


def example_of(document: str, format: PromptFormat) -> Example | LeftOut:
    """The texts of one document.

    Special tokens may come from a template only: "<|im_end|>" in what somebody wrote would end a turn.
    """
    record = json.loads(document)
    found = _of_messages(record, format) if format.chat_template is not None else _of_fields(record, format)
    if isinstance(found, Example) and _special(tuple(format.special_tokens)).search(
        "\n".join(_texts(record))
    ):
        return LeftOut(SPECIAL)
    return found


def _of_fields(record: Mapping[str, str], format: PromptFormat) -> Example | LeftOut:
    prompt, response, context = (record.get(key, "") for key in ("prompt", "response", "context"))
    if not prompt.strip():
        return LeftOut(EMPTY_PROMPT)
    if not response.strip():
        return LeftOut(EMPTY_RESPONSE)
    if format.template is not None:
        return Example(format.template.format(prompt=prompt, context=context), response)
    before = f"{context}\n\n" if context.strip() else ""
    return Example(f"{before}{prompt}\n", response)


def _of_messages(record: Mapping[str, Any], format: PromptFormat) -> Example | LeftOut:
    messages: Sequence[Mapping[str, Any]] = record["messages"]
    if messages[-1]["role"] != "assistant":
        return LeftOut(NO_ANSWER)
    if not messages[-1]["content"].strip():
        return LeftOut(EMPTY_RESPONSE)
    if not any(message["content"].strip() for message in messages[:-1]):
        return LeftOut(EMPTY_PROMPT)
    assert format.chat_template is not None
    template, tokens = format.chat_template, format.named_tokens
    try:
        prompt = render(template, messages[:-1], tokens, generation_prompt=True)
        whole = render(template, messages, tokens, generation_prompt=False)
    except Refused as error:
        return LeftOut(f"refused by the chat template ({str(error)[:_MOST_OF_A_REASON]})")
    if not whole.startswith(prompt):
        return LeftOut(REWRITTEN)
    written = whole[len(prompt) :]
    if format.tail is not None:
        return Example(prompt, written.removesuffix(format.tail))
    response, end, _ = written.rpartition(format.end_of_turn)
    return Example(prompt, response) if end else LeftOut(NO_END)


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


@lru_cache(maxsize=8)
def _special(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")

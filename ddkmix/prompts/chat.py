"""Chat templates: a conversation as the text that a model was trained to read.

A template comes with the tokenizer and is a Jinja program. It runs in Jinja's sandbox, in the environment
that transformers gives it, but for one thing: `strftime_now` does not exist. A template that writes today's
date would make other rows tomorrow; most have a date of their own to write where it does not exist.
(transformers' own function is not used: importing it costs every packing process seconds.)
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

from ddkmix.errors import ModelError
from ddkmix.hub import model_file, optional_model_file, read_json_object

Message = Mapping[str, Any]
"""At least `role` and `content`."""

TEMPLATE_FILE = "chat_template.jinja"
_NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Refused(Exception):  # no error of ours: an example that is counted
    """A template cannot write these messages."""


def read_chat_template(name: str, revision: str | None = None) -> str:
    """The chat template that a tokenizer brings: its own file, or the entry of tokenizer_config.json.

    Raises:
        ModelError: it brings none.
    """
    path = optional_model_file(name, TEMPLATE_FILE, revision)
    if path is not None:
        return path.read_text(encoding="utf-8")
    config = model_file(name, "tokenizer_config.json", revision)
    template = read_json_object(config).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str) or not template:
        raise ModelError(
            f"{name} has no chat template (neither {TEMPLATE_FILE} nor chat_template in {config.name}); use "
            "a tokenizer that has one, or name plain fields in the card: prompt_response: {prompt: ..., "
            "response: ...}."
        )
    return template


def named_tokens(name: str, revision: str | None = None) -> dict[str, str]:
    """What a template may call `bos_token`, `eos_token` and so on.

    Raises:
        ModelError: the tokenizer has no tokenizer_config.json.
    """
    config = read_json_object(model_file(name, "tokenizer_config.json", revision))
    found = {}
    for key in (f"{kind}_token" for kind in _NAMED_TOKENS):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[key] = token
    return found


def render(
    template: str, messages: Sequence[Message], tokens: Mapping[str, str], *, generation_prompt: bool
) -> str:
    """Messages as text.

    Args:
        template: Jinja.
        messages: of the conversation.
        tokens: see `named_tokens`.
        generation_prompt: with what comes before the assistant's next message.

    Raises:
        Refused: the template says so, or fails.
    """
    from jinja2 import TemplateError

    try:
        return str(
            _compiled(template).render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=generation_prompt,
                **tokens,
            )
        )
    # what Jinja raises, and what the program's own expressions do
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise Refused(" ".join(str(error).split()) or type(error).__name__) from None


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says; for the text it changes nothing."""

        tags = {"generation"}  # noqa: RUF012  # Jinja's

        def parse(self, parser: Any) -> list[Node]:
            next(parser.stream)
            body: list[Node] = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return body

    class Names(Namespace):
        """Jinja's namespace without names that Python gives a meaning to."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            names = dict(*args[1:], **kwargs)
            for name in names:
                check_name(name)
            Namespace.__init__(args[0], names)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    def check_name(name: object) -> None:
        if str(name).startswith("_"):
            raise TemplateError(f"a namespace has no {name}")

    def refuse(message: object) -> NoReturn:
        raise TemplateError(str(message))

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)  # and no type to climb from
    environment.globals["namespace"] = Names
    return environment.from_string(template)

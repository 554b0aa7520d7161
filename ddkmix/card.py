"""The content of a domain card, and what is wrong with it in one line."""

from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

from ddkmix.errors import DataError, did_you_mean
from ddkmix.sections import NAME, Positive, PositiveInt, Section

_UNITS = ("bits_per_byte", "nats_per_byte", "nats_per_token")
NEEDS = "a card needs name, license, and train and held_out (or rows)."


class Source(Section):
    """Where the text of a domain comes from."""

    package: str
    registry: str
    version: str
    license: str
    sha256: str | None = None
    note: str | None = None


class DatasetEntry(Section):
    """A Hugging Face data set, read as a stream."""

    dataset: str
    """`owner/name`, or a local folder, relative to the card if it begins with a dot."""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    """Branch, tag or commit; name a commit, or tomorrow's rows may be other rows."""
    shards: PositiveInt | None = None
    """Parts that it is packed in, at most as many as it has files; one for each file when unset."""


class ReferenceLoss(Section):
    """A loss on a domain's held-out text that somebody has measured, in place of a teacher's.

    Losses per byte hold for every tokenizer; one per token holds for the tokenizer that it was measured with.
    It is compared with the student's loss on packed rows, in which the separator that ends a document is
    predicted too and covers no byte (`DomainLosses.num_bytes`): count it, as `ddkmix gaps` does for models
    that share a tokenizer. A loss of the text alone, as `ddkmix gaps` gives for two tokenizers, is lower by
    one separator's nats a document.
    """

    model: str
    """Whose loss; for people."""
    bits_per_byte: Positive | None = None
    """Bits per UTF-8 byte of text."""
    nats_per_byte: Positive | None = None
    """Nats per UTF-8 byte of text; bits x ln 2."""
    nats_per_token: Positive | None = None
    """Nats per predicted token of `tokenizer`."""
    tokenizer: str | None = None
    """Folder or Hub id; must read text as the rows' tokenizer does."""

    @model_validator(mode="after")
    def _one_unit(self) -> "ReferenceLoss":
        given = [unit for unit in _UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(_UNITS)}, and there is {' and '.join(given) or 'none'}")
        if (self.nats_per_token is None) != (self.tokenizer is None):
            raise ValueError("nats_per_token and tokenizer, whose tokens they are, belong together")
        return self


_FIELD = r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$"
Column = Annotated[str, Field(pattern=_FIELD)]


class PromptResponse(Section):
    """Which fields hold the examples of a prompt domain: chat messages, or a prompt and its response."""

    messages: Column | None = None
    """A list of {role, content}, the last of which is the assistant's; written by the tokenizer's own chat
    template."""
    prompt: Column | None = None
    response: Column | None = None
    context: Column | None = None
    """What the prompt is about; may be null."""
    template: str | None = None
    """What is written before the response: text with {prompt} and, where there is a context, {context}. When
    unset, the context and a blank line where there is one, the prompt, and a line break."""
    end_of_turn: str | None = None
    """Token behind a response. Unset: the one that the chat template ends an assistant's turn with; of plain
    fields the tokenizer's end-of-sequence token."""
    long_responses: Literal["leave_out", "cut"] = "leave_out"
    """What becomes of an example whose response does not fit into its row behind the prompt: it is left out,
    or its response is cut where the row ends, without the end of the turn. Both are counted."""

    @model_validator(mode="after")
    def _one_kind(self) -> "PromptResponse":
        plain = [
            key for key in ("prompt", "response", "context", "template") if getattr(self, key) is not None
        ]
        if self.messages is not None and plain:
            raise ValueError(f"messages and {plain[0]} exclude each other: chat messages, or plain fields")
        if self.messages is None and (self.prompt is None or self.response is None):
            raise ValueError("name messages, or both prompt and response")
        if self.template is not None:
            _check_template(self.template, {"prompt"} | ({"context"} if self.context is not None else set()))
        return self


def _check_template(template: str, wanted: set[str]) -> None:
    """Raises ValueError unless a template holds just these names, plainly: nothing in it is evaluated."""
    parts = list(Formatter().parse(template))
    for _, name, spec, conversion in parts:
        if name is not None and (name not in wanted or spec or conversion):
            written = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            known = " and ".join(f"{{{one}}}" for one in sorted(wanted))
            raise ValueError(f"template holds {{{written}}}; it may hold {known}, and {{{{ for a brace")
    if lacking := sorted(wanted - {name for _, name, _, _ in parts}):
        raise ValueError(f"template lacks {{{lacking[0]}}}")


class HeldOutShare(Section):
    """Documents taken from the train shards, chosen by their content."""

    share_of_train: Annotated[float, Field(gt=0, le=0.5)]
    """About this share of the documents is measured on and not trained on."""


def _as_tuple(value: Any) -> Any:
    return value if value is None or isinstance(value, list | tuple) else (value,)


def _kind_of_entry(value: Any) -> str:
    return "a dataset" if isinstance(value, dict | DatasetEntry) else "a location"


def _kind_of_held_out(value: Any) -> str:
    chosen = isinstance(value, HeldOutShare) or (isinstance(value, dict) and "dataset" not in value)
    return "a share" if chosen else "a entries"


Entry = Annotated[
    Annotated[str, Tag("a location")] | Annotated[DatasetEntry, Tag("a dataset")],
    Discriminator(_kind_of_entry),
]
Entries = Annotated[tuple[Entry, ...], BeforeValidator(_as_tuple)]
HeldOut = Annotated[
    Annotated[HeldOutShare, Tag("a share")] | Annotated[Entries, Tag("a entries")],
    Discriminator(_kind_of_held_out),
]


class Card(Section):
    """The content of a card."""

    name: Annotated[str, Field(pattern=NAME)]
    """Lower-case letters, digits, _ and -; seeds and file names derive from it."""
    description: str = ""
    text_field: Column = "txt"
    """What holds the text: a tar's member `txt` or `text`, or `json.FIELD`; elsewhere a column."""
    prompt_response: PromptResponse | None = None
    """In place of text_field: fields of an object (JSON lines, Parquet, a tar's member `json`) that hold a
    prompt and its response. Such a document is a row of its own, and only its response is predicted."""
    train: Entries | None = None
    """Shards to learn from."""
    held_out: HeldOut | None = None
    """Shards to measure on."""
    rows: str | None = None
    """Folder that `ddkmix pack` wrote, in place of train and held_out."""
    sha256: Mapping[str, Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]] = Field(default={})
    """File name -> digest, checked when a shard is read."""
    license: str
    max_epochs: Positive | None = None
    """Passes allowed over the train rows."""
    prior: Positive | None = None
    """Share in the `natural` mixture, relative to the others; the number of train rows when unset."""
    teacher: str | None = None
    """Who teaches this domain: an entry of the config's `teachers`, or `teacher`; `default_teacher` when
    unset."""
    reference_loss: ReferenceLoss | None = None
    """What the student's loss is compared with where there is no teacher to measure, or
    `evaluation.reference` is `cards`."""
    sources: tuple[Source, ...] = ()

    @model_validator(mode="after")
    def _one_content(self) -> "Card":
        if self.prompt_response is not None and "text_field" in self.model_fields_set:
            raise ValueError("text_field and prompt_response exclude each other; remove one of them")
        return self


def read_card(path: Path) -> Card:
    """One card.

    Raises:
        DataError: it cannot be read, or a key or value is wrong.
    """
    try:
        return Card.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as a card: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise DataError(_explain(error, path)) from None


def _explain(error: ValidationError, path: Path) -> str:
    errors = error.errors()
    # a misspelt key before what is missing because of it
    first = next((entry for entry in errors if entry["type"] == "extra_forbidden"), errors[0])
    # without the tags of unions ("a dataset"), and without the index of an only entry
    tags = {part for part in first["loc"] if isinstance(part, str) and part.startswith("a ")}
    key = ".".join(str(part) for part in first["loc"] if part not in tags and part != 0)
    if first["type"] == "extra_forbidden":
        section: type[Section] = Card
        if len(first["loc"]) > 1:
            section = DatasetEntry if "a dataset" in tags else HeldOutShare if "a share" in tags else Source
            named: dict[str, type[Section]] = {
                "reference_loss": ReferenceLoss,
                "prompt_response": PromptResponse,
            }
            section = named.get(str(first["loc"][0]), section)
        return f"{path}: unknown key {key!r}; {did_you_mean(str(first['loc'][-1]), section.model_fields)}"
    if first["type"] == "missing":
        return f"{path}: {key} is missing; {NEEDS}"
    rule = first["msg"].removeprefix("Value error, ")
    if not key and isinstance(first["input"], dict):  # of the card as a whole, which would fill the line
        return f"{path}: {rule}."
    return f"{path}: {key or 'card'} = {first['input']!r}; {rule}."

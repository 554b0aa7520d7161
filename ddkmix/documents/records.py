"""What a document is where a domain holds prompts and responses: a few fields of an object, as one string.

    {"id": 7, "question": "Why?", "answer": "Because."}   ->   {"prompt":"Why?","response":"Because."}

The string is JSON with sorted keys and nothing that was null, so the same example is the same document
whatever file it came from: it has a digest, and may stand in the held-out split, as any other text.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from ddkmix.documents.text import (
    JSON_NAMES,
    checked_text,
    column_of,
    json_tree,
    look_up,
    shown,
    text_of_json,
)
from ddkmix.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptFields:
    """Which fields hold an example: `messages`, or the others."""

    messages: str | None = None
    """A list of {role, content}."""
    prompt: str | None = None
    response: str | None = None
    context: str | None = None
    """What the prompt is about."""

    @property
    def columns(self) -> dict[str, str]:
        """The column of each part of an example; dots go deeper."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {part: column_of(column) for part, column in named if column is not None}


SETTING = "prompt_response"
"""The card's key that names the fields of an example."""
TextField = str | PromptFields
"""What a reader takes of each document: the field of its text, or those of an example."""


def columns_of(text_field: TextField) -> list[str]:
    """The columns that documents are made of."""
    return [column_of(text_field)] if isinstance(text_field, str) else list(text_field.columns.values())


def document_of_json(data: bytes, text_field: TextField, where: str) -> str:
    """The document in a JSON object; "" where its fields are null.

    Raises:
        DataError: the data are not a JSON object, lack a field, or a field is of the wrong kind.
    """
    if isinstance(text_field, str):
        return text_of_json(data, column_of(text_field), where)
    tree = json_tree(data, where)
    columns = text_field.columns
    values = {part: look_up(tree, column, where, SETTING) for part, column in columns.items()}
    return record_text(text_field, values, where)


def record_text(fields: PromptFields, values: Mapping[str, Any], where: str) -> str:
    """An example as a document; "" where every field is null.

    Args:
        fields: which columns they came from, for messages.
        values: what each of `fields.columns` holds; strings, or of `messages` a list.
        where: the file and line, for messages.

    Raises:
        DataError: a value is of another kind, or no Unicode text.
    """
    parts = {
        part: _messages(values[part], column, where)
        if part == "messages"
        else checked_text(values[part], column, where)
        for part, column in fields.columns.items()
    }
    if not any(parts.values()):
        return ""
    kept = {part: value for part, value in parts.items() if value}
    return json.dumps(kept, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def _messages(value: Any, column: str, where: str) -> list[dict[str, Any]]:
    if isinstance(value, dict) and value and all(isinstance(one, list) for one in value.values()):
        # how `datasets` stores a list of objects whose features were declared as a Sequence
        lengths = {len(one) for one in value.values()}
        if len(lengths) == 1:
            value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(
            f"{where}: {column!r} is a JSON {_kind(value)}; messages are a list of {{role, content}}."
        )
    return [_message(message, f"{column}[{i}]", where) for i, message in enumerate(value)]


def _message(message: Any, name: str, where: str) -> dict[str, Any]:
    if isinstance(message, str) and message.startswith("{"):
        # how `datasets` stores objects that differ in their keys
        with suppress(ValueError):
            message = json.loads(message)
    if not isinstance(message, dict):
        raise DataError(f"{where}: {name!r} is a JSON {_kind(message)}; a message is {{role, content}}.")
    if lacking := [key for key in ("role", "content") if key not in message]:
        keys = ", ".join(shown(str(key)) for key in message) or "nothing"
        raise DataError(
            f"{where}: {name!r} has no {lacking[0]}, only {keys}; a message is {{role, content}}."
        )
    for key in ("role", "content"):
        checked_text(message[key], f"{name}.{key}", where)
    if not (message["role"] or "").strip():
        raise DataError(f"{where}: {name}.role is empty; it says who speaks: system, user or assistant.")
    kept = {"role": "", "content": "", **{k: v for k, v in message.items() if v is not None}}
    try:
        json.dumps(kept, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:  # a date, bytes; or half of a surrogate pair
        raise DataError(f"{where}: {name!r} cannot be a message ({error}).") from None
    return kept


def _kind(value: Any) -> str:
    return JSON_NAMES.get(type(value), type(value).__name__)

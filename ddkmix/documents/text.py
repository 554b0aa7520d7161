"""What a document is: a string of Unicode text, found in bytes or in a field of a JSON object."""

import hashlib
import json
from typing import Any

from ddkmix.errors import DataError

_BOM = b"\xef\xbb\xbf"
_MOST_FIELDS_NAMED = 20
JSON_NAMES = {
    type(None): "null",
    bool: "true or false",
    int: "number",
    float: "number",
    str: "string",
    list: "list",
    dict: "object",
}


def digest(text: str) -> bytes:
    """16 bytes that two documents share only when they are equal."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def column_of(text_field: str) -> str:
    """The column that a card's text_field names: `json.FIELD` and `FIELD` are one; dots go deeper."""
    return text_field.removeprefix("json.")


def text_of_bytes(data: bytes, where: str) -> str:
    """Bytes as text, nothing translated.

    Raises:
        DataError: they are not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}).") from None


def text_of_json(data: bytes, column: str, where: str) -> str:
    """The text in one field of a JSON object; "" for null.

    Raises:
        DataError: the data are not a JSON object, lack the field, or the field is no text.
    """
    return checked_text(look_up(json_tree(data, where), column, where), column, where)


def json_tree(data: bytes, where: str) -> Any:
    """Bytes as JSON.

    Raises:
        DataError: they are none.
    """
    try:
        return json.loads(text_of_bytes(data.removeprefix(_BOM), where))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON ({error.msg} at character {error.pos}); write one JSON object."
        ) from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{where} is not JSON that can be read ({error}).") from None
    except RecursionError:
        raise DataError(f"{where} is not JSON that can be read (nested too deep).") from None


def checked_text(value: Any, column: str, where: str) -> str:
    """A value of a JSON field or a column as a document; "" for null.

    Raises:
        DataError: it is not a string, or has half of a surrogate pair.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = JSON_NAMES.get(type(value), type(value).__name__)
        raise DataError(f"{where}: {column!r} is a JSON {kind}; a document is a string.")
    try:
        # the encoder is far faster than a look at every character
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: {column!r} has an unpaired surrogate; write the JSON as valid Unicode."
        ) from None
    return value


def missing_column(column: str, names: list[str], where: str, setting: str = "text_field") -> DataError:
    """The error for a field that is not there; it lists the fields that are. `setting`: the card's."""
    listed = ", ".join(shown(name) for name in names[:_MOST_FIELDS_NAMED])
    more = ", ..." if len(names) > _MOST_FIELDS_NAMED else ""
    return DataError(
        f"{where} has no field {column!r}, only {listed or 'nothing'}{more}; set {setting} in the card to "
        "what holds the text."
    )


def shown(name: str) -> str:
    """A name out of somebody's file as it may stand in a message of one line."""
    return name if name.isprintable() else ascii(name)


def look_up(tree: Any, column: str, where: str, setting: str = "text_field") -> Any:
    """A field by name, or by path (`a.b`); a name that has dots itself comes first.

    Raises:
        DataError: it is not there. `setting` is the card's that names it.
    """
    if not isinstance(tree, dict):
        raise DataError(
            f"{where} is a JSON {JSON_NAMES[type(tree)]}; write an object with a field {column!r}."
        )
    value: Any = tree
    names = [column] if column in tree else column.split(".")
    for name in names:
        if value is None:
            return None
        if not isinstance(value, dict) or name not in value:
            raise missing_column(column, [str(key) for key in tree], where, setting)
        value = value[name]
    return value

"""The documents of an Arrow table, for the readers that get their data as such."""

from collections.abc import Iterator
from typing import Any

from ddkmix.documents.records import SETTING, TextField, record_text
from ddkmix.documents.text import checked_text, column_of, missing_column, text_of_bytes
from ddkmix.errors import DataError


def check_columns(schema: Any, text_field: TextField, where: str) -> None:
    """Check that what documents are made of is there; what the fields of an example hold, their values tell.

    Raises:
        DataError: a column is missing, or the one of a text holds no strings.
    """
    if isinstance(text_field, str):
        check_column(schema, column_of(text_field), where)
        return
    for column in text_field.columns.values():
        if _kind(schema, column) is None:
            raise missing_column(column, list(schema.names), where, SETTING)


def documents_of_table(table: Any, text_field: TextField, where: str, first_row: int) -> Iterator[str]:
    """The documents of a table or a record batch in order; null is "".

    Args:
        table: has the columns, checked by `check_columns`.
        text_field: what they are made of.
        where: the shard, for messages.
        first_row: rows of the shard before this table, for messages.

    Raises:
        DataError: a value is not UTF-8, or of another kind than it must be.
    """
    if isinstance(text_field, str):
        yield from texts_of(table, column_of(text_field), where, first_row)
        return
    columns = {part: _values(table, column) for part, column in text_field.columns.items()}
    for row, values in enumerate(zip(*columns.values(), strict=True), start=first_row):
        place = f"{where}: row {row}"
        try:
            found = {part: value.as_py() for part, value in zip(columns, values, strict=True)}
        except UnicodeDecodeError as error:
            raise DataError(f"{place} is not UTF-8 ({error.reason} at byte {error.start}).") from None
        yield record_text(text_field, found, place)


def check_column(schema: Any, column: str, where: str) -> None:
    """Check that a column (or a field of a struct column, `a.b`) is there and holds strings.

    Raises:
        DataError: it is missing, or of another type.
    """
    import pyarrow.types as types

    kind = _kind(schema, column)
    if kind is None:
        raise missing_column(column, list(schema.names), where)
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not _is_text(value):
        raise DataError(f"{where}: {column!r} is a column of {kind}; documents are strings.")


def texts_of(table: Any, column: str, where: str, first_row: int) -> Iterator[str]:
    """The documents of a table or a record batch in order; null is "".

    Args:
        table: has the column, checked by `check_column`.
        column: its name; dots go into structs.
        where: the shard, for messages.
        first_row: rows of the shard before this table, for messages.

    Raises:
        DataError: a value is not UTF-8.
    """
    for row, value in enumerate(_values(table, column), start=first_row):
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where}: row {row}: {column!r} is not UTF-8 ({error.reason} at byte {error.start})."
            ) from None
        place = f"{where}: row {row}"
        yield text_of_bytes(text, place) if isinstance(text, bytes) else checked_text(text, column, place)


def _values(table: Any, column: str) -> Any:
    import pyarrow as pa
    import pyarrow.compute as compute

    if column in table.schema.names:
        return table.column(column)
    first, *rest = column.split(".")
    values = table.column(first)
    for name in rest:
        values = compute.struct_field(values, name)  # type: ignore[attr-defined]  # null where the struct is
    assert isinstance(values, pa.Array | pa.ChunkedArray)
    return values


def _kind(schema: Any, column: str) -> Any:
    """The type of a column or of a field within; None when there is no such thing, or two of them."""
    import pyarrow.types as types

    if column in schema.names:
        return schema.field(column).type if schema.names.count(column) == 1 else None
    first, *rest = column.split(".")
    if schema.names.count(first) != 1:
        return None
    kind = schema.field(first).type
    for name in rest:
        if not types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind


def _is_text(kind: Any) -> bool:
    """Strings, and bytes, which is what old Parquet writers call strings; an all-null column has no text."""
    import pyarrow.types as types

    tests = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
        types.is_null,
    )
    return any(test(kind) for test in tests)

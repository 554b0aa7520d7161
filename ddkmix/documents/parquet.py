"""Parquet: the columns of the documents, a few rows at a time, whatever the size of the row groups."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddkmix.documents.arrow import check_columns, documents_of_table
from ddkmix.documents.records import TextField, columns_of
from ddkmix.errors import DataError

_BATCH_BYTES = 1 << 24
_MOST_ROWS = 1024
_READ_BYTES = 1 << 20


def read_parquet(path: Path, text_field: TextField, *, name: str) -> Iterator[str]:
    """The documents in one column of a Parquet file, or in some of them; null is "".

    Only those columns are read, and of them a few megabytes (or one page) at a time.

    Raises:
        DataError: the file is cut or damaged, the column is missing or holds no strings, or a document is
            not UTF-8.
        OSError: the file cannot be opened.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    columns, rows = columns_of(text_field), 0
    with path.open("rb") as source:
        try:
            # pages are read as they are needed (pre_buffer would hold a whole row group)
            with parquet.ParquetFile(
                source, pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True
            ) as file:
                check_columns(file.schema_arrow, text_field, name)
                for batch in _batches(file, columns):
                    yield from documents_of_table(batch, text_field, name, rows)
                    rows += batch.num_rows
                expected = file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # the disk's, not Arrow's
                raise
            reason = " ".join(str(error).split())
            raise DataError(
                f"{name} is not a whole Parquet file ({reason}); copy or write it again."
            ) from None
    if rows != expected:
        raise DataError(f"{name} has {rows} rows and says {expected}; copy or write it again.")


def _batches(file: Any, columns: list[str]) -> Iterator[Any]:
    """Record batches of about `_BATCH_BYTES`: a row may hold ten bytes or ten million."""
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        if metadata.num_rows:
            size = _column_bytes(metadata, columns)
            rows = _BATCH_BYTES * metadata.num_rows // max(size, 1)
            yield from file.iter_batches(
                batch_size=min(max(rows, 1), _MOST_ROWS),
                row_groups=[group],
                columns=columns,
                use_threads=False,
            )


def _column_bytes(group: Any, columns: list[str]) -> int:
    chunks = (group.column(i) for i in range(group.num_columns))
    within = tuple(f"{column}." for column in columns)  # of a list of objects, the leaves
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema in columns or chunk.path_in_schema.startswith(within)
    )

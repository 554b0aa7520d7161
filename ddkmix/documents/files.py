"""Documents from one local file, whatever its format."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ddkmix.documents.compression import COMPRESSIONS
from ddkmix.documents.jsonl import read_jsonl
from ddkmix.documents.parquet import read_parquet
from ddkmix.documents.records import TextField
from ddkmix.documents.tar import read_tar
from ddkmix.errors import DataError, StorageError

Format = Literal["tar", "jsonl", "parquet"]

_BARE: dict[str, Format] = {
    ".tar": "tar",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_SUFFIXES: dict[str, tuple[Format, str | None]] = {
    **{suffix: (format, None) for suffix, format in _BARE.items()},
    **{
        suffix + compressed: (format, compression)
        for suffix, format in _BARE.items()
        if format != "parquet"  # it compresses its pages itself
        for compressed, compression in COMPRESSIONS.items()
    },
    ".tgz": ("tar", "gzip"),
}
"""What a file's name says: its format, and how it is compressed."""


def format_of(name: str) -> Format:
    """The format that a file's name or URL tells.

    Raises:
        DataError: the suffix is none of those that can be read.
    """
    return _format_and_compression(name)[0]


def read_documents(path: Path, text_field: TextField, *, name: str | None = None) -> Iterator[str]:
    """The documents of a local file in order; a document without text is "".

    Args:
        path: a WebDataset tar, JSON lines or Parquet.
        text_field: what holds the text. In a tar a member's extension (`txt`, `text`) or `json.FIELD`;
            elsewhere the column, `FIELD` or `json.FIELD`. Dots go deeper: `json.a.b`. Or the fields of an
            example, in a tar of its member `json`.
        name: what messages call the file, and what tells its format, when `path` is a temporary copy.

    Raises:
        DataError: the name's suffix is unknown; or, while reading: the file is cut, damaged or followed by
            something else, a document is not UTF-8 or not a string, or the field is not there.
        StorageError: the file cannot be opened or read.
    """
    name = str(path) if name is None else name
    format, compression = _format_and_compression(name)
    return _read(path, text_field, name, format, compression)


def _read(
    path: Path, text_field: TextField, name: str, format: Format, compression: str | None
) -> Iterator[str]:
    try:
        if format == "tar":
            yield from read_tar(path, text_field, name=name, compression=compression)
        elif format == "jsonl":
            yield from read_jsonl(path, text_field, name=name, compression=compression)
        else:
            yield from read_parquet(path, text_field, name=name)
    except OSError as error:
        raise StorageError(
            f"{name} cannot be read ({error.strerror or error}); check it and its disk."
        ) from None


def _format_and_compression(name: str) -> tuple[Format, str | None]:
    bare = name.partition("?")[0].partition("#")[0] if "://" in name else name
    for suffix, found in sorted(_SUFFIXES.items(), key=lambda item: -len(item[0])):
        if bare.lower().endswith(suffix):
            return found
    raise DataError(
        f"{name}: no format of documents has this suffix; known: .tar .jsonl .ndjson .json, each also with "
        f"{' '.join(COMPRESSIONS)}; .tgz .parquet. Rename or convert it."
    )

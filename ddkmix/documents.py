"""Read the documents of a WebDataset tar, and notice when it is not whole."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from ddkmix.errors import DataError


def read_documents(path: Path, text_field: str) -> Iterator[str]:
    """The documents of a WebDataset tar in order.

    Args:
        path: the tar, uncompressed.
        text_field: member that holds the text: `txt`, `text`, or `json.FIELD`.

    Raises:
        DataError: the tar is truncated or damaged, a document is not UTF-8 or lacks the field, or the
            shard has none.
    """
    extension, _, field = text_field.partition(".")
    _check_complete(path)
    found = 0
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                if not member.isfile() or not member.name.endswith(f".{extension}"):
                    continue
                file = tar.extractfile(member)
                data = file.read() if file else b""
                if len(data) != member.size:
                    raise DataError(f"{path}: member {member.name} is cut short; copy the shard again.")
                found += 1
                yield _text(data, field, f"{path}: member {member.name}")
            _check_end(path, tar.offset)
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a whole tar file ({error}); copy or write it again.") from None
    if not found:
        raise DataError(
            f"{path} has no .{extension} member; set text_field in the card to the documents' extension."
        )


def _check_complete(path: Path) -> None:
    """A tar cut between two members reads without an error; only its end mark tells."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        size = file.tell()
        file.seek(max(size - 2 * tarfile.BLOCKSIZE, 0))
        tail = file.read()
    if size % tarfile.BLOCKSIZE or len(tail) < 2 * tarfile.BLOCKSIZE or tail.strip(b"\0"):
        raise DataError(
            f"{path} has no tar end mark after {size} bytes: it is truncated or not an uncompressed tar. "
            "Copy or write it again."
        )


def _check_end(path: Path, end: int) -> None:
    """tarfile takes a damaged header, or the end mark between two joined tars, for the end of the shard."""
    with path.open("rb") as file:
        file.seek(end)
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                raise DataError(
                    f"{path} goes on after its tar ends at byte {end}: a header is damaged or tars were "
                    "joined. Copy or write it again."
                )


def _text(data: bytes, field: str, where: str) -> str:
    try:
        text = data.decode("utf-8")
        if not field:
            return text
        value = json.loads(text)[field]
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}).") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(
            f"{where} is not JSON with a field {field!r}; correct the card's text_field."
        ) from None
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} is a {type(value).__name__}; a document is a string.")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise DataError(f"{where}: {field!r} has an unpaired surrogate; write the JSON as valid Unicode.")
    return value


def digest(text: str) -> bytes:
    """16 bytes that two documents share only when they are equal."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()

"""JSON lines: one object a line, the document in one of its fields or some of them."""

from collections.abc import Iterator
from pathlib import Path

from ddkmix.documents.compression import open_bytes, suffix_of_content
from ddkmix.documents.records import TextField, document_of_json
from ddkmix.errors import DataError


def read_jsonl(
    path: Path, text_field: TextField, *, name: str, compression: str | None = None
) -> Iterator[str]:
    """The documents of a file of JSON lines; blank lines are none, null is "".

    A file that is cut exactly between two lines is a whole file to any reader; cut anywhere else it is
    refused.

    Raises:
        DataError: a line is not a JSON object with the field, or its text is no text; the compressed
            stream is not whole; there is no line.
    """
    number = 0
    with open_bytes(path, name, compression) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                _check_first(line, name, compression)
            if not line.isspace():
                yield document_of_json(line, text_field, f"{name}: line {number}")
    if not number:
        raise DataError(f"{name} is empty; remove it or write it again.")


def _check_first(line: bytes, name: str, compression: str | None) -> None:
    """Say what a file is when its first bytes tell that it is something else."""
    suffix = suffix_of_content(line)
    if suffix:
        twice = "compressed twice" if compression else "compressed"
        raise DataError(f"{name} is {twice}; its content is {suffix}. Rename it so, or decompress it.")
    if line.lstrip()[:1] == b"[":
        raise DataError(
            f"{name}: line 1 begins a JSON array; write one object a line (jq -c '.[]' FILE does)."
        )

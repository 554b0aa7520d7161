"""Read the documents of a WebDataset tar, and notice when it is not whole.

WebDataset's rule, which we share: a sample is a run of members with one name up to the first dot of the
file name, and what follows that dot is the member's extension. `a/b.c.txt` is member `c.txt` of sample
`a/b`, and no `txt`.
"""

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from itertools import groupby, takewhile
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ddkmix.documents.compression import open_bytes
from ddkmix.documents.energon import IndexCheck, index_beside
from ddkmix.documents.records import SETTING, TextField, document_of_json
from ddkmix.documents.text import shown, text_of_bytes
from ddkmix.errors import DataError

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_METADATA = re.compile(r"__[^/]*__($|/)")
_MOST_EXTENSIONS_NAMED = 8
_READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    """A member that belongs to a sample."""

    sample: str
    extension: str
    header: tarfile.TarInfo


def read_tar(
    path: Path, text_field: TextField, *, name: str, compression: str | None = None
) -> Iterator[str]:
    """The documents of a WebDataset tar in order, one a sample; "" for a sample that has no text member.

    Where Megatron-Energon's index lies beside a plain tar, the tar is checked against it.

    Args:
        path: the tar.
        text_field: extension of the member that holds the text (`txt`, `text`), or `json.FIELD`; or the
            fields of the member `json` that hold an example.
        name: what messages call the tar.
        compression: `gzip`, `zstd`, `xz`, `bzip2` or None.

    Raises:
        DataError: the tar is truncated, damaged or followed by something else; its index is of another
            tar; a document is not UTF-8 or lacks the field; a text member is a link; or no sample has one.
        OSError: the file cannot be opened or read.
    """
    index = index_beside(path, name) if compression is None else None
    seen: set[str] = set()
    with whole_tar(path, name, compression) as tar:
        yield from _texts(tar, _members(tar, index), text_field, name, seen)
    if index:
        index.end(tar.offset)
    wanted = _extension_of(text_field)
    if wanted not in seen:
        others = ", ".join(f".{extension}" for extension in sorted(seen))
        only = f", only {others}" if others else ""
        raise DataError(f"{name} has no .{wanted} member{only}; {_advice(text_field)}.")


@contextmanager
def whole_tar(path: Path, name: str, compression: str | None = None) -> Iterator[tarfile.TarFile]:
    """A tar to be read from its first member to its last, which must be all that the file holds.

    Raises:
        DataError: the tar is truncated, damaged or followed by something else.
        OSError: the file cannot be opened or read.
    """
    if compression is None:
        _check_complete(path, name)
    with ExitStack() as stack:
        source = _Forward(stack.enter_context(open_bytes(path, name, compression)), compression is None)
        try:
            tar = stack.enter_context(_open_tar(source))
            yield tar
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise DataError(f"{name} is not a whole tar file ({error}); copy or write it again.") from None
        _check_end(source, tar.offset, name)


def read_document(
    path: Path,
    offsets: Int[np.ndarray, " N_plus_1"],
    i: int,
    text_field: TextField,
    *,
    name: str | None = None,
) -> str:
    """One document of a plain tar, found by its index (`read_tar_idx`) and read alone.

    Args:
        path: the tar.
        offsets: byte offset of each sample's first header, and of the end.
        i: which sample, from 0.
        text_field: as for `read_documents`.
        name: what messages call the tar.

    Raises:
        IndexError: there is no such sample.
        DataError: the index is not of this tar, or the document cannot be read.
    """
    if not 0 <= i < len(offsets) - 1:
        raise IndexError(f"sample {i} of {len(offsets) - 1}")
    name = str(path) if name is None else name
    start, end = int(offsets[i]), int(offsets[i + 1])
    try:
        with path.open("rb") as file, _open_tar(_Forward(file, True, start)) as tar:
            within = takewhile(lambda member: member.header.offset < end, _members(tar, None))
            texts = list(_texts(tar, within, text_field, name, set()))
    except (tarfile.TarError, ValueError, OverflowError):
        texts = []
    if len(texts) != 1:
        raise DataError(
            f"{name} has no sample between the bytes {start} and {end}: its index is of another tar. "
            "Prepare it again."
        )
    return texts[0]


def _texts(
    tar: tarfile.TarFile, members: Iterable[_Member], text_field: TextField, name: str, seen: set[str]
) -> Iterator[str]:
    """One text a sample; what extensions there are is noted in `seen`."""
    wanted = _extension_of(text_field)
    for sample, parts in groupby(members, key=lambda member: member.sample):
        text, almost = None, None
        for part in parts:
            if part.extension == wanted:
                if text is not None:  # two of one name: webdataset refuses them, both are documents
                    yield text
                text = _text(tar, part.header, text_field, name)
            elif part.extension.endswith(f".{wanted}"):
                almost = part
            if part.extension == wanted or len(seen) < _MOST_EXTENSIONS_NAMED:
                seen.add(part.extension)
        if text is None and almost:
            raise DataError(
                f"{name}: member {shown(almost.header.name)} is .{shown(almost.extension)} of sample "
                f"{shown(sample)}, which has no .{wanted}: an extension begins at the first dot of the "
                "name. Rename the members (dots to underscores)."
            )
        yield text or ""


def _members(tar: tarfile.TarFile, index: IndexCheck | None) -> Iterator[_Member]:
    """The members that WebDataset gathers into samples, less hidden files (`._0.txt`, as macOS adds them)."""
    indexed = None
    while (header := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # else it keeps one for every member of a large shard
        match = None if _METADATA.match(header.name) else _NAME.match(header.name)
        if match is None:
            continue
        if index and header.isreg() and match[1] != indexed:
            index.sample(header.offset)
            indexed = match[1]
        hidden = header.name.startswith("__MACOSX/") or header.name.rpartition("/")[2].startswith(".")
        if not hidden and (header.isreg() or header.issym() or header.islnk()):
            yield _Member(sample=match[1], extension=match[2].lower(), header=header)


def _text(tar: tarfile.TarFile, header: tarfile.TarInfo, text_field: TextField, name: str) -> str:
    where = f"{name}: member {shown(header.name)}"
    if not header.isreg():
        raise DataError(
            f"{where} is a link, which is not followed; write the shard with the file itself "
            "(tar --dereference --hard-dereference)."
        )
    data = _data(tar, header)
    if len(data) != header.size:
        raise DataError(f"{where} is cut short; copy the shard again.")
    if _is_json(text_field):
        return document_of_json(data, text_field, where)
    return text_of_bytes(data, where)


def _data(tar: tarfile.TarFile, header: tarfile.TarInfo) -> bytes:
    if header.issparse():
        file = tar.extractfile(header)
        return file.read() if file else b""
    # tarfile's own file object costs more than the reading of a short document
    source = tar.fileobj
    assert source is not None
    source.seek(header.offset_data)
    return source.read(header.size)


def _extension_of(text_field: TextField) -> str:
    if isinstance(text_field, str) and not _is_json(text_field):
        return text_field
    return "json"


def _is_json(text_field: TextField) -> bool:
    return not isinstance(text_field, str) or text_field.startswith("json.")


def _advice(text_field: TextField) -> str:
    if isinstance(text_field, str):
        return "set text_field in the card to the documents' extension"
    return f"{SETTING} in a card reads the fields of a .json member"


def _open_tar(source: "_Forward") -> tarfile.TarFile:
    return tarfile.open(fileobj=source, mode="r:")  # type: ignore[call-overload]


class _Forward:
    """A stream that goes forward only, so that plain and compressed tars are read and checked in one way."""

    def __init__(self, file: BufferedReader, seekable: bool, position: int = 0) -> None:
        self._file = file
        self._seekable = seekable
        self._position = position
        self.last = b""
        """What the last `read` gave."""
        file.seek(position) if position else None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer only at the end."""
        if size <= _READ_BYTES:
            self.last = self._file.read(size)
            self._position += len(self.last)
            return self.last
        # in pieces, or a header that lies about its member's size takes all memory
        pieces = []
        while size > 0 and (piece := self.read(min(size, _READ_BYTES))):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def tell(self) -> int:
        """Bytes before the next one."""
        return self._position

    def seek(self, position: int) -> None:
        """Go forward; to go back is what only a damaged header asks for."""
        if position < self._position:
            raise tarfile.ReadError(f"a header points back to byte {position}")
        if self._seekable:
            self._position = self._file.seek(position)
        while self._position < position and self.read(min(position - self._position, _READ_BYTES)):
            pass


def _check_complete(path: Path, name: str) -> None:
    """A tar cut between two members reads without an error; only its end mark tells."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 2 * tarfile.BLOCKSIZE, 0))
        tail = file.read()
    if size % tarfile.BLOCKSIZE or len(tail) < 2 * tarfile.BLOCKSIZE or tail.strip(b"\0"):
        raise DataError(
            f"{name} has no tar end mark after {size} bytes: it is truncated or not an uncompressed tar. "
            "Copy or write it again."
        )


def _check_end(source: _Forward, end: int, name: str) -> None:
    """tarfile takes a damaged header, or the end mark between two joined tars, for the end of the shard.

    Its last read was of the block that it took for the end mark; from there on all must be zeros.
    """
    block, size = source.last, source.tell()
    whole = size - len(block) == end
    while block:
        if not whole or block.strip(b"\0"):
            raise DataError(
                f"{name} goes on after its tar ends at byte {end}: a header is damaged or tars were "
                "joined. Copy or write it again."
            )
        block = source.read(_READ_BYTES)
    size = source.tell()
    if size % tarfile.BLOCKSIZE or size - end < 2 * tarfile.BLOCKSIZE:
        raise DataError(
            f"{name} has no tar end mark after {size} bytes: it is truncated. Copy or write it again."
        )

"""Where each packed row lies, and reading one row with one system call.

A packed shard is a WebDataset tar of `.npy` rows (any WebDataset reader opens it) with a small sidecar
index `<shard>.index.npz`: the byte offset of each row's tokens, how many of them are text, and how many
bytes of text they predict. One index per shard, never one database.
"""

import json
import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Int, UInt

from ddkmix.errors import DataError
from ddkmix.fingerprint import replacing

_OPEN_FILES = 64
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    RuntimeError,
    BadZipFile,
    zlib.error,
    LZMAError,
)
"""What numpy, zipfile and json raise on damaged files; a test flips bytes to find them."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShardIndex:
    """One packed shard."""

    location: str
    """The tar of rows: a path or a URL."""
    size: int
    """Its bytes."""
    sha256: str
    """Its SHA-256, hex."""
    offsets: Int[np.ndarray, " R"]
    """Byte offset of each row's first token."""
    num_tokens: Int[np.ndarray, " R"]
    """Tokens of text and separators in each row; the rest, at the end, is padding."""
    num_bytes: Int[np.ndarray, " R"]
    """UTF-8 bytes of the text that the row's predicted tokens (all but its first) cover."""
    crc32: UInt[np.ndarray, " R"]
    """CRC-32 of each row's bytes, checked whenever it is read."""
    seq_len: int
    dtype: str
    """numpy type of a stored token, little-endian ("<u2" or "<u4")."""
    report: dict[str, Any]
    """What packing the shard kept and dropped."""

    @property
    def num_rows(self) -> int:
        """Rows in the shard."""
        return len(self.offsets)

    @property
    def name(self) -> str:
        """The file name of the shard, which is a part of its rows' names."""
        return self.location.rsplit("/", 1)[-1]


def row_checksums(rows: UInt[np.ndarray, "R T"]) -> UInt[np.ndarray, " R"]:
    """CRC-32 of each row's bytes as they are stored."""
    return np.array([zlib.crc32(row.tobytes()) for row in rows], dtype=np.uint32)


def index_path(shard: Path) -> Path:
    """The sidecar of a packed shard."""
    return shard.with_name(shard.name + ".index.npz")


def write_index(index: ShardIndex) -> None:
    """Write the sidecar of a local shard; its presence says that the shard is complete."""
    meta = {
        "seq_len": index.seq_len,
        "dtype": index.dtype,
        "size": index.size,
        "sha256": index.sha256,
        "report": index.report,
    }
    with replacing(index_path(Path(index.location))) as file:
        np.savez(
            file,
            offsets=index.offsets,
            num_tokens=index.num_tokens,
            num_bytes=index.num_bytes,
            crc32=index.crc32,
            meta=np.array(json.dumps(meta)),
        )


def read_index(shard: Path) -> ShardIndex:
    """Read the sidecar of a local packed shard and check that the shard is the one it describes.

    Raises:
        DataError: the sidecar is damaged or the shard's size differs from the recorded one.
    """
    index = read_sidecar(index_path(shard), str(shard))
    try:
        size = shard.stat().st_size
    except OSError as error:
        raise DataError(
            f"{shard} cannot be read ({error.strerror}); delete its folder to pack again."
        ) from None
    if size != index.size:
        raise DataError(
            f"{shard} has {size} bytes but was packed with {index.size}; it is truncated or was "
            "changed. Delete its folder to pack again."
        )
    return index


def read_sidecar(sidecar: Path, location: str) -> ShardIndex:
    """Read the sidecar of the packed shard at `location`, without looking at the shard.

    Raises:
        DataError: the sidecar is damaged.
    """
    try:
        with sidecar.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            meta = json.loads(str(arrays["meta"]))
            return ShardIndex(
                location=location,
                size=meta["size"],
                sha256=meta["sha256"],
                offsets=arrays["offsets"],
                num_tokens=arrays["num_tokens"],
                num_bytes=arrays["num_bytes"],
                crc32=arrays["crc32"],
                seq_len=meta["seq_len"],
                dtype=meta["dtype"],
                report=meta["report"],
            )
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{sidecar} cannot be read ({reason}); delete its folder to pack again.") from None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DomainRows:
    """The packed rows of one split of one domain."""

    domain: str
    shards: tuple[ShardIndex, ...]
    fingerprint: str
    """Changes with the documents, the tokenizer and the packing, and with nothing else."""
    max_epochs: float | None = None
    """The card's limit."""
    prior: float | None = None
    """The card's share in the natural mixture."""

    @property
    def num_rows(self) -> int:
        """Rows over all shards."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding over all shards."""
        return int(sum(shard.num_tokens.sum() for shard in self.shards))

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""
        return self.shards[0].seq_len

    def name_of(self, shard: int, row: int) -> str:
        """The name of a row, the same under every mixture: `code/train-000003.tar#17`."""
        return f"{self.domain}/{self.shards[shard].name}#{row}"


class RowReader:
    """Reads rows of one `DomainRows`; holds at most 64 files open; can be sent to another process."""

    def __init__(self, rows: DomainRows) -> None:
        self.rows = rows
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.rows, "_files": OrderedDict()}

    def read(self, shard: int, row: int) -> UInt[np.ndarray, " T"]:
        """The `seq_len` tokens of one row, padding included.

        Raises:
            DataError: the shard cannot be read or ends before the row does.
        """
        index = self.rows.shards[shard]
        itemsize = np.dtype(index.dtype).itemsize
        try:
            data = os.pread(self._file(shard), index.seq_len * itemsize, int(index.offsets[row]))
        except OSError as error:
            raise DataError(f"{index.location} cannot be read ({error.strerror}).") from None
        if len(data) != index.seq_len * itemsize:
            raise DataError(
                f"{self.rows.name_of(shard, row)}: {len(data)} of {index.seq_len * itemsize} bytes at "
                f"offset {int(index.offsets[row])} of {index.location}; the shard was cut while in use."
            )
        return np.frombuffer(data, dtype=index.dtype)

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            path = self.rows.shards[shard].location
            try:
                self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DataError(f"{path} cannot be opened ({error.strerror}).") from None
        return self._files[shard]

    def close(self) -> None:
        """Close every file."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()

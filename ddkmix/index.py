"""Where each packed row lies, and reading one row with one system call.

A packed shard is a WebDataset tar of `.npy` rows (any WebDataset reader opens it) with a small sidecar
index `<shard>.index.npz`: the byte offset of each row's tokens, how many of them are text, and how many
bytes of text they predict. One index per shard, never one database.
"""

import json
import zlib
from dataclasses import dataclass, field, replace
from lzma import LZMAError
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Int, UInt

from ddkmix.errors import DataError
from ddkmix.fingerprint import replacing
from ddkmix.storage.location import file_name
from ddkmix.storage.spool import StoredShard

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
    """CRC-32 of the bytes of each row's `num_tokens` tokens, checked whenever it is read."""
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
        return file_name(self.location)

    @property
    def stored(self) -> StoredShard:
        """The shard as `storage` knows it."""
        return StoredShard(self.location, self.size, self.sha256)


def row_checksums(rows: UInt[np.ndarray, "R T"], num_tokens: Int[np.ndarray, " R"]) -> UInt[np.ndarray, " R"]:
    """CRC-32 of each row's stored bytes, without padding."""
    pairs = zip(rows, num_tokens.tolist(), strict=True)
    return np.array([zlib.crc32(row[:length].tobytes()) for row, length in pairs], dtype=np.uint32)


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
class RowPlaces:
    """The index of all shards in a row: entry `starts[shard] + row` is the row of that shard."""

    starts: Int[np.ndarray, " S"]
    offsets: Int[np.ndarray, " R"]
    num_tokens: Int[np.ndarray, " R"]
    crc32: UInt[np.ndarray, " R"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DomainRows:
    """The packed rows of one split of one domain."""

    domain: str
    shards: tuple[ShardIndex, ...]
    fingerprint: str
    """Changes with the documents, the tokenizer and the packing, and with nothing else."""
    padding_id: int = 0
    """Fills a row behind its tokens."""
    max_epochs: float | None = None
    """The card's limit."""
    prior: float | None = None
    """The card's share in the natural mixture."""
    places: RowPlaces = field(init=False, repr=False)
    """The indices of `shards` end to end; those are views of it, so that nothing is kept twice."""

    def __post_init__(self) -> None:
        counts = [shard.num_rows for shard in self.shards]
        ends = np.cumsum(counts, dtype=np.int64)
        places = RowPlaces(
            starts=ends - np.array(counts, dtype=np.int64),
            offsets=np.concatenate([shard.offsets for shard in self.shards]),
            num_tokens=np.concatenate([shard.num_tokens for shard in self.shards]),
            crc32=np.concatenate([shard.crc32 for shard in self.shards]),
        )
        views = tuple(
            replace(
                shard,
                offsets=places.offsets[start:end],
                num_tokens=places.num_tokens[start:end],
                crc32=places.crc32[start:end],
            )
            for shard, start, end in zip(self.shards, places.starts, ends, strict=True)
        )
        object.__setattr__(self, "shards", views)
        object.__setattr__(self, "places", places)

    @property
    def num_rows(self) -> int:
        """Rows over all shards."""
        return len(self.places.offsets)

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Rows of each shard."""
        return tuple(shard.num_rows for shard in self.shards)

    def tokens_at(self, shard: int, row: int) -> int:
        """Tokens of a row, without padding."""
        return int(self.shards[shard].num_tokens[row])

    @property
    def num_tokens(self) -> int:
        """Tokens without padding over all shards."""
        return int(self.places.num_tokens.sum())

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""
        return self.shards[0].seq_len

    @property
    def dtype(self) -> str:
        """numpy type of a stored token."""
        return self.shards[0].dtype

    def name_of(self, shard: int, row: int) -> str:
        """The name of a row, the same under every mixture: `code/train-000003.tar#17`."""
        return f"{self.domain}/{self.shards[shard].name}#{row}"

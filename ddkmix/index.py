"""Where each packed row lies, and reading one row with one system call.

A packed shard is a WebDataset tar of `.npy` rows (any WebDataset reader opens it) with a small sidecar
index `<shard>.index.npz`: the byte offset of each row's tokens, how many of them are text, how many bytes of
text they predict, and how many of them are a prompt, where rows are prompts and responses. One index per
shard, never one database.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from lzma import LZMAError
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Bool, Int, UInt

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

_PROMPTS = "num_prompt_tokens"


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
    """UTF-8 bytes of the text that the row's predicted tokens (all but its first, or its prompt) cover."""
    crc32: UInt[np.ndarray, " R"]
    """CRC-32 of the bytes of each row's `num_tokens` tokens, checked whenever it is read."""
    seq_len: int
    dtype: str
    """numpy type of a stored token, little-endian ("<u2" or "<u4")."""
    report: dict[str, Any]
    """What packing the shard kept and dropped."""
    num_prompt_tokens: Int[np.ndarray, " R"] | None = None
    """The first tokens of each row, which are given and not predicted; None where rows are text."""

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
    prompts: dict[str, Any] = {}
    if index.num_prompt_tokens is not None:
        prompts = {_PROMPTS: index.num_prompt_tokens}
    with replacing(index_path(Path(index.location))) as file:
        np.savez(
            file,
            offsets=index.offsets,
            num_tokens=index.num_tokens,
            num_bytes=index.num_bytes,
            crc32=index.crc32,
            meta=np.array(json.dumps(meta)),
            **prompts,
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
                num_prompt_tokens=arrays.get(_PROMPTS),
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
    num_prompt_tokens: Int[np.ndarray, " R"] | None = None
    """None where rows are text."""


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
    end_of_turn_id: int | None = None
    """The last token of a response; None where rows are text."""
    kept: Bool[np.ndarray, " R"] | None = None
    """Which rows of all shards, end to end, are served; None where all are. Counts are of these, places and
    names are those of the shard: whoever knows a row's place may read it, served or not."""
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
            num_prompt_tokens=_end_to_end([shard.num_prompt_tokens for shard in self.shards]),
        )
        prompts = places.num_prompt_tokens
        views = tuple(
            replace(
                shard,
                offsets=places.offsets[start:end],
                num_tokens=places.num_tokens[start:end],
                crc32=places.crc32[start:end],
                num_prompt_tokens=None if prompts is None else prompts[start:end],
            )
            for shard, start, end in zip(self.shards, places.starts, ends, strict=True)
        )
        object.__setattr__(self, "shards", views)
        object.__setattr__(self, "places", places)

    @property
    def num_rows(self) -> int:
        """Rows over all shards."""
        return len(self.places.offsets) if self.kept is None else int(self.kept.sum())

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Rows of each shard."""
        if self.kept is None:
            return tuple(shard.num_rows for shard in self.shards)
        before = np.concatenate([[0], np.cumsum(self.kept)])
        ends = [*self.places.starts[1:], len(self.kept)]
        return tuple((before[ends] - before[self.places.starts]).tolist())

    @property
    def kept_rows(self) -> Int[np.ndarray, " n"] | None:
        """Number in its shard of each row that is served, shard after shard; None where all are."""
        if self.kept is None:
            return None
        served = np.flatnonzero(self.kept)
        return served - np.repeat(self.places.starts, self.shard_rows)

    def tokens_at(self, shard: int, row: int) -> int:
        """Tokens of a row, without padding."""
        return int(self.shards[shard].num_tokens[row])

    @property
    def are_prompts(self) -> bool:
        """Whether each row is a prompt and its response; else it is text."""
        return self.places.num_prompt_tokens is not None

    def prompt_tokens(
        self, shards: Int[np.ndarray, " n"], rows: Int[np.ndarray, " n"]
    ) -> Int[np.ndarray, " n"]:
        """Tokens of each row's prompt; 0 of text."""
        places, prompts = self.places.starts[shards] + rows, self.places.num_prompt_tokens
        return np.zeros(len(places), dtype=np.int64) if prompts is None else prompts[places]

    def prompt_tokens_at(self, shard: int, row: int) -> int:
        """Tokens of a row's prompt; 0 of text."""
        prompts = self.shards[shard].num_prompt_tokens
        return 0 if prompts is None else int(prompts[row])

    def counted_tokens_at(self, shard: int, row: int) -> int:
        """What a row counts where weights are shares of tokens: its tokens without padding, of a prompt and
        its response those of the response."""
        return self.tokens_at(shard, row) - self.prompt_tokens_at(shard, row)

    @property
    def counted_tokens(self) -> int:
        """`counted_tokens_at` over all rows."""
        prompts = self.places.num_prompt_tokens
        return self.num_tokens - (0 if prompts is None else int(prompts.sum(where=self._served)))

    @property
    def num_tokens(self) -> int:
        """Tokens without padding over all shards."""
        return int(self.places.num_tokens.sum(where=self._served))

    @property
    def _served(self) -> Any:
        return True if self.kept is None else self.kept

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


def _end_to_end(prompts: Sequence[Int[np.ndarray, " _"] | None]) -> Int[np.ndarray, " R"] | None:
    found = [one for one in prompts if one is not None]
    if len(found) not in (0, len(prompts)):
        raise DataError("some shards of a domain hold prompts and others text; pack them again.")
    return np.concatenate(found) if found else None

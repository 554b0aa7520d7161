"""Packed rows written by hand, so that a test knows every token of every row."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ddkmix.index import DomainRows, ShardIndex, row_checksums, write_index


def write_shard_of_rows(
    path: Path, rows: Sequence[Sequence[int]], *, seq_len: int, dtype: str = "<u2", padding: int = 0
) -> ShardIndex:
    """A shard without tar headers, and its sidecar; a row of n tokens covers 3 (n - 1) bytes of text."""
    tokens = np.full((len(rows), seq_len), padding, dtype=dtype)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tokens.tobytes())
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    index = ShardIndex(
        location=str(path),
        size=path.stat().st_size,
        sha256=sha256(tokens.tobytes()).hexdigest(),
        offsets=np.arange(len(rows), dtype=np.int64) * seq_len * tokens.itemsize,
        num_tokens=lengths,
        num_bytes=3 * np.maximum(lengths - 1, 0),
        crc32=row_checksums(tokens, lengths),
        seq_len=seq_len,
        dtype=dtype,
        report={},
    )
    write_index(index)
    return index


def write_rows(
    folder: Path,
    domain: str,
    shards: Sequence[Sequence[Sequence[int]]],
    *,
    seq_len: int,
    dtype: str = "<u2",
    padding: int = 0,
    fingerprint: str = "f",
    **options: Any,
) -> DomainRows:
    """Packed rows from lists of lists of tokens, one list per shard; `options` are those of DomainRows."""
    return DomainRows(
        domain=domain,
        shards=tuple(
            write_shard_of_rows(
                folder / domain / f"{i}.tar", rows, seq_len=seq_len, dtype=dtype, padding=padding
            )
            for i, rows in enumerate(shards)
        ),
        fingerprint=fingerprint,
        padding_id=padding,
        **options,
    )


def random_rows(
    folder: Path,
    domain: str = "code",
    *,
    shards: Sequence[int] = (5, 4),
    seed: int = 0,
    shortest: int = 2,
    seq_len: int = 6,
    **options: Any,
) -> DomainRows:
    """Rows of random tokens from 1 to 299 and of random lengths, `shards` of them in each shard."""
    generator = np.random.default_rng(seed)

    def row() -> list[int]:
        return generator.integers(1, 300, generator.integers(shortest, seq_len + 1)).tolist()  # type: ignore[no-any-return]

    rows = [[row() for _ in range(count)] for count in shards]
    return write_rows(folder, domain, rows, seq_len=seq_len, **options)


def unread_rows(
    domain: str, lengths: Sequence[Sequence[int]], *, seq_len: int = 8, fingerprint: str = "f", **options: Any
) -> DomainRows:
    """Rows of these lengths that have no files, one list per shard, for tests that only plan."""
    shards = []
    for i, tokens in enumerate(lengths):
        num_tokens = np.array(tokens, dtype=np.int64)
        index = ShardIndex(
            location=f"/nowhere/{domain}-{i}.tar",
            size=len(tokens) * seq_len * 2,
            sha256="",
            offsets=np.arange(len(tokens), dtype=np.int64) * seq_len * 2,
            num_tokens=num_tokens,
            num_bytes=num_tokens,
            crc32=np.zeros(len(tokens), dtype=np.uint32),
            seq_len=seq_len,
            dtype="<u2",
            report={},
        )
        shards.append(index)
    return DomainRows(domain=domain, shards=tuple(shards), fingerprint=fingerprint, **options)


def numbered_rows(
    folder: Path,
    domain: str,
    count: int,
    *,
    length: int,
    seq_len: int,
    first: int = 1,
    per_shard: int = 4,
    **options: Any,
) -> DomainRows:
    """Rows of one length whose tokens are `first` + their number in the domain: each names itself."""
    rows = [[first + i] * length for i in range(count)]
    shards = [rows[start : start + per_shard] for start in range(0, count, per_shard)]
    return write_rows(folder, domain, shards, seq_len=seq_len, **options)


def damage(rows: DomainRows, shard: int, row: int, *, byte: int = 0, flip: int = 0xFF) -> None:
    """Flip bits of one byte of a row, counted from its first token."""
    index = rows.shards[shard]
    path, at = Path(index.location), int(index.offsets[row]) + byte
    content = bytearray(path.read_bytes())
    content[at] ^= flip
    path.write_bytes(content)

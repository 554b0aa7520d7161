"""Digests of a shard's documents, kept beside its rows: which documents are held out, which come again.

`<folder>/.digests/<split>/<shard>.npy` holds 16 bytes for each document that was kept, in order. They are a
by-product of packing, remade when they are missing, and not published.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt

from ddkmix.fingerprint import replacing

_MOST_AT_ONCE = 1 << 27
"""Documents whose digests are sorted together: a gigabyte."""


def digests_path(rows: Path) -> Path:
    """Where the digests of the documents in `<folder>/<split>/<shard>` are."""
    return rows.parent.parent / ".digests" / rows.parent.name / f"{rows.name}.npy"


def write_digests(rows: Path, digests: Sequence[bytes]) -> None:
    """Keep the digests (16 bytes each) of the documents of one row shard."""
    array = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
    with replacing(digests_path(rows)) as file:
        np.save(file, array, allow_pickle=False)


def read_digests(rows: Path) -> UInt[np.ndarray, "n 2"] | None:
    """The digests of one row shard's documents; None when they are not there or are damaged."""
    try:
        array = np.load(digests_path(rows), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.ndim == 2 and array.dtype == np.dtype("<u8") else None


def digest_set(shards: Iterable[Path]) -> frozenset[bytes]:
    """All digests of some row shards, to look documents up in.

    Their files must be there: whoever asks has made them.
    """
    found: set[bytes] = set()
    for rows in shards:
        array = read_digests(rows)
        assert array is not None, rows
        data = array.tobytes()
        found.update(data[i : i + 16] for i in range(0, len(data), 16))
    return frozenset(found)


def count_repeated(shards: Sequence[Path]) -> int | None:
    """Documents of a split that stand earlier in it, word for word; None when digests are missing.

    Eight bytes of a digest are compared: among a billion documents, a false repeat has a chance of 3 %.
    """
    arrays = [read_digests(rows) for rows in shards]
    firsts = [array[:, 0] for array in arrays if array is not None]
    if len(firsts) < len(shards):
        return None
    total = sum(len(first) for first in firsts)
    passes = -(-total // _MOST_AT_ONCE)
    distinct = 0
    for part in range(passes):
        distinct += len(np.unique(np.concatenate([f[f % np.uint64(passes) == part] for f in firsts])))
    return total - distinct

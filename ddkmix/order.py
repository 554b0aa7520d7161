"""Order as a pure function: which row of a domain is its j-th.

    epoch = j // rows;  shards permuted per epoch;  rows permuted inside blocks of that shard order

Every permutation comes from (run seed, domain *name*, epoch), so adding a domain or a rank changes nobody
else's order, and no shuffle buffer exists that would have to be saved. Permutations are an argsort of raw
Philox output because numpy promises that stream for ever, which it does not for `Generator.permutation`.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DomainOrder:
    """What the order of one domain depends on."""

    domain: str
    shard_rows: tuple[int, ...]
    """Rows of each shard."""
    seed: int
    """The run's seed."""
    block_rows: int = 8192
    """Rows are permuted inside blocks of this many."""

    @property
    def num_rows(self) -> int:
        """Rows in an epoch."""
        return sum(self.shard_rows)


def locate(order: DomainOrder, j: int) -> tuple[int, int]:
    """The place (shard, row in shard) of the domain's j-th row, counted from 0 over all epochs."""
    epoch, position = divmod(j, order.num_rows)
    block, offset = divmod(position, order.block_rows)
    place = block * order.block_rows + int(_block(order, epoch, block)[offset])
    shards, starts = _shards(order, epoch)
    i = int(np.searchsorted(starts, place, side="right")) - 1
    return int(shards[i]), place - int(starts[i])


# A reader walks through one block of each domain at a time; a few dozen arrays serve any real mixture.
@lru_cache(maxsize=256)
def _shards(order: DomainOrder, epoch: int) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
    """Shards in the order of this epoch, and the position of each one's first row."""
    shards = _permutation(len(order.shard_rows), order.seed, order.domain, epoch, "shards")
    sizes = np.array(order.shard_rows, dtype=np.int64)[shards]
    return shards, np.cumsum(sizes) - sizes


@lru_cache(maxsize=256)
def _block(order: DomainOrder, epoch: int, block: int) -> Int[np.ndarray, " n"]:
    size = min(order.block_rows, order.num_rows - block * order.block_rows)
    return _permutation(size, order.seed, order.domain, epoch, f"block {block}")


def _permutation(size: int, *key: object) -> Int[np.ndarray, " n"]:
    """A permutation of range(size) that depends on `key` alone, on every machine and numpy version."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    generator = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))
    permutation: Int[np.ndarray, " n"] = np.argsort(generator.random_raw(size), kind="stable")
    return permutation

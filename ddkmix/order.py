"""Order as a pure function: which row of a domain is its j-th.

    epoch = j // rows;  shards permuted per epoch;  rows permuted inside blocks of that shard order

Where only some rows of a shard are served (`kept_rows`), they are counted among themselves up to here, and
get their number in the shard at the very end: a row has the same place and name under every selection.

Every permutation comes from (run seed, domain *name*, epoch), so adding a domain or a rank changes nobody
else's order, and no shuffle buffer exists that would have to be saved. Permutations are an argsort of raw
Philox output because numpy promises that stream for ever, which it does not for `Generator.permutation`.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

_KEPT_BLOCKS = 4
"""Permutations kept per domain: the present block, the next, and both sides of an epoch's end."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DomainOrder:
    """What the order of one domain depends on."""

    domain: str
    shard_rows: tuple[int, ...]
    """Rows of each shard."""
    seed: int
    """The run's seed."""
    block_rows: int = 8192
    """Rows are permuted inside blocks of this many."""
    kept_rows: Int[np.ndarray, " R"] | None = None
    """Number in its shard of each row that is served, shard after shard; None where all are. `shard_rows`
    counts these alone."""
    num_rows: int = field(init=False)
    """Rows in an epoch."""
    _memory: OrderedDict[Any, Any] = field(init=False, repr=False, default_factory=OrderedDict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_rows", sum(self.shard_rows))
        assert self.kept_rows is None or len(self.kept_rows) == self.num_rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": OrderedDict()}


def locate(order: DomainOrder, j: int) -> tuple[int, int]:
    """The place (shard, row in shard) of the domain's j-th row, counted from 0 over all epochs."""
    epoch, position = divmod(j, order.num_rows)
    block, offset = divmod(position, order.block_rows)
    shards, rows = _block(order, epoch, block)
    return int(shards[offset]), int(rows[offset])


def locate_rows(
    order: DomainOrder, numbers: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The places (shards, rows in their shard) of many rows; the same as `locate` of each, but fast."""
    if not len(numbers):
        return numbers, numbers
    wanted = numbers.tolist()
    first, last = min(wanted), max(wanted)  # numpy's own cost more for the few rows of a domain in a step
    epoch, position = divmod(first, order.num_rows)
    block, offset = divmod(position, order.block_rows)
    if offset + last - first < min(order.block_rows, order.num_rows - block * order.block_rows):
        shards, rows = _block(order, epoch, block)
        where = numbers - (first - offset)
        return shards[where], rows[where]
    places = np.array([locate(order, j) for j in wanted], dtype=np.int64).reshape(-1, 2)
    return places[:, 0], places[:, 1]


def place_of(order: DomainOrder, number: int) -> tuple[int, int]:
    """The place (shard, row in shard) of the domain's n-th row in the order of the shards, from 0."""
    starts = np.cumsum(order.shard_rows) - order.shard_rows
    shard = int(np.searchsorted(starts, number, side="right")) - 1
    row = number - starts[shard] if order.kept_rows is None else order.kept_rows[number]
    return shard, int(row)


def shards_from(order: DomainOrder, j: int) -> list[int]:
    """The shards of the rows from j to the end of the next block, in the order of their first use."""
    used: dict[int, None] = {}
    for _ in range(2):
        epoch, position = divmod(j, order.num_rows)
        block, offset = divmod(position, order.block_rows)
        shards, _ = _block(order, epoch, block)
        used.update(dict.fromkeys(shards[offset:].tolist()))
        j += len(shards) - offset
    return list(used)


def _block(order: DomainOrder, epoch: int, block: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Shard, and row in it, of every row of a block, in the order in which they are served."""
    return _remembered(order, ("block", epoch, block), lambda: _permuted_block(order, epoch, block))


def _permuted_block(
    order: DomainOrder, epoch: int, block: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    start = block * order.block_rows
    size = min(order.block_rows, order.num_rows - start)
    places = start + _permutation(size, order.seed, order.domain, epoch, f"block {block}")
    shards, starts = _remembered(order, ("shards", epoch), lambda: _permuted_shards(order, epoch))
    i = np.searchsorted(starts, places, side="right") - 1
    rows = places - starts[i]
    if order.kept_rows is not None:
        before = np.cumsum(order.shard_rows) - order.shard_rows
        rows = order.kept_rows[before[shards[i]] + rows]
    return shards[i].astype(np.int32), rows.astype(np.int32)


def _permuted_shards(order: DomainOrder, epoch: int) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
    """Shards in the order of this epoch, and the position of each one's first row."""
    shards = _permutation(len(order.shard_rows), order.seed, order.domain, epoch, "shards")
    sizes = np.array(order.shard_rows, dtype=np.int64)[shards]
    return shards, np.cumsum(sizes) - sizes


def _remembered(order: DomainOrder, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    memory = order._memory
    if key in memory:
        memory.move_to_end(key)
        return memory[key]
    memory[key] = value = make()
    while len(memory) > _KEPT_BLOCKS:
        memory.popitem(last=False)
    return value


def _permutation(size: int, *key: object) -> Int[np.ndarray, " n"]:
    """A permutation of range(size) that depends on `key` alone, on every machine and numpy version."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    generator = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))
    permutation: Int[np.ndarray, " n"] = np.argsort(generator.random_raw(size), kind="stable")
    return permutation

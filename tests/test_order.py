"""Order: which row of a domain is its j-th."""

import pickle
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix import order as module
from ddkmix.order import DomainOrder, locate, locate_rows, shards_from

Locate = Callable[[DomainOrder, int], tuple[int, int]]


def order_of(*shard_rows: int, domain: str = "code", seed: int = 0, block_rows: int = 4) -> DomainOrder:
    """An order over a few small shards."""
    return DomainOrder(domain=domain, shard_rows=shard_rows, seed=seed, block_rows=block_rows)


def epoch_of(order: DomainOrder, epoch: int, locate: Locate = locate) -> list[tuple[int, int]]:
    """The places of one epoch in order."""
    return [locate(order, epoch * order.num_rows + i) for i in range(order.num_rows)]


def check_serves_every_row_once(order: DomainOrder, epoch: int, locate: Locate = locate) -> None:
    """The property of an epoch: it is a permutation of all (shard, row)."""
    expected = [(shard, row) for shard, rows in enumerate(order.shard_rows) for row in range(rows)]
    assert expected == sorted(epoch_of(order, epoch, locate))


shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(shard_rows=shard_sizes, block_rows=st.integers(1, 40), epoch=st.integers(0, 10**6), seed=st.integers())
def test_an_epoch_serves_every_row_exactly_once(
    shard_rows: list[int], block_rows: int, epoch: int, seed: int
) -> None:
    """Whatever the shards, the block size, the epoch and the seed: no row is left out, none comes twice."""
    check_serves_every_row_once(order_of(*shard_rows, block_rows=block_rows, seed=seed), epoch)


def drawn_with_replacement(order: DomainOrder, j: int) -> tuple[int, int]:
    """A saboteur: each row is drawn afresh, as samplers with replacement do."""
    return locate(order, (j * j) % order.num_rows)


def in_the_first_epoch_only(order: DomainOrder, j: int) -> tuple[int, int]:
    """A saboteur: its last block reaches into the next epoch."""
    return locate(order, j + 1)


@pytest.mark.parametrize("sabotaged", [drawn_with_replacement, in_the_first_epoch_only])
def test_the_epoch_check_notices_a_row_that_is_missing(sabotaged: Locate) -> None:
    """The property above fails for orders that repeat or skip a row."""
    with pytest.raises(AssertionError):
        check_serves_every_row_once(order_of(3, 5, 2), epoch=0, locate=sabotaged)


def test_order_never_changes() -> None:
    """The permutation is part of the format: runs resume and logits are looked up under it.

    If these numbers change, a run that was interrupted under the older version goes on with other rows.
    """
    order = order_of(3, 5, 2, domain="code", seed=7, block_rows=4)
    first = [(1, 0), (1, 3), (1, 2), (1, 1), (1, 4), (2, 1), (2, 0), (0, 0), (0, 2), (0, 1)]
    second = [(1, 0), (0, 2), (0, 1), (0, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 0)]
    assert first == epoch_of(order, 0)
    assert second == epoch_of(order, 1)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(order_of(20, 20, seed=1), id="seed"),
        pytest.param(order_of(20, 20, domain="math"), id="name"),
        pytest.param(order_of(20, 20, block_rows=40), id="block size"),
    ],
)
def test_order_depends_on_seed_name_and_block_size(other: DomainOrder) -> None:
    """Two orders that differ in one of these serve the same rows in another order."""
    assert epoch_of(order_of(20, 20), 0) != epoch_of(other, 0)


def test_epochs_differ() -> None:
    """No two of the first ten epochs have the same order."""
    order = order_of(20, 20)
    assert 10 == len({tuple(epoch_of(order, epoch)) for epoch in range(10)})


def test_order_is_a_pure_function() -> None:
    """Neither the rows asked for before nor other domains' orders change where the j-th row is."""
    expected = [locate(order_of(7, 9, 4), j) for j in range(60)]
    order = order_of(7, 9, 4)
    actual = {}
    for j in [59, 0, 31, 30, 1, *range(60)]:
        locate(order_of(5, 5, domain="other"), j)
        actual[j] = locate(order, j)
    assert expected == [actual[j] for j in range(60)]


def test_rows_are_permuted_inside_blocks_of_one_shard_order() -> None:
    """With blocks as long as shards, a reader has one shard open at a time, and leaves it for good."""
    shards = [shard for shard, _ in epoch_of(order_of(4, 4, 4, 4, 4), 3)]
    assert 4 == sum(left != right for left, right in pairwise(shards))


@pytest.mark.parametrize("block_rows", [1, 3, 8])
def test_blocks_are_local(block_rows: int) -> None:
    """Block b of an epoch holds exactly the rows at places b * block_rows.. of the shard order."""
    order = order_of(10, 6, 8, block_rows=block_rows)
    places = epoch_of(order, 0)
    shard_order = list(dict.fromkeys(shard for shard, _ in epoch_of(order_of(10, 6, 8, block_rows=1), 0)))
    unshuffled = [(shard, row) for shard in shard_order for row in range(order.shard_rows[shard])]
    for start in range(0, 24, block_rows):
        block = slice(start, start + block_rows)
        assert sorted(unshuffled[block]) == sorted(places[block])


def test_blocks_mix_neighbouring_shards() -> None:
    """A block that spans two shards interleaves their rows."""
    shards = [shard for shard, _ in epoch_of(order_of(8, 8, block_rows=16), 0)]
    assert sum(left != right for left, right in pairwise(shards)) > 1


def test_every_row_is_reachable_first() -> None:
    """Over many epochs each of five rows comes first about equally often (200 of 1000 expected)."""
    order = order_of(2, 3, block_rows=8)
    first = [locate(order, epoch * 5) for epoch in range(1000)]
    counts = [first.count(place) for place in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]]
    assert 1000 == sum(counts)
    assert min(counts) > 150
    assert max(counts) < 250


def test_rows_far_into_a_run_are_found() -> None:
    """A j of many trillions is still exact."""
    order = order_of(3, 5, 2)
    check_serves_every_row_once(order, 10**15)
    assert locate(order, 10**16 + 3) == epoch_of(order, 10**15)[3]


# --- many rows at once ------------------------------------------------------------------------------


def located(order: DomainOrder, numbers: list[int]) -> list[tuple[int, int]]:
    """The places of many rows as pairs."""
    shards, rows = locate_rows(order, np.array(numbers, dtype=np.int64))
    return list(zip(shards.tolist(), rows.tolist(), strict=True))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    shard_rows=shard_sizes,
    block_rows=st.integers(1, 12),
    first=st.integers(0, 200) | st.just(10**15),
    offsets=st.lists(st.integers(0, 40), max_size=20),
)
def test_many_rows_are_where_each_of_them_is(
    shard_rows: list[int], block_rows: int, first: int, offsets: list[int]
) -> None:
    """Any numbers: none, in any order, repeated, over the ends of blocks and epochs."""
    order = order_of(*shard_rows, block_rows=block_rows)
    numbers = [first + offset for offset in offsets]
    assert [locate(order, j) for j in numbers] == located(order, numbers)


@pytest.mark.parametrize("first", [0, 8, 12, 24, 3 * 20 + 8, 20 * 10**12 + 12])
def test_rows_of_one_block_are_looked_up_at_once(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """Also far from the first block: one by one would take a second for a large batch."""
    order = order_of(12, 8, block_rows=4)
    expected = [locate(order, j) for j in range(first, first + 4)]

    def one_by_one(*_: object) -> None:
        raise AssertionError("located one by one")

    monkeypatch.setattr(module, "locate", one_by_one)
    assert expected == located(order, list(range(first, first + 4)))
    with pytest.raises(AssertionError, match="one by one"):
        located(order, list(range(first, first + 5)))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(shard_rows=shard_sizes, block_rows=st.integers(1, 12), j=st.integers(0, 100))
def test_the_next_shards_are_those_of_the_next_rows(shard_rows: list[int], block_rows: int, j: int) -> None:
    """Exactly the shards of the rest of this block and of the next, in the order of their first row."""
    order = order_of(*shard_rows, block_rows=block_rows)
    starts = [
        epoch * order.num_rows + start
        for epoch in range(j // order.num_rows + 3)
        for start in range(0, order.num_rows, block_rows)
    ]
    end = [start for start in starts if start > j][1]
    expected = dict.fromkeys(locate(order, i)[0] for i in range(j, end))
    assert list(expected) == shards_from(order, j)


def test_empty_shards_are_never_served() -> None:
    """First, in the middle and last: they have a place in the list and no rows."""
    order = order_of(0, 3, 0, 0, 4, 0)
    for epoch in range(20):
        check_serves_every_row_once(order, epoch)
        assert {1, 4} == {shard for shard, _ in epoch_of(order, epoch)}
        assert set(shards_from(order, epoch * 7)) <= {1, 4}


def test_only_a_few_permutations_are_kept() -> None:
    """Memory is bounded however far a run goes, and what was forgotten comes back the same."""
    order = order_of(20, 20, block_rows=4)
    expected = [locate(order, j) for j in range(400)]
    assert len(order._memory) <= 4
    assert expected == [locate(order, j) for j in range(400)]


def test_an_order_travels_without_its_permutations() -> None:
    """Workers get a few numbers and make their own; the places are the same."""
    order = order_of(5000, 5000, block_rows=10**6)
    before = len(pickle.dumps(order))
    expected = [locate(order, j) for j in range(50)]
    assert len(order._memory) > 0
    assert before == len(pickle.dumps(order))
    copy = pickle.loads(pickle.dumps(order))
    assert 0 == len(copy._memory)
    assert expected == [locate(copy, j) for j in range(50)]

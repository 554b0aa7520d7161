"""Fewer rows of a domain under the planner: its promises hold for those that are kept, by their old names."""

import json
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.errors import DataError
from ddkmix.index import DomainRows
from ddkmix.loader import DomainMixture
from ddkmix.order import DomainOrder, locate, locate_rows, place_of, shards_from
from ddkmix.provenance import ShardRecord, as_text, from_text
from ddkmix.selected import decide, keeping, predicted_tokens, to_be_kept
from ddkmix.selection import DifferenceSelection
from ddkmix.stream import describe_stream
from tests.hand_made import numbered_rows, random_rows, unread_rows

SETTINGS = settings(deadline=None, derandomize=True, max_examples=100)
Place = tuple[int, int]

masks = st.lists(st.lists(st.booleans(), max_size=7), min_size=1, max_size=5).filter(
    lambda shards: any(any(shard) for shard in shards)
)


def order_of(mask: Sequence[Sequence[bool]], **options: Any) -> DomainOrder:
    """The order over the rows that a mask keeps, as a stream makes it."""
    rows = unread_rows("code", [[4] * len(shard) for shard in mask])
    rows = keeping(rows, np.array([kept for shard in mask for kept in shard], dtype=np.bool_))
    return describe_stream([rows], batch_rows=1, **options).orders[0]


def kept_places(mask: Sequence[Sequence[bool]]) -> list[Place]:
    """(shard, row) of the rows that a mask keeps."""
    return [(s, r) for s, shard in enumerate(mask) for r, kept in enumerate(shard) if kept]


def check_an_epoch(
    mask: Sequence[Sequence[bool]],
    order: DomainOrder,
    epoch: int,
    where: Callable[[DomainOrder, int], Place] = locate,
) -> None:
    """Every kept row once, no dropped row ever, by the numbers that rows have in their shards."""
    places = [where(order, epoch * order.num_rows + i) for i in range(order.num_rows)]
    assert kept_places(mask) == sorted(places)


@SETTINGS
@given(mask=masks, seed=st.integers(0, 9), block_rows=st.integers(1, 12), epoch=st.integers(0, 10**6))
def test_an_epoch_is_every_kept_row_once(
    mask: list[list[bool]], seed: int, block_rows: int, epoch: int
) -> None:
    """Whatever is kept: also shards of which nothing is left, and one row of all."""
    order = order_of(mask, seed=seed, block_rows=block_rows)
    check_an_epoch(mask, order, epoch)
    numbers = np.arange(order.num_rows * 3)
    expected = [locate(order, j) for j in numbers.tolist()]
    for part in np.split(numbers, [order.num_rows // 2, order.num_rows]):
        shards, rows = locate_rows(order, part)
        assert [expected[j] for j in part.tolist()] == list(zip(shards.tolist(), rows.tolist(), strict=True))
    assert kept_places(mask) == [place_of(order, number) for number in range(order.num_rows)]
    assert set(shards_from(order, 0)) <= {shard for shard, _ in kept_places(mask)}


def numbered_among_the_kept(order: DomainOrder, j: int) -> Place:
    """A saboteur: the row's number among the kept ones, which is another row's in the shard."""
    return locate(replace(order, kept_rows=None), j)


def off_by_a_shard(order: DomainOrder, j: int) -> Place:
    """A saboteur: numbers looked up as if shards were in the order of the epoch."""
    assert order.kept_rows is not None
    shard, row = locate(replace(order, kept_rows=None), j)
    return shard, int(order.kept_rows[row])


@pytest.mark.parametrize("sabotaged", [numbered_among_the_kept, off_by_a_shard])
def test_the_check_notices_other_rows(sabotaged: Callable[[DomainOrder, int], Place]) -> None:
    """The property above fails for orders that forget the numbers of the rows."""
    mask = [[False, True, True], [True, False, True]]
    with pytest.raises(AssertionError):
        check_an_epoch(mask, order_of(mask), 0, sabotaged)


def test_all_rows_kept_are_the_domain_itself() -> None:
    """Nothing changes, so a run of all rows is the run without a selection; fewer are other data, and which
    ones matters."""
    rows = unread_rows("code", [[4, 4], [4]])
    assert keeping(rows, np.ones(3, dtype=np.bool_)) is rows
    assert (None, (2, 1), 12) == (rows.kept_rows, rows.shard_rows, rows.num_tokens)
    first, second = (keeping(rows, np.array(bits)) for bits in ([True, False, True], [False, True, True]))
    assert 3 == len({rows.fingerprint, first.fingerprint, second.fingerprint})
    assert first.fingerprint == keeping(rows, np.array([True, False, True])).fingerprint
    assert (2, (1, 1), 8) == (first.num_rows, first.shard_rows, first.num_tokens)


def test_counts_are_of_the_kept_rows() -> None:
    """Tokens, limits and natural weights; a row's own size and name are those of its place in the shard."""
    code = keeping(unread_rows("code", [[3, 8], [5, 1]]), np.array([False, True, True, False]))
    stream = describe_stream(
        [replace(code, max_epochs=1.5), unread_rows("math", [[8] * 6])], batch_rows=4, count="tokens"
    )
    assert (2, 6) == stream.settings.num_rows
    assert (3, None) == stream.settings.cap_rows
    assert [0.25, 0.75] == stream.natural_weights.tolist()
    assert 13 == code.counted_tokens
    assert stream.tokens_of is not None
    assert {8, 5} == {stream.tokens_of(0, j) for j in range(2)}
    names = [code.name_of(*locate(stream.orders[0], j)) for j in range(2)]
    assert {"code/code-0.tar#1", "code/code-1.tar#0"} == set(names)


# --- the mixture ------------------------------------------------------------------------------------


def kept_domains(folder: Path) -> dict[str, DomainRows]:
    """Two domains whose rows name themselves, with every second and every third row."""
    code = numbered_rows(folder, "code", 20, length=4, seq_len=4, first=1)
    math = numbered_rows(folder, "math", 30, length=4, seq_len=4, first=101)
    return {
        "code": keeping(code, np.arange(20) % 2 == 0),
        "math": keeping(math, np.arange(30) % 3 == 1),
    }


CHANGES = {3: {"code": 0.8, "math": 0.2}, 9: {"code": 0.3, "math": 0.7}}


def steps_of(ranks: Sequence[DomainMixture], steps: Sequence[int]) -> list[list[int]]:
    """The sorted rows of each step over all ranks, with weights changed before some steps."""
    found = []
    for step in steps:
        for rank in ranks:
            if step in CHANGES:
                rank.set_weights(CHANGES[step])
        batches = [next(rank) for rank in ranks]
        found.append(sorted(int(n) for batch in batches for n in batch["input_ids"][:, 0]))
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_ranks_and_resuming_read_the_same_kept_rows(tmp_path: Path, workers: int) -> None:
    """The global batches of one process are those of two, and of a mixture that goes on from a saved state;
    kept rows come equally often and dropped ones never."""
    rows = kept_domains(tmp_path)
    options: dict[str, Any] = {"batch_rows": 6, "seed": 3, "block_rows": 4, "num_workers": workers}
    alone = DomainMixture(rows, **options)
    expected = steps_of([alone], range(14))
    ranks = [DomainMixture(rows, rank=rank, world_size=2, **options) for rank in range(2)]
    first = steps_of(ranks, range(6))
    state = json.loads(json.dumps(ranks[0].state_dict()))
    again = DomainMixture(rows, **options)
    assert [] == again.load_state_dict(state)
    assert expected == first + steps_of([again], range(6, 14))
    assert expected[:6] == first
    counts = Counter(row for step in expected for row in step)
    code = {1 + i for i in range(20) if i % 2 == 0}
    math = {101 + i for i in range(30) if i % 3 == 1}
    assert set(counts) <= code | math
    for own in (code, math):
        times = [counts[row] for row in own]
        assert max(times) - min(times) <= 1
    for mixture in (alone, *ranks, again):
        mixture.close()


def test_places_and_names_are_those_of_the_shard(tmp_path: Path) -> None:
    """What a store of logits or responses is read by: the token of a row says which one it is."""
    mixture = DomainMixture(kept_domains(tmp_path), batch_rows=6)
    for _ in range(8):
        batch = next(mixture)
        assert mixture.last_plan is not None
        names = mixture.row_names(mixture.last_plan)
        places, ids = mixture.row_places.tolist(), batch["domain_ids"].tolist()
        for name, (shard, row), domain, token in zip(
            names, places, ids, batch["input_ids"][:, 0].tolist(), strict=True
        ):
            number = token - (1, 101)[domain]
            assert (number // 4, number % 4) == (shard, row)
            assert name.endswith(f"#{row}")


def test_another_selection_is_other_data(tmp_path: Path) -> None:
    """A state of other kept rows is refused, and goes on from the first row where that is allowed."""
    rows = kept_domains(tmp_path)
    mixture = DomainMixture(rows, batch_rows=6)
    for _ in range(3):
        next(mixture)
    other = {**rows, "code": keeping(replace(rows["code"], kept=None), np.arange(20) % 2 == 1)}
    target = DomainMixture(other, batch_rows=6)
    with pytest.raises(DataError, match="the data of domain 'code' changed"):
        target.load_state_dict(mixture.state_dict())
    (change,) = target.load_state_dict(mixture.state_dict(), allow_changes=True)
    assert "code" in change
    assert 0 == target.served["code"]
    assert mixture.served["math"] == target.served["math"]


def test_a_damaged_row_is_replaced_by_a_kept_one(tmp_path: Path) -> None:
    """The row that stands in is one that the selection keeps, the same for every reader."""
    rows = numbered_rows(tmp_path, "code", 12, length=4, seq_len=4, first=1)
    kept = keeping(rows, np.arange(12) % 4 != 0)
    for shard in kept.shards:
        path = Path(shard.location)
        data = bytearray(path.read_bytes())
        data[int(shard.offsets[1])] ^= 1  # row 1 of every shard
        path.write_bytes(data)
    seen = []
    for _ in range(2):
        mixture = DomainMixture({"code": kept}, batch_rows=3)
        tokens = [int(n) for _ in range(6) for n in next(mixture)["input_ids"][:, 0]]
        seen.append(tokens)
        assert {1 + i for i in range(12) if i % 4 >= 2} == set(tokens)
        assert {record.substitute_row for record in mixture.substitutions} <= {2, 3}
        assert {1} == {record.row for record in mixture.substitutions}
    assert seen[0] == seen[1]


# --- the decision -----------------------------------------------------------------------------------


def test_a_decision_by_hand() -> None:
    """Means per predicted token, not sums; rows without one are neither offered nor kept."""
    rows = unread_rows("code", [[3, 1, 5], [], [2, 4]])
    assert [2, 0, 4, 1, 3] == predicted_tokens(rows).tolist()
    reference = np.array([4.0, 0.0, 12.0, 5.0, 3.0])  # 2, -, 3, 5, 1 a token
    teacher = np.array([2.0, 0.0, 4.0, 4.5, 3.0])  # 1, -, 1, 4.5, 1: differences 1, -, 2, 0.5, 0
    kept = decide(DifferenceSelection(share=0.5), rows, reference, teacher)
    assert [True, False, True, False, False] == kept.mask.tolist()
    assert (5, 4, 2, 1.0) == (kept.rows, kept.offered, kept.kept, kept.threshold)
    early = to_be_kept(DifferenceSelection(share=0.5), rows)
    assert (5, 4, 2, None) == (early.rows, early.offered, early.kept, early.threshold)


def test_prompts_are_not_predicted() -> None:
    """Of a prompt and its response, the tokens of the response count, the first of them included."""
    rows = unread_rows("code", [[6, 6]])
    shard = replace(rows.shards[0], num_prompt_tokens=np.array([4, 1]))
    prompts = replace(rows, shards=(shard,))
    assert [2, 5] == predicted_tokens(prompts).tolist()
    half = keeping(prompts, np.array([True, False]))
    assert (6, 2) == (half.num_tokens, half.counted_tokens)


def test_a_domain_without_a_token_to_predict_is_named() -> None:
    """One line, before anything is divided by zero."""
    rows = unread_rows("code", [[1, 1]])
    with pytest.raises(DataError, match="domain 'code': its train rows have no token to predict"):
        decide(DifferenceSelection(), rows, np.zeros(2), np.zeros(2))


@SETTINGS
@given(bits=st.lists(st.booleans(), max_size=40))
def test_bits_come_back_from_text(bits: list[bool]) -> None:
    """All of them, and nothing is set behind them."""
    mask = np.array(bits, dtype=np.bool_)
    back = from_text(as_text(mask))
    assert bits == back[: len(bits)].tolist()
    assert not back[len(bits) :].any()


@pytest.mark.parametrize("text", ["", "AAAA", "not base64!", as_text(np.array([True, False, True]))])
def test_damaged_bits_are_no_rows(text: str) -> None:
    """A record whose bits are gone, or are of another number of rows, is a ValueError as other damage is."""
    with pytest.raises(ValueError, match=r"."):
        ShardRecord(name="a.tar", rows=3, sha256="", kept=text)


def test_a_selected_domain_travels_to_workers(tmp_path: Path) -> None:
    """Pickled and back, the same rows."""
    rows = keeping(random_rows(tmp_path), np.arange(9) % 2 == 0)
    copy = pickle.loads(pickle.dumps(rows))
    assert rows.kept_rows is not None
    assert copy.kept_rows.tolist() == rows.kept_rows.tolist()
    assert copy.fingerprint == rows.fingerprint

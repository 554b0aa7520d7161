"""Reading planned rows: substitutes for damaged rows, limits, errors, token types.

Every row of these domains is one number repeated, so a batch says by its tokens which rows it has.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddkmix.errors import DataError, RowError
from ddkmix.index import DomainRows
from ddkmix.loader import DomainMixture
from ddkmix.order import DomainOrder, locate
from ddkmix.planner import deal
from ddkmix.row_tasks import RowBatch, Substitution, TaskReader
from ddkmix.sources import tensors_of
from tests.hand_made import damage, numbered_rows, write_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

SEQ_LEN, BATCH_ROWS, STEPS = 4, 6, 9
Mixtures = Callable[..., DomainMixture]
BAD = (2, 5, 7, 11)
"""Rows of code that are damaged, by their number in the files."""


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, DomainRows]:
    """code: 12 rows of tokens 1 to 12; math: 10 rows of tokens 101 to 110, a part of them padding."""
    return {
        "code": numbered_rows(tmp_path, "code", 12, length=4, seq_len=SEQ_LEN),
        "math": numbered_rows(tmp_path, "math", 10, length=3, seq_len=SEQ_LEN, first=101),
    }


@pytest.fixture
def mixture_of(rows: dict[str, DomainRows]) -> Iterator[Mixtures]:
    """A function that makes mixtures of the two domains; their workers end with the test."""
    made: list[DomainMixture] = []

    def make(rows: dict[str, DomainRows] = rows, **options: Any) -> DomainMixture:
        made.append(DomainMixture(rows, **{"batch_rows": BATCH_ROWS, "weights": HALVES, **options}))
        return made[-1]

    yield make
    for mixture in made:
        mixture.close()


HALVES = {"code": 0.5, "math": 0.5}
ONLY_CODE, ONLY_MATH = {"code": 1.0, "math": 0.0}, {"code": 0.0, "math": 1.0}


def damage_code(rows: dict[str, DomainRows], numbers: Sequence[int] = BAD) -> None:
    """Flip bits in some rows of code, or flip them back."""
    for number in numbers:
        damage(rows["code"], number // 4, number % 4, byte=number % 8)


def read(ranks: Sequence[DomainMixture], steps: int) -> list[list[int]]:
    """The first token of every row of the global batches, in slot order."""
    found = []
    for _ in range(steps):
        tokens = [0] * BATCH_ROWS
        for rank, batch in enumerate([next(mixture) for mixture in ranks]):
            plan = ranks[rank].last_plan
            assert plan is not None
            slots = deal(plan, rank, len(ranks)).tolist()
            for slot, row, domain in zip(slots, batch["input_ids"], batch["domain_ids"], strict=True):
                tokens[slot] = int(row[0])
                assert domain == int(row[0] > 100)
        found.append(tokens)
    return found


def flat(batches: list[list[int]]) -> list[int]:
    """All rows, one after the other."""
    return [token for batch in batches for token in batch]


def substitutes(ranks: Sequence[DomainMixture]) -> list[Substitution]:
    """What stood in on any rank, in the order of the stream."""
    return sorted((s for mixture in ranks for s in mixture.substitutions), key=lambda s: (s.domain, s.j))


# --- substitutes ------------------------------------------------------------------------------------


def check_only_bad_rows_change(whole: list[list[int]], found: list[list[int]]) -> None:
    """Every slot has its row of the undamaged stream, or a good row of the domain in place of a bad one."""
    bad, changed = {number + 1 for number in BAD}, 0
    for expected, actual in zip(flat(whole), flat(found), strict=True):
        if expected in bad:
            changed += 1
            assert actual < 100
            assert actual not in bad
        else:
            assert expected == actual
    assert changed > len(BAD)  # more than an epoch


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 1), (1, 2), (2, 0), (3, 1), (6, 0)])
def test_substitutes_do_not_depend_on_who_reads(
    rows: dict[str, DomainRows], mixture_of: Mixtures, world_size: int, num_workers: int
) -> None:
    """The same batches and the same records for any ranks and workers; nothing else moves."""
    whole = mixture_of()
    undamaged = read([whole], STEPS)
    damage_code(rows)
    alone = mixture_of()
    expected = read([alone], STEPS)
    check_only_bad_rows_change(undamaged, expected)
    assert whole.state == alone.state
    ranks = [
        mixture_of(rank=rank, world_size=world_size, num_workers=num_workers) for rank in range(world_size)
    ]
    assert expected == read(ranks, STEPS)
    assert substitutes([alone]) == substitutes(ranks)


def test_the_check_notices_substitutes_with_a_memory(
    rows: dict[str, DomainRows], mixture_of: Mixtures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A saboteur that serves "the next good row" gives other batches to other world sizes."""
    damage_code(rows)
    substitute, calls = TaskReader._substitute, []

    def with_memory(self: TaskReader, domain: int, j: int, *rest: Any) -> Any:
        calls.append(j)
        return substitute(self, domain, len(calls), *rest)

    monkeypatch.setattr(TaskReader, "_substitute", with_memory)
    expected = read([mixture_of()], STEPS)
    assert expected != read([mixture_of(rank=rank, world_size=2) for rank in range(2)], STEPS)


def test_substitutes_are_the_same_after_resume(rows: dict[str, DomainRows], mixture_of: Mixtures) -> None:
    """From every step on, with other workers."""
    damage_code(rows)
    first, states, expected = mixture_of(), [], []
    for _ in range(STEPS):
        states.append(first.state_dict())
        expected += read([first], 1)
    for step in range(0, STEPS, 2):
        again = mixture_of(num_workers=step % 3)
        again.load_state_dict(states[step])
        assert expected[step:] == read([again], STEPS - step)
        assert again.substitutions == first.substitutions[-len(again.substitutions) :]


EXPECTED = [
    (2, "code/1.tar#1", "code/2.tar#1"),
    (5, "code/0.tar#2", "code/2.tar#2"),
    (6, "code/1.tar#3", "code/0.tar#3"),
    (7, "code/2.tar#3", "code/1.tar#0"),
]


def test_substitutes_never_change(rows: dict[str, DomainRows], mixture_of: Mixtures) -> None:
    """Which row stands in is a part of the format: (seed, domain, j) and nothing else."""
    damage_code(rows)
    mixture = mixture_of(weights=ONLY_CODE)
    read([mixture], 2)
    assert EXPECTED == [(s.j, s.name, s.substitute) for s in mixture.substitutions]
    other = mixture_of(weights=ONLY_CODE, seed=1)
    read([other], 2)
    assert {s.name for s in other.substitutions} == {s.name for s in mixture.substitutions}
    assert {(s.j, s.substitute) for s in other.substitutions} != {(j, s) for j, _, s in EXPECTED}


def test_the_record_names_both_rows(rows: dict[str, DomainRows], mixture_of: Mixtures) -> None:
    """j is the number that the plan gave, in every epoch anew; the order says which row that is."""
    damage_code(rows)
    mixture = mixture_of(weights=ONLY_CODE)
    read([mixture], 4)
    order = DomainOrder(domain="code", shard_rows=(4, 4, 4), seed=0)
    expected = [j for j in range(24) if (place := locate(order, j)) and place[0] * 4 + place[1] in BAD]
    assert expected == [s.j for s in mixture.substitutions]
    for record in mixture.substitutions:
        assert "code" == record.domain
        assert rows["code"].name_of(*locate(order, record.j)) == record.name
        assert record.reason.startswith(f"{record.name}: 8 bytes have changed at offset ")


def test_substitutes_that_are_damaged_too_are_passed_over(
    rows: dict[str, DomainRows], mixture_of: Mixtures
) -> None:
    """Half of the rows are bad: only the good ones are served."""
    damage_code(rows, range(0, 12, 2))
    found = read([mixture_of(weights=ONLY_CODE)], 4)
    assert {2, 4, 6, 8, 10, 12} == set(flat(found))


def test_a_domain_that_is_all_bad_is_an_error(rows: dict[str, DomainRows], mixture_of: Mixtures) -> None:
    """Nothing is left to stand in; mended, the same step is served."""
    expected = read([mixture_of()], 3)
    damage_code(rows, range(12))
    mixture = mixture_of()
    for _ in range(2):
        with pytest.raises(DataError, match="8 substitutes of the domain are damaged too") as info:
            next(mixture)
        assert "\n" not in str(info.value)
    assert 0 == mixture.state.step
    damage_code(rows, range(12))
    assert expected == read([mixture], 3)


def test_padding_follows_the_substitute(tmp_path: Path, mixture_of: Mixtures) -> None:
    """Labels are those of the row that is served: a short row in place of a long one."""
    rows = write_rows(tmp_path, "code", [[[1, 1, 1, 1], [2]]], seq_len=SEQ_LEN)
    damage(rows, 0, 0)
    batch = next(mixture_of({"code": rows}, weights=None))
    assert [[2, 0, 0, 0]] * 6 == batch["input_ids"].tolist()
    assert [[2, -100, -100, -100]] * 6 == batch["labels"].tolist()


def test_substitutes_come_from_every_good_row(tmp_path: Path, mixture_of: Mixtures) -> None:
    """Also past shards without rows, and about equally often."""
    good = [[[10 + i]] for i in range(4)]
    rows = write_rows(tmp_path, "code", [[], [[1]], [], *good, []], seq_len=1)
    damage(rows, 1, 0)
    mixture = mixture_of({"code": rows}, weights=None, batch_rows=100, max_substitutes=10**6)
    for _ in range(5):
        next(mixture)
    names = [record.substitute for record in mixture.substitutions]
    assert 100 == len(names)
    counts = [names.count(f"code/{shard}.tar#0") for shard in (3, 4, 5, 6)]
    assert 100 == sum(counts)
    assert min(counts) > 10


# --- the limit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("limit", [0, 1, 3])
def test_too_many_damaged_rows_end_the_loop_before_the_step(
    rows: dict[str, DomainRows], mixture_of: Mixtures, limit: int, num_workers: int
) -> None:
    """The step is not consumed; with the file mended it is served, and nothing is lost or served again."""
    expected = read([mixture_of()], STEPS)
    damage_code(rows)
    mixture, found = mixture_of(max_substitutes=limit, num_workers=num_workers), []
    with pytest.raises(RowError) as info:
        while True:
            found += read([mixture], 1)
    assert len(mixture.substitutions) <= limit
    assert f"max_substitutes allows {limit}." in str(info.value)
    assert "bytes have changed at offset " in str(info.value)
    assert "\n" not in str(info.value)
    assert len(found) == mixture.state.step
    damage_code(rows)
    found += read([mixture], STEPS - len(found))
    bad = {number + 1 for number in BAD}
    for step, actual in zip(expected, found, strict=True):
        assert all(e == a or e in bad for e, a in zip(step, actual, strict=True))
    if not limit:
        assert expected == found


def test_strict_means_no_substitute_at_all(rows: dict[str, DomainRows], mixture_of: Mixtures) -> None:
    """max_substitutes=0 raises at the first damaged row; a sound stream does not notice the setting."""
    assert read([mixture_of()], STEPS) == read([mixture_of(max_substitutes=0)], STEPS)
    damage_code(rows, [0])
    with pytest.raises(RowError, match="It is damaged row 1; max_substitutes allows 0"):
        read([mixture_of(max_substitutes=0)], STEPS)


def test_the_limit_itself_is_allowed(rows: dict[str, DomainRows], mixture_of: Mixtures) -> None:
    """Two epochs with one damaged row are two substitutes: a limit of 2 suffices, one of 1 does not."""
    damage_code(rows, [0])
    assert 4 == len(read([mixture_of(weights=ONLY_CODE, max_substitutes=2)], 4))
    with pytest.raises(RowError, match="It is damaged row 2; max_substitutes allows 1"):
        read([mixture_of(weights=ONLY_CODE, max_substitutes=1)], 4)


# --- what is told -----------------------------------------------------------------------------------


def test_each_substitute_is_logged(
    rows: dict[str, DomainRows], mixture_of: Mixtures, caplog: pytest.LogCaptureFixture
) -> None:
    """One line with row, shard, offset and the row that stands in."""
    damage_code(rows, [6])
    mixture = mixture_of(weights=ONLY_CODE, num_workers=1)
    with caplog.at_level(logging.WARNING, "ddkmix"):
        read([mixture], 2)
    (record,) = mixture.substitutions
    expected = (
        f"code/1.tar#2: 8 bytes have changed at offset 16 of {rows['code'].shards[1].location} since they "
        f"were packed; pack the shard again. {record.substitute} stands in for it."
    )
    assert [expected] == [entry.getMessage() for entry in caplog.records]


@pytest.mark.parametrize("bad", [range(0, 12, 3), range(12)])
def test_what_was_read_ahead_and_dropped_is_not_reported(
    rows: dict[str, DomainRows], mixture_of: Mixtures, caplog: pytest.LogCaptureFixture, bad: range
) -> None:
    """Workers met damaged rows, or nothing but these, in a step that the loop then never asks for."""
    order = DomainOrder(domain="code", shard_rows=(4, 4, 4), seed=0)
    first = {shard * 4 + row for shard, row in (locate(order, j) for j in range(BATCH_ROWS))}
    damage_code(rows, [number for number in bad if number not in first])
    mixture = mixture_of(weights=ONLY_CODE, num_workers=1, prefetch_steps=4)
    read([mixture], 1)
    time.sleep(0.3)  # the second step, and some behind it, are read
    mixture.set_weights(ONLY_MATH)
    assert all(token > 100 for token in flat(read([mixture], 6)))
    assert ([], []) == (mixture.substitutions, caplog.records)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_vanished_ends_the_loop_and_comes_back(
    rows: dict[str, DomainRows], mixture_of: Mixtures, num_workers: int
) -> None:
    """No substitute for a store that lacks the file: one line, and the step is served when it is there."""
    expected = read([mixture_of()], STEPS)
    shard = Path(rows["code"].shards[2].location)
    shard.rename(shard.with_suffix(".away"))
    mixture, found = mixture_of(num_workers=num_workers), []
    with pytest.raises(DataError, match=r"2\.tar cannot be opened \(No such file or directory\)\.$") as info:
        while True:
            found += read([mixture], 1)
    assert "\n" not in str(info.value)
    shard.with_suffix(".away").rename(shard)
    assert expected == found + read([mixture], STEPS - len(found))
    assert [] == mixture.substitutions


# --- token types ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("dtypes", [("<u2", "<u4"), ("<u4", "<u2"), ("<u4", "<u4")])
def test_domains_may_store_tokens_of_different_width(
    tmp_path: Path, mixture_of: Mixtures, dtypes: tuple[str, str], num_workers: int
) -> None:
    """Ids above 65,535 beside small ones, damaged rows included: int64 and the right numbers."""
    high = [100000 if dtype == "<u4" else 60000 for dtype in dtypes]
    rows = {
        name: numbered_rows(tmp_path, name, 6, length=3, seq_len=SEQ_LEN, first=first, dtype=dtype)
        for name, first, dtype in zip(("code", "math"), high, dtypes, strict=True)
    }
    for domain in rows.values():
        damage(domain, 0, 1)
    mixture = mixture_of(rows, num_workers=num_workers)
    for _ in range(4):
        batch = next(mixture)
        assert torch.int64 == batch["input_ids"].dtype
        for domain, ids, labels in zip(*map(batch.get, ("domain_ids", "input_ids", "labels")), strict=True):
            token, first = int(ids[0]), high[int(domain)]
            assert token in {first, *range(first + 2, first + 6)}
            assert ([token] * 3 + [0], [token] * 3 + [-100]) == (ids.tolist(), labels.tolist())
    assert {"code", "math"} == {record.domain for record in mixture.substitutions}


def test_tensors_by_hand() -> None:
    """Labels are -100 behind the text; rows without padding and rows without text are fine."""
    batch = RowBatch(
        version=0,
        slot=0,
        num_tokens=np.array([2, 3, 0]),
        tokens=np.array([[5, 6, 0], [7, 8, 9], [0, 0, 0]], "<u2"),
    )
    tensors = tensors_of(batch)
    assert [[5, 6, 0], [7, 8, 9], [0, 0, 0]] == tensors["input_ids"].tolist()
    assert [[5, 6, -100], [7, 8, 9], [-100, -100, -100]] == tensors["labels"].tolist()
    assert {"input_ids", "labels"} == set(tensors)
    assert {torch.int64} == {tensor.dtype for tensor in tensors.values()}

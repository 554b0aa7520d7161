"""The mixture as a loop sees it: which rows arrive at which step, whoever reads them.

Rows are recognised by their tokens, not by the plan, so what is compared is what a model would be fed.
"""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ddkmix.domains import load_domains
from ddkmix.errors import ConfigError, DataError, MixtureExhausted
from ddkmix.index import DomainRows
from ddkmix.loader import DomainMixture
from ddkmix.order import DomainOrder, locate
from ddkmix.pack import pack_domains
from ddkmix.planner import PlannerState, PlanSettings, initial_state, plan_step, quantise, with_weights
from ddkmix.rows import RowReader
from ddkmix.tokenizer import read_tokenizer
from tests.conftest import write_domain
from tests.hand_made import write_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

SEQ_LEN = 16
BATCH_ROWS = 12
DOMAINS = ("code", "math", "prose")
DOCUMENTS = {"code": 2, "math": 3, "prose": 4}
"""Documents in each of two train shards."""

Names = Mapping[tuple[int, ...], str]
Weights = Mapping[str, float]
Rows = dict[str, DomainRows]


def weights_of(*weights: float) -> dict[str, float]:
    """Mixture weights of code, math and prose."""
    return dict(zip(DOMAINS, map(float, weights), strict=True))


START = weights_of(0.5, 0.3, 0.2)
CHANGES = {
    3: weights_of(0.1, 0.1, 0.8),
    4: weights_of(0.0, 1.0, 0.0),
    5: weights_of(1 / 3, 1 / 3, 1 / 3),
    9: weights_of(1e-6, 0.5, 0.5),
}
"""Weights set before these steps, three of them in a row."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cards of three domains."""
    folder = tmp_path_factory.mktemp("domains")
    for name, count in DOCUMENTS.items():
        write_domain(folder, name, shards=2, per_shard=count)
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path, tokenizer_folder: Path) -> Rows:
    """Their packed train rows."""
    domains, tokenizer = load_domains([str(folder)]), read_tokenizer(str(tokenizer_folder))
    packed = pack_domains(domains, tokenizer, seq_len=SEQ_LEN, cache_dir=folder / "cache", processes=1)
    return {name: domain.train for name, domain in packed.items()}


@pytest.fixture(scope="module")
def names(rows: Rows) -> Names:
    """The name of each row by its tokens; no two rows of these domains have the same."""
    found = {}
    for domain in rows.values():
        reader = RowReader(domain)
        for shard, index in enumerate(domain.shards):
            for row in range(index.num_rows):
                found[tuple(reader.read(shard, row).tolist())] = domain.name_of(shard, row)
    assert sum(domain.num_rows for domain in rows.values()) == len(found)
    return found


@pytest.fixture
def mixture_of(rows: Rows) -> Iterator[Callable[..., DomainMixture]]:
    """A function that makes mixtures of the three domains; their workers end with the test."""
    made: list[DomainMixture] = []

    def make(kind: type[DomainMixture] = DomainMixture, **options: Any) -> DomainMixture:
        made.append(kind(rows, **{"batch_rows": BATCH_ROWS, "weights": START, **options}))
        return made[-1]

    yield make
    for mixture in made:
        mixture.close()


def names_in(batch: Mapping[str, torch.Tensor], names: Names) -> list[str]:
    """The names of a batch's rows, by content; `domain_ids` must agree with them."""
    found = [names[tuple(row)] for row in batch["input_ids"].tolist()]
    assert [DOMAINS[i] for i in batch["domain_ids"].tolist()] == [name.split("/")[0] for name in found]
    return found


def read_steps(
    mixtures: Sequence[DomainMixture], names: Names, steps: range, changes: Mapping[int, Weights]
) -> list[list[str]]:
    """The sorted rows of each step over all ranks, with weights changed before some steps."""
    batches = []
    for step in steps:
        for mixture in mixtures:
            if step in changes:
                mixture.set_weights(changes[step])
        batches.append(sorted(name for mixture in mixtures for name in names_in(next(mixture), names)))
    return batches


def planned_steps(
    rows: Rows,
    steps: int,
    *,
    weights: Weights = START,
    changes: Mapping[int, Weights] | None = None,
    seed: int = 0,
) -> list[list[str]]:
    """What the planner and the order alone say about each step: no loader, no workers, no prefetch."""
    settings = PlanSettings(
        domains=DOMAINS,
        batch_rows=BATCH_ROWS,
        num_rows=tuple(rows[name].num_rows for name in DOMAINS),
        cap_rows=(None, None, None),
    )
    orders = [
        DomainOrder(domain=name, shard_rows=tuple(s.num_rows for s in rows[name].shards), seed=seed)
        for name in DOMAINS
    ]
    state = initial_state(settings, np.array([weights[name] for name in DOMAINS]))
    batches = []
    for step in range(steps):
        if changes and step in changes:
            vector = np.array([changes[step][name] for name in DOMAINS])
            state = with_weights(state, quantise(vector / vector.sum()))
        plan, state = plan_step(settings, state)
        batches.append(
            sorted(
                rows[DOMAINS[domain]].name_of(*locate(orders[domain], j))
                for domain, j in zip(plan.domain_ids.tolist(), plan.row_numbers.tolist(), strict=True)
            )
        )
    return batches


# --- the same global batches for everybody ----------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "num_workers", "prefetch_steps"),
    [
        (1, 0, 1),
        (1, 1, 1),
        (1, 2, 2),
        (1, 4, 1),
        (1, 4, 4),
        (2, 0, 2),
        (2, 2, 1),
        (3, 1, 4),
        (4, 0, 2),
        (6, 0, 2),
        (6, 1, 2),
        (12, 0, 2),
    ],
)
def test_global_batches_do_not_depend_on_who_reads_them(
    rows: Rows,
    names: Names,
    mixture_of: Callable[..., DomainMixture],
    world_size: int,
    num_workers: int,
    prefetch_steps: int,
) -> None:
    """Workers, prefetch and world size only change who reads a row, never which rows a step has.

    Weights change on the way, so this holds across rollbacks too.
    """
    ranks = [
        mixture_of(
            rank=rank, world_size=world_size, num_workers=num_workers, prefetch_steps=prefetch_steps, seed=5
        )
        for rank in range(world_size)
    ]
    expected = planned_steps(rows, 12, changes=CHANGES, seed=5)
    assert expected == read_steps(ranks, names, range(12), CHANGES)
    assert {ranks[0].state.fingerprint()} == {rank.state.fingerprint() for rank in ranks}


def test_ranks_get_equal_shares_of_batches_and_domains(mixture_of: Callable[..., DomainMixture]) -> None:
    """12 rows on 3 ranks: four each; 6, 4 and 2 rows of the domains: floor or ceil of a third each."""
    ranks = [mixture_of(rank=rank, world_size=3) for rank in range(3)]
    for _ in range(10):
        batches = [next(rank) for rank in ranks]
        assert [4, 4, 4] == [len(batch["domain_ids"]) for batch in batches]
        total = np.bincount(ranks[0].last_plan.domain_ids, minlength=3)
        for batch in batches:
            counts = np.bincount(batch["domain_ids"].numpy(), minlength=3)
            assert ((total // 3 <= counts) & (counts <= -(-total // 3))).all()


@pytest.mark.parametrize("change", [{"seed": 1}, {"block_rows": 4}, {"weights": weights_of(1, 1, 1)}])
def test_seed_block_and_weights_change_the_batches(
    names: Names, mixture_of: Callable[..., DomainMixture], change: dict[str, Any]
) -> None:
    """What is not meant to be ignored is not."""
    expected = read_steps([mixture_of()], names, range(4), {})
    assert expected != read_steps([mixture_of(**change)], names, range(4), {})


def test_the_plan_names_the_rows_that_arrive(names: Names, mixture_of: Callable[..., DomainMixture]) -> None:
    """`last_plan` and `row_names` tell what the global batch was, in slot order."""
    mixture = mixture_of(num_workers=1)
    for step in range(5):
        batch = next(mixture)
        assert step == mixture.last_plan.step
        assert mixture.row_names(mixture.last_plan) == names_in(batch, names)


# --- epochs -----------------------------------------------------------------------------------------


def test_each_epoch_of_a_domain_serves_every_row_once(
    rows: Rows, names: Names, mixture_of: Callable[..., DomainMixture]
) -> None:
    """Over three epochs of code no row comes twice before its domain's epoch ends, and none is missed."""
    mixture = mixture_of(num_workers=2, weights=weights_of(0.4, 0.35, 0.25))
    served: dict[str, list[str]] = {name: [] for name in DOMAINS}
    while mixture.epochs["code"] < 3:
        for name in names_in(next(mixture), names):
            served[name.split("/")[0]].append(name)
    for domain, found in served.items():
        everything = sorted(name for name in names.values() if name.startswith(f"{domain}/"))
        for start in range(0, len(found), rows[domain].num_rows):
            epoch = found[start : start + rows[domain].num_rows]
            assert len(epoch) == len(set(epoch))
            assert len(epoch) < len(everything) or everything == sorted(epoch)
    epochs = [served["code"][i * rows["code"].num_rows :][: rows["code"].num_rows] for i in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_another_domain_changes_nobodys_order(rows: Rows, names: Names) -> None:
    """code's rows come in the same order alone, beside math, and under other weights."""

    def code_rows(mixture: DomainMixture) -> list[str]:
        return [name for _ in range(8) for name in names_in(next(mixture), names) if name.startswith("code/")]

    alone = code_rows(DomainMixture({"code": rows["code"]}, batch_rows=12))
    beside = code_rows(DomainMixture({n: rows[n] for n in ("code", "math")}, batch_rows=12))
    three = code_rows(DomainMixture(rows, batch_rows=12, weights=START))
    assert alone[: len(beside)] == beside
    assert alone[: len(three)] == three


# --- batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_is_what_transformers_expects(
    rows: Rows, mixture_of: Callable[..., DomainMixture], num_workers: int
) -> None:
    """int64 tensors; labels equal input_ids, not shifted, and -100 exactly where there is padding."""
    mixture, padded = mixture_of(num_workers=num_workers), 0
    lengths = {
        rows[name].name_of(shard, row): int(tokens)
        for name in DOMAINS
        for shard, index in enumerate(rows[name].shards)
        for row, tokens in enumerate(index.num_tokens)
    }
    while mixture.epochs["code"] < 1:
        batch = next(mixture)
        assert {"input_ids", "labels", "domain_ids"} == set(batch)
        assert [(12, 16), (12, 16), (12,)] == [tuple(tensor.shape) for tensor in batch.values()]
        assert {torch.int64} == {tensor.dtype for tensor in batch.values()}
        for name, ids, labels in zip(
            mixture.row_names(mixture.last_plan), batch["input_ids"], batch["labels"], strict=True
        ):
            valid = lengths[name]
            assert ids[:valid].tolist() + [-100] * (SEQ_LEN - valid) == labels.tolist()
            padded += valid < SEQ_LEN
    assert padded > 0


def test_a_batch_may_be_written_to(mixture_of: Callable[..., DomainMixture]) -> None:
    """A loop that changes a batch in place changes nothing that is read later."""
    mixture = mixture_of(weights=weights_of(1, 0, 0))
    first = next(mixture)["input_ids"].clone()
    again = mixture_of(weights=weights_of(1, 0, 0))
    next(again)["input_ids"].zero_()
    again.load_state_dict(mixture_of(weights=weights_of(1, 0, 0)).state_dict())
    assert first.tolist() == next(again)["input_ids"].tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_leaves_the_random_generators_alone(
    mixture_of: Callable[..., DomainMixture], num_workers: int
) -> None:
    """A run with dropout must not change with the number of workers, nor with their restarts."""
    torch.manual_seed(3)  # (beartype, which checks types in tests, moves Python's own generator)
    before = torch.get_rng_state().tolist(), str(np.random.get_state())  # noqa: NPY002
    mixture = mixture_of(num_workers=num_workers)
    next(mixture)
    mixture.close()
    next(mixture)
    after = torch.get_rng_state().tolist(), str(np.random.get_state())  # noqa: NPY002
    assert before == after


# --- weight changes ---------------------------------------------------------------------------------


def check_changes_are_whole(
    mixture: DomainMixture, rows: Rows, names: Names, changes: Mapping[int, Weights]
) -> None:
    """Every step follows the weights in force before it, and each domain's rows go on without a gap."""
    expected = planned_steps(rows, 14, changes=changes)
    row_numbers: list[list[int]] = [[], [], []]
    for step in range(14):
        if step in changes:
            mixture.set_weights(changes[step])
        batch = next(mixture)
        assert expected[step] == sorted(names_in(batch, names))
        plan = mixture.last_plan
        for domain, j in zip(plan.domain_ids.tolist(), plan.row_numbers.tolist(), strict=True):
            row_numbers[domain].append(j)
    assert [list(range(len(numbers))) for numbers in row_numbers] == row_numbers
    assert [len(numbers) for numbers in row_numbers] == list(mixture.served.values())


@pytest.mark.parametrize(("num_workers", "prefetch_steps"), [(0, 1), (1, 2), (4, 4)])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(CHANGES, id="several"),
        pytest.param({0: weights_of(0, 0, 1)}, id="before the first"),
        pytest.param({step: weights_of(1 + step % 3, 1, step % 2) for step in range(14)}, id="every step"),
    ],
)
def test_a_weight_change_is_whole_at_the_next_step(
    rows: Rows,
    names: Names,
    mixture_of: Callable[..., DomainMixture],
    num_workers: int,
    prefetch_steps: int,
    changes: Mapping[int, Weights],
) -> None:
    """However much was read ahead: nothing of it is served under the old weights, lost or served again."""
    mixture = mixture_of(num_workers=num_workers, prefetch_steps=prefetch_steps)
    check_changes_are_whole(mixture, rows, names, changes)


class LateMixture(DomainMixture):
    """A saboteur without rollback: new weights reach only what is planned from now on."""

    def _rewind(self, state: PlannerState) -> None:
        self._plans.ahead = with_weights(self._plans.ahead, state.weights)


class LosingMixture(DomainMixture):
    """A saboteur that drops what was read ahead but does not plan its rows again."""

    def _rewind(self, state: PlannerState) -> None:
        ahead = self._plans.ahead
        super()._rewind(state)
        self._plans.ahead = replace(state, served=ahead.served, credit=ahead.credit)


class RepeatingMixture(DomainMixture):
    """A saboteur that goes back one step too far."""

    def _rewind(self, state: PlannerState) -> None:
        super()._rewind(state)
        before = self._plans._recent.get(state.step - 1, state)
        self._plans.ahead = replace(before, weights=state.weights)


@pytest.mark.parametrize("sabotaged", [LateMixture, LosingMixture, RepeatingMixture])
def test_the_check_notices_mixtures_that_do_not_roll_back(
    rows: Rows, names: Names, mixture_of: Callable[..., DomainMixture], sabotaged: type[DomainMixture]
) -> None:
    """Weights that come late, rows that are lost, rows that come twice."""
    with pytest.raises(AssertionError):
        check_changes_are_whole(mixture_of(sabotaged, num_workers=4, prefetch_steps=4), rows, names, CHANGES)


def test_weights_may_be_the_planners_integers(names: Names, mixture_of: Callable[..., DomainMixture]) -> None:
    """Ranks exchange integers because they are exact; they mean the same as the numbers."""
    by_name, by_integer = mixture_of(), mixture_of()
    by_name.set_weights(weights_of(0.2, 0.3, 0.5))
    by_integer.set_weights(list(quantise(np.array([0.2, 0.3, 0.5]))))
    assert by_name.state == by_integer.state
    assert {"code": 0.2, "math": 0.3, "prose": 0.5} == pytest.approx(by_name.weights, abs=1e-9)


@pytest.mark.parametrize(
    ("expected", "weights"),
    [
        ("unknown domains ['web']; give exactly one", {**START, "web": 1.0}),
        ("mixture weights: missing domains ['prose']", {"code": 1.0, "math": 1.0}),
        ("every weight must be finite and >= 0", weights_of(1, float("nan"), 1)),
        ("every weight must be finite and >= 0", weights_of(1, -1, 1)),
        ("and one of them > 0", weights_of(0, 0, 0)),
        ("must be a dict {domain: weight}, or 3 integers >= 0 summing to 4294967296", [1 << 31, 1 << 31]),
        ("must be a dict {domain: weight}, or 3 integers >= 0 summing to 4294967296", [1, 2, 3]),
        ("must be a dict {domain: weight}, or 3 integers >= 0 summing to 4294967296", [1 << 32, 1, -1]),
    ],
)
def test_wrong_weights_are_refused(
    mixture_of: Callable[..., DomainMixture], expected: str, weights: Any
) -> None:
    """One line with the value and the rule, and the mixture goes on as before."""
    mixture = mixture_of()
    before = mixture.state
    with pytest.raises(ConfigError) as info:
        mixture.set_weights(weights)
    assert expected in str(info.value)
    assert "\n" not in str(info.value)
    assert before == mixture.state


# --- resume -----------------------------------------------------------------------------------------


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    """A state as a checkpoint gives it back, here through two of them."""
    return json.loads(json.dumps(json.loads(json.dumps(state))))


def check_resumes_from_every_step(
    first: DomainMixture, again: Callable[[], Sequence[DomainMixture]], names: Names
) -> None:
    """Stopped after any step, with or without having set the next weights, the stream goes on the same."""
    states, changed_states, expected = [], [], []
    for step in range(12):
        states.append(through_json(first.state_dict()))
        if step in CHANGES:
            first.set_weights(CHANGES[step])
        changed_states.append(through_json(first.state_dict()))
        expected.append(sorted(names_in(next(first), names)))
    for step in range(12):
        cases = [(states[step], CHANGES)]
        if step in CHANGES:
            cases.append((changed_states[step], {k: v for k, v in CHANGES.items() if k > step}))
        for state, changes in cases:
            mixtures = again()
            for mixture in mixtures:
                mixture.load_state_dict(state)
            assert expected[step:] == read_steps(mixtures, names, range(step, 12), changes)


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_stream_resumes_from_every_step(
    names: Names, mixture_of: Callable[..., DomainMixture], world_size: int
) -> None:
    """Also before the first batch, between weight changes, and on another world size."""
    check_resumes_from_every_step(
        mixture_of(num_workers=2, prefetch_steps=4),
        lambda: [mixture_of(rank=rank, world_size=world_size) for rank in range(world_size)],
        names,
    )


class ForgetfulMixture(DomainMixture):
    """A saboteur whose state leaves out the credits, as samplers that save only an iteration do."""

    def load_state_dict(self, state: Mapping[str, Any], *, allow_changes: bool = False) -> list[str]:
        """Start again with credits of 0."""
        planner = {**state["planner"], "credit": [0, 0, 0]}
        return super().load_state_dict({**state, "planner": planner}, allow_changes=allow_changes)


class AheadMixture(DomainMixture):
    """A saboteur that saves where it has planned to, not where the loop is."""

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """The state of the last plan."""
        return {**super().state_dict(step), "planner": self._plans.ahead.to_json()}


def test_the_resume_check_notices_states_that_are_not_whole(
    names: Names, mixture_of: Callable[..., DomainMixture]
) -> None:
    """Without credits the stream changes; with the state of the prefetch, steps are skipped."""
    with pytest.raises(AssertionError):
        check_resumes_from_every_step(mixture_of(), lambda: [mixture_of(ForgetfulMixture)], names)
    with pytest.raises(AssertionError):
        check_resumes_from_every_step(
            mixture_of(AheadMixture, num_workers=1, prefetch_steps=2), lambda: [mixture_of()], names
        )


@pytest.mark.parametrize(("num_workers", "world_size"), [(1, 1), (2, 2), (4, 1)])
def test_a_state_loads_into_a_mixture_that_is_running(
    rows: Rows, names: Names, mixture_of: Callable[..., DomainMixture], num_workers: int, world_size: int
) -> None:
    """Workers that have read ahead elsewhere drop it; forwards, backwards, and to the beginning."""
    first = mixture_of()
    states = [through_json(first.state_dict())]
    for _ in range(8):
        next(first)
        states.append(through_json(first.state_dict()))
    expected = planned_steps(rows, 11)
    ranks = [
        mixture_of(rank=rank, world_size=world_size, num_workers=num_workers) for rank in range(world_size)
    ]
    for step in (0, 8, 2, 0, 5):
        for rank in ranks:
            rank.load_state_dict(states[step])
        assert expected[step : step + 3] == read_steps(ranks, names, range(step, step + 3), {})


def test_loops_that_read_ahead_ask_for_an_earlier_state(
    rows: Rows, names: Names, mixture_of: Callable[..., DomainMixture]
) -> None:
    """HF's loops fetch a batch before they train on the last one; the state of that step is kept."""
    mixture, again = mixture_of(num_workers=1), mixture_of()
    read_steps([mixture], names, range(7), {})
    expected = planned_steps(rows, 8)
    for step in (0, 3, 6, 7):
        again.load_state_dict(through_json(mixture.state_dict(step=step)))
        assert step == again.state.step
        assert [expected[step]] == read_steps([again], names, range(1), {})
    assert mixture.state_dict() == mixture.state_dict(step=7)


def test_an_earlier_state_has_the_weights_of_its_step(mixture_of: Callable[..., DomainMixture]) -> None:
    """Weights set after three steps are in the state of step 3, which the fourth batch follows."""
    mixture = mixture_of()
    for _ in range(3):
        next(mixture)
    mixture.set_weights(weights_of(0, 0, 1))
    next(mixture)
    versions = [mixture.state_dict(step=step)["planner"]["version"] for step in range(5)]
    assert [0, 0, 0, 1, 1] == versions


def test_states_of_an_older_stream_are_forgotten(mixture_of: Callable[..., DomainMixture]) -> None:
    """After going back to step 2, step 4 lies ahead, and its old state belongs to another history."""
    mixture = mixture_of()
    for _ in range(5):
        next(mixture)
    mixture.load_state_dict(mixture.state_dict(step=2))
    with pytest.raises(ConfigError, match=r"state_dict\(step=4\): known steps are \[2\]"):
        mixture.state_dict(step=4)


def test_the_last_64_states_are_kept(mixture_of: Callable[..., DomainMixture]) -> None:
    """More is never read ahead; asking for an older or a future step names those that are known."""
    mixture = mixture_of()
    for _ in range(70):
        next(mixture)
    assert 7 == mixture.state_dict(step=7)["planner"]["step"]
    for step in (6, 71):
        with pytest.raises(ConfigError, match=rf"state_dict\(step={step}\): known steps are \[7, 8, "):
            mixture.state_dict(step=step)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": 1}, "has seed = 0 and this mixture 1"),
        ({"batch_rows": 24}, "batch_rows was 12 and is 24"),
        ({"max_epochs": 3.0}, "cap_rows was {} and is {'code': "),
        ({"on_cap": "stop"}, "on_cap was 'renormalize' and is 'stop'"),
        ({"block_rows": 100}, "has block_rows = 8192 and this mixture 100"),
        ({"count": "tokens"}, "count was 'rows' and is 'tokens'"),
    ],
)
def test_a_state_of_another_mixture_is_refused(
    mixture_of: Callable[..., DomainMixture], change: dict[str, Any], expected: str
) -> None:
    """It would go on with other rows; one line says what differs."""
    mixture = mixture_of(**change)
    before = mixture.state
    with pytest.raises(DataError) as info:
        mixture.load_state_dict(mixture_of().state_dict())
    assert expected in str(info.value)
    assert "\n" not in str(info.value)
    assert before == mixture.state


def test_a_state_of_other_data_is_refused(rows: Rows, mixture_of: Callable[..., DomainMixture]) -> None:
    """Fewer domains, or other rows under the same name; also a state of another format."""
    two = DomainMixture({name: rows[name] for name in ("code", "math")}, batch_rows=12)
    changed = DomainMixture({**rows, "math": replace(rows["math"], fingerprint="other")}, batch_rows=12)
    for other, expected in (
        (two, "domain 'prose' was added"),
        (changed, "the data of domain 'math' changed"),
    ):
        with pytest.raises(DataError, match=expected):
            mixture_of().load_state_dict(other.state_dict())
    for state in ({}, {**mixture_of().state_dict(), "format": 1}):
        with pytest.raises(DataError, match="the saved mixture state has format"):
            mixture_of().load_state_dict(state)


@pytest.mark.parametrize("change", [{"rank": 1, "world_size": 2}, {"num_workers": 3}, {"prefetch_steps": 9}])
def test_a_state_does_not_depend_on_who_reads(
    mixture_of: Callable[..., DomainMixture], change: dict[str, Any]
) -> None:
    """Fingerprint and state say nothing of ranks and workers, nor of the weights at the start."""
    assert mixture_of().state_dict() == mixture_of(**change).state_dict()
    assert mixture_of().fingerprint == mixture_of(weights=weights_of(1, 0, 0)).fingerprint


def test_closing_is_a_pause(rows: Rows, names: Names, mixture_of: Callable[..., DomainMixture]) -> None:
    """Workers end, and reading again goes on with the next step."""
    mixture = mixture_of(num_workers=2, prefetch_steps=4)
    found = read_steps([mixture], names, range(3), {})
    assert 2 == len(multiprocessing.active_children())
    mixture.close()
    assert [] == multiprocessing.active_children()
    assert planned_steps(rows, 6) == found + read_steps([mixture], names, range(3, 6), {})


def test_spawned_workers_follow_weight_changes(
    rows: Rows, names: Names, mixture_of: Callable[..., DomainMixture]
) -> None:
    """Where processes are spawned, not forked (macOS, Windows), workers see the same version counter."""
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        mixture = mixture_of(num_workers=1, prefetch_steps=4)
        found = read_steps([mixture], names, range(6), CHANGES)
        mixture.close()
    finally:
        multiprocessing.set_start_method(method, force=True)
    assert planned_steps(rows, 6, changes=CHANGES) == found


# --- the end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_stream_ends_when_every_epoch_is_used_up(
    rows: Rows, names: Names, mixture_of: Callable[..., DomainMixture], num_workers: int
) -> None:
    """One epoch of each domain: all rows but the last few that fill no batch, none twice; then nothing."""
    mixture = mixture_of(num_workers=num_workers, max_epochs=1.0, weights=None)
    found = [name for batch in mixture for name in names_in(batch, names)]
    assert len(names) // BATCH_ROWS * BATCH_ROWS == len(found) == len(set(found))
    assert [] == list(mixture)
    assert mixture.served == {n: sum(name.startswith(f"{n}/") for name in found) for n in DOMAINS}


@pytest.mark.parametrize("num_workers", [0, 4])
def test_an_exhausted_mixture_can_be_revived(
    rows: Rows, names: Names, mixture_of: Callable[..., DomainMixture], num_workers: int
) -> None:
    """code alone ends after its epoch; with weight on math the same object goes on, code's rest included."""
    mixture = mixture_of(num_workers=num_workers, max_epochs=1.0, weights=weights_of(1, 0, 0))
    steps = sum(1 for _ in mixture)
    assert rows["code"].num_rows // BATCH_ROWS == steps
    with pytest.raises(StopIteration):
        next(mixture)
    mixture.set_weights(weights_of(1, 1, 0))
    found = [name for batch in mixture for name in names_in(batch, names)]
    left = rows["code"].num_rows % BATCH_ROWS + rows["math"].num_rows
    assert left // BATCH_ROWS * BATCH_ROWS == len(found) == len(set(found))


def test_weights_that_change_before_the_end_prevent_it(
    rows: Rows, mixture_of: Callable[..., DomainMixture]
) -> None:
    """Workers have read to the end of code's epoch when math gets its weight; the loop never notices."""
    mixture = mixture_of(num_workers=4, prefetch_steps=4, max_epochs=1.0, weights=weights_of(1, 0, 0))
    next(mixture)
    mixture.set_weights(weights_of(0, 1, 0))
    assert [BATCH_ROWS] * 2 == [int((next(mixture)["domain_ids"] == 1).sum()) for _ in range(2)]


def test_a_cap_passes_the_weight_on(rows: Rows, mixture_of: Callable[..., DomainMixture]) -> None:
    """After one epoch of code, math and prose share as 3 : 2, and `weights` says so."""
    limited = {**rows, "code": replace(rows["code"], max_epochs=1.0)}
    mixture = DomainMixture(limited, batch_rows=12, weights=START)
    while mixture.epochs["code"] < 1:
        next(mixture)
    assert {"code": 0.0, "math": 0.6, "prose": 0.4} == pytest.approx(mixture.weights, abs=1e-9)
    before = mixture.served
    for _ in range(10):
        next(mixture)
    after = mixture.served
    assert [0, 72, 48] == pytest.approx([after[n] - before[n] for n in DOMAINS], abs=1.01)


def test_the_smaller_limit_wins(rows: Rows) -> None:
    """A card's max_epochs or the run's; half an odd number of rows is rounded down."""
    code, math = replace(rows["code"], max_epochs=0.5), replace(rows["math"], max_epochs=9.0)
    limited = DomainMixture({**rows, "code": code, "math": math}, batch_rows=12, max_epochs=2.0)
    caps = limited.settings.cap_rows
    expected = (rows["code"].num_rows // 2, 2 * rows["math"].num_rows, 2 * rows["prose"].num_rows)
    assert expected == caps
    assert (None,) * 3 == DomainMixture(rows, batch_rows=12).settings.cap_rows


@pytest.mark.parametrize("num_workers", [0, 4])
@pytest.mark.parametrize("on_cap", ["stop", "error"])
def test_stop_and_error_come_at_the_step_that_cannot_be_planned(
    rows: Rows, mixture_of: Callable[..., DomainMixture], on_cap: str, num_workers: int
) -> None:
    """Not when workers read ahead of it: every whole step before the cap arrives first."""
    mixture = mixture_of(num_workers=num_workers, max_epochs=1.0, on_cap=on_cap, weights=weights_of(1, 0, 0))
    steps = rows["code"].num_rows // BATCH_ROWS
    for _ in range(steps):
        next(mixture)
    with pytest.raises(StopIteration if on_cap == "stop" else DataError) as info:
        next(mixture)
    assert info.type is not MixtureExhausted
    assert steps == mixture.state.step
    mixture.set_weights(weights_of(0, 1, 0))
    assert [1] == next(mixture)["domain_ids"].unique().tolist()


# --- weights that count tokens ----------------------------------------------------------------------

TOKEN_LENGTHS = {"code": [16] * 9, "math": [2, 3, 4] * 6, "prose": [16, 1, 8, 5] * 5}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Domains whose rows differ in length; every row has tokens of its own."""
    folder, made = tmp_path_factory.mktemp("uneven"), {}
    for i, (name, lengths) in enumerate(TOKEN_LENGTHS.items()):
        texts = [[1000 * (i + 1) + j] * length for j, length in enumerate(lengths)]
        made[name] = write_rows(folder, name, [texts[:5], texts[5:]], seq_len=SEQ_LEN)
    return made


def token_steps(
    rows: Rows, steps: int, *, world_size: int = 1, states: Sequence[Any] = (), **options: Any
) -> tuple[list[list[int]], list[dict[str, int]], DomainMixture]:
    """The first tokens of each global batch, sorted; the tokens of each domain in it; the first rank."""
    ranks = [
        DomainMixture(
            rows,
            **{"batch_rows": BATCH_ROWS, "weights": START, "count": "tokens", **options},
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    found, tokens = [], []
    for rank in ranks:
        for state in states:
            rank.load_state_dict(through_json(state))
    for step in range(ranks[0].state.step, steps):
        first, counts = [], dict.fromkeys(DOMAINS, 0)
        for rank in ranks:
            if step in CHANGES and options.get("weights") is None:
                rank.set_weights(CHANGES[step])
            batch = next(rank)
            first += batch["input_ids"][:, 0].tolist()
            for domain, labels in zip(batch["domain_ids"].tolist(), batch["labels"], strict=True):
                counts[DOMAINS[domain]] += int((labels >= 0).sum())
        found.append(sorted(first))
        tokens.append(counts)
    for rank in ranks:
        rank.close()
    return found, tokens, ranks[0]


def test_token_shares_follow_the_weights(uneven: Rows) -> None:
    """Of what a model is fed, half is code though its rows are few; counting rows, code has far more."""
    for count, agrees in (("tokens", True), ("rows", False)):
        _, tokens, mixture = token_steps(uneven, 60, weights=START, count=count)
        total = {name: sum(step[name] for step in tokens) for name in DOMAINS}
        shares = {name: total[name] / sum(total.values()) for name in DOMAINS}
        assert agrees == (START == pytest.approx(shares, abs=0.01))
        assert 60 * BATCH_ROWS == sum(mixture.served.values())


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (3, 0), (4, 1)])
def test_batches_by_tokens_do_not_depend_on_who_reads_them(
    uneven: Rows, world_size: int, num_workers: int
) -> None:
    """Under changing weights, with workers that read ahead: the same global batches, the same state."""
    expected, _, alone = token_steps(uneven, 12, weights=None)
    found, _, rank = token_steps(uneven, 12, weights=None, world_size=world_size, num_workers=num_workers)
    assert expected == found
    assert alone.state == rank.state


def test_batches_by_tokens_resume_exactly(uneven: Rows) -> None:
    """From the middle, on another world size."""
    expected, _, _ = token_steps(uneven, 12)
    _, _, half = token_steps(uneven, 5)
    found, _, _ = token_steps(uneven, 12, states=[half.state_dict()], world_size=2)
    assert expected[5:] == found


# --- what goes wrong --------------------------------------------------------------------------------


def check_ends_in_one_line_and_goes_on(
    mixture: DomainMixture, rows: Rows, names: Names, mend: Callable[[], object] = lambda: None
) -> None:
    """The loop stops at some step with the reason; reading again goes on with that step."""
    found: list[list[str]] = []
    with pytest.raises(DataError, match=r"use fewer loader\.workers, then resume\.$") as info:
        while len(found) < 50:
            found += read_steps([mixture], names, range(1), {})
    message, steps = str(info.value), mixture.state.step
    assert "a reader process ended: " in message
    assert "\n" not in message
    mend()
    found += read_steps([mixture], names, range(3), {})
    assert planned_steps(rows, steps + 3)[-len(found) :] == found


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_worker_is_an_error_and_not_a_hang(
    rows: Rows,
    names: Names,
    mixture_of: Callable[..., DomainMixture],
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
) -> None:
    """One line says what to do, and reading again starts new workers.

    torch looks after its workers every five seconds (here: every tenth) and when a signal tells it to. The
    signal could arrive in this test's own lines, so it is let pass.
    """
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    mixture = mixture_of(num_workers=num_workers, prefetch_steps=2)
    next(mixture)
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        check_ends_in_one_line_and_goes_on(mixture, rows, names)
        mixture.close()
    finally:
        signal.signal(signal.SIGCHLD, handler)


def test_a_worker_that_dies_while_it_reads_is_an_error(
    rows: Rows, names: Names, mixture_of: Callable[..., DomainMixture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the signal tells, at once: the only worker kills itself when it reads its first row."""

    def die(*_: object) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    monkeypatch.setattr(os, "preadv", die)
    check_ends_in_one_line_and_goes_on(mixture_of(num_workers=1), rows, names, monkeypatch.undo)


def test_other_errors_of_workers_are_not_hidden(
    mixture_of: Callable[..., DomainMixture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in a reader is not called a lack of memory."""

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        next(mixture_of(num_workers=1))


# --- construction -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        (
            "batch_rows = 12 rows cannot be dealt evenly to 5 processes; use a positive",
            {"rank": 0, "world_size": 5},
        ),
        ("batch_rows = 0, block_rows = 8192", {"batch_rows": 0}),
        ("rank = 2 of 2 processes", {"rank": 2, "world_size": 2}),
        ("rank = 0 of 0 processes", {"rank": 0, "world_size": 0}),
        ("rank = None, world_size = 2; give both", {"world_size": 2}),
        ("num_workers = -1", {"num_workers": -1}),
        ("prefetch_steps = 0", {"num_workers": 1, "prefetch_steps": 0}),
        ("unknown domains ['web']", {"weights": {**START, "web": 1.0}}),
    ],
)
def test_wrong_arguments_are_refused(
    mixture_of: Callable[..., DomainMixture], expected: str, options: dict[str, Any]
) -> None:
    """In one line with the value, before anything is read."""
    with pytest.raises(ConfigError) as info:
        mixture_of(**options)
    assert expected in str(info.value)
    assert "\n" not in str(info.value)


def test_rows_of_different_length_are_refused(rows: Rows) -> None:
    """A batch is a rectangle."""
    longer = replace(rows["math"], shards=tuple(replace(s, seq_len=32) for s in rows["math"].shards))
    with pytest.raises(DataError, match=r"seq_len by domain: \{'code': 16, 'math': 32\}"):
        DomainMixture({"code": rows["code"], "math": longer}, batch_rows=12)
    with pytest.raises(DataError, match="domains must have rows of one length"):
        DomainMixture({}, batch_rows=12)


def test_weights_default_to_rows_or_priors(rows: Rows) -> None:
    """Proportional to the rows there are; to the cards' priors when every card has one."""
    mixture = DomainMixture(rows, batch_rows=12)
    total = sum(domain.num_rows for domain in rows.values())
    by_rows = {name: domain.num_rows / total for name, domain in rows.items()}
    assert by_rows == pytest.approx(mixture.weights, abs=1e-9)
    priors = {name: replace(rows[name], prior=p) for name, p in zip(DOMAINS, (1.0, 1.0, 2.0), strict=True)}
    assert {"code": 0.25, "math": 0.25, "prose": 0.5} == DomainMixture(priors, batch_rows=12).weights
    one_without = {**priors, "code": rows["code"]}
    assert by_rows == pytest.approx(DomainMixture(one_without, batch_rows=12).weights, abs=1e-9)


def test_counters_follow_the_loop_and_not_the_prefetch(
    rows: Rows, mixture_of: Callable[..., DomainMixture]
) -> None:
    """After two batches 24 rows are served, whatever workers have read ahead."""
    mixture = mixture_of(num_workers=2, prefetch_steps=4)
    assert {"code": 0, "math": 0, "prose": 0} == mixture.served
    assert mixture is iter(mixture)
    next(mixture)
    next(mixture)
    assert 24 == sum(mixture.served.values())
    assert 2 == mixture.state.step
    assert mixture.served["code"] / rows["code"].num_rows == mixture.epochs["code"]


def test_cards_become_a_mixture(folder: Path, names: Names, tokenizer_folder: Path, tmp_path: Path) -> None:
    """One call from YAML to batches: it packs what the cache lacks, and the rows are the same."""
    mixture = DomainMixture.from_cards(
        str(folder),
        tokenizer=str(tokenizer_folder),
        seq_len=SEQ_LEN,
        batch_rows=12,
        cache_dir=tmp_path / "cache",
        weights=START,
        max_epochs=2.0,
    )
    found = names_in(next(mixture), names)
    assert 12 == len(found)
    packed = sorted(path.name.split("-")[0] for path in (tmp_path / "cache" / "rows").iterdir())
    assert ["code", "math", "prose"] == packed


# --- documents kept apart ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_positions_restart_at_every_document(
    rows: Rows, mixture_of: Callable[..., DomainMixture], num_workers: int
) -> None:
    """On request: a separator, here token 0, begins a segment at position 0; every other token counts on."""
    plain = next(mixture_of(num_workers=num_workers))
    batch = next(mixture_of(num_workers=num_workers, document_boundaries=True))
    assert "position_ids" not in plain
    assert plain["input_ids"].tolist() == batch["input_ids"].tolist()
    assert torch.int64 == batch["position_ids"].dtype
    assert {0} == {domain.padding_id for domain in rows.values()}
    restarts = 0
    for tokens, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
        expected = -1
        for i, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            expected = 0 if token == 0 or i == 0 else expected + 1
            assert expected == position
            restarts += token == 0
    assert restarts > 0


def test_cards_take_the_strategy_of_packing(folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Best fit pads where concatenation fills, so the domains have more rows."""
    counts = {}
    for strategy in ("concatenate", "best_fit"):
        mixture = DomainMixture.from_cards(
            str(folder),
            tokenizer=str(tokenizer_folder),
            seq_len=128,
            batch_rows=2,
            cache_dir=tmp_path / "cache",
            strategy=strategy,
        )
        counts[strategy] = sum(mixture.settings.num_rows)
        next(mixture)
        mixture.close()
    assert counts["concatenate"] < counts["best_fit"]


# --- steps in parts, and public types ---------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_parts_of_a_step_are_its_rows_dealt_out(
    names: Names, mixture_of: Callable[..., DomainMixture], num_workers: int
) -> None:
    """However many parts are asked for, from step to step, the rows are those of whole batches."""
    mixture, whole = mixture_of(num_workers=num_workers), mixture_of()
    for parts in (1, 3, 3, 2, 4, 1):
        batch = next(whole)
        dealt = mixture.next_parts(parts)
        assert parts == len(dealt)
        for part, micro in enumerate(dealt):
            assert torch.equal(batch["input_ids"][part::parts], micro["input_ids"])
            assert torch.equal(batch["labels"][part::parts], micro["labels"])
    assert whole.state == mixture.state


def test_a_loader_of_packed_rows_has_what_transformers_takes(
    mixture_of: Callable[..., DomainMixture],
) -> None:
    """input_ids and labels; `domain_ids` on request only, because models refuse what they do not know."""
    mixture = mixture_of()
    batch = next(iter(mixture.loader(microbatches=2)))
    assert {"input_ids": (6, 16), "labels": (6, 16)} == {k: tuple(v.shape) for k, v in batch.items()}
    batch = next(iter(mixture_of().loader(microbatches=2, domain_ids=True)))
    assert (6,) == tuple(batch["domain_ids"].shape)


def test_no_plan_is_left_from_before_a_load(mixture_of: Callable[..., DomainMixture]) -> None:
    """`last_plan` belongs to the last batch, and after a load there is none."""
    mixture = mixture_of()
    next(mixture)
    mixture.load_state_dict(mixture.state_dict())
    assert mixture.last_plan is None


USER = """
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ddkmix import DomainLosses, DomainMixture, GapEvaluator, MixtureBatchSampler, Reweighter, StepLoader
from ddkmix import domain_indices, reweight


class Items(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(i + 2)}


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.cat([item["input_ids"] for item in items])}


model = nn.Linear(1, 1)
mixture = DomainMixture.from_datasets(
    {"code": Items(), "math": [{"input_ids": torch.ones(2)}]},
    batch_rows=4,
    num_tokens={"code": np.arange(10), "math": [1]},
    collate_fn=collate,
    max_epochs=3,
    on_cap="stop",
)
lists = DomainMixture.from_datasets({"code": [1, 2], "math": (3, 4)}, batch_rows=2)
evaluator = GapEvaluator({"code": Items(), "math": Items()}, reference={"code": 1.0, "math": 2}, rows=5)
reweighter = Reweighter(mixture, evaluator, {"name": "ddk", "signal": "loss_gap"}, interval_steps=10)
loader: StepLoader = mixture.loader(steps=3, microbatches=2, device="cpu")
for batch in loader:
    losses: DomainLosses | None = reweighter.step(model, mixture.state.step)
mixture.set_weights({"code": 1, "math": 2.5})
state: dict[str, Any] = reweighter.state_dict()
changes: list[str] = reweighter.load_state_dict(state, allow_changes=True)
numbers: dict[str, float] = reweighter.metrics()
sampler = MixtureBatchSampler(domain_indices(["code", "math"]), batch_rows=2)
for batch in sampler.follow(DataLoader(Items(), batch_sampler=sampler)):
    pass
Reweighter(sampler, None).update(DomainLosses.from_means({"code": 1.0, "math": 2.0}))
weights, memory = reweight("ddk", DomainLosses.from_means({"code": 1.0, "math": 2.0}))
share: float = weights["code"]
"""
WRONG = """
from ddkmix import DomainMixture, MixtureBatchSampler

DomainMixture.from_datasets({"code": [1, 2]}, batch_rows="two")
DomainMixture.from_datasets({"code": [1, 2]}, batch_rows=2, on_cap="never")
DomainMixture.from_datasets({"code": [1, 2]}, batch_rows=2, unknown=1)
DomainMixture.from_datasets({"code": iter([1, 2])}, batch_rows=2)
MixtureBatchSampler({"code": ["a"]}, batch_rows=2)
"""


def test_users_may_check_their_types(tmp_path: Path) -> None:
    """A program of every public name passes mypy's strict mode, and each of five mistakes is found."""
    from mypy import api

    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(USER)
    wrong.write_text(WRONG)
    root = Path(__file__).parents[1]
    # the settings and the cache of `make check`: torch is not read anew, which takes a minute and a half
    options = ["--config-file", str(root / "pyproject.toml"), "--cache-dir", str(root / ".mypy_cache")]
    output, problems, _ = api.run([*options, str(right), str(wrong)])
    errors = [line for line in output.splitlines() if ": error:" in line]
    assert "" == problems
    assert [] == [line for line in errors if "right.py" in line]
    assert [4, 5, 6, 7, 8] == sorted({int(line.split(":")[1]) for line in errors if "wrong.py" in line})

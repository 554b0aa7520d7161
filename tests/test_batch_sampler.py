"""Indices for somebody else's DataLoader: exact with `follow`, whatever the loader reads ahead."""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ddkmix import DomainMixture, MixtureBatchSampler, domain_indices
from ddkmix.batch_sampler import _Sent
from ddkmix.errors import ConfigError, DataError, RunError
from ddkmix.planner import PlannerState
from tests.reference_loop import (
    ACTIONS,
    BATCH_ROWS,
    COUNTS,
    DATASETS,
    INDICES,
    OPTIONS,
    SCRIPTS,
    SEED,
    Script,
    expected,
    items_in,
    play,
    weights_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
DATASET = list(range(16))
"""Items of three domains, each its own number."""


class ReadingAhead:
    """What a DataLoader with workers does to its batch sampler: asks `ahead` batches before it gives one."""

    def __init__(self, sampler: MixtureBatchSampler, ahead: int) -> None:
        self.sampler, self.ahead = sampler, ahead

    def __iter__(self) -> Iterator[list[int]]:
        asked, under_way = iter(self.sampler), deque[list[int]]()
        while True:
            while len(under_way) <= self.ahead and (indices := next(asked, None)) is not None:
                under_way.append(indices)
            if not under_way:
                return
            yield [DATASET[i] for i in under_way.popleft()]


def sampler_of(kind: type[MixtureBatchSampler] = MixtureBatchSampler, **options: Any) -> MixtureBatchSampler:
    """A sampler over the three domains."""
    return kind(INDICES, **{"batch_rows": BATCH_ROWS, "seed": SEED, **options})


def followed(
    script: Script, ahead: int, kind: type[MixtureBatchSampler] = MixtureBatchSampler, **options: Any
) -> list[Any]:
    """What the loop of `follow` receives from a loader that reads ahead."""
    sampler = sampler_of(kind, **options)
    return play(lambda: sampler.follow(ReadingAhead(sampler, ahead)), sampler, script)


# --- follow: the same as a mixture that reads its own rows ------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=150)
@given(script=SCRIPTS, ahead=st.integers(0, 7), options=OPTIONS)
def test_the_loop_receives_what_the_planner_says(script: Script, ahead: int, options: dict[str, Any]) -> None:
    """Weights set, iterations left, states loaded at any micro-batch; also at the end of the run or of the
    domains: every batch and every state is that of a loop that plans a step when it is asked for it."""
    assert expected(script, **options) == followed(script, ahead, **options)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(script=SCRIPTS, ahead=st.integers(0, 5), options=OPTIONS)
def test_the_loop_receives_what_a_mixture_of_own_datasets_gives(
    script: Script, ahead: int, options: dict[str, Any]
) -> None:
    """`DomainMixture.from_datasets` over the same items, driven by the same calls."""
    options = dict(options)
    ours = {"microbatches": options.pop("microbatches"), "steps": options.pop("steps", None)}
    mixture = DomainMixture.from_datasets(
        DATASETS, batch_rows=BATCH_ROWS, seed=SEED, collate_fn=list, **options
    )
    loader = mixture.loader(**ours)
    own = play(lambda: iter(loader), mixture, script)
    assert own == followed(script, ahead, **ours, **options)


class KeepsStale(MixtureBatchSampler):
    """A saboteur that gives what was read under older weights."""

    def _rewind(self, state: PlannerState) -> None:
        sent, self._sent = self._sent, deque()
        super()._rewind(state)
        self._sent = sent


class LosesRest(MixtureBatchSampler):
    """A saboteur that forgets the rest of a step that was left in the middle."""

    def _take(self, sent: Any) -> None:
        super()._take(sent)
        self._rest = []


class KeepsRest(MixtureBatchSampler):
    """A saboteur that goes on with the rest of a step after another state was loaded."""

    def load_state_dict(self, state: Any, *, allow_changes: bool = False) -> list[str]:
        """Keeps the rest."""
        rest = self._rest
        changes = super().load_state_dict(state, allow_changes=allow_changes)
        self._rest = rest
        return changes


class SaysWhatWasAsked(MixtureBatchSampler):
    """A saboteur whose state is what the loader has asked for."""

    @property
    def state(self) -> PlannerState:
        """Of the loader."""
        return self._plans.consumed


class NeverGoesOn(MixtureBatchSampler):
    """A saboteur that believes the loader's end."""

    def _goes_on(self) -> bool:
        return False


class KeepsAsking(MixtureBatchSampler):
    """A saboteur that goes on in the middle of a step that is planned anew."""

    def _batches(self, state: Any, plan: Any, parts: Any) -> Iterator[list[int]]:
        for i, part in enumerate(parts):
            self._sent.append(_Sent(state, plan, parts[i + 1 :]))
            yield part


@pytest.mark.parametrize(
    "saboteur", [KeepsStale, LosesRest, KeepsRest, SaysWhatWasAsked, NeverGoesOn, KeepsAsking]
)
def test_the_property_notices_samplers_that_are_wrong(saboteur: type[MixtureBatchSampler]) -> None:
    """Each of them gives other batches or states within a few hundred random scripts."""
    generator = random.Random(0)
    actions = ["break", "save", "load", 0, 1, 2, 3, 4]
    for _ in range(300):
        script = [generator.choices(actions, k=generator.choice([0, 0, 1, 2])) for _ in range(20)]
        options = {"microbatches": generator.choice([1, 2, 3]), "steps": generator.choice([3, 6])}
        if expected(script, **options) != followed(script, generator.randrange(6), saboteur, **options):
            return
    pytest.fail("nobody noticed")


@settings(deadline=None, derandomize=True, max_examples=30)
@given(script=st.lists(st.lists(ACTIONS, max_size=1), min_size=6, max_size=18), ahead=st.integers(0, 4))
def test_every_rank_gets_its_share_of_the_same_steps(script: Script, ahead: int) -> None:
    """Three ranks that make the same calls, each with a loader of its own."""
    for rank in range(3):
        options = {"rank": rank, "world_size": 3, "microbatches": 2}
        assert expected(script, **options) == followed(script, ahead + rank, **options)


LIVELY: Script = [
    [],
    [1],
    [],
    ["save"],
    ["break"],
    [],
    [4, "break"],
    [],
    ["load"],
    [],
    [2],
    [],
    ["break"],
    [],
]


@pytest.mark.parametrize(
    "loading",
    [
        {},
        {"num_workers": 1, "prefetch_factor": 3},
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True},
    ],
    ids=["in the loop", "one worker", "two workers", "persistent workers"],
)
@pytest.mark.parametrize("microbatches", [1, 3])
def test_the_same_with_a_real_dataloader(loading: dict[str, Any], microbatches: int) -> None:
    """torch's own, constructed once and iterated again and again."""
    sampler = sampler_of(microbatches=microbatches, steps=6)
    loader: DataLoader[int] = DataLoader(DATASET, batch_sampler=sampler, **loading)  # type: ignore[arg-type]
    wanted = expected(LIVELY, microbatches=microbatches, steps=6)
    assert wanted == play(lambda: sampler.follow(loader), sampler, LIVELY)


def test_a_weight_change_at_the_last_step_reaches_the_steps_after_a_resume() -> None:
    """The loader has come to its end; what was set there is in the state."""
    sampler = sampler_of(steps=2)
    for _ in sampler.follow(ReadingAhead(sampler, 3)):
        if sampler.state.step == 2:
            sampler.set_weights(weights_of(1))
    assert {"code": 1.0, "math": 0.0, "prose": 0.0} == pytest.approx(sampler.weights)


def test_what_the_loop_sees_is_what_it_has_received() -> None:
    """Weights, plan, served rows and saved state do not run ahead with the loader."""
    sampler = sampler_of(max_epochs=1.0)
    for step, batch in enumerate(sampler.follow(ReadingAhead(sampler, 1)), start=1):
        assert step == sampler.state.step == sampler.state_dict()["planner"]["step"]
        assert sampler.last_plan is not None
        assert step - 1 == sampler.last_plan.step
        assert sorted(batch) == sorted(int(name.split("#")[1]) for name in plan_items(sampler))
        assert step * BATCH_ROWS == sum(sampler.served.values())
        assert min(sampler.weights.values()) > 0  # at the caps only after the second step
        break
    assert step == 1


def plan_items(sampler: MixtureBatchSampler) -> list[str]:
    """The last plan's rows as items of the dataset."""
    assert sampler.last_plan is not None
    names = sampler.row_names(sampler.last_plan)
    return [f"all#{INDICES[name.split('#')[0]][int(name.split('#')[1])]}" for name in names]


def test_an_item_that_cannot_be_read_may_be_asked_for_again() -> None:
    """The dataset raises once in the middle of a step; nothing of the step is lost or comes twice."""

    class Flaky:
        failed = False

        def __getitem__(self, i: int) -> int:
            if not self.failed and len(found) == 4:
                self.failed = True
                raise OSError("gone for a moment")
            return DATASET[i]

        def __len__(self) -> int:
            return len(DATASET)

    sampler = sampler_of(microbatches=3, steps=4)
    loader: Any = DataLoader(Flaky(), batch_sampler=sampler)  # type: ignore[arg-type,type-var]
    found: list[list[int]] = []
    with pytest.raises(OSError, match="gone for a moment"):
        for batch in sampler.follow(loader):
            found.append(items_in(batch))
    for batch in sampler.follow(loader):
        found.append(items_in(batch))
    assert expected([[]] * 12, microbatches=3, steps=4)[::2] == found


def test_a_loader_that_stops_early_is_taken_up_where_it_stopped() -> None:
    """What it had asked for beyond its own end is not lost."""
    from itertools import islice

    sampler = sampler_of(steps=6)
    found = [
        items_in(batch) for _ in range(3) for batch in sampler.follow(islice(ReadingAhead(sampler, 3), 2))
    ]
    assert expected([[]] * 6, steps=6)[::2] == found


def test_nothing_piles_up_without_follow() -> None:
    """A plain run keeps no list of what it has given."""
    sampler = sampler_of(steps=500)
    assert 500 == len(list(sampler))
    assert 0 == len(sampler._sent)


def test_iterating_again_begins_anew_after_a_follow_that_was_left_open() -> None:
    """Of two followers the last counts, and closing the first does not take it back."""
    sampler = sampler_of(steps=6)
    first = sampler.follow(ReadingAhead(sampler, 2))
    found = [items_in(next(first))]
    second = sampler.follow(ReadingAhead(sampler, 2))
    found.append(items_in(next(second)))
    first.close()
    found += [items_in(batch) for batch in second]
    assert expected([[]] * 6, steps=6)[::2] == found


# --- without follow ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_rows_are_exact_in_the_order_asked_for(workers: int, microbatches: int) -> None:
    """A plain DataLoader over a run without changes."""
    sampler = sampler_of(microbatches=microbatches, steps=5)
    loader: DataLoader[int] = DataLoader(DATASET, batch_sampler=sampler, num_workers=workers)  # type: ignore[arg-type]
    assert 5 * microbatches == len(loader) == len(sampler)
    wanted = expected([[]] * 5 * microbatches, microbatches=microbatches, steps=5)[::2]
    assert wanted == [items_in(batch) for batch in loader]


@pytest.mark.parametrize("received", [1, 4, 5, 9])
def test_the_state_of_an_earlier_step_is_right(received: int) -> None:
    """A loop that knows how many steps it has had saves that one, however far the loader is."""
    sampler = sampler_of()
    reading = iter(ReadingAhead(sampler, 7))
    found = [next(reading) for _ in range(received)]
    wanted = expected([[]] * 20)[::2]
    assert (wanted[:received], received + 7) == (found, sampler.state.step)
    again = sampler_of()
    again.load_state_dict(sampler.state_dict(received))
    rest = iter(again)
    assert wanted[received:] == [next(rest) for _ in range(20 - received)]


def test_a_step_that_was_left_in_the_middle_is_finished() -> None:
    """Also without `follow`, and also when weights were set meanwhile."""
    sampler = sampler_of(microbatches=3)
    wanted = expected([[], [1], *[[]] * 7], microbatches=3)[::2]
    found = [items_in(batch) for batch, _ in zip(sampler, range(2), strict=False)]
    sampler.set_weights(weights_of(1))
    assert 1 == sampler.state.step
    found += [items_in(batch) for batch, _ in zip(sampler, range(7), strict=False)]
    # zip has asked for one more before it saw its end: the loop knows that, and the first is not repeated
    assert wanted[:2] == found[:2]
    assert all(0 <= item < 7 for batch in found[3:] for item in batch)


def test_steps_that_were_taken_back_are_no_longer_known() -> None:
    """The state of a step that will be planned anew is not handed out."""
    sampler = sampler_of()
    follow = sampler.follow(ReadingAhead(sampler, 5))
    next(follow)
    sampler.set_weights(weights_of(1))
    with pytest.raises(ConfigError, match=r"state_dict\(step=3\): known steps are \[0, 1\]"):
        sampler.state_dict(3)


# --- arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected_message", "options"),
    [
        ("microbatches = 0; both must be at least 1", {"microbatches": 0}),
        ("steps = 0, microbatches = 1", {"steps": 0}),
        ("cannot be dealt into 5 equal micro-batches; make batch_rows a multiple of 5", {"microbatches": 5}),
        ("cannot be dealt evenly to 5 processes", {"rank": 0, "world_size": 5}),
        ("give both or neither", {"rank": 0}),
    ],
)
def test_wrong_settings_are_one_line(expected_message: str, options: dict[str, Any]) -> None:
    """Before anything is sampled."""
    with pytest.raises(ConfigError) as info:
        sampler_of(**options)
    assert expected_message in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("expected_message", "items"),
    [
        (
            "must be whole numbers and holds bool; of a mask, give numpy.flatnonzero(mask)",
            [True, False, True],
        ),
        ("must be a list of item numbers >= 0", [3, -1]),
    ],
)
def test_indices_that_would_mean_something_else_are_refused(expected_message: str, items: Any) -> None:
    """A mask read as the numbers 0 and 1 would train on two items."""
    with pytest.raises(ConfigError) as info:
        MixtureBatchSampler({"code": items}, batch_rows=2)
    assert expected_message in str(info.value)


def test_a_domain_without_items_is_refused() -> None:
    """A data error, as for packed rows."""
    with pytest.raises(DataError, match=r"domains \['math'\] have no rows"):
        MixtureBatchSampler({"code": [1], "math": []}, batch_rows=2)


@pytest.mark.parametrize("items", [range(5), np.arange(5, dtype=np.int32), [0, 1, 2, 3, 4]])
def test_indices_may_be_any_list_of_numbers(items: Sequence[int]) -> None:
    """What they are in does not matter to the state."""
    sampler = MixtureBatchSampler({"code": items}, batch_rows=5)
    sampler.load_state_dict(MixtureBatchSampler({"code": range(5)}, batch_rows=5).state_dict())
    assert [0, 1, 2, 3, 4] == sorted(next(iter(sampler)))


def test_other_indices_are_another_stream() -> None:
    """A state of other items is refused, and followed on request."""
    state = sampler_of().state_dict()
    other = MixtureBatchSampler({**INDICES, "code": range(1, 8)}, batch_rows=BATCH_ROWS, seed=SEED)
    with pytest.raises(DataError, match="the data of domain 'code' changed"):
        other.load_state_dict(state)
    assert 1 == len(other.load_state_dict(state, allow_changes=True))


def test_a_sampler_without_steps_has_no_length() -> None:
    """As Python asks, so that `list` and DataLoader know."""
    with pytest.raises(TypeError, match="give it steps"):
        len(sampler_of())


@pytest.mark.parametrize("what", ["another sampler", "out of order"])
def test_a_loader_that_follow_cannot_know_is_refused(what: str) -> None:
    """At once, not when rows are missing."""
    sampler = sampler_of(steps=2)
    loader: Any = DataLoader(DATASET, batch_size=2)  # type: ignore[arg-type]
    if what == "out of order":
        loader = DataLoader(DATASET, batch_sampler=sampler, num_workers=1, in_order=False)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="Construct it with batch_sampler=sampler"):
        next(sampler.follow(loader))


def test_batches_that_nobody_named_are_refused() -> None:
    """A loader without a batch sampler to look at."""
    sampler = sampler_of(steps=2)
    with pytest.raises(RunError, match="gives batches that this sampler did not name"):
        next(sampler.follow([[1, 2], [3, 4]]))


def test_domains_from_a_column() -> None:
    """Whatever the column is made of; every item is in one domain."""
    column = ["prose", "code", "code", "math", "prose"]
    for labels in (column, np.array(column), tuple(column)):
        found = {name: items.tolist() for name, items in domain_indices(labels).items()}
        assert {"code": [1, 2], "math": [3], "prose": [0, 4]} == found


def test_a_million_items_open_at_once() -> None:
    """Nothing is done per item but a hash of their numbers."""
    sampler = MixtureBatchSampler(
        {"code": range(1_000_000), "math": range(1_000_000, 1_000_010)}, batch_rows=64
    )
    assert 64 == len(next(iter(sampler)))


def test_domains_of_the_counts_are_those_of_the_indices() -> None:
    """The reference loop speaks of the same items."""
    assert {name: len(items) for name, items in INDICES.items()} == COUNTS

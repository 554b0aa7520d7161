"""Micro-batches for loops that are not ours: no row lost or repeated, whatever the loop does in between."""

import random
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from ddkmix import DomainMixture, StepLoader
from ddkmix.errors import ConfigError, DataError, RunError
from tests.reference_loop import (
    BATCH_ROWS,
    COUNTS,
    DATASETS,
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
PLAIN: Script = [[]] * 12


@pytest.fixture
def mixture_of() -> Iterator[Callable[..., DomainMixture]]:
    """A function that makes mixtures of the three datasets; their workers end with the test."""
    made: list[DomainMixture] = []

    def make(**options: Any) -> DomainMixture:
        options = {"batch_rows": BATCH_ROWS, "seed": SEED, "collate_fn": list, **options}
        made.append(DomainMixture.from_datasets(DATASETS, **options))
        return made[-1]

    yield make
    for mixture in made:
        mixture.close()


def own_mixture(**options: Any) -> DomainMixture:
    """A mixture without workers."""
    return DomainMixture.from_datasets(DATASETS, batch_rows=BATCH_ROWS, seed=SEED, collate_fn=list, **options)


def received(script: Script, kind: type[StepLoader] = StepLoader, **options: Any) -> list[Any]:
    """What the loop of a `StepLoader` receives."""
    ours = {name: options.pop(name) for name in ("steps", "microbatches") if name in options}
    mixture = own_mixture(**options)
    loader = kind(mixture, **ours)
    return play(lambda: iter(loader), mixture, script)


@settings(deadline=None, derandomize=True, max_examples=120)
@given(script=SCRIPTS, options=OPTIONS)
def test_the_loop_receives_what_the_planner_says(script: Script, options: dict[str, Any]) -> None:
    """Weights set between any two micro-batches, iterations left and taken up again, states saved and loaded,
    domains that are used up: a step in hand stays whole, the next one follows."""
    assert expected(script, **options) == received(script, **options)


class DropsRest(StepLoader):
    """A saboteur that begins each iteration with a new step."""

    def __iter__(self) -> Iterator[Any]:
        self._rest.clear()
        yield from super().__iter__()


class KeepsRest(StepLoader):
    """A saboteur that goes on with a step after another state was loaded."""

    def _is_within_step(self) -> bool:
        return bool(self._rest)


class OneStepMore(StepLoader):
    """A saboteur that counts from one."""

    def _next_step(self) -> bool:
        steps, self.steps = self.steps, self.steps + 1  # type: ignore[operator]
        more = super()._next_step()
        self.steps = steps
        return more


@pytest.mark.parametrize("saboteur", [DropsRest, KeepsRest, OneStepMore])
def test_the_property_notices_loaders_that_are_wrong(saboteur: type[StepLoader]) -> None:
    """Each of them gives other micro-batches within a hundred random scripts."""
    generator = random.Random(0)
    for _ in range(100):
        actions = ["break", "save", "load", 0, 1, 2, 3, 4]
        script = [generator.choices(actions, k=generator.choice([0, 0, 1])) for _ in range(20)]
        options = {"microbatches": generator.choice([1, 2, 3]), "steps": generator.choice([3, 6])}
        if expected(script, **options) != received(script, saboteur, **options):
            return
    pytest.fail("nobody noticed")


LIVELY: Script = [
    *([], [1], [], ["save"], ["break"], [], [4, "break"], []),
    *(["load"], [], [2], [], ["break"], [], [0], []),
]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_workers_change_nothing(
    mixture_of: Callable[..., DomainMixture], num_workers: int, microbatches: int
) -> None:
    """Whatever they have read ahead when weights change, a loop breaks off or a state is loaded."""
    mixture = mixture_of(num_workers=num_workers)
    loader = mixture.loader(steps=6, microbatches=microbatches)
    wanted = expected(LIVELY, steps=6, microbatches=microbatches)
    assert wanted == play(lambda: iter(loader), mixture, LIVELY)


@pytest.mark.parametrize("on_cap", ["stop", "error"])
def test_the_end_of_a_domain_comes_when_the_loop_gets_there(
    mixture_of: Callable[..., DomainMixture], on_cap: str
) -> None:
    """Two workers have seen it long before; every whole step is served first."""
    wanted = expected(PLAIN, microbatches=3, max_epochs=1.0, on_cap=on_cap)
    mixture = mixture_of(num_workers=2, max_epochs=1.0, on_cap=on_cap)
    loader = mixture.loader(microbatches=3)
    assert wanted == play(lambda: iter(loader), mixture, PLAIN)
    assert {"stop": "end", "error": "error"}[on_cap] in wanted


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_of_one_mixture_share_its_steps(
    mixture_of: Callable[..., DomainMixture], num_workers: int
) -> None:
    """One in the middle of a step with three micro-batches, another with two, in turn: every row once, and
    each step whole; what workers had collated for the other one is collated anew."""
    mixture = mixture_of(num_workers=num_workers)
    three, two = iter(mixture.loader(microbatches=3)), iter(mixture.loader(microbatches=2))
    steps: list[list[int]] = [[], [], []]
    for loader, step, size in (
        *((three, 0, 4), (two, 1, 6), (three, 0, 4), (three, 0, 4)),
        *((three, 2, 4), (two, 1, 6), (three, 2, 4), (three, 2, 4)),
    ):
        batch = items_in(next(loader))
        assert size == len(batch)
        steps[step] += batch
    wanted = expected(PLAIN)[::2]
    assert [sorted(step) for step in wanted[:3]] == [sorted(step) for step in steps]


def test_a_loader_left_open_gives_its_rest_after_others_have_taken_steps(
    mixture_of: Callable[..., DomainMixture],
) -> None:
    """Rows that the mixture counts as served are not dropped."""
    mixture = mixture_of()
    loader = mixture.loader(microbatches=2)
    found = items_in(next(iter(loader)))
    next(mixture)
    found += items_in(next(iter(loader)))
    assert sorted(expected(PLAIN)[0]) == sorted(found)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_microbatches_may_change_between_steps(
    mixture_of: Callable[..., DomainMixture], num_workers: int
) -> None:
    """The rows of each step stay; only how they are dealt changes."""
    mixture = mixture_of(num_workers=num_workers)
    loader, found = mixture.loader(), []
    for microbatches in (1, 3, 2, 2, 1):
        loader.microbatches = microbatches
        parts = [items_in(part) for _, part in zip(range(microbatches), loader, strict=False)]
        found.append([parts[i % microbatches][i // microbatches] for i in range(BATCH_ROWS)])
    assert expected([[]] * 5)[::2] == found


# --- states -----------------------------------------------------------------------------------------


def test_the_state_of_a_loader_is_that_of_whole_steps(mixture_of: Callable[..., DomainMixture]) -> None:
    """In the middle of a step it is the one before, and whoever loads it gets the whole step."""
    mixture = mixture_of()
    loader = mixture.loader(microbatches=3)
    wanted = expected(PLAIN, microbatches=3)[::2]
    iteration = iter(loader)
    for received, step in zip(range(1, 10), (0, 0, 1, 1, 1, 2, 2, 2, 3), strict=True):
        next(iteration)
        state = loader.state_dict()
        assert step == state["planner"]["step"]
        other = mixture_of().loader(microbatches=3)
        other.load_state_dict(state)
        again = iter(other)
        assert wanted[3 * step : 3 * step + 3] == [items_in(next(again)) for _ in range(3)], received


def test_weights_set_within_a_step_are_in_no_state_before_it(
    mixture_of: Callable[..., DomainMixture],
) -> None:
    """Refused rather than lost; at the end of the step they are there."""
    loader = mixture_of().loader(microbatches=2)
    iteration = iter(loader)
    next(iteration)
    loader.mixture.set_weights(weights_of(1))
    with pytest.raises(RunError, match=r"set between two micro-batches of step 1, .* save after its last"):
        loader.state_dict()
    next(iteration)
    assert 1 == loader.state_dict()["planner"]["version"]


def test_a_loaded_state_ends_the_step_in_hand(mixture_of: Callable[..., DomainMixture]) -> None:
    """Also when it is the mixture's, loaded while the loop runs, with the same number of steps."""
    mixture = mixture_of()
    loader = mixture.loader(microbatches=3)
    iteration = iter(loader)
    first = items_in(next(iteration))
    mixture.load_state_dict(mixture_of().state_dict())
    assert first == items_in(next(iteration))


# --- length, end, errors ----------------------------------------------------------------------------


def test_the_length_is_that_of_the_whole_run(mixture_of: Callable[..., DomainMixture]) -> None:
    """Frameworks count epochs by it; a resumed loader yields fewer."""
    mixture = mixture_of()
    loader = mixture.loader(steps=5, microbatches=2)
    assert (10, 10) == (len(loader), len(list(loader)))
    assert (10, 0) == (len(loader), len(list(loader)))
    assert 4 == len(list(mixture.loader(steps=7, microbatches=2)))
    with pytest.raises(TypeError, match=r"give steps to DomainMixture\.loader"):
        len(mixture.loader())


@pytest.mark.parametrize(
    ("expected_message", "options"),
    [
        ("steps = None, microbatches = 0; both must be at least 1", {"microbatches": 0}),
        ("steps = 0, microbatches = 1", {"steps": 0}),
        (
            "12 rows a step are 12 for each of 1 processes and cannot be dealt into 5 equal",
            {"microbatches": 5},
        ),
    ],
)
def test_wrong_arguments_are_one_line(
    mixture_of: Callable[..., DomainMixture], expected_message: str, options: dict[str, Any]
) -> None:
    """Before a row is read."""
    with pytest.raises(ConfigError) as info:
        mixture_of().loader(**options)
    assert expected_message in str(info.value)
    assert "\n" not in str(info.value)


def test_micro_batches_must_be_equal_on_every_rank(mixture_of: Callable[..., DomainMixture]) -> None:
    """12 rows on 2 ranks are 6 each: 3 parts, not 4."""
    mixture = mixture_of(rank=1, world_size=2)
    assert 2 == len(next(iter(mixture.loader(microbatches=3))))
    with pytest.raises(ConfigError, match="make batch_rows a multiple of 8"):
        mixture.loader(microbatches=4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_step_that_cannot_be_read_is_asked_for_again(num_workers: int) -> None:
    """An item fails while a file is away; the loop goes on with the very step when it is back."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        datasets = {name: NeedsFile(items, Path(folder) / "file") for name, items in DATASETS.items()}
        (Path(folder) / "file").touch()
        mixture = DomainMixture.from_datasets(
            datasets, batch_rows=BATCH_ROWS, seed=SEED, collate_fn=list, num_workers=num_workers
        )
        loader = mixture.loader(microbatches=2, steps=20)
        found = [items_in(batch) for batch, _ in zip(loader, range(3), strict=False)]
        (Path(folder) / "file").unlink()
        with pytest.raises(DataError, match=r"datasets\['.*'\]\[\d+\] cannot be read \(FileNotFoundError: "):
            for batch in loader:  # what workers have read ahead is still given
                found.append(items_in(batch))
        (Path(folder) / "file").touch()
        found += [items_in(batch) for batch in loader]
        mixture.close()
    wanted = expected([[]] * 40, microbatches=2, steps=20)[::2]
    # zip asks for a fourth micro-batch before it sees its own end
    assert wanted[:3] + wanted[4:] == found


class NeedsFile:
    """Items that can be read while a file is there."""

    def __init__(self, items: Any, file: Any) -> None:
        self.items, self.file = items, file

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> int:
        self.file.read_bytes()
        return int(self.items[i])


# --- domain ids and devices -------------------------------------------------------------------------


def as_dict(items: list[int]) -> dict[str, Any]:
    """A batch with a name."""
    return {"items": torch.tensor(items), "names": [str(item) for item in items]}


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("ranks", [{}, {"rank": 1, "world_size": 2}])
def test_domain_ids_belong_to_the_rows_of_each_micro_batch(
    mixture_of: Callable[..., DomainMixture], microbatches: int, ranks: dict[str, int]
) -> None:
    """Items below 7 are code's, below 12 math's."""
    loader = mixture_of(collate_fn=as_dict, **ranks).loader(
        steps=4, microbatches=microbatches, domain_ids=True
    )
    batches = list(loader)
    assert 4 * microbatches == len(batches)
    for batch in batches:
        assert torch.int64 == batch["domain_ids"].dtype
        wanted = [0 if item < 7 else 1 if item < 12 else 2 for item in batch["items"].tolist()]
        assert wanted == batch["domain_ids"].tolist()


def test_domain_ids_need_a_dict(mixture_of: Callable[..., DomainMixture]) -> None:
    """What was asked for is not left out without a word."""
    with pytest.raises(ConfigError, match="domain_ids = True and batches are lists; let collate_fn give"):
        next(iter(mixture_of().loader(domain_ids=True)))


Pair = namedtuple("Pair", ["items", "more"])


def nested(items: list[int]) -> Any:
    """Tensors inside a named tuple, a list and a dict."""
    return Pair(torch.tensor(items), [{"x": torch.tensor(items), "name": "code"}])


def test_a_batch_is_moved_whatever_its_tensors_are_nested_in(
    mixture_of: Callable[..., DomainMixture],
) -> None:
    """To any device; what is no tensor stays."""
    batch = next(iter(mixture_of(collate_fn=nested).loader(device="meta")))
    assert ("meta", "meta") == (batch.items.device.type, batch.more[0]["x"].device.type)
    assert ("code", "Pair") == (batch.more[0]["name"], type(batch).__name__)
    assert "cpu" == next(iter(mixture_of(collate_fn=nested).loader())).items.device.type


def test_a_batch_that_cannot_be_moved_may_be_asked_for_again(
    mixture_of: Callable[..., DomainMixture],
) -> None:
    """A device that is full for a moment loses no row."""
    loader = mixture_of(collate_fn=torch.tensor).loader(microbatches=2, steps=3, device="no such device")
    with pytest.raises(RuntimeError, match="no such device"):
        next(iter(loader))
    loader._device = None
    assert expected([[]] * 6, microbatches=2, steps=3)[::2] == [items_in(batch) for batch in loader]


def test_the_parts_of_a_loader_are_named(mixture_of: Callable[..., DomainMixture]) -> None:
    """Adapters look at them."""
    mixture = mixture_of()
    loader = mixture.loader(steps=3, microbatches=2)
    assert (mixture, 3, 2) == (loader.mixture, loader.steps, loader.microbatches)
    assert list(COUNTS) == list(mixture.domains)

"""What readers make of a user's items: micro-batches by the user's own function, here or in processes."""

import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from multiprocessing import Value
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddkmix import DomainMixture
from ddkmix.errors import DataError
from ddkmix.item_tasks import ItemReader
from ddkmix.own_rows import own_rows
from ddkmix.row_tasks import Task
from ddkmix.stream import describe_stream

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
DATASETS = {"code": list(range(6)), "math": list(range(100, 104))}
Mixtures = Callable[..., DomainMixture]


@pytest.fixture
def mixture_of() -> Iterator[Mixtures]:
    """A function that makes mixtures of two datasets; their workers end with the test."""
    made: list[DomainMixture] = []

    def make(datasets: Any = DATASETS, **options: Any) -> DomainMixture:
        made.append(DomainMixture.from_datasets(datasets, **{"batch_rows": 4, **options}))
        return made[-1]

    yield make
    for mixture in made:
        mixture.close()


def reader_of(collate: Callable[[list[Any]], Any] = list, version: int = 0) -> ItemReader:
    """A reader of the two datasets."""
    stream = describe_stream(list(own_rows(DATASETS).values()), batch_rows=4)
    return ItemReader(stream, Value("q", version, lock=False), collate)


def task(*, parts: int = 1, version: int = 0) -> Task:
    """The first five rows of code, one epoch's end among them, and three of math."""
    domains, numbers = np.array([0] * 5 + [1] * 3), np.array([3, 4, 5, 6, 7, 0, 1, 2])
    return Task(version, domains, numbers, slot=7, parts=parts)


def test_micro_batches_are_every_nth_row() -> None:
    """Together they are the rows of the task, each part in its order."""
    (whole,) = reader_of()[task()].parts
    assert 8 == len(whole)
    assert [0] * 5 + [1] * 3 == [int(item >= 100) for item in whole]
    for parts in (2, 4, 8):
        assert [whole[part::parts] for part in range(parts)] == list(reader_of()[task(parts=parts)].parts)


def test_a_stale_task_reads_nothing() -> None:
    """The loop drops it anyway."""

    def never(items: list[Any]) -> Any:
        raise AssertionError

    batch = reader_of(never, version=1)[task()]
    assert (0, 7, (), None) == (batch.version, batch.slot, batch.parts, batch.error)
    assert reader_of(list, version=1)[task(version=1)].parts


def test_a_function_that_fails_is_an_error_as_a_value() -> None:
    """It names the items, so that they can be looked at."""

    def fails(items: list[Any]) -> Any:
        raise ValueError("sizes differ")

    error = reader_of(fails)[task()].error
    assert error is not None
    assert "collate_fn fails on code#" in str(error)
    assert ", math#" in str(error)
    assert str(error).endswith("(ValueError: sizes differ).")


Pair = namedtuple("Pair", ["first", "second"])


def as_pair(items: list[int]) -> Any:
    """A named tuple."""
    return Pair(torch.tensor(items), "code")


def as_encoding(items: list[int]) -> Any:
    """What tokenizers give."""
    from transformers import BatchEncoding

    return BatchEncoding({"input_ids": torch.tensor(items)})


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("collate", "values"),
    [
        (None, lambda batch: batch),
        (torch.tensor, lambda batch: batch),
        (tuple, lambda batch: batch),
        (as_pair, lambda batch: batch.first),
        (as_encoding, lambda batch: batch["input_ids"]),
        (lambda items: np.array(items), lambda batch: batch),
    ],
    ids=["default", "tensor", "tuple", "named tuple", "encoding", "lambda"],
)
def test_batches_are_what_the_function_gives(
    mixture_of: Mixtures, num_workers: int, collate: Any, values: Any
) -> None:
    """Of its type, with its values, read here or by workers, also where `domain_ids` are put beside them."""
    options = {} if collate is None else {"collate_fn": collate}
    mixture, plain = mixture_of(num_workers=num_workers, **options), mixture_of(collate_fn=list)
    for _ in range(4):
        batch, wanted = next(mixture), next(plain)
        kind = torch.Tensor if collate is None else type((collate or torch.tensor)(wanted))
        assert kind is type(batch)
        assert wanted == [int(value) for value in values(batch)]
    if collate is as_encoding:
        assert [int(value >= 100) for value in batch["input_ids"]] == batch["domain_ids"].tolist()


class Raising:
    """Items of which one raises."""

    def __init__(self, error: type[Exception]) -> None:
        self.error, self.mended = error, False

    def __len__(self) -> int:
        return 30

    def __getitem__(self, i: int) -> int:
        if i == 17 and not self.mended:
            raise self.error("broken")
        return i


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("error", [KeyError, FileNotFoundError, StopIteration, MemoryError, RuntimeError])
def test_an_item_that_raises_stops_the_loop_with_its_name(
    mixture_of: Mixtures, num_workers: int, error: type[Exception]
) -> None:
    """At its step, not before, in one line; the step can be asked for again and nothing is skipped."""
    mixture = mixture_of({"code": Raising(error)}, num_workers=num_workers, batch_rows=3, collate_fn=list)
    found: list[int] = []
    with pytest.raises(DataError) as info:
        while True:
            found += next(mixture)
    assert str(info.value).startswith(f"datasets['code'][17] cannot be read ({error.__name__}: ")
    assert "\n" not in str(info.value)
    assert len(found) == 3 * mixture.state.step
    with pytest.raises(DataError, match=r"\[17\] cannot be read"):
        next(mixture)
    mixture.stream.rows[0].dataset.mended = True
    while len(found) < 30:
        found += next(mixture)
    assert list(range(30)) == sorted(found)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("error", [StopIteration, FileNotFoundError, RuntimeError])
def test_a_collate_function_that_raises_does_not_end_the_stream(
    mixture_of: Mixtures, num_workers: int, error: type[Exception]
) -> None:
    """A StopIteration in it would look like the end of the data, a RuntimeError like a dead worker."""

    def fails(items: list[int]) -> Any:
        raise error("inside")

    mixture = mixture_of(collate_fn=fails, num_workers=num_workers)
    with pytest.raises(DataError, match=rf"collate_fn fails on code#.* \({error.__name__}: inside\)"):
        next(mixture)


def test_a_batch_that_cannot_be_sent_is_an_error_and_no_hang(mixture_of: Mixtures) -> None:
    """A generator cannot leave a process; without workers it is fine."""

    def lazily(items: list[int]) -> Any:
        return (item for item in items)

    assert 4 == len(list(next(mixture_of(collate_fn=lazily))))
    with pytest.raises(DataError, match="collate_fn gives a generator that no worker can send; use num_work"):
        next(mixture_of(collate_fn=lazily, num_workers=1))


class Drawing:
    """Items with noise from torch's generator."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> float:
        return float(torch.rand(()))


def test_what_items_draw_in_workers_differs_between_ranks_and_starts(mixture_of: Mixtures) -> None:
    """Else augmentations would be the same on every rank and after every change; a run can be repeated."""

    def draws(rank: int, *, seed: int = 0) -> list[list[float]]:
        mixture = mixture_of(
            {"code": Drawing()}, rank=rank, world_size=2, num_workers=1, collate_fn=list, seed=seed
        )
        first = next(mixture)
        mixture.close()
        return [first, next(mixture)]

    found = [*draws(0), *draws(1), *draws(0, seed=1)]
    assert 6 == len({tuple(batch) for batch in found})
    assert found[:2] == draws(0)


SPAWNING = """
import multiprocessing
import sys

from ddkmix import DomainMixture, DdkmixError


def main():
    multiprocessing.set_start_method("spawn")
    collate = (lambda items: items) if sys.argv[1] == "lambda" else list
    mixture = DomainMixture.from_datasets(
        {"code": [1, 2, 3, 4]}, batch_rows=4, collate_fn=collate, num_workers=1
    )
    try:
        print(sorted(next(mixture)))
    except DdkmixError as error:
        print(type(error).__name__, error)
    mixture.close()


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("collate", "expected"),
    [("list", "[1, 2, 3, 4]"), ("lambda", "ConfigError workers cannot be started")],
)
def test_workers_may_be_spawned(tmp_path: Path, collate: str, expected: str) -> None:
    """Where nothing can be forked, what cannot be pickled is one line."""
    program = tmp_path / "program.py"
    program.write_text(SPAWNING)
    result = subprocess.run(
        [sys.executable, str(program), collate], capture_output=True, text=True, timeout=200, check=False
    )
    assert expected in result.stdout, result.stderr

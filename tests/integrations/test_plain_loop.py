"""A plain PyTorch loop: `DomainMixture.loader` and `Reweighter`, nothing else."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.integrations.conftest import STEPS, Parts, Rows, dealt, rows_of

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def run(parts: Parts, microbatches: int, *, until: int = STEPS) -> Rows:
    """The rows of each step of a plain loop, which learns nothing."""
    found: Rows = []
    loader = parts.mixture.loader(steps=until, microbatches=microbatches)
    done, window = parts.mixture.state.step, []
    parts.reweighter.step(parts.student, done)
    for batch in loader:
        window.append(rows_of(batch["input_ids"]))
        if len(window) == microbatches:
            found.append(dealt(window))
            done, window = done + 1, []
            parts.reweighter.step(parts.student, done)
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_rows_are_those_of_our_own_trainer(
    trainer_rows: Rows, parts: Callable[..., Parts], workers: int, microbatches: int
) -> None:
    """Every step, with weights that move every other step."""
    assert trainer_rows == run(parts(num_workers=workers), microbatches)


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_loop_goes_on_from_its_state(trainer_rows: Rows, parts: Callable[..., Parts], stop: int) -> None:
    """With another number of workers and micro-batches; between and at intervals."""
    first = parts(num_workers=2)
    found = run(first, 1, until=stop)
    state: Any = first.reweighter.state_dict()
    second = parts()
    second.reweighter.load_state_dict(state)
    assert trainer_rows == found + run(second, 3)

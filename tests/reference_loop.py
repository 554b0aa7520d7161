"""What a loop must receive, from the planner and the order alone: no loader, no workers, no reading ahead.

A `Script` is what the loop does after each micro-batch: sets weights, leaves the iteration and takes it up
again, saves, loads. `play` acts it with any loop, `expected` with the planner.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ddkmix.errors import DataError, MixtureExhausted
from ddkmix.order import DomainOrder, locate
from ddkmix.planner import (
    OnCap,
    PlannerState,
    PlanSettings,
    deal,
    initial_state,
    plan_step,
    quantise,
    with_weights,
)

COUNTS = {"code": 7, "math": 5, "prose": 4}
"""Items of each domain."""
INDICES = {"code": list(range(7)), "math": list(range(7, 12)), "prose": list(range(12, 16))}
"""The items as numbers of one dataset."""
DATASETS: Mapping[str, Sequence[int]] = INDICES
"""The items as datasets of their own: each item is its number in the one dataset."""
BATCH_ROWS, SEED = 12, 3
WEIGHTS = ((1, 1, 1), (1, 0, 0), (1, 5, 2), (0, 1, 1), (0.001, 0.5, 0.499))

Action = str | int
"""`break`, `save`, `load`, or the number of the weights to set."""
Script = Sequence[Sequence[Action]]
ACTIONS = st.sampled_from(["break", "save", "load", *range(len(WEIGHTS))])
SCRIPTS = st.lists(st.lists(ACTIONS, max_size=2), min_size=1, max_size=24)
OPTIONS = st.fixed_dictionaries(
    {"microbatches": st.sampled_from([1, 2, 3])},
    optional={
        "steps": st.sampled_from([1, 3, 6]),
        "max_epochs": st.sampled_from([1.0, 2.0]),
        "on_cap": st.sampled_from(["renormalize", "stop", "error"]),
    },
)
"""Arguments of a loader or sampler, and of its mixture."""


def weights_of(number: int) -> dict[str, float]:
    """Weights by domain."""
    return dict(zip(COUNTS, map(float, WEIGHTS[number]), strict=True))


def items_in(batch: Sequence[Any]) -> list[int]:
    """The items of a batch that was made by `list` or by torch."""
    return [int(item) for item in batch]


def play(start: Callable[[], Iterator[Any]], mixture: Any, script: Script) -> list[Any]:
    """What a loop receives, and the state that it sees after each micro-batch.

    Args:
        start: begins an iteration.
        mixture: what weights are set of.
        script: what the loop does after each micro-batch.
    """
    received: list[Any] = []
    saved, iteration = mixture.state_dict(), start()
    for actions in script:
        try:
            received.append(items_in(next(iteration)))
        except StopIteration:
            received.append("end")
            iteration = start()
        except DataError:
            received.append("error")
            iteration = start()
        for action in actions:
            if action == "break":
                iteration.close()  # type: ignore[attr-defined]
                iteration = start()
            elif action == "save":
                saved = mixture.state_dict()
            elif action == "load":
                mixture.load_state_dict(saved)
            else:
                mixture.set_weights(weights_of(int(action)))
        received.append((mixture.state.step, mixture.served))
    iteration.close()  # type: ignore[attr-defined]
    return received


class Planned:
    """A loop that plans a step when it is asked for its first micro-batch."""

    def __init__(
        self,
        *,
        steps: int | None = None,
        microbatches: int = 1,
        rank: int = 0,
        world_size: int = 1,
        max_epochs: float | None = None,
        on_cap: OnCap = "renormalize",
    ) -> None:
        caps = [None if max_epochs is None else int(max_epochs * count) for count in COUNTS.values()]
        self._settings = PlanSettings(
            domains=tuple(COUNTS),
            batch_rows=BATCH_ROWS,
            num_rows=tuple(COUNTS.values()),
            cap_rows=tuple(caps),
            on_cap=on_cap,
        )
        self._orders = [
            DomainOrder(domain=name, shard_rows=(count,), seed=SEED) for name, count in COUNTS.items()
        ]
        self._steps, self._microbatches, self._ranks = steps, microbatches, (rank, world_size)
        sizes = np.array([float(count) for count in COUNTS.values()])
        self.state: PlannerState = initial_state(self._settings, sizes / sizes.sum())
        self._rest: list[list[int]] = []

    @property
    def served(self) -> dict[str, int]:
        """Rows of all ranks by domain."""
        return dict(zip(COUNTS, self.state.served, strict=True))

    def start(self) -> Iterator[list[int]]:
        """An iteration."""
        while self._rest or (self._steps is None or self.state.step < self._steps):
            if not self._rest:
                try:
                    plan, self.state = plan_step(self._settings, self.state)
                except MixtureExhausted:
                    return
                slots = deal(plan, *self._ranks)
                places = zip(plan.domain_ids[slots].tolist(), plan.row_numbers[slots].tolist(), strict=True)
                names = list(COUNTS)
                items = [INDICES[names[i]][locate(self._orders[i], j)[1]] for i, j in places]
                self._rest = [items[part :: self._microbatches] for part in range(self._microbatches)]
            yield self._rest.pop(0)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """From the next step on."""
        vector = np.array(list(weights.values()))
        self.state = with_weights(self.state, quantise(vector / vector.sum()))

    def state_dict(self) -> PlannerState:
        """After the step in hand."""
        return self.state

    def load_state_dict(self, state: PlannerState) -> None:
        """The step in hand is given up."""
        self.state, self._rest = state, []


def expected(script: Script, **options: Any) -> list[Any]:
    """What every loop must receive."""
    planned = Planned(**options)
    return play(planned.start, planned, script)

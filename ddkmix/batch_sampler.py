"""A mixture as a batch sampler of torch, for a dataset and a DataLoader that somebody already has.

A DataLoader asks its batch sampler far ahead of the loop, so by itself a change of weights comes
`num_workers * prefetch_factor` batches late. `MixtureBatchSampler.follow` makes it exact: it drops what the
loader has read ahead under other weights, and those rows are planned again.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from jaxtyping import Int

from ddkmix.errors import ConfigError, RunError
from ddkmix.fingerprint import hash_json
from ddkmix.order import locate
from ddkmix.own_rows import OwnRows
from ddkmix.planned_mixture import PlannedMixture
from ddkmix.planner import OnCap, PlannerState
from ddkmix.stream import describe_stream


@dataclass(slots=True, eq=False)
class _Sent:
    """A micro-batch that the DataLoader has asked for and the loop has not received."""

    state: PlannerState
    """After its step."""
    rest: list[list[int]]
    """The micro-batches of its step that come after it."""
    stale: bool = False


class MixtureBatchSampler(PlannedMixture[OwnRows]):
    """Batches of indices into a map-style dataset whose items belong to domains.

    Pass it as `batch_sampler` to `torch.utils.data.DataLoader`. Every batch is one micro-batch of this rank.
    With `follow`, weights that are set while step s is in the loop's hands are whole at step s + 1, and
    `state` is what the loop has received; without it, both follow what the DataLoader has asked for.

    Do not let Accelerate prepare the DataLoader: its `BatchSamplerShard` would give each rank every n-th
    batch of what is this rank's own share already.

    Args:
        indices: the items of each domain; see `domain_indices` for a dataset with a column of domains.
        batch_rows: items in the global batch of one optimizer step.
        microbatches: batches for each step and rank (gradient accumulation).
        steps: optimizer steps of the whole run; None goes on until the domains are used up.
        weights: mixture weights by domain, normalised here; proportional to items when None.
        seed: of the order of the items.
        rank: this process, from 0; None as in `DomainMixture`.
        world_size: processes that batches are dealt to. None with `rank`.
        max_epochs: passes allowed over any domain.
        on_cap: "renormalize", "stop" or "error" at that limit.

    Raises:
        ConfigError: an argument is wrong, or a step cannot be dealt into equal micro-batches.
        DataError: a domain has no items.

    >>> sampler = MixtureBatchSampler({"code": range(6), "math": range(6, 10)}, batch_rows=4, steps=2)
    >>> len(list(sampler)), sampler.served
    (2, {'code': 5, 'math': 3})
    """

    def __init__(
        self,
        indices: Mapping[str, Sequence[int]],
        *,
        batch_rows: int,
        microbatches: int = 1,
        steps: int | None = None,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        max_epochs: float | None = None,
        on_cap: OnCap = "renormalize",
    ) -> None:
        if microbatches < 1 or (steps is not None and steps < 1):
            raise ConfigError(f"steps = {steps}, microbatches = {microbatches}; both must be at least 1.")
        rows = [_rows_of(name, items) for name, items in indices.items()]
        stream = describe_stream(rows, batch_rows=batch_rows, seed=seed, max_epochs=max_epochs, on_cap=on_cap)
        super().__init__(stream, weights, rank, world_size)
        self.check_parts(microbatches)
        self.microbatches, self.steps = microbatches, steps
        self._sent: deque[_Sent] = deque()
        self._received: PlannerState | None = None
        """After the last step of which the loop of `follow` has received a micro-batch."""
        self._rest: list[list[int]] = []
        """What that loop has not received of this step."""
        self._loads = 0

    @property
    def state(self) -> PlannerState:
        """The planner's state after the last step that the loop received (or asked for, without `follow`)."""
        return self._plans.consumed if self._received is None else self._received

    def __len__(self) -> int:
        """Micro-batches of the whole run, those before a resume included.

        Raises:
            TypeError: `steps` was not given, as Python asks of an object without a length.
        """
        if self.steps is None:
            raise TypeError("this sampler has no length; give it steps.")
        return self.steps * self.microbatches

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of indices, from where `state` is.

        Raises:
            DataError: `on_cap` is "error" and a domain is used up.
        """
        self._sent.clear()
        rest, self._rest = self._rest, []
        self._rewind(self.state)
        self.check_parts(self.microbatches)
        yield from self._batches(self._plans.consumed, rest)
        while self.steps is None or self._plans.consumed.step < self.steps:
            plan = self._plans.plan()
            if plan is None:
                if self._plans.is_exhausted():
                    return
                continue
            self.last_plan = self._plans.consume()
            slots = self._slots(plan)
            chosen = [
                int(self.stream.rows[domain].dataset[locate(self.stream.orders[domain], j)[1]])
                for domain, j in zip(plan.domain_ids[slots], plan.row_numbers[slots].tolist(), strict=True)
            ]
            parts = [chosen[part :: self.microbatches] for part in range(self.microbatches)]
            yield from self._batches(self._plans.consumed, parts)

    def _batches(self, state: PlannerState, parts: list[list[int]]) -> Iterator[list[int]]:
        """Micro-batches of one step, for as long as nobody has gone back to before it."""
        loads = self._loads
        for i, part in enumerate(parts):
            if loads != self._loads or state.step > self._plans.consumed.step:
                return
            self._sent.append(_Sent(state, parts[i + 1 :]))
            yield part

    def follow(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of a DataLoader that has this batch sampler, without what it read under older weights.

        Args:
            loader: the DataLoader, with any number of workers; iterated here.

        Raises:
            RunError: it has another batch sampler, or gives batches that this one did not name.
        """
        sampler = getattr(loader, "batch_sampler", self)
        if sampler is not self:
            raise RunError(
                f"the loader draws batches from a {type(sampler).__name__}; construct it with "
                "batch_sampler=sampler, and do not let Accelerate prepare it: that would drop other batches."
            )
        self._received = self.state
        dropped = True
        while dropped:  # it may have come to its end under older weights
            dropped = False
            for batch in loader:
                if not self._sent:
                    raise RunError(
                        "the loader gives batches that this sampler did not name; construct it with "
                        "batch_sampler=sampler."
                    )
                sent = self._sent.popleft()
                if sent.stale:
                    dropped = True
                    continue
                if sent.state.step > self._received.step:
                    self._received = sent.state
                self._rest = sent.rest
                yield batch
        self._received = None

    def _rewind(self, state: PlannerState) -> None:
        """Go on from `state`; the step that the loop is in stays as it is."""
        for sent in self._sent:
            sent.stale = sent.stale or sent.state.step > state.step
        super()._rewind(state)
        if self._received is not None:
            self._received = state

    def load_state_dict(self, state: Mapping[str, Any], *, allow_changes: bool = False) -> list[str]:
        """Go on from a saved state; see `DomainMixture.load_state_dict`.

        Args:
            state: what `state_dict` gave.
            allow_changes: go on although items or settings have changed.

        Returns:
            What has changed, one phrase each.

        Raises:
            DataError: something has changed and `allow_changes` is not set.
        """
        changes = super().load_state_dict(state, allow_changes=allow_changes)
        self._loads += 1
        self._rest = []
        for sent in self._sent:
            sent.stale = True
        return changes


def domain_indices(labels: Sequence[str]) -> dict[str, Int[np.ndarray, " n"]]:
    """The items of each domain, from a column that names the domain of every item.

    Args:
        labels: one domain name per item.

    >>> {name: items.tolist() for name, items in domain_indices(["code", "math", "code"]).items()}
    {'code': [0, 2], 'math': [1]}
    """
    column = np.asarray(labels)
    return {str(name): np.flatnonzero(column == name) for name in np.unique(column)}


def _rows_of(name: str, items: Sequence[int]) -> OwnRows:
    numbers = np.asarray(items, dtype=np.int64)
    if numbers.ndim != 1 or (numbers < 0).any():
        raise ConfigError(f"indices[{name!r}] must be a list of item numbers >= 0.")
    return OwnRows(
        domain=name,
        dataset=numbers,
        num_rows=len(numbers),
        fingerprint=hash_json([len(numbers), sha256(numbers.tobytes()).hexdigest()]),
    )

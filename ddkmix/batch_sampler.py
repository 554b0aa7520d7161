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
from jaxtyping import Int, Shaped

from ddkmix.errors import ConfigError, RunError
from ddkmix.fingerprint import hash_json
from ddkmix.order import locate
from ddkmix.own_rows import Numbers, OwnRows, integers
from ddkmix.planned_mixture import PlannedMixture
from ddkmix.planner import OnCap, PlannerState, StepPlan
from ddkmix.stream import check_steps, describe_stream

_WAY_OUT = "Construct it with batch_sampler=sampler, and do not let Accelerate prepare it."


@dataclass(slots=True, eq=False)
class _Sent:
    """A micro-batch that the DataLoader has asked for and the loop has not received."""

    state: PlannerState
    """After its step."""
    plan: StepPlan | None
    """Of its step."""
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

    >>> from ddkmix import MixtureBatchSampler
    >>> sampler = MixtureBatchSampler({"code": range(6), "math": range(6, 10)}, batch_rows=4, steps=2)
    >>> len(list(sampler)), sampler.served
    (2, {'code': 5, 'math': 3})
    """

    def __init__(
        self,
        indices: Mapping[str, Numbers],
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
        check_steps(steps, microbatches)
        rows = [_rows_of(name, items) for name, items in indices.items()]
        stream = describe_stream(rows, batch_rows=batch_rows, seed=seed, max_epochs=max_epochs, on_cap=on_cap)
        super().__init__(stream, weights, rank, world_size)
        self.check_parts(microbatches)
        self.microbatches: int = microbatches
        """Batches for each step and rank."""
        self.steps: int | None = steps
        """Optimizer steps of the whole run."""
        self._sent: deque[_Sent] = deque()
        self._received: PlannerState | None = None
        """After the last step of which the loop of `follow` has received a micro-batch; None outside it."""
        self._rest: list[list[int]] = []
        """What has not been received (or asked for) of the present step."""
        self._follower: object = None
        """The iteration of `follow` that counts: the one that began last."""
        self._changed = False
        """Whether weights were set, or a state loaded, since the DataLoader was iterated."""

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
        """Batches of indices, from where `state` is; a step that was left in the middle comes to its end.

        Raises:
            DataError: `on_cap` is "error" and a domain is used up.
        """
        self._sent.clear()
        super()._rewind(self.state)
        self.check_parts(self.microbatches)
        yield from self._batches(self._plans.consumed, self.last_plan, self._rest)
        while self.steps is None or self._plans.consumed.step < self.steps:
            plan = self._plans.plan()
            if plan is None:
                # what was asked for before comes first: `follow` raises when the loop has it
                if self._received is not None or self._plans.is_exhausted():
                    return
                continue
            self._plans.consume()
            slots = self._slots(plan)
            chosen = [
                int(self.stream.rows[domain].dataset[locate(self.stream.orders[domain], j)[1]])
                for domain, j in zip(plan.domain_ids[slots], plan.row_numbers[slots].tolist(), strict=True)
            ]
            parts = [chosen[part :: self.microbatches] for part in range(self.microbatches)]
            yield from self._batches(self._plans.consumed, plan, parts)

    def _batches(
        self, state: PlannerState, plan: StepPlan | None, parts: list[list[int]]
    ) -> Iterator[list[int]]:
        """Micro-batches of one step, for as long as nobody has gone back to before it."""
        loads = self.loads
        for i, part in enumerate(parts):
            if loads != self.loads or state.step > self._plans.consumed.step:
                return
            sent = _Sent(state, plan, parts[i + 1 :])
            if self._received is None:
                self._take(sent)
            else:
                self._sent.append(sent)
            yield part

    def _take(self, sent: _Sent) -> None:
        """The loop has this micro-batch."""
        self.last_plan, self._rest = sent.plan, sent.rest
        if self._received is not None and sent.state.step > self._received.step:
            self._received = sent.state

    def follow(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of a DataLoader that has this batch sampler, without what it read under older weights.

        One that was left, even in the middle of a step, is taken up there by the next.

        Args:
            loader: the DataLoader, with any number of workers; iterated here.

        Raises:
            RunError: it gives other batches than this sampler named, or in another order.
            DataError: `on_cap` is "error" and a domain is used up.
        """
        self._check_loader(loader)
        mine = self._follower = object()
        self._received = self.state
        try:
            while True:
                self._changed = False
                yield from self._fresh(loader)
                if self._sent:  # the loader has its own end
                    return
                if not self._goes_on() or not self._changed:
                    return
        finally:
            if self._follower is mine:  # from here on, what is asked for counts again
                state, self._received, self._follower = self._received, None, None
                super()._rewind(state)

    def _fresh(self, loader: Iterable[Any]) -> Iterator[Any]:
        """One pass over the loader."""
        for batch in loader:
            if not self._sent:
                raise RunError(f"the loader gives batches that this sampler did not name. {_WAY_OUT}")
            sent = self._sent.popleft()
            if not sent.stale:
                self._take(sent)
                yield batch

    def _goes_on(self) -> bool:
        """Whether there is more to receive after `state`; raises DataError where `on_cap` is "error"."""
        unfinished = self.steps is None or self.state.step < self.steps
        return bool(self._rest) or (unfinished and not self._plans.is_exhausted())

    def _check_loader(self, loader: Any) -> None:
        if getattr(loader, "batch_sampler", self) is not self or not getattr(loader, "in_order", True):
            raise RunError(f"the loader has another batch_sampler, or in_order=False. {_WAY_OUT}")

    def _rewind(self, state: PlannerState) -> None:
        """Go on from `state`; the step that the loop is in stays as it is."""
        for sent in self._sent:
            sent.stale = sent.stale or sent.state.step > state.step
        super()._rewind(state)
        self._changed = True
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
        self._rest = []
        for sent in self._sent:
            sent.stale = True
        return changes


def domain_indices(labels: Sequence[str] | Shaped[np.ndarray, " _"]) -> dict[str, Int[np.ndarray, " _"]]:
    """The items of each domain, from a column that names the domain of every item.

    Args:
        labels: one domain name per item.

    >>> from ddkmix import domain_indices
    >>> {name: items.tolist() for name, items in domain_indices(["code", "math", "code"]).items()}
    {'code': [0, 2], 'math': [1]}
    """
    column = np.asarray(labels)
    return {str(name): np.flatnonzero(column == name) for name in np.unique(column)}


def _rows_of(name: str, items: Numbers) -> OwnRows:
    numbers = integers(f"indices[{name!r}]", items)
    if numbers.ndim != 1 or (numbers < 0).any():
        raise ConfigError(f"indices[{name!r}] must be a list of item numbers >= 0.")
    return OwnRows(
        domain=name,
        dataset=numbers,
        num_rows=len(numbers),
        fingerprint=hash_json([len(numbers), sha256(numbers.tobytes()).hexdigest()]),
    )

"""A mixture as the loader of a loop that is not ours: micro-batches, a length, an end.

Frameworks ask for one micro-batch at a time, want to know how many there are, and some read ahead where they
are not told. This loader never does: a step is handed out when its first micro-batch is asked for.
"""

from collections import deque
from collections.abc import Iterator, MutableMapping
from typing import Any

from ddkmix.errors import ConfigError
from ddkmix.planner import PlannerState, deal
from ddkmix.sources import with_domain_ids


class StepLoader:
    """The micro-batches of a mixture, `microbatches` for each optimizer step.

    Part p of a step holds every `microbatches`-th row of this rank from row p on, as in ddkmix's own trainer.
    An iteration starts with the step after the mixture's state, wherever that is, and ends after step `steps`
    of the run; one that was left in the middle of a step is taken up there. No step is taken before it is
    asked for, so what the loop has received is what the mixture's state says.

    Args:
        mixture: a `DomainMixture`.
        steps: optimizer steps of the whole run; None goes on until the domains are used up.
        microbatches: batches for each step (gradient accumulation).
        domain_ids: add `domain_ids` (b,) int64 to every batch that is a dict; models refuse them.
        device: where tensors are moved (a torch device or its name); None leaves them on the CPU.

    Raises:
        ConfigError: `steps` or `microbatches` is below 1, or a rank's rows cannot be dealt into so many.
    """

    def __init__(
        self,
        mixture: Any,
        *,
        steps: int | None = None,
        microbatches: int = 1,
        domain_ids: bool = False,
        device: Any = None,
    ) -> None:
        if microbatches < 1 or (steps is not None and steps < 1):
            raise ConfigError(f"steps = {steps}, microbatches = {microbatches}; both must be at least 1.")
        self.mixture = mixture
        """The `DomainMixture`."""
        self.steps, self.microbatches = steps, microbatches
        self._domain_ids, self._device = domain_ids, device
        self._rest: deque[Any] = deque()
        """Micro-batches of the present step that nobody has received."""
        self._rest_of: PlannerState | None = None
        self.mixture.check_parts(self.microbatches)

    def __len__(self) -> int:
        """Micro-batches of the whole run, those before a resume included.

        Raises:
            TypeError: `steps` was not given, as Python asks of an object without a length.
        """
        if self.steps is None:
            raise TypeError("this loader has no length; give steps to DomainMixture.loader.")
        return self.steps * self.microbatches

    def __iter__(self) -> Iterator[Any]:
        """Micro-batches from where the mixture is.

        Raises:
            DataError: a row cannot be read, or `on_cap` is "error" and a domain is used up.
        """
        if self._rest_of is not self.mixture.state:
            self._rest.clear()  # another state was loaded, or somebody else took a step
        while True:
            if not self._rest and not self._next_step():
                return
            yield self._rest.popleft()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state after the last step of which every micro-batch was received."""
        step = self.mixture.state.step
        unfinished = bool(self._rest) and self._rest_of is self.mixture.state
        state: dict[str, Any] = self.mixture.state_dict(step - 1 if unfinished else step)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            DataError: it is of other data or settings.
        """
        self._rest.clear()
        self.mixture.load_state_dict(state)

    def _next_step(self) -> bool:
        """Take the micro-batches of one more step; False at the end."""
        if self.steps is not None and self.mixture.state.step >= self.steps:
            return False
        self.mixture.check_parts(self.microbatches)
        try:
            parts = self.mixture.next_parts(self.microbatches)
        except StopIteration:
            return False
        plan = self.mixture.last_plan
        if self._domain_ids:
            ids = plan.domain_ids[deal(plan, *self.mixture.ranks)]
            parts = [with_domain_ids(part, ids[i :: self.microbatches]) for i, part in enumerate(parts)]
        self._rest = deque(parts if self._device is None else map(self._moved, parts))
        self._rest_of = self.mixture.state
        return True

    def _moved(self, batch: Any) -> Any:
        from torch import Tensor

        if not isinstance(batch, MutableMapping):
            return batch.to(self._device, non_blocking=True) if isinstance(batch, Tensor) else batch
        for name, value in batch.items():
            if isinstance(value, Tensor):
                batch[name] = value.to(self._device, non_blocking=True)
        return batch

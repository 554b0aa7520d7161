"""A mixture as the loader of a loop that is not ours: micro-batches, a length, an end.

Frameworks ask for one micro-batch at a time, want to know how many there are, and some read ahead where they
are not told. This loader never does: a step is handed out when its first micro-batch is asked for.
"""

from collections import deque
from collections.abc import Iterator, MutableMapping
from typing import Any

from ddkmix.errors import ConfigError, RunError
from ddkmix.planner import deal
from ddkmix.sources import with_arrays
from ddkmix.stream import check_steps


class StepLoader:
    """The micro-batches of a mixture, `microbatches` for each optimizer step.

    Part p of a step holds every `microbatches`-th row of this rank from row p on, as in ddkmix's own trainer.
    An iteration starts with the step after the mixture's state, wherever that is, and ends after step `steps`
    of the run; one that was left in the middle of a step is taken up there, unless another state was loaded.
    No step is taken before it is asked for, so what the loop has received is what the mixture's state says.

    >>> from ddkmix import DomainMixture
    >>> mixture = DomainMixture.from_datasets({"code": [1, 2], "math": [3]}, batch_rows=4, collate_fn=list)
    >>> loader = mixture.loader(steps=3, microbatches=2)
    >>> len(loader), [len(batch) for batch in loader]
    (6, [2, 2, 2, 2, 2, 2])
    >>> mixture.state.step
    3

    Args:
        mixture: a `DomainMixture`.
        steps: optimizer steps of the whole run; None goes on until the domains are used up.
        microbatches: batches for each step (gradient accumulation).
        domain_ids: add `domain_ids` (b,) int64 to every batch, which must be a dict; models refuse them.
        row_places: add `row_places` (b, 2) int64 likewise, by which a logits store is read.
        device: where the tensors of a batch are moved, in whatever they are nested (a torch device or its
            name); None leaves them on the CPU.

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
        row_places: bool = False,
        device: Any = None,
    ) -> None:
        check_steps(steps, microbatches)
        self.mixture: Any = mixture
        """The `DomainMixture`."""
        self.steps: int | None = steps
        """Optimizer steps of the whole run."""
        self.microbatches: int = microbatches
        """Batches for each step."""
        self._names = {"domain_ids": domain_ids, "row_places": row_places}
        self._device = device
        self._rest: deque[Any] = deque()
        """Micro-batches of the present step that nobody has received."""
        self._rest_step = 0
        """Steps before it."""
        self._loads = 0
        """States that had been loaded when it was taken."""
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
        while self._is_within_step() or self._next_step():
            batch = self._moved(self._rest[0])
            self._rest.popleft()  # only now: a batch that the device has no room for can be asked for again
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state after the last step of which every micro-batch was received.

        Raises:
            RunError: weights were set in the middle of the present step; a state before it lacks them.
        """
        if not self._is_within_step():
            whole: dict[str, Any] = self.mixture.state_dict()
            return whole
        before: dict[str, Any] = self.mixture.state_dict(self._rest_step)
        if before["planner"]["version"] != self.mixture.state.version:
            raise RunError(
                f"weights were set between two micro-batches of step {self._rest_step + 1}, and a state "
                "before that step lacks them; save after its last micro-batch, or set weights there."
            )
        return before

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state: what `state_dict` gave.

        Raises:
            DataError: it is of other data or settings.
        """
        self.mixture.load_state_dict(state)

    def _is_within_step(self) -> bool:
        """Whether micro-batches of a step are left that the loop has not received."""
        if self._loads != self.mixture.loads:
            self._rest.clear()
        return bool(self._rest)

    def _next_step(self) -> bool:
        """Take the micro-batches of one more step; False at the end."""
        step = self.mixture.state.step
        if self.steps is not None and step >= self.steps:
            return False
        self.mixture.check_parts(self.microbatches)
        try:
            parts = self.mixture.next_parts(self.microbatches)
        except StopIteration:
            return False
        self._rest = deque(self._named(parts) if any(self._names.values()) else parts)
        self._rest_step, self._loads = step, self.mixture.loads
        return True

    def _named(self, parts: list[Any]) -> list[Any]:
        """The micro-batches with what was asked for about each row."""
        asked = [name for name, wanted in self._names.items() if wanted]
        if not isinstance(parts[0], MutableMapping):
            raise ConfigError(
                f"{asked[0]} = True and batches are {type(parts[0]).__name__}s; let collate_fn give a dict."
            )
        plan = self.mixture.last_plan
        arrays = {}
        if "domain_ids" in asked:
            arrays["domain_ids"] = plan.domain_ids[deal(plan, *self.mixture.ranks)]
        if "row_places" in asked:
            arrays["row_places"] = self.mixture.row_places
        count = self.microbatches
        return [
            with_arrays(part, **{name: array[i::count] for name, array in arrays.items()})
            for i, part in enumerate(parts)
        ]

    def _moved(self, batch: Any) -> Any:
        if self._device is None:
            return batch
        from accelerate import utils

        move: Any = utils.send_to_device
        return move(batch, self._device, non_blocking=True)

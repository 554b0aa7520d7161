"""The interface of objectives, and a part of a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from ddkmix.preference.on_policy import Source

__all__ = ["Needs", "Objective", "Part", "WindowNames"]

Needs = Literal["teacher_responses", "student_responses"]
"""What a run must have: a store of the teacher's responses, a student that answers."""

WindowNames = Mapping[str, tuple[str, ...]]
"""Metrics of an objective, beside those of `loss`: the names of the values of each part."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Part:
    """Rows of a step that are trained on with one objective."""

    name: str
    """Where its metrics go (`train`, `pairs`, ...); all parts of a name share a normaliser."""
    batch: Mapping[str, Any]
    """`input_ids` and `labels` (B, T), `domain_ids` (B,), and what `what` asks for."""
    what: Any
    """Weighted losses of tokens, or a `ddkmix.distillation.OfResponses`."""
    in_pairs: bool = False
    """Rows 2 i and 2 i + 1 belong together, and pairs are counted; else predicted tokens."""


@runtime_checkable
class Objective(Protocol):
    """What an entry of `OBJECTIVES` must offer."""

    needs: ClassVar[frozenset[str]]
    """Of `Needs`."""
    stands_alone: ClassVar[bool]
    """Whether something is learnt without any term in `loss`."""

    def windows(self) -> WindowNames:
        """The values that its parts give, by the name of the part; without `train`, the part of `loss`."""
        ...

    def init(self, validation_loss: float) -> dict[str, Any]:
        """The state before the first step, JSON-able.

        Args:
            validation_loss: of the student on held-out responses, nats per token.
        """
        ...

    def update(self, state: Mapping[str, Any], validation_loss: float) -> dict[str, Any]:
        """The state after a validation.

        Args:
            state: what `init` or `update` gave.
            validation_loss: on held-out responses, nats per token.
        """
        ...

    def decide(
        self, state: Mapping[str, Any], *, step: int, steps: int, uniform: float, stored: int
    ) -> Source:
        """Where a step's student responses come from; `dataset` where it needs none.

        Args:
            state: what `init` or `update` gave.
            step: optimizer steps done, from 0.
            steps: optimizer steps of the run.
            uniform: a number in [0, 1), drawn for this step.
            stored: rows in the replay buffer.
        """
        ...

    def parts(self, rows: Any) -> Sequence[Part]:
        """What a step trains on.

        Args:
            rows: `ddkmix.step_rows.StepRows` of the step.
        """
        ...


def new_or_replayed(uniform: float, fresh: float, stored: int) -> Source:
    """New responses of the student on a share of the steps, and while there are no old ones.

    Args:
        uniform: a number in [0, 1), drawn for the step.
        fresh: the share.
        stored: rows in the replay buffer.
    """
    return "generate" if uniform < fresh or not stored else "replay"


class Stateless:
    """For objectives that do not look at the validation loss."""

    __slots__ = ()

    def init(self, validation_loss: float) -> dict[str, Any]:
        """Nothing to remember.

        Args:
            validation_loss: not looked at.
        """
        return {}

    def update(self, state: Mapping[str, Any], validation_loss: float) -> dict[str, Any]:
        """Nothing to remember.

        Args:
            state: empty.
            validation_loss: not looked at.
        """
        return {}

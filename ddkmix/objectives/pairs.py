"""Objectives of pairs: the teacher's response to a prompt is preferred to the student's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ddkmix.objectives.base import Part, Stateless, WindowNames, new_or_replayed
from ddkmix.preference import PairLoss
from ddkmix.preference.on_policy import Source

__all__ = ["PairSettings", "Pairs"]

_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSettings:
    """What every pair objective can be told, beside its own parameters."""

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Factor on the mean over pairs. `loss`, the language-modelling anchor, has its own: lambda."""
    chosen_nll: _Weight = 0.0
    """Weight of language modelling on the chosen responses: `ddkmix.preference.ChosenNLL`."""
    fresh: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the steps whose responses of the student are new; on the others the replay buffer gives them,
    with their prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs(Stateless):
    """A pair loss on (teacher's response, student's response), beside `loss` on the rows of data."""

    name: str
    """Of the loss."""
    loss: PairLoss
    settings: PairSettings = PairSettings()
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_responses", "student_responses"})
    stands_alone: ClassVar[bool] = True

    def windows(self) -> WindowNames:
        """The loss, and what shows a student that unlearns instead of preferring."""
        from ddkmix.preference.rewards import PAIR_MEASURES

        return {"pairs": (self.name, "chosen_nll", *PAIR_MEASURES)}

    def decide(
        self, state: Mapping[str, Any], *, step: int, steps: int, uniform: float, stored: int
    ) -> Source:
        """New responses on a share `fresh` of the steps, and while there are no old ones; see `Objective`."""
        return new_or_replayed(uniform, self.settings.fresh, stored)

    def parts(self, rows: Any) -> Sequence[Part]:
        """The data's rows, and the pairs.

        Args:
            rows: of the step.
        """
        from ddkmix.preference.steps import PairStep

        what = PairStep(loss=self.loss, weight=self.settings.weight, chosen_nll=self.settings.chosen_nll)
        batch = rows.pairs(rows.student_responses(), graded=getattr(self.loss, "needs_quality", False))
        return [*rows.anchor(), Part(name="pairs", batch=batch, what=what, in_pairs=True)]

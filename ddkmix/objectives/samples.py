"""MiniLLM as an objective of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ddkmix.objectives.base import Part, Stateless, WindowNames
from ddkmix.preference.minillm import MiniLLM
from ddkmix.preference.on_policy import Source

__all__ = ["MiniLLMObjective"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MiniLLMObjective(MiniLLM, Stateless):
    """`MiniLLM`'s policy gradient on new responses at every step, beside `loss` on the rows of data.

    Responses are drawn from a p + (1 - a) q, a = `teacher_share`: teacher and student decode together. The
    paper takes several optimizer steps on each set of responses, with a bound on the ratio; here each is
    trained on once, so the ratio is q / p~ alone. Its language modelling on text is `loss`: cross-entropy,
    weight 1.
    """

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Factor on the mean over the responses' tokens."""
    needs: ClassVar[frozenset[str]] = frozenset({"student_responses"})
    stands_alone: ClassVar[bool] = True

    def windows(self) -> WindowNames:
        """The reverse KL and the surprise at the response's tokens, what they earn, and the weights w_t."""
        return {"minillm": ("reverse_kl", "cross_entropy", "advantage", "ratio")}

    def decide(
        self, state: Mapping[str, Any], *, step: int, steps: int, uniform: float, stored: int
    ) -> Source:
        """Always new ones; see `Objective`."""
        return "generate"

    def parts(self, rows: Any) -> Sequence[Part]:
        """The data's rows, and the samples.

        Args:
            rows: of the step.
        """
        from ddkmix.preference.steps import PolicyGradientStep

        what = PolicyGradientStep(minillm=self, weight=self.weight)
        batch = rows.of_responses(rows.student_responses())
        return [*rows.anchor(), Part(name="minillm", batch=batch, what=what)]

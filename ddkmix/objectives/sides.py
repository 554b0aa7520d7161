"""DistiLLM-2 as an objective of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ddkmix.objectives.base import Part, Stateless, WindowNames, new_or_replayed
from ddkmix.preference.contrastive import ContrastiveSkew
from ddkmix.preference.on_policy import Source

__all__ = ["DistiLLM2"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DistiLLM2(ContrastiveSkew, Stateless):
    """`ContrastiveSkew` on the teacher's responses and on the student's, beside `loss` on the rows of data.

    As published there is no other loss: `loss: []`. Responses of the student are new on a share `fresh` of
    the steps; the paper generates them once an epoch.
    """

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Factor on both sides."""
    fresh: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the steps whose responses of the student are new; on the others the replay buffer gives them,
    with their prompts."""
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_responses", "student_responses"})
    stands_alone: ClassVar[bool] = True

    def windows(self) -> WindowNames:
        """A divergence for either side, and the skew of its rows."""
        return {
            "teacher_responses": ("skew_kl", "skew"),
            "student_responses": ("skew_reverse_kl", "skew"),
        }

    def decide(
        self, state: Mapping[str, Any], *, step: int, steps: int, uniform: float, stored: int
    ) -> Source:
        """New responses on a share `fresh` of the steps, and while there are no old ones; see `Objective`."""
        return new_or_replayed(uniform, self.fresh, stored)

    def parts(self, rows: Any) -> Sequence[Part]:
        """The data's rows, the teacher's responses, and the student's to the same prompts.

        Args:
            rows: of the step.
        """
        from ddkmix.preference.steps import SkewStep

        rejected = rows.student_responses()
        sides = {"teacher_responses": rows.teacher_responses(rejected), "student_responses": rejected}
        return [
            *rows.anchor(),
            *(
                Part(
                    name=name,
                    batch=rows.of_responses(responses),
                    what=SkewStep(
                        contrast=self,
                        of_teacher=name == "teacher_responses",
                        step=rows.step,
                        steps=rows.steps,
                        weight=self.weight,
                    ),
                )
                for name, responses in sides.items()
            ),
        ]

"""Objectives that apply `loss` to other responses than the data's: of the teacher, or of the student."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ddkmix.objectives.base import Part, Stateless, WindowNames
from ddkmix.preference.on_policy import AdaptiveOffPolicy, OnPolicyShare, Source

__all__ = ["GKD", "DistiLLM", "Distill", "SeqKD"]


class _OfLoss:
    """Metrics are those of `loss` alone, and without it nothing is learnt."""

    __slots__ = ()
    stands_alone: ClassVar[bool] = False

    def windows(self) -> WindowNames:
        """None beside `train`."""
        return {}


class _NeverStudent(_OfLoss, Stateless):
    """The student answers nothing."""

    __slots__ = ()

    def decide(
        self, state: Mapping[str, Any], *, step: int, steps: int, uniform: float, stored: int
    ) -> Source:
        """Never a response of the student; see `Objective`."""
        return "dataset"


class _OnDataOrStudent(_OfLoss):
    """`loss` on the rows of data, or on the student's responses to their prompts."""

    __slots__ = ()
    needs: ClassVar[frozenset[str]] = frozenset({"student_responses"})

    def parts(self, rows: Any) -> Sequence[Part]:
        """One part; rows of plain text are in it whatever was decided.

        Args:
            rows: of the step.
        """
        on_data = rows.source == "dataset"
        batch = rows.batch if on_data else rows.with_responses(rows.student_responses())
        return [Part(name="train", batch=batch, what=rows.terms)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Distill(_NeverStudent):
    """`loss` on the rows of data: distillation as DDK has it (arXiv 2407.16154, Eq. 3)."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def parts(self, rows: Any) -> Sequence[Part]:
        """The planner's rows.

        Args:
            rows: of the step.
        """
        return [Part(name="train", batch=rows.batch, what=rows.terms)]


@dataclass(frozen=True, kw_only=True, slots=True)
class SeqKD(_NeverStudent):
    """`loss` on the teacher's responses, in the place of the data's: sequence-level distillation.

    As published (arXiv 1606.07947) the loss is `cross_entropy` alone, and responses are the mode of the
    teacher (beam search); `ddkmix generate` draws them, or takes the likeliest tokens at temperature 0. Rows
    of plain text stay as they are. A response that says nothing is left out.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_responses"})

    def parts(self, rows: Any) -> Sequence[Part]:
        """Text, and prompts with the teacher's responses.

        Args:
            rows: of the step.
        """
        return [Part(name="train", batch=rows.with_responses(rows.teacher_responses()), what=rows.terms)]


@dataclass(frozen=True, kw_only=True, slots=True)
class GKD(_OnDataOrStudent, OnPolicyShare, Stateless):
    """On a share of the steps `loss` on the student's own responses (GKD, arXiv 2306.13649, Algorithm 1).

    Its loss is `jsd`, JSD(beta) between teacher and student at every token of the response. No gradient flows
    through the sampling. lambda is `share`: 0 is distillation on fixed data, 1 is on-policy distillation. A
    student's responses are always new; TRL's trainer draws lambda for each step, too.
    """

    def decide(  # type: ignore[override]
        self, state: Mapping[str, Any], *, step: int, steps: int, uniform: float, stored: int
    ) -> Source:
        """The student's new responses with probability `share`; see `Objective`."""
        return OnPolicyShare.decide(self, uniform)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistiLLM(_OnDataOrStudent, AdaptiveOffPolicy):
    """`loss` on the student's responses, new or old, the more often the less held-out responses like what
    fixed data did (DistiLLM, arXiv 2402.03898). Its loss is `skew_kl` or `skew_reverse_kl` at skew 0.1.

    The validation loss is the student's on held-out responses, at every evaluation
    (`mixture.interval_steps`). The buffer's size is `rollouts.buffer_rows`.
    """

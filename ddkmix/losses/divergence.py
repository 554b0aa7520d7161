"""What all divergences between teacher and student share: temperature, scale, and any kind of signal.

A divergence compares two distributions over the same classes: all V of them where the teacher's logits are
there, the K kept ones and the rest where its signal is truncated. A file of one says only how.

This module and the files of single losses import no torch: `lint` reads them.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

TemperatureOn = Literal["both", "teacher"]
Adapt = Literal["fixed", "norm_kd", "wttm", "adakd_sd", "adakd_h"]

NEEDS_ALL_LOGITS = frozenset({"norm_kd", "adakd_sd", "adakd_h"})
"""Their temperature differs from token to token, and no store holds the teacher at all of them."""


def kinds_of(adapt: Adapt, accepts: frozenset[str]) -> frozenset[str]:
    """What is left of the kinds of signals that a divergence accepts, with this way to choose
    temperatures."""
    return accepts & {"dense"} if adapt in NEEDS_ALL_LOGITS else accepts


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """p = softmax(teacher_logits / temperature) against q = softmax(student_logits / temperature)."""

    temperature: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Divides the logits."""
    temperature_on: TemperatureOn = "both"
    """Whose logits it divides. `teacher`: the student is compared at temperature 1."""
    scale_by_temperature: bool = True
    """Multiply value and gradient by temperature**2 (`both`), without which the gradient would shrink
    with it (Hinton et al. 2015, arXiv 1503.02531). Has no effect with `teacher`."""
    adapt: Adapt = "fixed"
    """How `temperature` becomes that of a token. `fixed`: it is. `norm_kd`: times the standard deviation of
    the logits (arXiv 2308.00520). `wttm`: it is, and the token's loss is weighted with sum_v
    p**(1/temperature) (arXiv 2402.11148). `adakd_sd`, `adakd_h`: between 1 and `temperature`, by the
    standard deviation or the entropy of p (reconstructed: arXiv 2410.16215 has no formula that could be
    read)."""
    scale_power: ClassVar[int] = 2
    """Power of the temperature with which the divergence and its gradient fall."""
    needs_teacher: ClassVar[bool] = True
    """Whether it looks at the teacher."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "bucket"})
    """Kinds of signals that it is defined for: `dense`, a `tail` of TruncatedSignal, or `drawn`."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.adapt == "wttm" and self.temperature_on != "teacher":
            raise ValueError("adapt: wttm tempers the teacher alone; write temperature_on: teacher beside it")
        if self.adapt == "norm_kd" and self.temperature_on != "both":
            raise ValueError("adapt: norm_kd tempers both sides; leave out temperature_on")

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of signals that it is defined for with these parameters."""
        return kinds_of(self.adapt, self.accepts)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures at which the teacher's probabilities are wanted; none where it differs by token."""
        return () if self.adapt in NEEDS_ALL_LOGITS else (self.temperature,)

    def between(self, log_q: Any, log_p: Any) -> Any:
        """The divergence of each token.

        Args:
            log_q: (n, C) log-probabilities of the student, differentiable.
            log_p: (n, C) log-probabilities of the teacher. -inf in both marks a class that is not there;
                in `log_p` alone, one that the teacher excludes.

        Returns:
            (n,) nats, before the scale.
        """
        raise NotImplementedError

    def between_and_slope(self, log_q: Any, log_p: Any) -> tuple[Any, Any]:
        """`between` and its derivative, written out. Without it `between` is differentiated by autograd.

        Args:
            log_q: (n, C) log-probabilities of the student, without a gradient.
            log_p: (n, C) log-probabilities of the teacher, as in `between`.

        Returns:
            (n,) the same values as `between`, and (n, C) d between / d log_q, which may be off by a multiple
            of q (forward KL: -p; for any other, q times the derivative by q). Finite where `between` is.
        """
        from ddkmix.losses.closed_form import by_autograd

        return by_autograd(self.between, log_q, log_p)

    def value_and_slope(self, student: Any, teacher: Any, labels: Any) -> tuple[Any, Any]:
        """What `__call__` gives, and its derivative; see `TokenLoss`.

        Args:
            student: `LogProbs` of its logits, without a gradient.
            teacher: `LogProbs` of its logits, or a TruncatedSignal of the n tokens.
            labels: not looked at.

        Returns:
            (n,) values, and a `Slope`.
        """
        from ddkmix.losses.classes import all_classes, log_probs_of
        from ddkmix.losses.closed_form import LogProbs, Slope, by_autograd, keeps_up
        from ddkmix.losses.temperature import through_deviation

        tempered = self.tempering(student, teacher)
        teacher = all_classes(teacher, student.logits.shape[1])
        log_q, log_p = log_probs_of(student, teacher, tempered.student, tempered.teacher)
        if keeps_up(type(self), "between_and_slope", "between"):
            values, slope = self.between_and_slope(log_q, log_p)
        else:
            values, slope = by_autograd(self.between, log_q, log_p)
        values = tempered.factor * values
        whole = Slope(temperature=tempered.student, factor=tempered.factor)
        if isinstance(teacher, LogProbs):
            if self.adapt == "norm_kd":
                slope = slope + through_deviation(student.logits, log_q, slope, self.temperature)
            return values, replace(whole, dense=slope)
        entries, rest, log_q_rest = slope[:, :-1], slope[:, -1:], log_q[:, -1:]
        return values, replace(whole, ids=teacher.ids, entries=entries, rest=rest, log_q_rest=log_q_rest)

    def __call__(self, student_logits: Any, teacher: Any, labels: Any) -> Any:
        """The divergence of each token.

        Args:
            student_logits: (n, V) float32.
            teacher: (n, V) float32 logits, or a TruncatedSignal of the n tokens.
            labels: not looked at.

        Returns:
            (n,) float32, nats per token, times the factor of its temperature if so scaled.
        """
        from ddkmix.losses.classes import all_classes, log_probs_of
        from ddkmix.losses.closed_form import LogProbs

        student = LogProbs(student_logits)
        said = teacher if hasattr(teacher, "log_probs") else LogProbs(teacher)
        tempered = self.tempering(student, said)
        said = all_classes(said, student_logits.shape[1])
        log_q, log_p = log_probs_of(student, said, tempered.student, tempered.teacher)
        return tempered.factor * self.between(log_q, log_p)

    def tempering(self, student: Any, teacher: Any) -> Any:
        """What divides the logits of each side, and what the divergence is multiplied by.

        Args:
            student: its `LogProbs`.
            teacher: its `LogProbs`, or a TruncatedSignal of the same tokens.

        Returns:
            Three numbers for all tokens, or (n,) tensors: `student`, `teacher` and `factor`.
        """
        from ddkmix.losses.temperature import Tempering, ada_kd, norm_kd, power_sum

        both = self.temperature_on == "both"
        power = self.scale_power if self.scale_by_temperature else 0
        if self.adapt == "norm_kd":
            return norm_kd(self.temperature, student.logits, teacher.logits, power)
        if self.adapt in ("adakd_sd", "adakd_h"):
            return ada_kd(self.adapt, self.temperature, teacher.at(1.0), power, both=both)
        factor = power_sum(teacher, self.temperature) if self.adapt == "wttm" else self.scale
        return Tempering(student=self.student_temperature, teacher=self.temperature, factor=factor)

    @property
    def student_temperature(self) -> float:
        """What divides the student's logits."""
        return self.temperature if self.temperature_on == "both" else 1.0

    @property
    def scale(self) -> float:
        """Factor on value and gradient."""
        scaled = self.scale_by_temperature and self.temperature_on == "both"
        return self.temperature**self.scale_power if scaled else 1.0

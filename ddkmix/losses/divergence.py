"""What all divergences between teacher and student share: temperature, scale, and any kind of signal.

A divergence compares two distributions over the same classes: all V of them where the teacher's logits are
there, the K kept ones and the rest where its signal is truncated. A file of one says only how.

This module and the files of single losses import no torch: `lint` reads them.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

TemperatureOn = Literal["both", "teacher"]


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
    needs_teacher: ClassVar[bool] = True
    """Whether it looks at the teacher."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "bucket"})
    """Kinds of signals that it is defined for: `dense`, a `tail` of TruncatedSignal, or `drawn`."""

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures at which the teacher's probabilities are wanted."""
        return (self.temperature,)

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
        """What `__call__` gives, and its derivative; see `TokenLoss`."""
        from ddkmix.losses import classes, closed_form

        log_q, log_p = classes.log_probs_of(student, teacher, self.student_temperature, self.temperature)
        if closed_form.keeps_up(type(self), "between_and_slope", "between"):
            values, slope = self.between_and_slope(log_q, log_p)
        else:
            values, slope = closed_form.by_autograd(self.between, log_q, log_p)
        common = {"temperature": self.student_temperature, "factor": self.scale}
        if isinstance(teacher, closed_form.LogProbs):
            return self.scale * values, closed_form.Slope(dense=slope, **common)
        parts = {"entries": slope[:, :-1], "rest": slope[:, -1:], "log_q_rest": log_q[:, -1:]}
        return self.scale * values, closed_form.Slope(ids=teacher.ids, **parts, **common)

    def __call__(self, student_logits: Any, teacher: Any, labels: Any) -> Any:
        """The divergence of each token.

        Args:
            student_logits: (n, V) float32.
            teacher: (n, V) float32 logits, or a TruncatedSignal of the n tokens.
            labels: not looked at.

        Returns:
            (n,) float32, nats per token, times temperature**2 if so scaled.
        """
        from ddkmix.losses.classes import class_log_probs

        log_q, log_p = class_log_probs(student_logits, teacher, self.student_temperature, self.temperature)
        return self.scale * self.between(log_q, log_p)

    @property
    def student_temperature(self) -> float:
        """What divides the student's logits."""
        return self.temperature if self.temperature_on == "both" else 1.0

    @property
    def scale(self) -> float:
        """Factor on value and gradient."""
        scaled = self.scale_by_temperature and self.temperature_on == "both"
        return self.temperature**2 if scaled else 1.0

"""Mean squared error between probabilities or between logits."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ddkmix.losses.divergence import Divergence, kinds_of

__all__ = ["MSE"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MSE(Divergence):
    """Squared error, the MSE of pre-training distillation (arXiv 2410.16215, Table 5: 7.6 % below no
    teacher).

        probabilities:  MSE[i] = sum_v (p(v) - q(v))**2
        logits:         MSE[i] = 1/V sum_v ((y(v) - mean(y)) - (z(v) - mean(z)))**2
        y = teacher_logits / temperature, p = softmax(y); z = student_logits / temperature, q = softmax(z)

    That paper does not say which of the two it means. Its Eq. 3 compares q with F(p), which is a
    distribution, so `probabilities` is the default. Papers on images compare logits (Kim et al. 2021, arXiv
    2105.08919); a softmax does not know their mean, so it is taken off both first. Squares, not nats.

    A teacher with p = (3/4, 1/4) and an undecided student: 2 (1/4)**2.

    >>> import torch
    >>> from ddkmix.losses import MSE
    >>> teacher_logits = torch.tensor([[3.0, 1.0]]).log()
    >>> squares = MSE()(torch.zeros(1, 2), teacher_logits, torch.tensor([0]))
    >>> [round(value, 4) for value in squares.tolist()]
    [0.125]
    """

    of: Literal["probabilities", "logits"] = "probabilities"
    """What is compared. `logits` needs all of the teacher's."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "bucket", "renormalize"})
    """Random draws would add their variance to its value, though not to its expected gradient."""

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of signals that it is defined for with these parameters."""
        return kinds_of(self.adapt, self.accepts & {"dense"} if self.of == "logits" else self.accepts)

    def between(self, log_q: Any, log_p: Any) -> Any:
        """Sum of squared differences of probabilities, or mean of those of centred logits."""
        difference, divisor = self._compared(log_q, log_p)
        return (difference.square() / divisor).sum(-1)

    def between_and_slope(self, log_q: Any, log_p: Any) -> tuple[Any, Any]:
        """Its derivative by log q is 2 q (q - p), or 2/V times the difference of centred logits."""
        difference, divisor = self._compared(log_q, log_p)
        slope = 2 * difference / divisor
        values = (difference.square() / divisor).sum(-1)
        return values, slope * log_q.exp() if self.of == "probabilities" else slope

    def _compared(self, log_q: Any, log_p: Any) -> tuple[Any, Any]:
        """The difference whose squares are summed, and what they are divided by."""
        if self.of == "probabilities":
            return log_q.exp() - log_p.exp(), 1.0
        from ddkmix.losses.sums import centred

        # log-probabilities are logits less a constant, which the mean takes off again
        return centred(log_q) - centred(log_p), log_q.isfinite().sum(-1, keepdim=True)

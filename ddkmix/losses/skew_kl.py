"""Skew KL: the teacher against a student with a little of the teacher mixed in."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ddkmix.losses.divergence import Divergence

__all__ = ["SkewKL"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SkewKL(Divergence):
    """Skew KL, the SKL of DistiLLM (arXiv 2402.03898; skew = 0.1 in its scripts).

        SKL[i] = sum_v p(v) (log p(v) - log(skew p(v) + (1 - skew) q(v)))
        p teacher, q student, both at their temperature; the value is scaled like every divergence

    It is at most log(1 / skew), where forward KL has no bound: a class that the student misses cannot
    outweigh a whole batch. The authors' code leaves out the teacher's entropy, so its value never reaches 0.

    A student that excludes the teacher's only class pays log(1 / 0.1) = ln 10, not infinity.

    >>> import torch
    >>> from ddkmix.losses import SkewKL
    >>> student_logits, teacher_logits = torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 99.0]])
    >>> nats = SkewKL()(student_logits, teacher_logits, torch.tensor([0]))
    >>> [round(value, 4) for value in nats.tolist()]
    [2.3026]
    """

    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the teacher in the mixture. At 0 it would be forward KL."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "bucket", "renormalize"})
    """It is not linear in p, so random draws would not estimate it without bias."""

    def between(self, log_q: Any, log_p: Any) -> Any:
        """sum_v p log(p / (skew p + (1 - skew) q))."""
        from ddkmix.losses.sums import log_mixed, present

        log_q, log_p = present(log_q), present(log_p)
        return -(log_p.exp() * log_mixed(1 - self.skew, log_q - log_p)).sum(-1)

    def between_and_slope(self, log_q: Any, log_p: Any) -> tuple[Any, Any]:
        """Its derivative by log q is -(1 - skew) p q / m, m the mixture."""
        from ddkmix.losses.sums import log_mixed, present

        log_q, log_p = present(log_q), present(log_p)
        log_m_over_p = log_mixed(1 - self.skew, log_q - log_p)
        values = -(log_p.exp() * log_m_over_p).sum(-1)
        return values, -(1 - self.skew) * (log_q - log_m_over_p).exp()

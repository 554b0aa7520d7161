"""Skew reverse KL: the student against a teacher with a little of the student mixed in."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ddkmix.losses.divergence import Divergence

__all__ = ["SkewReverseKL"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SkewReverseKL(Divergence):
    """Skew reverse KL, the SRKL of DistiLLM (arXiv 2402.03898; skew = 0.1 in its scripts).

        SRKL[i] = sum_v q(v) (log q(v) - log(skew q(v) + (1 - skew) p(v)))
        p teacher, q student, both at their temperature; the value is scaled like every divergence

    It is at most log(1 / skew), also where the teacher excludes a class.

    A student that believes in a class that the teacher excludes pays log(1 / 0.1) = ln 10, not infinity.

    >>> import torch
    >>> from ddkmix.losses import SkewReverseKL
    >>> student_logits, teacher_logits = torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 99.0]])
    >>> nats = SkewReverseKL()(student_logits, teacher_logits, torch.tensor([0]))
    >>> [round(value, 4) for value in nats.tolist()]
    [2.3026]
    """

    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the student in the mixture. At 0 it would be reverse KL."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "bucket", "renormalize"})
    """Unlike reverse KL it stays finite where a renormalised signal has probability 0."""

    def between(self, log_q: Any, log_p: Any) -> Any:
        """sum_v q log(q / (skew q + (1 - skew) p))."""
        from ddkmix.losses.sums import log_mixed, present

        log_q, log_p = present(log_q), present(log_p)
        return -(log_q.exp() * log_mixed(1 - self.skew, log_p - log_q)).sum(-1)

    def between_and_slope(self, log_q: Any, log_p: Any) -> tuple[Any, Any]:
        """Its derivative by log q is q (log(q / m) - skew q / m), m the mixture, but for a multiple of q."""
        from ddkmix.losses.sums import log_mixed, present

        log_q, log_p = present(log_q), present(log_p)
        q, log_m_over_q = log_q.exp(), log_mixed(1 - self.skew, log_p - log_q)
        slope = -q * (log_m_over_q + self.skew * (-log_m_over_q).exp())
        return -(q * log_m_over_q).sum(-1), slope

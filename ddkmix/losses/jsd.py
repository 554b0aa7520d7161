"""Generalised Jensen-Shannon divergence: both distributions against their mixture."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ddkmix.losses.divergence import Divergence

__all__ = ["JSD"]


@dataclass(frozen=True, kw_only=True, slots=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, Eq. 1).

        JSD[i] = beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
        p teacher, q student, both at their temperature; the value is scaled like every divergence

    At the ends it vanishes: JSD / beta -> KL(p || q) as beta -> 0, and JSD / (1 - beta) -> KL(q || p) as
    beta -> 1. GKD's code therefore jumps to the KL at 0 and 1, and a sweep over beta silently rescales the
    gradient. `normalize` divides by beta (1 - beta), which makes forward and reverse KL its limits.

    Teacher and student that exclude each other's only class: m = (1/2, 1/2), so it is ln 2.

    >>> import torch
    >>> from ddkmix.losses import JSD
    >>> student_logits, teacher_logits = torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 99.0]])
    >>> nats = JSD()(student_logits, teacher_logits, torch.tensor([0]))
    >>> [round(value, 4) for value in nats.tolist()]
    [0.6931]
    """

    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the mixture, and of its KL in the sum. For 0 and 1 use forward_kl,
    reverse_kl."""
    normalize: bool = False
    """Divide by beta (1 - beta), so that different beta are of one scale. False is the published form."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "bucket", "renormalize"})
    """It stays finite where the teacher's probability is 0, as a renormalised signal has it."""

    def between(self, log_q: Any, log_p: Any) -> Any:
        """sum_v beta p log(p / m) + (1 - beta) q log(q / m)."""
        from ddkmix.losses.sums import log_mixed, present

        log_q, log_p = present(log_q), present(log_p)
        from_teacher = -self.beta * log_p.exp() * log_mixed(1 - self.beta, log_q - log_p)
        return (from_teacher.sum(-1) + self._from_student(log_q, log_p).sum(-1)) / self._divisor

    def between_and_slope(self, log_q: Any, log_p: Any) -> tuple[Any, Any]:
        """Its derivative by log q is (1 - beta) q log(q / m), but for a multiple of q."""
        from ddkmix.losses.sums import present

        return self.between(log_q, log_p), self._from_student(present(log_q), present(log_p)) / self._divisor

    def _from_student(self, log_q: Any, log_p: Any) -> Any:
        """(1 - beta) q log(q / m) of each class."""
        from ddkmix.losses.sums import log_mixed

        return -(1 - self.beta) * log_q.exp() * log_mixed(self.beta, log_p - log_q)

    @property
    def _divisor(self) -> float:
        return self.beta * (1 - self.beta) if self.normalize else 1.0

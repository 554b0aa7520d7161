"""Reverse KL: KL(student || teacher), which seeks modes of the teacher instead of covering all of them."""

import math
from dataclasses import dataclass
from typing import Any

from ddkmix.losses.divergence import Divergence

__all__ = ["ReverseKL"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReverseKL(Divergence):
    """KL(student || teacher) (MiniLLM, arXiv 2306.08543; here token by token on fixed text).

        RKL[i] = temperature**2 * sum_v q_i(v) (log q_i(v) - log p_i(v))

    An undecided student of a teacher with p = (3/4, 1/4): 1/2 ln(2/3) + 1/2 ln 2.

    >>> import torch
    >>> from ddkmix.losses import ReverseKL
    >>> teacher_logits = torch.tensor([[3.0, 1.0]]).log()
    >>> nats = ReverseKL()(torch.zeros(1, 2), teacher_logits, torch.tensor([0]))
    >>> [round(value, 4) for value in nats.tolist()]
    [0.1438]
    """

    def between(self, log_q: Any, log_p: Any) -> Any:
        """sum_v q (log q - log p); inf where the student believes in a class that the teacher excludes."""
        absent = log_q == -math.inf
        difference = log_q.masked_fill(absent, 0.0) - log_p.masked_fill(absent, 0.0)
        return (log_q.exp() * difference).sum(-1)

    def between_and_slope(self, log_q: Any, log_p: Any) -> tuple[Any, Any]:
        """Its derivative by log q is q (log q - log p), but for a multiple of q."""
        q = log_q.exp()
        slope = (q * (log_q - log_p)).masked_fill(q == 0, 0.0)
        return slope.sum(-1), slope

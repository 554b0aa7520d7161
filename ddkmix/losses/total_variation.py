"""Total variation: how much probability lies elsewhere."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ddkmix.losses.divergence import Divergence

__all__ = ["TotalVariation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TotalVariation(Divergence):
    """Total variation distance (f-distill, arXiv 2307.15190).

        TV[i] = 1/2 sum_v |p(v) - q(v)|
        p teacher, q student, both at their temperature

    A share of probability in [0, 1], not nats. It falls with 1 / temperature where the KL falls with
    1 / temperature**2, so `scale_by_temperature` multiplies by temperature here; the square, which some
    trainers use, makes it grow with the temperature.

    A teacher with p = (3/4, 1/4) and an undecided student: 1/2 (1/4 + 1/4).

    >>> import torch
    >>> from ddkmix.losses import TotalVariation
    >>> teacher_logits = torch.tensor([[3.0, 1.0]]).log()
    >>> shares = TotalVariation()(torch.zeros(1, 2), teacher_logits, torch.tensor([0]))
    >>> [round(value, 4) for value in shares.tolist()]
    [0.25]
    """

    scale_power: ClassVar[int] = 1
    """Power of the temperature with which the distance falls."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "bucket", "renormalize"})
    """It is not linear in p, so random draws would not estimate it without bias."""

    def between(self, log_q: Any, log_p: Any) -> Any:
        """1/2 sum_v |p - q|; at p = q the sub-gradient is 0."""
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2

    def between_and_slope(self, log_q: Any, log_p: Any) -> tuple[Any, Any]:
        """Its derivative by log q is 1/2 q sign(q - p)."""
        q = log_q.exp()
        difference = q - log_p.exp()
        return difference.abs().sum(-1) / 2, q * difference.sign() / 2

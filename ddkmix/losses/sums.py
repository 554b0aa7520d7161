"""Sums over classes that stay finite, and exact where student and teacher agree.

-inf marks a class that is not there. It adds nothing to any sum here, to its value or to its gradient; left
to itself, 0 x inf would make both nan.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

ABSENT = -1e30
"""Stands for -inf in differences: exp of it is 0, and its products with 0 are 0."""


def present(log_probs: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
    """The same with -inf replaced by a finite number that still means probability 0; no gradient there."""
    return log_probs.clamp(min=ABSENT)


def log_mixed(share: float, difference: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
    """log(1 - share + share e^difference): a mixture's log-probability above that of its other part.

    With difference = log b - log a it is log(((1 - share) a + share b) / a). Never overflows, and is
    exactly 0 where the difference is, so that a divergence from a mixture is exactly 0 for equal
    distributions.

    Args:
        share: weight of b, in (0, 1).
        difference: log b - log a, nats.
    """
    large = difference > 30  # e^difference is still far from overflow
    direct = torch.log1p(share * torch.expm1(difference.masked_fill(large, 0.0)))
    turned = difference + torch.log(share + (1 - share) * torch.exp(-difference.masked_fill(~large, 0.0)))
    return torch.where(large, turned, direct)


def centred(log_probs: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
    """Minus their mean over the classes that are there; 0 in the others."""
    absent = log_probs == -math.inf
    filled = log_probs.masked_fill(absent, 0.0)
    mean = filled.sum(-1, keepdim=True) / (~absent).sum(-1, keepdim=True)
    return (filled - mean).masked_fill(absent, 0.0)

"""From logits to the next token: temperature, then top_k, then top_p, then one draw.

That is the order of transformers: `top_k` and `top_p` see tempered logits, and `top_p` is a share of the mass
that `top_k` has left. A token costs one random number, which picks a class by the inverse of the distribution
function over classes in the order of their ids. So the number, and not the noise of each class, decides:
logits that differ by rounding choose the same class but where the number lies at the very edge between two.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddkmix.truncation import draw_classes

_FIRST_CANDIDATES = 256
"""Classes that are sorted to find a nucleus; more only where these are too few."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a token is chosen."""

    temperature: float = 1.0
    """Logits are divided by it; 0 is the likeliest class, always."""
    top_k: int | None = None
    """Only classes whose logit is at least the k-th largest; classes that tie with that one stay."""
    top_p: float = 1.0
    """Only the likeliest classes whose mass before them is below this; the likeliest one stays always, and
    classes that tie with the last one stay."""


def choose(
    logits: Float[Tensor, "n V"], uniforms: Float[Tensor, " n"], sampling: Sampling
) -> Int[Tensor, " n"]:
    """The next token of n rows.

    Args:
        logits: finite or -inf, at least one finite in each row.
        uniforms: a random number in [0, 1) for each row, float64; without effect at temperature 0.
        sampling: how.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)  # of equal ones the first
    kept = truncated(logits, sampling)
    weights = (kept - kept.amax(-1, keepdim=True)).exp()
    return draw_classes(weights, uniforms[:, None])[0][:, 0]


def truncated(logits: Float[Tensor, "n V"], sampling: Sampling) -> Float[Tensor, "n V"]:
    """Tempered logits in float32, -inf where a class cannot be chosen; the temperature is not 0.

    The set of classes is that of transformers' TemperatureLogitsWarper, TopKLogitsWarper and TopPLogitsWarper
    in this order, but for ties, which the last cuts by the order of a sort.
    """
    kept = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < kept.shape[1]:
        kth = kept.topk(sampling.top_k, dim=-1).values[:, -1:]
        kept = kept.masked_fill(kept < kth, -torch.inf)
    if sampling.top_p < 1:
        kept = kept.masked_fill(kept < _nucleus_edge(kept, sampling.top_p), -torch.inf)
    return kept


def _nucleus_edge(logits: Float[Tensor, "n V"], p: float) -> Float[Tensor, "n 1"]:
    """The smallest logit in the nucleus of each row: the mass before it, likeliest first, is below p."""
    log_z = logits.logsumexp(-1, keepdim=True)
    count = min(_FIRST_CANDIDATES, logits.shape[1])
    while True:
        values = logits.topk(count, dim=-1).values
        probs = (values - log_z).double().exp()
        before = probs.cumsum(-1) - probs
        if count == logits.shape[1] or bool((before[:, -1] >= p).all()):
            inside = (before < p) & (values > -torch.inf)  # rounding may leave the mass of all below p
            inside[:, 0] = True
            return values.gather(1, inside.sum(-1, keepdim=True) - 1)
        count = min(8 * count, logits.shape[1])

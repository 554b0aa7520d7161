"""Ranks that can be differentiated: projection onto the permutahedron (Blondel et al. 2020, arXiv
2002.08871).

The ranks of m numbers are the corner of the polytope spanned by all permutations of (1, ..., m) that is best
aligned with them; the point of it that is nearest to values / strength is a soft version. It is found by
sorting and one isotonic regression. The authors' library is not on PyPI, and a loop over tokens would be
slow; for the few dozen classes that are ranked here, the min-max formula gives the exact solution without a
loop.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LAST = -1e9
"""Stands for the value of a place without class: sorted last and never merged with another."""


def soft_ranks(
    values: Float[Tensor, "n m"], there: Bool[Tensor, "n m"], strength: float
) -> Float[Tensor, "n m"]:
    """Soft ranks of each row, 1 for the largest; 0 where nothing is there.

    As strength -> 0 they become the ranks; as it grows, all of them go to their mean.

    Args:
        values: what is ranked; ranks are differentiable in them.
        there: which places of a row count.
        strength: gap of two values at which their ranks are a whole rank apart.
    """
    filled = (-values / strength).masked_fill(~there, LAST)
    # descending values of -values: the smallest value of all comes first and has the last rank
    ordered, order = filled.sort(dim=-1, descending=True)
    count = there.sum(-1, keepdim=True)
    target = count - torch.arange(values.shape[1], device=values.device, dtype=values.dtype)
    ranks = ordered - decreasing_fit(ordered - target)
    return torch.zeros_like(ranks).scatter(-1, order, ranks).masked_fill(~there, 0.0)


def decreasing_fit(values: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """The non-increasing sequence nearest to each row in least squares: what pool-adjacent-violators finds.

        fit_i = min over a <= i of max over b >= i of mean(values_a, ..., values_b)

    Takes n x m x m numbers. Its gradient is that of the means that are selected: the mean over each block.
    """
    m = values.shape[1]
    sums = torch.nn.functional.pad(values.cumsum(-1), (1, 0))
    first = torch.arange(m, device=values.device)
    length = first[None, :] - first[:, None] + 1
    means = (sums[:, None, 1:] - sums[:, :-1, None]) / length.clamp(min=1)
    means = means.masked_fill(length < 1, -torch.inf)
    largest = means.flip(-1).cummax(-1).values.flip(-1)
    largest = largest.masked_fill(length < 1, torch.inf)
    return largest.amin(dim=1)

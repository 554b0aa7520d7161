"""The mixture inside bounds that is nearest to a wanted one, exactly.

    argmin over {w : low <= w <= high, sum w = 1} of KL(w || p) = sum_i w[i] log(w[i] / p[i])

It keeps the ratios of all shares that no bound touches, as the planner does when a domain is used up; and for
exponentiated policies it is the update that they would have made under these bounds, because theirs is the
minimiser of <score, w> + KL(w || w_t) on the simplex, and the minimiser on a part of the simplex is its
KL projection (mirror descent).

Unique: the set is compact and convex, and KL(. || p) strictly convex where p > 0. Form: the stationarity of
the Lagrangian is log(w[i] / p[i]) + 1 = mu, cut off at the bounds, so w[i] = clip(x p[i], low[i], high[i])
with one x for all. Their sum rises with x, in straight lines between the 2N places low[i] / p[i] and high[i]
/ p[i]. So bisection among those sorted places, which is exact, finds the line on which the sum is 1, and on
it x = (1 - sum of the shares at a bound) / (sum of p over the others). No tolerance, no iteration count.

Where p is 0, KL is infinite for any share. Such domains count as the limit of equal, ever smaller p: they
stay at their lower bounds until all others are at their upper bounds, then share the rest by the same rule
with p = 1.
"""

import numpy as np
from jaxtyping import Float

_ZERO = float(np.finfo(np.float64).tiny)
"""Below the smallest normal number the quotient of a bound and p overflows."""


def nearest_mixture(
    wanted: Float[np.ndarray, " N"], low: Float[np.ndarray, " N"], high: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """The mixture w with low <= w <= high that minimises KL(w || wanted).

    Args:
        wanted: shares >= 0 that sum to 1; returned as they are where they keep the bounds.
        low: smallest shares; they sum to at most 1.
        high: largest shares, none below `low`; they sum to at least 1.
    """
    if (low <= wanted).all() and (wanted <= high).all():
        return wanted
    served = wanted >= _ZERO
    found = np.where(served, high, low)
    if found.sum() >= 1 or served.all():  # upper bounds may sum to a little less than 1 by rounding
        found[served] = _fill(wanted[served], low[served], high[served], 1 - low[~served].sum())
    else:  # what the others may not have goes to domains that were to have nothing
        rest = ~served
        found[rest] = _fill(np.ones(rest.sum()), low[rest], high[rest], 1 - high[served].sum())
    return found


def _fill(
    p: Float[np.ndarray, " M"], low: Float[np.ndarray, " M"], high: Float[np.ndarray, " M"], total: float
) -> Float[np.ndarray, " M"]:
    """clip(x p, low, high) for the x at which it sums to `total`."""
    enters, leaves = low / p, high / p
    places = np.unique(np.concatenate([enters, leaves]))
    first, last = 0, len(places) - 1
    while last - first > 1:
        middle = (first + last) // 2
        if np.clip(places[middle] * p, low, high).sum() <= total:
            first = middle
        else:
            last = middle
    free = (enters <= places[first]) & (leaves >= places[last]) & (enters < leaves)
    x = places[first]
    if free.any():
        at_bounds = np.clip(x * p, low, high)[~free].sum()
        x = np.clip((total - at_bounds) / p[free].sum(), places[first], places[last])
    filled: Float[np.ndarray, " M"] = np.clip(x * p, low, high)
    return filled

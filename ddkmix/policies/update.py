"""The exponentiated step with a uniform floor that DDK, DoReMi and their kin share, and where they start."""

from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax

Start = Literal["uniform", "natural"]
"""Weights before the first update: 1/N each, or the shares of the corpus as it is."""

LARGEST_STEP_SIZE = 1e6
"""Steps of this size give one domain everything; far larger ones overflow."""


def start_weights(start: Start, natural_weights: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """The weights of the first interval, as a new array."""
    if start == "natural":
        return natural_weights.copy()
    return np.full(len(natural_weights), 1.0 / len(natural_weights))


def finite_logs(weights: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Logarithms of weights; a weight of 0 is taken for 1e-308, because JSON has no infinity."""
    logs: Float[np.ndarray, " N"] = np.log(np.maximum(weights, np.finfo(np.float64).tiny))
    return logs


def exponentiated_update(
    log_weights: Float[np.ndarray, " N"],
    score: Float[np.ndarray, " N"],
    *,
    step_size: float,
    uniform_mix: float,
) -> Float[np.ndarray, " N"]:
    """One exponentiated step with a uniform floor, in log space.

        psi[i] = w[i] exp(step_size * score[i])
        w'[i]  = (1 - uniform_mix) * psi[i] / sum_j psi[j] + uniform_mix / N

    This is DDK's Eq. 2 (arXiv 2407.16154; step_size 1, uniform_mix 1 - alpha) and the weight update of
    DoReMi's Algorithm 1 (arXiv 2305.10429; eta, c).

    >>> import numpy as np
    >>> from ddkmix.policies import exponentiated_update
    >>> log_weights = exponentiated_update(
    ...     np.log([0.5, 0.5]), np.log([3.0, 1.0]), step_size=1.0, uniform_mix=0.5
    ... )
    >>> np.exp(log_weights).round(6).tolist()
    [0.625, 0.375]

    Args:
        log_weights: logarithms of the present weights, up to a common constant.
        score: any finite numbers, 1e300 as well as 1; only their differences count.
        step_size: eta of the exponentiated step.
        uniform_mix: share of the result that is uniform, in [0, 1].

    Returns:
        Logarithms of the new weights, whose exponentials sum to 1; -inf for a share of nothing.
    """
    log_p = log_softmax(log_weights + step_size * score)
    with np.errstate(divide="ignore"):  # log(0): a share of nothing
        mixed: Float[np.ndarray, " N"] = np.logaddexp(
            np.log(1 - uniform_mix) + log_p, np.log(uniform_mix / len(log_p))
        )
    return mixed

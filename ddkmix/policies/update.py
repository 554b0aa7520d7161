"""The exponentiated step with a uniform floor that DDK, DoReMi and their kin share."""

import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax


def exponentiated_update(
    log_weights: Float[np.ndarray, " N"],
    score: Float[np.ndarray, " N"],
    *,
    step_size: float,
    uniform_mix: float,
) -> Float[np.ndarray, " N"]:
    """log of: weights * exp(step_size * score), normalised, then mixed with uniform.

    Args:
        log_weights: logarithms of the present weights, up to a common constant.
        score: any finite numbers, 1e300 as well as 1; only their differences count.
        step_size: eta of the exponentiated step.
        uniform_mix: share of the result that is uniform, in [0, 1].
    """
    log_p = log_softmax(log_weights + step_size * score)
    with np.errstate(divide="ignore"):  # log(0): a share of nothing
        mixed: Float[np.ndarray, " N"] = np.logaddexp(
            np.log(1 - uniform_mix) + log_p, np.log(uniform_mix / len(log_p))
        )
    return mixed

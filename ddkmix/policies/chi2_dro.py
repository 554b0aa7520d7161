"""DRPruning's mixture: the worst one within a chi-square ball around the prior (arXiv 2411.14055)."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float
from pydantic import Field

from ddkmix.policies.signal import MeasuredSignal, columns_of, signal_of
from ddkmix.policies.update import Start, start_weights
from ddkmix.types import DomainLosses

_EXACT = 4 * float(np.finfo(np.float64).eps)
_LARGEST_EXPONENT = 709.0  # exp of more overflows


@dataclass(frozen=True, kw_only=True, slots=True)
class Chi2Dro:
    """Distributionally robust loading (Deng et al. 2025, DRPruning, arXiv 2411.14055).

        q    = argmax over mixtures of sum_i q[i] d[i],  1/2 sum_i p[i] (q[i] / p[i] - 1)^2 <= rho
        q[i] = p[i] r[i] / sum_j p[j] r[j],   r[i] = max(relu(d[i] - eta) / sum_j p[j] relu(d[j] - eta), m)
        w[i] = max(q[i], min_j p[j]), normalised;       rho = 0.1, m = 0.2

    with d = l_student - l_reference, the teacher's loss as the reference, and the prior p. The number eta is
    the one at which q is on the edge of the ball; where even all mass on the largest d is inside, that is q.
    It remembers nothing but the prior, so it cannot run away: of all published rules it moves least.

    Where we leave the authors' code: (1) eta is found to the last bits, there to 1e-4 in the divergence.
    (2) Where every d is negative, the code multiplies the references by 0.9, 0.8, ... until one d is
    positive, because its bracket for eta wants that; the argmax needs no such thing, and we take it as it
    stands. (3) The code can smooth training losses (0.1 a step) or take held-out ones as they are; we do the
    latter. (4) Its references and priors that are refitted during the run are left out.

    Prior (1/2, 1/2), gaps (1, 0), rho = 1/8, no floors: q = (1/2 + x, 1/2 - x) has the divergence
    2 x^2 = 1/8, so x = 1/4.

    >>> import numpy as np
    >>> from ddkmix import DomainLosses
    >>> from ddkmix.policies import Chi2Dro
    >>> losses = DomainLosses.from_means({"code": 3.0, "prose": 2.0}, {"code": 2.0, "prose": 2.0})
    >>> policy = Chi2Dro(radius=0.125, min_ratio=0.0, floor_at_least_prior=False)
    >>> state = policy.update(policy.init(losses, natural_weights=np.array([0.5, 0.5])), losses)
    >>> [round(share, 6) for share in state["mixture_weights"]]
    [0.75, 0.25]
    """

    radius: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """Largest half chi-square divergence from the prior, rho: a squared relative shift of shares."""
    min_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """No domain falls below this factor of its prior, m (before normalisation)."""
    floor_at_least_prior: bool = True
    """Whether every share is lifted to the smallest share of the prior, as in the code."""
    signal: MeasuredSignal = "loss_gap"
    """The d of the equations: `loss_gap` as published, or another of `Signal` of one evaluation."""
    prior: Start = "natural"
    """Centre of the ball and mixture of the first interval: the corpus as it is, or uniform."""

    @property
    def needs(self) -> frozenset[str]:
        """What an evaluator must measure beside the losses: `excess_loss`, `forward_kl`, or nothing."""
        return columns_of(self.signal)

    def init(self, losses: DomainLosses, natural_weights: Float[np.ndarray, " N"]) -> dict[str, Any]:
        """The prior.

        Args:
            losses: those of the untrained student; only looked at for the signal to be there.
            natural_weights: shares of the corpus as it is; sum to 1.

        Raises:
            ConfigError: the signal is of something that nobody has measured.
        """
        signal_of(self.signal, losses)  # better now than after the first interval
        prior = start_weights(self.prior, natural_weights).tolist()
        return {"prior": prior, "mixture_weights": prior}

    def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
        """The worst mixture for the newest losses.

        Args:
            state: what `init` or the last `update` gave.
            losses: those at the end of the last interval, nats per token.
        """
        prior = np.array(state["prior"])
        weights = worst_mixture(
            prior, signal_of(self.signal, losses), radius=self.radius, min_ratio=self.min_ratio
        )
        if self.floor_at_least_prior:
            weights = np.maximum(weights, prior.min())
        return {"prior": state["prior"], "mixture_weights": (weights / weights.sum()).tolist()}


def worst_mixture(
    prior: Float[np.ndarray, " N"], gap: Float[np.ndarray, " N"], *, radius: float, min_ratio: float
) -> Float[np.ndarray, " N"]:
    """The mixture within the ball that gives large gaps the most, to the last bits of eta.

    In place of eta the unknown is the logarithm of its distance from the largest gap: shifts of all gaps then
    change nothing, and the root is found in some 15 steps wherever it lies.
    """
    behind = np.where(prior > 0, gap.max(initial=-np.inf, where=prior > 0) - gap, np.inf)
    steps = behind[(behind > 0) & np.isfinite(behind)]
    if not len(steps):  # all alike
        return prior

    def tilt(log_distance: float) -> Float[np.ndarray, " N"]:
        """q / prior."""
        mass = np.maximum(1.0 - behind / math.exp(log_distance), 0.0)
        ratio = np.maximum(mass / (prior @ mass), min_ratio)
        tilted: Float[np.ndarray, " N"] = ratio / (prior @ ratio)
        return tilted

    def outside(log_distance: float) -> float:
        """How far outside the ball q is; not above 0 inside."""
        off = tilt(log_distance) - 1.0
        return float(0.5 * (prior @ (off * off)) - radius)

    # as near as the second largest gap all mass is on the largest; at the far end q is inside the ball
    low, far = math.log(steps.min()), math.log(steps.max()) + math.log1p(1.0 / (2.0 * radius))
    high = min(far, _LARGEST_EXPONENT)
    if outside(low) > 0:
        from scipy.optimize import brentq  # half a second to import

        low = brentq(outside, low, high, xtol=_EXACT, rtol=_EXACT) if outside(high) < 0 else high
    shares: Float[np.ndarray, " N"] = prior * tilt(low)
    return shares / shares.sum()

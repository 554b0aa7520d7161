"""Adaptive Data Optimization: more of the domains whose losses are predicted to fall (arXiv 2410.11820)."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from ddkmix.policies.power_law import fit_power_laws
from ddkmix.policies.signal import measured
from ddkmix.policies.update import Start, start_weights
from ddkmix.types import DomainLosses

_LEAST_EXPONENT = 0.05
_FEWEST_POINTS = 4  # three say nothing about how well three parameters fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Ado:
    """ADO's data policy (Jiang et al. 2024, arXiv 2410.11820, Algorithm 1; code at bc3d8d0).

        l_k(n)   = e_k + b_k n^-a_k                    a law of each domain's loss against rows seen
        slope_k  = max(a_k, 0.05) (l_k(n) - e_k) / n   how fast it falls per row
        rho_k    = prior_k h_k^(1/2) slope_k, normalised, not below 0.01, normalised
        w_t      = 0.9 mean_t + 0.1 rho,               mean_{t+1} = mean_t t / (t + 1) + rho / (t + 1)

    with h_k the recent share of domain k, mean_0 the prior, and the prior itself until there are four points.
    The fit minimises the Huber loss (1e-3) of log residuals, as published. The code's first public version
    had sqrt(h (1 - h)); its authors corrected it to the paper's sqrt(h), which is ours.

    **It differs from the published one** where there is one measurement an interval, not one a step:
    (1) fitted are held-out losses (the code's `val_loss`), unsmoothed, from the first interval on; published
    are training losses of every tenth step after the first 1,000, smoothed (Savitzky-Golay, 101 points).
    (2) h is the share of the last interval; published is a mean over steps that decays by 0.9, which at the
    end of a long interval is the same. (3) t counts updates; published steps. (4) The optimizer is a grid of
    exponents with reweighted least squares; published is L-BFGS from 512 starts, the same objective.
    (5) a <= 0.8 as published, but e >= 0 and b is free; published are e >= 1.65 nats, which a strong
    student's code is below, and b <= 665. (6) With N > 100 domains the floor 0.01 cannot hold and is 1/N,
    so the mixture goes to uniform: lower `min_share`.

    Before there are four points the mixture is the prior:

    >>> import numpy as np
    >>> from dataclasses import replace
    >>> from ddkmix import DomainLosses
    >>> from ddkmix.policies import Ado
    >>> losses = DomainLosses.from_means({"code": 4.0, "prose": 4.0})
    >>> policy, rows = Ado(), np.array([0, 0])
    >>> state = policy.init(replace(losses, rows_served=rows), natural_weights=np.array([0.5, 0.5]))
    >>> for step in range(1, 5):  # code falls as 1 + 3 (n / 100)^-0.5, prose stays
    ...     falls = DomainLosses.from_means({"code": 1.0 + 3.0 * step**-0.5, "prose": 4.0})
    ...     state = policy.update(state, replace(falls, rows_served=rows + 50 * step))
    ...     print([round(share, 3) for share in state["mixture_weights"]])
    [0.5, 0.5]
    [0.5, 0.5]
    [0.5, 0.5]
    [0.549, 0.451]

    All of the slope is code's, so rho is (1, 0.01) / 1.01 and w = 0.9 (0.5, 0.5) + 0.1 rho.
    """

    fits_laws: ClassVar[bool] = True
    """An update takes long where there are hundreds of domains; guards ask for fewer of them."""
    prior: Start = "natural"
    """Mixture before the first fit, and the factor of every slope: the corpus as it is, or uniform."""
    rows: Literal["all", "own"] = "all"
    """What n counts: rows of all domains, as the code by default, or those of the domain, as the paper."""
    min_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Smallest share of a domain in rho."""
    newest: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of rho in the mixture; the rest is the mean of all before."""
    most_points: Annotated[int, Field(ge=8)] = 32
    """Evaluations kept for the fit against rows. Of more, every second of the older half is dropped."""

    def init(self, losses: DomainLosses, natural_weights: Float[np.ndarray, " N"]) -> dict[str, Any]:
        """The prior.

        Args:
            losses: those of the untrained student, nats per token, with `rows_served`.
            natural_weights: shares of the corpus as it is; sum to 1.

        Raises:
            ConfigError: nobody has counted `rows_served`.
        """
        prior = start_weights(self.prior, natural_weights).tolist()
        return {
            "mixture_weights": prior,
            "prior": prior,
            "mean": prior,
            "recent": prior,
            "served": measured("rows_served", losses).tolist(),
            "rows": [],
            "losses": [],
            "updates": 0,
        }

    def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
        """The prior until there are four points; then w_t.

        Args:
            state: what `init` or the last `update` gave.
            losses: those at the end of the last interval, nats per token, with `rows_served`.

        Raises:
            ConfigError: nobody has counted `rows_served`.
        """
        served, updates = measured("rows_served", losses), state["updates"] + 1
        since = served - np.array(state["served"])
        recent = np.array(state["recent"]) if since.sum() <= 0 else since / since.sum()
        counted = [served.sum()] if self.rows == "all" else served.tolist()
        points = _thinned([*state["rows"], counted], self.most_points)
        values = _thinned([*state["losses"], losses.student_loss.tolist()], self.most_points)
        new = {
            **state,
            "recent": recent.tolist(),
            "served": served.tolist(),
            "rows": points,
            "losses": values,
            "updates": updates,
        }
        if len(points) < _FEWEST_POINTS:
            return new
        rho = self._preferences(np.array(state["prior"]), recent, points, values)
        mean = np.array(state["mean"])
        return {
            **new,
            "mixture_weights": ((1.0 - self.newest) * mean + self.newest * rho).tolist(),
            "mean": (mean + (rho - mean) / (updates + 1)).tolist(),
        }

    def _preferences(
        self,
        prior: Float[np.ndarray, " N"],
        recent: Float[np.ndarray, " N"],
        rows: list[list[float]],
        losses: list[list[float]],
    ) -> Float[np.ndarray, " N"]:
        """rho: where a row is worth most, if the laws go on."""
        seen = np.maximum(np.array(rows, dtype=np.float64), 1.0) * np.ones(len(prior))
        laws = fit_power_laws(seen, np.array(losses))
        slope = np.maximum(laws.exponent, _LEAST_EXPONENT) * laws.scale / seen[-1]
        rho = prior * np.sqrt(recent) * slope
        total = rho.sum()
        shares = rho / total if total > 0 else prior  # no loss falls anywhere
        lifted = np.maximum(shares, min(self.min_share, 1.0 / len(shares)))
        preferences: Float[np.ndarray, " N"] = lifted / lifted.sum()
        return preferences


def _thinned(points: list[list[float]], most: int) -> list[list[float]]:
    """At most so many points; too many are made fewer where they are oldest and densest."""
    if len(points) <= most:
        return points
    half = len(points) // 2
    return points[:half:2] + points[half:]

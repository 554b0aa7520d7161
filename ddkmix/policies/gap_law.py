"""How the gap of each domain falls with the rows served: a Bayesian fit over a grid of curves.

For one shape c = (sharing m, scale k, exponent b) of the law

    E_i(t) = n_i(t) + m (n(t) - n_i(t))            rows of domain i, and a share m of everybody else's
    g_i    = G_i - A_i h(E_i),   h(E) = 1 - (1 + E / k)^(-b),   0 <= A_i <= S_i

level G and fall A are a linear regression; S_i is the first gap, or twice the largest change where the
first gap is not above 0. Nothing is searched for and nothing can fail to converge: every shape of a fixed
grid is fitted in closed form, and predictions are averages over shapes with their probabilities. One shape
does not fall at all. Domains lend each other evidence: half of every domain's prior over shapes is the
average of what all domains believe, and m is one for all.

Everything is relative to the rows served so far and to the first gaps; units of rows do not matter.

Axis letters: T measurements, N domains, M values of m, C shapes for each, S of all those, J numbers of rows.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

_SHARING = np.array([0.0, 0.03, 0.12, 0.4])
_SCALES = 2.0 ** np.arange(-7, 7)
_EXPONENTS = np.array([0.15, 0.25, 0.4, 0.6, 0.9, 1.4, 2.4])
_SCALE, _EXPONENT = (grid.ravel() for grid in np.meshgrid(_SCALES, _EXPONENTS, indexing="ij"))
_NEVER = 0.1
"""Prior probability that a gap does not fall."""
_SHARE_MEAN, _SHARE_SPREAD = 0.6, 0.4
"""Prior of A / S, the share of the first gap that rows can remove."""
_IMPROBABLE = 1e-4
"""Shapes that no domain believes in more than this are left out of predictions."""
_BELIEF_IN_ERRORS = 4.0
"""Measurements' worth of belief in the standard errors as given, against the scatter about the best law."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GapLaws:
    """The posterior over curves of every domain: those of the S shapes that somebody believes in."""

    rows: Float[np.ndarray, " N"]
    """Rows of each domain so far."""
    sharing: Float[np.ndarray, " S"]
    """m of every shape."""
    scale: Float[np.ndarray, " S"]
    exponent: Float[np.ndarray, " S"]
    probability: Float[np.ndarray, "S N"]
    level: Float[np.ndarray, "S N"]
    """G, in the gap's unit."""
    fall: Float[np.ndarray, "S N"]
    """A, in the gap's unit."""
    fall_error: Float[np.ndarray, "S N"]
    """Standard error of A."""

    def predict(
        self, more: Float[np.ndarray, "J N"], total: float
    ) -> tuple[Float[np.ndarray, "J N"], Float[np.ndarray, "J N"], Float[np.ndarray, " N"]]:
        """Gaps after more rows, what one more row of the own domain takes off, and how sure that is.

        Args:
            more: rows of each domain from now on.
            total: rows of all domains from now on, the same in every row of `more`.

        Returns:
            Expected gap; minus its derivative, >= 0; its standard deviation at the first row of `more`.
        """
        m, k, b = (a[:, None] for a in (self.sharing, self.scale, self.exponent))
        others = self.rows.sum() - self.rows + total - more
        bend = np.log1p(((self.rows + more)[:, None] + m * others[:, None]) / k)  # J S N
        rest = np.exp(-b * bend)
        gap = np.einsum("sn,jsn->jn", self.probability * self.fall, rest)
        gap = gap + (self.probability * (self.level - self.fall)).sum(axis=0)
        per_fall = b / k * rest * np.exp(-bend)
        mean = np.einsum("sn,jsn->jn", self.probability * self.fall, per_fall)
        square = (self.probability * (self.fall**2 + self.fall_error**2) * per_fall[0] ** 2).sum(axis=0)
        spread = np.sqrt(np.maximum(square - mean[0] ** 2, 0.0))
        # what m leaves of a slope is the same share for all domains: no reason to doubt their differences
        own = ((1 - m) * self.probability).sum(axis=0)
        return gap, own * mean, own * spread


def fit_gap_laws(
    rows: Float[np.ndarray, "T N"], gaps: Float[np.ndarray, "T N"], errors: Float[np.ndarray, "T N"]
) -> GapLaws:
    """The laws after T measurements.

    Args:
        rows: rows of each domain that had been served at each measurement; zeros in the first.
        gaps: measured then.
        errors: their standard errors, > 0.
    """
    # under a uniform mixture every m must tell the same story, so scales grow with what others teach;
    # a curve that bends at infinity never falls
    as_uniform = rows[-1].mean() * (1 + _SHARING * (rows.shape[1] - 1))
    scale = np.append(as_uniform[:, None] * _SCALE, np.full((len(_SHARING), 1), np.inf), axis=1)  # M C
    exponent = np.append(_EXPONENT, 1.0)
    taught = rows + _SHARING[:, None, None] * (rows.sum(axis=1, keepdims=True) - rows)  # M T N
    bend = np.log1p(taught[:, None] / scale[:, :, None, None])
    learned = -np.expm1(-exponent[:, None, None] * bend)  # h: M C T N
    fallen = np.ptp(gaps, axis=0)
    largest = np.where(gaps[0] > 0, np.maximum(gaps[0], fallen), 2 * fallen).clip(1e-9)  # S
    weight = 1 / errors**2
    weight_sum = weight.sum(axis=0)
    mean_gap = (weight * gaps).sum(axis=0) / weight_sum
    mean_learned = np.einsum("tn,mctn->mcn", weight, learned) / weight_sum
    curve = largest * (learned - mean_learned[:, :, None])  # the fall of a gap that all goes
    off = gaps - mean_gap
    share, share_error, evidence = _regress(
        np.einsum("tn,mctn,mctn->mcn", weight, curve, curve),
        -np.einsum("tn,mctn->mcn", weight * off, curve),
        (weight * off**2).sum(axis=0),
        len(gaps),
    )
    fall = share * largest
    probability = _posterior(evidence)
    kept = probability.max(axis=2) > _IMPROBABLE  # M C
    return GapLaws(
        rows=rows[-1],
        sharing=np.broadcast_to(_SHARING[:, None], kept.shape)[kept],
        scale=scale[kept],
        exponent=np.broadcast_to(exponent, kept.shape)[kept],
        probability=probability[kept] / probability[kept].sum(axis=0),
        level=(mean_gap + fall * mean_learned)[kept],
        fall=fall[kept],
        fall_error=(share_error * largest)[kept],
    )


def _regress(
    curve_square: Float[np.ndarray, "M C N"],
    curve_gap: Float[np.ndarray, "M C N"],
    gap_square: Float[np.ndarray, " N"],
    count: int,
) -> tuple[Float[np.ndarray, "M C N"], Float[np.ndarray, "M C N"], Float[np.ndarray, "M C N"]]:
    """A / S of every shape, its standard error, and the log probability of the gaps under the shape.

    Standard errors of the gaps are scaled by what the best shape leaves: the same held-out rows are used
    every time, so gaps scatter less about a curve than about the truth; and a run can be rougher than both.
    """
    best = np.clip(curve_gap / np.maximum(curve_square, 1e-300), 0.0, 1.0)
    left = (gap_square - 2 * best * curve_gap + best**2 * curve_square).min(axis=(0, 1))
    noise = (_BELIEF_IN_ERRORS + left) / (_BELIEF_IN_ERRORS + max(count - 3, 0))
    precision = curve_square / noise + _SHARE_SPREAD**-2
    share = np.clip((curve_gap / noise + _SHARE_MEAN * _SHARE_SPREAD**-2) / precision, 0.0, 1.0)
    misfit = (gap_square - 2 * share * curve_gap + share**2 * curve_square) / noise
    surprise = ((share - _SHARE_MEAN) / _SHARE_SPREAD) ** 2 + np.log(precision * _SHARE_SPREAD**2)
    return share, precision**-0.5, -(misfit + surprise) / 2


def _posterior(evidence: Float[np.ndarray, "M C N"]) -> Float[np.ndarray, "M C N"]:
    """Probabilities of the shapes, summing to 1 for each domain."""
    shapes = evidence.shape[1] - 1
    prior = np.log(np.append(np.full(shapes, (1 - _NEVER) / shapes), _NEVER))[:, None]
    alone = evidence + prior
    alone = np.exp(alone - _log_sum(alone, 1))
    shared = (np.exp(prior) + alone.mean(axis=2, keepdims=True)) / 2
    joint = evidence + np.log(shared)
    of_sharing = _log_sum(joint, 1)  # M 1 N
    each = np.exp(joint - of_sharing)
    total = of_sharing.sum(axis=2, keepdims=True)
    probability: Float[np.ndarray, "M C N"] = each * np.exp(total - _log_sum(total, 0))
    return probability


def _log_sum(logs: Float[np.ndarray, "M C N"], axis: int) -> Float[np.ndarray, "..."]:
    """log sum exp, the axis kept; scipy's takes ten times as long on arrays of this size."""
    largest = logs.max(axis=axis, keepdims=True)
    total: Float[np.ndarray, ...] = largest + np.log(np.exp(logs - largest).sum(axis=axis, keepdims=True))
    return total

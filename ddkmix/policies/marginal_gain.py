"""Rows go where the objective falls fastest for each of them; the page is marginal_gain.md beside this file.

The equations stand in the docstring of `MarginalGain`; the curves that it believes in, in gap_law.py.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field

from ddkmix.errors import ConfigError
from ddkmix.policies.gap_law import GapLaws, fit_gap_laws
from ddkmix.types import DomainLosses

_WORST = 32.0
"""The exponent that stands for the worst gap: the power mean is within N^(1/32) of the maximum."""
_LAW_ERROR, _LAW_ERROR_BEFORE = 0.003, 0.01
"""What no law of this form describes, as a share of the first gap: now, and each factor e of rows before."""
_UNKNOWN_ERROR = 0.02
"""Standard error where nobody measured one, as a share of the gap."""
_HOPELESS = 0.01
"""A gap that all the rows ahead would hardly bring down by this share of it gets no more than the floor."""
_STEPS = np.array([0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]) / 128
"""Shares of the rows ahead at which curves are looked at; straight lines between."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MarginalGain:
    """Water-filling on the marginal gain of a stated objective, from learning curves fitted online.

        F       = (1/N sum_i g_i^p)^(1/p)                            the objective, over the gaps g_i
        g_i(n)  = G_i - A_i (1 - (1 + n / k_i)^(-b_i))               fitted to what was measured so far
        x       = argmin sum_i g_i(n_i + x_i)^p,  sum_i x_i = X,  x_i >= floor X / N
        w       = c x / X + (1 - c) / N,   c = gain^2 / (gain^2 + variance of the gain)

    At the minimum one more row lowers F alike in every domain above the floor: rows go where the objective
    falls fastest for each of them, and not where the gap is merely large. Where the fit is poor c is small
    and the mixture uniform; so is the first interval. Ours; the page beside the source has the details.

    The standard errors of the gaps are in the fit, in the fill and in c, so the guard `evidence` does not act
    on this policy; floor, cap and the others do.

    Of two gaps the first does not fall: after two intervals it gets less than half.

    >>> import numpy as np
    >>> from ddkmix import DomainLosses
    >>> from ddkmix.policies import MarginalGain
    >>> policy = MarginalGain(objective="mean")
    >>> at = [DomainLosses.from_means({"noise": 5.0, "prose": gap}) for gap in (3.0, 2.4, 2.1)]
    >>> state = policy.init(at[0], natural_weights=np.array([0.5, 0.5]))
    >>> state["mixture_weights"]
    [0.5, 0.5]
    >>> for losses in at[1:]:
    ...     state = policy.update(state, losses)
    >>> [round(share, 1) for share in state["mixture_weights"]]
    [0.2, 0.8]
    """

    weighs_errors: ClassVar[bool] = True
    """The guard `evidence` would count the errors of the gaps twice, and does not act."""
    fits_laws: ClassVar[bool] = True
    """An update takes long where there are hundreds of domains."""
    objective: Literal["mean", "worst"] | Annotated[float, Field(ge=1)] = "mean"
    """What is to be small at the end, in nats per token: the `mean` gap, the `worst` gap, or the power mean
    of the gaps with this exponent, which leads from one (1) to the other (32 and more)."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the rows that is always spread evenly, so that no domain is forgotten or unobserved."""
    lookahead: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.25
    """Rows that are planned at once, as a share of the rows served so far; at least those of an interval."""
    memory: Annotated[int, Field(ge=4)] = 16
    """Measurements of rows and gaps that are kept; the nearest two become one where there are more."""

    def init(self, losses: DomainLosses, natural_weights: Float[np.ndarray, " N"]) -> dict[str, Any]:
        """Uniform, since nothing is known yet.

        Args:
            losses: those of the untrained student, nats per token.
            natural_weights: not looked at.
        """
        count = len(losses.domains)
        return {
            "mixture_weights": [1 / count] * count,
            "confidence": 0.0,
            "first_rows": None if losses.rows_served is None else losses.rows_served.tolist(),
            "measurements": [1],
            "rows": [[0.0] * count],
            "gaps": [losses.loss_gap.tolist()],
            "errors": [_errors(losses).tolist()],
        }

    def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
        """Fit the laws to all measurements, fill the rows ahead, and trust that as far as it is certain.

        Args:
            state: what `init` or the last `update` gave.
            losses: those at the end of the last interval, nats per token. Without `rows_served` an interval
                counts as one row, shared by its weights.

        Raises:
            ConfigError: `rows_served` was given before and is missing now.
        """
        rows = _rows_so_far(state, losses)
        history = remember(
            {
                "measurements": [*state["measurements"], 1],
                "rows": [*state["rows"], rows.tolist()],
                "gaps": [*state["gaps"], losses.loss_gap.tolist()],
                "errors": [*state["errors"], _errors(losses).tolist()],
            },
            self.memory,
        )
        total = rows.sum()
        weights, confidence = np.full(len(rows), 1 / len(rows)), 0.0
        if total > 0:
            ahead = max(total - sum(state["rows"][-1]), self.lookahead * total)
            laws = fit_gap_laws(*_evidence(history))
            power = self._power
            plan = fill(laws, ahead, power, self.floor, np.array(history["errors"][-1]))
            confidence = trust(laws, plan, power)
            weights = confidence * plan / ahead + (1 - confidence) * weights
        return {
            "mixture_weights": (weights / weights.sum()).tolist(),
            "confidence": confidence,
            "first_rows": state["first_rows"],
            **history,
        }

    @property
    def _power(self) -> float:
        """The exponent of the power mean that `objective` stands for."""
        if self.objective == "mean":
            return 1.0
        return _WORST if self.objective == "worst" else min(float(self.objective), _WORST)


def _evidence(
    history: dict[str, Any],
) -> tuple[Float[np.ndarray, "T N"], Float[np.ndarray, "T N"], Float[np.ndarray, "T N"]]:
    """Rows, gaps and their errors: those of the measurement, and those of the law, which grow into the past.

    What counts is the slope now; a law that is wrong about the beginning must not bend it.
    """
    rows, gaps, errors = (np.array(history[name]) for name in ("rows", "gaps", "errors"))
    total = rows.sum(axis=1, keepdims=True)
    ago = np.log(total[-1] / (total + 0.02 * total[-1]) * 1.02)
    rough = np.abs(gaps[0]) * (_LAW_ERROR + _LAW_ERROR_BEFORE * np.maximum(ago, 0.0))
    return rows, gaps, np.hypot(errors, np.maximum(rough, 1e-9))


def fill(
    laws: GapLaws, ahead: float, power: float, floor: float, errors: Float[np.ndarray, " N"] | float = 0.0
) -> Float[np.ndarray, " N"]:
    """Rows for each domain such that one more row lowers the objective equally wherever it goes.

    Minimises sum_i g_i(x_i)^power over sum_i x_i = ahead, x_i >= floor ahead / N. The multiplier of the sum
    is found by bisection; marginal gains are interpolated on a grid of rows.

    Args:
        laws: what gaps will do.
        ahead: rows to spread, in the unit of the laws.
        power: exponent of the objective.
        floor: share of the rows that is spread evenly.
        errors: standard errors of the gaps as such, which no further measurement on the same rows removes.
    """
    count, free = len(laws.rows), (1 - floor) * ahead
    evenly = np.full(count, floor * ahead / count)
    extra = free * _STEPS
    gap, slope, _ = laws.predict(evenly + extra[:, None], ahead)
    moving = moves(laws, ahead)
    if not moving.any() or free <= 0:
        return np.full(count, ahead / count)
    log_gain = _log_weight(gap, errors, power - 1) + np.log(np.maximum(slope, 1e-300))
    log_gain = np.minimum.accumulate(log_gain)[:, moving]
    low, high = log_gain.min() - 1.0, log_gain.max() + 1.0
    for _ in range(8):  # 16^8 parts of the range
        levels = np.linspace(low, high, 17)
        enough = int((_demand(log_gain, extra, levels).sum(axis=1) > free)[:-1].sum())
        low, high = levels[max(enough - 1, 0)], levels[max(enough, 1)]
    more, less = _demand(log_gain, extra, np.array([low, high]))
    # between the two lie domains of one constant gain: they share what is left
    part = (free - less.sum()) / max(more.sum() - less.sum(), 1e-300)
    evenly[moving] += less + min(part, 1.0) * (more - less)
    return evenly * (ahead / evenly.sum())


def _log_weight(
    gap: Float[np.ndarray, "J N"], errors: Float[np.ndarray, " N"] | float, power: float
) -> Float[np.ndarray, "J N"]:
    """log E[(gap + errors z)^power], z standard normal, by the maximum of the integrand; power log gap at 0.

    A gap that is only known roughly may be larger than it looks, and a high power must not trust its rank.
    """
    gap, variance = np.maximum(gap, 1e-9), np.maximum(errors, 1e-12) ** 2
    likely = (gap + np.sqrt(gap**2 + 4 * power * variance)) / 2
    return power * np.log(likely) - (likely - gap) ** 2 / (2 * variance)


def _demand(
    log_gain: Float[np.ndarray, "J N"], extra: Float[np.ndarray, " J"], levels: Float[np.ndarray, " L"]
) -> Float[np.ndarray, "L N"]:
    """Rows after which the log gain of each domain has come down to each level."""
    above = (log_gain > levels[:, None, None]).sum(axis=1)
    left = np.clip(above - 1, 0, len(extra) - 2)
    column = np.arange(log_gain.shape[1])
    high, low = log_gain[left, column], log_gain[left + 1, column]
    part = np.clip((high - levels[:, None]) / np.maximum(high - low, 1e-300), 0.0, 1.0)
    inside = extra[left] + part * (extra[left + 1] - extra[left])
    return np.where(above == 0, 0.0, np.where(above == len(extra), extra[-1], inside))


def moves(laws: GapLaws, ahead: float) -> Bool[np.ndarray, " N"]:
    """Whether a gap would fall by more than 1 % if its domain got all the rows ahead, with some luck.

    Args:
        laws: what gaps will do.
        ahead: rows, in the unit of the laws.
    """
    gap, _, error = laws.predict(np.outer([0.0, ahead], np.ones(len(laws.rows))), ahead)
    fall: Float[np.ndarray, " N"] = gap[0] - gap[1] + error * ahead
    return fall > _HOPELESS * np.maximum(gap[0], 0.0)


def trust(laws: GapLaws, plan: Float[np.ndarray, " N"], power: float) -> float:
    """How far to go from uniform to a plan: gain^2 / (gain^2 + variance of the gain).

    Only gaps that move count: beside a large one that does not, a high power would see no gain anywhere.

    Args:
        laws: what gaps will do.
        plan: rows for each domain.
        power: exponent of the objective.
    """
    ahead = plan.sum()
    evenly = np.full(len(plan), ahead / len(plan))
    moving = moves(laws, ahead)
    if not moving.any():
        return 0.0
    gaps, _, error = laws.predict(np.stack([evenly, plan]), ahead)
    gaps = gaps[:, moving]
    if power > 1:
        gaps = np.maximum(gaps, 1e-9)
        top = gaps.max()
        means = top * np.mean((gaps / top) ** power, axis=1) ** (1 / power)
        pull = (gaps[0] / means[0]) ** (power - 1) / moving.sum()
    else:
        means, pull = gaps.mean(axis=1), np.full(moving.sum(), 1 / moving.sum())
    gain = means[0] - means[1]
    variance = ((pull * (error * (plan - evenly))[moving]) ** 2).sum()
    return float(gain**2 / (gain**2 + variance)) if gain > 0 else 0.0


def remember(history: dict[str, Any], memory: int) -> dict[str, Any]:
    """Measurements, of which two neighbours become one where they are more than `memory`.

    The first and the last stay; the pair merges whose numbers of rows have the smallest ratio. Errors merge
    as if they were independent, though the held-out rows are the same: what these err every time moves the
    level of a law, which is fitted freely, and never its slope. The slope suffers from the rest, which is new
    each time and does average out.

    Args:
        history: lists by measurement: how many each stands for, rows, gaps and their errors.
        memory: measurements that are kept.
    """
    if len(history["measurements"]) <= memory:
        return history
    total = np.maximum(np.array(history["rows"]).sum(axis=1)[1:-1], 1e-300)
    i = int(np.argmin(total[1:] / total[:-1])) + 1
    a, b = history["measurements"][i : i + 2]
    both = {name: np.array(history[name][i : i + 2]) for name in ("rows", "gaps", "errors")}
    share = np.array([[a], [b]]) / (a + b)
    one = {
        "measurements": a + b,
        "rows": (share * both["rows"]).sum(axis=0).tolist(),
        "gaps": (share * both["gaps"]).sum(axis=0).tolist(),
        "errors": np.sqrt(((share * both["errors"]) ** 2).sum(axis=0)).tolist(),
    }
    return {name: [*kept[:i], one[name], *kept[i + 2 :]] for name, kept in history.items()}


def _rows_so_far(state: dict[str, Any], losses: DomainLosses) -> Float[np.ndarray, " N"]:
    """Rows of each domain since `init`; intervals shared by weights where nobody counts rows."""
    if state["first_rows"] is None:
        return np.array(state["rows"][-1]) + np.array(state["mixture_weights"])
    if losses.rows_served is None:
        raise ConfigError(
            "policy marginal_gain got losses with rows_served at first and now without; give rows_served "
            "every time, or never (then every interval counts alike)."
        )
    rows: Float[np.ndarray, " N"] = losses.rows_served - np.array(state["first_rows"], dtype=np.float64)
    return rows


def _errors(losses: DomainLosses) -> Float[np.ndarray, " N"]:
    """Standard errors of the gaps; a share of the gap where nobody knows them."""
    guess = _UNKNOWN_ERROR * np.abs(losses.loss_gap)
    return np.where(np.isfinite(losses.gap_error), losses.gap_error, guess)

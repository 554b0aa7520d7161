"""Objectives, and the best fixed mixture of a world for each, with a bound on what a better one could gain.

Gaps are convex in the rows and a power mean (p >= 1) is convex and rising in the gaps, so there are no local
optima. Sequential quadratic programming (scipy's SLSQP) finds the minimum, and the tangent planes of the gaps
there bound from below what any mixture reaches: a linear programme (`lower_bound`).
"""

import numpy as np
from jaxtyping import Float
from scipy.optimize import linprog, minimize

from simulator.worlds import World

OBJECTIVES = {"mean gap": 1.0, "power mean 4": 4.0, "worst gap": np.inf}
"""Exponent of the power mean, by its name."""


def power_mean(gaps: Float[np.ndarray, "*P N"], power: float) -> Float[np.ndarray, "*P"]:
    """(mean of gap^power)^(1/power) over domains; the largest gap at inf. Gaps in nats per token, >= 0."""
    if np.isinf(power):
        return gaps.max(axis=-1)
    largest = gaps.max(axis=-1, keepdims=True)
    return (largest * ((gaps / largest) ** power).mean(axis=-1, keepdims=True) ** (1 / power))[..., 0]


def best_fixed(world: World, power: float) -> Float[np.ndarray, " N"]:
    """Shares of the mixture, kept for the whole run, whose objective at its end is the smallest."""
    starts = [np.full(world.count, 1 / world.count), world.natural, _inverse(world)]
    found = [s for start in starts for s in (start, _descend(world, power, start))]
    return min(found, key=lambda shares: value_of(world, shares, power))


def value_of(world: World, shares: Float[np.ndarray, " N"], power: float) -> float:
    """The objective at the end of a run with this mixture, nats per token."""
    return float(power_mean(world.gaps(world.budget * shares), power))


def _inverse(world: World) -> Float[np.ndarray, " N"]:
    """A start that gives rows where one more of them moves the gap most, from uniform."""
    slopes = -world.slopes(np.full(world.count, world.budget / world.count)).sum(axis=0)
    raw = np.sqrt(slopes) + 1e-9
    return raw / raw.sum()


def _descend(world: World, power: float, start: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """SLSQP on the simplex; for the largest gap over (shares, t) with t >= every gap."""
    count, budget = world.count, world.budget
    shares = _smooth(world, power, start) if np.isfinite(power) else start
    if np.isinf(power):
        top = float(world.gaps(budget * start).max())
        inequality = {
            "type": "ineq",
            "fun": lambda z: z[-1] - world.gaps(budget * z[:-1]) / top,
            "jac": lambda z: np.column_stack([-budget * world.slopes(budget * z[:-1]) / top, np.ones(count)]),
        }
        ones = np.append(np.ones(count), 0.0)
        done = minimize(
            lambda z: z[-1],
            np.append(start, 1.0),
            jac=lambda z: np.append(np.zeros(count), 1.0),
            method="SLSQP",
            bounds=[(0, 1)] * count + [(0, None)],
            constraints=[{"type": "eq", "fun": lambda z: ones @ z - 1, "jac": lambda z: ones}, inequality],
            options={"maxiter": 200, "ftol": 1e-10},
        )
        shares = done.x[:-1]
    shares = np.maximum(shares, 0.0)
    return shares / shares.sum()


def _smooth(world: World, power: float, start: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """SLSQP for a finite exponent."""
    count, budget = world.count, world.budget

    def objective(shares: Float[np.ndarray, " N"]) -> tuple[float, Float[np.ndarray, " N"]]:
        gaps = world.gaps(budget * shares)
        value = float(power_mean(gaps, power))
        pull = (gaps / value) ** (power - 1) / count
        return value, budget * (pull @ world.slopes(budget * shares))

    ones = np.ones(count)
    found: Float[np.ndarray, " N"] = minimize(
        objective,
        start,
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints=[{"type": "eq", "fun": lambda z: ones @ z - 1, "jac": lambda z: ones}],
        options={"maxiter": 200, "ftol": 1e-10},
    ).x
    return found


def lower_bound(world: World, shares: Float[np.ndarray, " N"], power: float) -> float:
    """No mixture reaches less than this, nats per token; near the optimum it is close to the optimum.

    The objective is at least its tangent plane at `shares`; for the largest gap, at least the largest of the
    tangent planes of the gaps, whose minimum over the simplex is a linear programme.
    """
    rows = world.budget * shares
    gaps, slopes = world.gaps(rows), world.budget * world.slopes(rows)
    if np.isfinite(power):
        value = float(power_mean(gaps, power))
        gradient = (gaps / value) ** (power - 1) / world.count @ slopes
        return float(value + gradient.min() - gradient @ shares)
    planes = np.column_stack([slopes, -np.ones(world.count)])
    done = linprog(
        np.append(np.zeros(world.count), 1.0),
        A_ub=planes,
        b_ub=slopes @ shares - gaps,
        A_eq=np.append(np.ones(world.count), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, 1)] * world.count + [(None, None)],
    )
    return float(done.fun)


def random_search(world: World, power: float, *, points: int, seed: int = 0) -> float:
    """The best objective of that many random mixtures (Dirichlet, from spiky to flat), nats per token."""
    rng = np.random.default_rng(seed)
    sharpness = rng.choice([0.3, 1.0, 3.0], (points, 1))
    raw = rng.standard_gamma(np.broadcast_to(sharpness, (points, world.count))) + 1e-12
    shares = raw / raw.sum(axis=1, keepdims=True)
    return float(power_mean(world.gaps(world.budget * shares), power).min())

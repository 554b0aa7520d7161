"""Losses of many domains against rows seen, fitted as loss = floor + scale * (rows / last rows)^-exponent.

Where the exponent is given, the law is linear in the other two. So exponents are searched on grids, coarse
then fine, and for each of them floor and scale are found by reweighted least squares, for all domains and all
exponents of a grid at once. The same data give the same bits on every rank; nothing starts at random.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import huber

LEAST_EXPONENT, LARGEST_EXPONENT = 0.01, 0.8
_POINTS_OF_A_GRID = 17
_GRIDS = 3  # the last one steps by 4e-4
_REWEIGHTINGS = 15
_HUBER = 1e-3
_SMALLEST_LOSS = 1e-3  # logarithms are fitted
_AT_ONCE = 32  # domains whose arrays fit into a processor's cache

_Columns = tuple[
    Float[np.ndarray, " N"], Float[np.ndarray, " N"], Float[np.ndarray, " N"], Float[np.ndarray, " N"]
]


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerLaws:
    """One law for each of N domains; at the last point a loss is `floor + scale`."""

    floor: Float[np.ndarray, " N"]
    """The loss that no number of rows goes below, nats per token."""
    scale: Float[np.ndarray, " N"]
    """What is above the floor at the last point, nats per token."""
    exponent: Float[np.ndarray, " N"]
    """How fast that shrinks with rows."""
    misfit: Float[np.ndarray, " N"]
    """Sum over points of the Huber loss (1e-3) of log(fitted / measured)."""


def fit_power_laws(rows: Float[np.ndarray, "T N"], losses: Float[np.ndarray, "T N"]) -> PowerLaws:
    """The laws with the smallest sum of Huber losses of log residuals, floor and scale not negative.

    Args:
        rows: rows seen at each point, above 0 and not decreasing.
        losses: nats per token at each point.
    """
    relative, measured = (rows / rows[-1]).T[:, None], np.maximum(losses, _SMALLEST_LOSS).T[:, None]
    parts = [slice(first, first + _AT_ONCE) for first in range(0, len(relative), _AT_ONCE)]
    columns = zip(*(_fit(relative[part], measured[part]) for part in parts), strict=True)
    floor, scale, exponent, misfit = map(np.concatenate, columns)
    return PowerLaws(floor=floor, scale=scale, exponent=exponent, misfit=misfit)


def _fit(relative: Float[np.ndarray, "N 1 T"], measured: Float[np.ndarray, "N 1 T"]) -> _Columns:
    """The columns of `PowerLaws`."""
    width = LARGEST_EXPONENT - LEAST_EXPONENT
    grid = np.linspace(LEAST_EXPONENT, LARGEST_EXPONENT, _POINTS_OF_A_GRID)[None].repeat(len(relative), 0)
    for _ in range(_GRIDS):
        floor, scale, misfit = _given_exponents(grid, relative, measured)
        at = (np.arange(len(grid)), misfit.argmin(axis=1))
        best = floor[at], scale[at], grid[at], misfit[at]
        width *= 2.0 / (_POINTS_OF_A_GRID - 1)  # from one neighbour on the grid to the other
        steps = np.linspace(-width / 2, width / 2, _POINTS_OF_A_GRID)
        grid = np.clip(best[2][:, None] + steps, LEAST_EXPONENT, LARGEST_EXPONENT)
    return best


def _given_exponents(
    exponents: Float[np.ndarray, "N G"],
    relative: Float[np.ndarray, "N 1 T"],
    measured: Float[np.ndarray, "N 1 T"],
) -> tuple[Float[np.ndarray, "N G"], Float[np.ndarray, "N G"], Float[np.ndarray, "N G"]]:
    """Floor, scale and misfit for every exponent of every domain's grid."""
    falling = relative ** -exponents[:, :, None]
    fitted, weight = measured, np.ones(1)
    for _ in range(_REWEIGHTINGS):
        # log(new / measured) is residual + (new - fitted) / fitted near the fitted law
        residual = np.log(fitted / measured)
        if fitted is not measured:
            weight = _HUBER / np.maximum(np.abs(residual), _HUBER)
        one, fall = 1.0 / fitted, falling / fitted
        floor, scale = _two_unknowns(weight, one, fall, np.maximum(1.0 - residual, 0.1))
        fitted = floor[..., None] + scale[..., None] * falling
    misfit = huber(_HUBER, np.log(fitted / measured)).sum(axis=-1)
    return floor, scale, misfit


def _two_unknowns(
    weight: Float[np.ndarray, "..."],
    one: Float[np.ndarray, "..."],
    fall: Float[np.ndarray, "..."],
    target: Float[np.ndarray, "..."],
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """floor, scale >= 0 with the least sum over points of weight (floor one + scale fall - target)^2."""
    weighted, towards = weight * one, weight * target
    sums = ((weighted, one), (weighted, fall), (weight * fall, fall), (one, towards), (fall, towards))
    aa, ab, bb, at, bt = (np.einsum("...t,...t->...", x, y) for x, y in sums)
    determinant = aa * bb - ab * ab
    told_apart = determinant > 1e-12 * aa * bb  # else the rows never changed, and a flat law is as good
    safe = np.where(told_apart, determinant, 1.0)
    floor = np.where(told_apart, (at * bb - bt * ab) / safe, at / aa)
    scale = np.where(told_apart, (bt * aa - at * ab) / safe, 0.0)
    floor, scale = np.where(scale < 0, at / aa, floor), np.maximum(scale, 0.0)
    return np.maximum(floor, 0.0), np.where(floor < 0, bt / bb, scale)

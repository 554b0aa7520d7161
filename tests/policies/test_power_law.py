"""Laws of losses against rows: known curves found again, and ADO's objective at its least."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from ddkmix.policies.power_law import PowerLaws, fit_power_laws

DELTA = 1e-3


def curves(floor, scale, exponent, points=12, rows=100.0):
    """Rows and losses, (T, N), of laws whose scale is the loss above the floor at the last point."""
    seen = rows * np.arange(1, points + 1)[:, None] * np.ones(len(floor))
    return seen, np.array(floor) + np.array(scale) * (seen / seen[-1]) ** -np.array(exponent)


def objective(parameters, rows, losses):
    """The published one: Huber losses of log(exp(e) + exp(a) n^-alpha) - log L, summed."""
    a, e, alpha = parameters
    gap = np.abs(np.logaddexp(a - alpha * np.log(rows), e) - np.log(losses))
    return float(np.where(gap > DELTA, DELTA * (gap - DELTA / 2), gap**2 / 2).sum())


def published_fit(rows, losses):
    """The least of it that L-BFGS finds from a grid of starts, with 0 <= alpha <= 0.8."""
    starts = [(a, e, alpha) for a in (1, 4) for e in (-1.5, 1) for alpha in (0.2, 0.5)]
    bounds = [(-30, 30), (-30, 5), (0.01, 0.8)]
    found = [
        minimize(objective, start, args=(rows, losses), method="L-BFGS-B", bounds=bounds) for start in starts
    ]
    return min(result.fun for result in found)


def test_known_laws_are_found_again():
    """Without noise floor, scale and exponent come out to a few thousandths, all domains at once."""
    rng = np.random.default_rng(0)
    floor, scale, exponent = rng.uniform(0.5, 3, 20), rng.uniform(0.2, 3, 20), rng.uniform(0.1, 0.75, 20)
    laws = fit_power_laws(*curves(floor, scale, exponent))
    assert exponent == pytest.approx(laws.exponent, abs=1e-3)
    assert floor == pytest.approx(laws.floor, abs=2e-2)
    assert scale == pytest.approx(laws.scale, abs=2e-2)
    assert laws.misfit.max() < 1e-6


def test_the_slope_at_the_last_point_is_that_of_the_law():
    """exponent * scale / rows is the derivative, here of 1 + 2 (n / 1200)^-0.5 at n = 1200: -1 / 1200."""
    laws = fit_power_laws(*curves([1.0], [2.0], [0.5]))
    assert 1.0 == pytest.approx((laws.exponent * laws.scale)[0], rel=2e-3)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_the_fit_is_as_good_as_lbfgs_on_the_published_objective(noise):
    """On three noisy curves the misfit is that of L-BFGS from 8 starts, or less, but for the grid."""
    rng = np.random.default_rng(7)
    rows, losses = curves([1.0, 2.0, 3.0], [2.0, 0.5, 0.1], [0.5, 0.7, 0.15])
    losses = losses * np.exp(rng.normal(0.0, noise, losses.shape))
    laws = fit_power_laws(rows, losses)
    for i in range(3):
        assert laws.misfit[i] <= 1.01 * published_fit(rows[:, i], losses[:, i]) + 1e-7
        scale = max(laws.scale[i], 1e-12) * rows[-1, i] ** laws.exponent[i]
        parameters = (math.log(scale), math.log(max(laws.floor[i], 1e-12)), laws.exponent[i])
        assert objective(parameters, rows[:, i], losses[:, i]) == pytest.approx(laws.misfit[i], abs=1e-9)


def test_a_worse_exponent_would_be_noticed():
    """The objective that the test above compares rises for a law with the exponent moved by 0.1."""
    rows, losses = curves([1.0], [2.0], [0.5])
    laws = fit_power_laws(rows, losses)
    moved = (math.log(2.0 * 1200**0.6), math.log(laws.floor[0]), 0.6)
    assert objective(moved, rows[:, 0], losses[:, 0]) > 100 * (laws.misfit[0] + 1e-7)


def test_one_point_far_off_moves_little():
    """An outlier of 30 % counts by its absolute value: the exponent stays where it was."""
    rows, losses = curves([1.0], [2.0], [0.5], points=20)
    losses[4] *= 1.3
    assert 0.5 == pytest.approx(fit_power_laws(rows, losses).exponent[0], abs=0.02)


def test_losses_that_do_not_fall_have_no_scale():
    """Flat or rising, a law may not rise: what is above the floor is nothing."""
    rows = 100.0 * np.arange(1, 9)[:, None] * np.ones(2)
    losses = np.stack([np.full(8, 3.0), np.linspace(2.0, 3.0, 8)], axis=1)
    assert [0.0, 0.0] == pytest.approx(fit_power_laws(rows, losses).scale, abs=1e-6)


def test_a_floor_is_never_negative():
    """A line that falls to almost nothing: the floor is 0, and the law still finite."""
    rows = 100.0 * np.arange(1, 9)[:, None]
    laws = fit_power_laws(rows, np.linspace(3.0, 0.01, 8)[:, None])
    assert laws.floor[0] >= 0
    assert np.isfinite([laws.scale[0], laws.misfit[0]]).all()


def test_rows_that_never_change_have_a_flat_law():
    """A domain that was served nothing between evaluations has no curve."""
    laws = fit_power_laws(np.full((5, 1), 100.0), np.array([[2.0], [2.1], [1.9], [2.0], [2.0]]))
    assert 0.0 == laws.scale[0]
    assert 2.0 == pytest.approx(laws.floor[0], abs=0.05)


def test_domains_are_fitted_apart():
    """The law of one domain is the same alone, to the last bit, which ranks and permutations rely on."""
    rows, losses = curves([1.0, 2.0, 0.5], [2.0, 0.5, 1.0], [0.5, 0.3, 0.2])
    together = fit_power_laws(rows, losses)
    alone = fit_power_laws(rows[:, 1:2], losses[:, 1:2])
    assert isinstance(alone, PowerLaws)
    for column in ("floor", "scale", "exponent"):
        assert getattr(alone, column)[0] == pytest.approx(getattr(together, column)[1], rel=1e-12)

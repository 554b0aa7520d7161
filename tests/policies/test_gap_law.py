"""The laws of the gap: against the equations in plain loops, and against curves that are known."""

import math

import numpy as np
import pytest

from ddkmix.policies import gap_law
from ddkmix.policies.gap_law import fit_gap_laws


def curve(rows, start, floor, scale, exponent):
    """A gap that follows the law."""
    return floor + (start - floor) * (1 + rows / scale) ** -exponent


def uniform_rows(measurements, domains, rows=100.0):
    """The same number of rows of every domain between any two measurements."""
    return np.repeat(rows * np.arange(measurements)[:, None], domains, axis=1)


def by_hand(rows, gaps, errors, more, total):
    """Expected gaps and slopes of every domain after `more` rows: the module's equations, shape by shape."""
    count, domains = len(rows), len(rows[0])
    sums = {}  # (m, shape, domain) -> k, b and the weighted sums of the regression
    for m in gap_law._SHARING:
        mean_rows = sum(rows[-1]) / domains * (1 + m * (domains - 1))
        shapes = [(k * mean_rows, b) for k in gap_law._SCALES for b in gap_law._EXPONENTS]
        for i in range(domains):
            taught = [row[i] + m * (sum(row) - row[i]) for row in rows]
            weight = [1 / row[i] ** 2 for row in errors]
            y = [row[i] for row in gaps]
            largest = max(y[0], max(y) - min(y))
            mean_y = sum(w * v for w, v in zip(weight, y, strict=True)) / sum(weight)
            gap_square = sum(w * (g - mean_y) ** 2 for w, g in zip(weight, y, strict=True))
            for c, (k, b) in enumerate([*shapes, (math.inf, 1.0)]):
                h = [1 - (1 + e / k) ** -b for e in taught]
                mean_h = sum(w * v for w, v in zip(weight, h, strict=True)) / sum(weight)
                square = sum(w * (largest * (v - mean_h)) ** 2 for w, v in zip(weight, h, strict=True))
                cross = -sum(
                    w * (g - mean_y) * largest * (v - mean_h) for w, g, v in zip(weight, y, h, strict=True)
                )
                sums[m, c, i] = (k, b, mean_h, mean_y, largest, gap_square, square, cross)
    left = [math.inf] * domains
    for (_, _, i), (*_, gap_square, square, cross) in sums.items():
        share = min(max(cross / square, 0), 1) if square else 0.0
        left[i] = min(left[i], gap_square - 2 * share * cross + share**2 * square)
    fits = {}  # (m, shape, domain) -> probability of the data, law
    for (m, c, i), (k, b, mean_h, mean_y, largest, gap_square, square, cross) in sums.items():
        noise = (4 + left[i]) / (4 + max(count - 3, 0))
        precision = square / noise + 1 / 0.4**2
        share = min(max((cross / noise + 0.6 / 0.4**2) / precision, 0), 1)
        misfit = (gap_square - 2 * share * cross + share**2 * square) / noise
        evidence = -0.5 * (misfit + ((share - 0.6) / 0.4) ** 2 + math.log(precision * 0.4**2))
        fits[m, c, i] = (evidence, k, b, mean_y + share * largest * mean_h, share * largest)
    cells = len(gap_law._SCALE) + 1
    prior = [0.9 / (cells - 1)] * (cells - 1) + [0.1]
    weights, of_m = {}, {}
    for m in gap_law._SHARING:
        alone = np.array(
            [[prior[c] * math.exp(fits[m, c, i][0]) for c in range(cells)] for i in range(domains)]
        )
        alone /= alone.sum(axis=1, keepdims=True)
        shared = (np.array(prior) + alone.mean(axis=0)) / 2
        joint = np.array(
            [[shared[c] * math.exp(fits[m, c, i][0]) for c in range(cells)] for i in range(domains)]
        )
        of_m[m] = joint.sum(axis=1).prod()
        weights[m] = joint / joint.sum(axis=1, keepdims=True)
    gap, slope = np.zeros(domains), np.zeros(domains)
    for (m, c, i), (_, k, b, level, fall) in fits.items():
        probability = of_m[m] / sum(of_m.values()) * weights[m][i, c]
        seen = rows[-1][i] + more[i] + m * (sum(rows[-1]) - rows[-1][i] + total - more[i])
        gap[i] += probability * (level - fall * (1 - (1 + seen / k) ** -b))
        slope[i] += probability * fall * b / k * (1 + seen / k) ** (-b - 1)
    own = sum((1 - m) * of_m[m] for m in of_m) / sum(of_m.values())
    return gap, own * slope


def test_predictions_are_the_equations(monkeypatch):
    """Three domains, five measurements, unequal rows: averages over all shapes, written out."""
    rng = np.random.default_rng(0)
    rows = np.vstack([np.zeros(3), np.cumsum(rng.uniform(10, 200, (4, 3)), axis=0)])
    gaps = curve(rows, 3.0, 1.0, 120.0, 0.6) + 0.05 * rng.standard_normal((5, 3))
    errors = rng.uniform(0.02, 0.1, (5, 3))
    more = np.array([0.0, 50.0, 300.0])
    quick, *_ = fit_gap_laws(rows, gaps, errors).predict(more[None], 350.0)
    monkeypatch.setattr(gap_law, "_IMPROBABLE", 0.0)
    gap, slope, _ = fit_gap_laws(rows, gaps, errors).predict(more[None], 350.0)
    expected_gap, expected_slope = by_hand(rows.tolist(), gaps.tolist(), errors.tolist(), more, 350.0)
    assert expected_gap == pytest.approx(gap[0], rel=1e-9)
    assert expected_slope == pytest.approx(slope[0], rel=1e-9)
    assert gap == pytest.approx(quick, rel=1e-3)  # with improbable shapes left out


def test_probabilities_sum_to_one():
    """For each domain, over all shapes and all m."""
    laws = fit_gap_laws(
        uniform_rows(6, 4), np.random.default_rng(0).uniform(1, 3, (6, 4)), np.full((6, 4), 0.1)
    )
    assert [1.0] * 4 == pytest.approx(laws.probability.sum(axis=0))


@pytest.mark.parametrize("scale", [30.0, 300.0, 3000.0])
@pytest.mark.parametrize("exponent", [0.25, 0.5, 0.9])
def test_a_curve_of_this_form_is_foretold(scale, exponent):
    """From 1,000 rows to 1,500: the fall that is still to come and its slope within a third."""
    rows = uniform_rows(11, 2)
    gaps = np.stack(
        [curve(rows[:, 0], 3.0, 0.5, scale, exponent), curve(rows[:, 0], 2.0, 0.0, 500.0, 0.5)], axis=1
    )
    laws = fit_gap_laws(rows, gaps, np.where(rows < 300, 0.03, 0.008))
    gap, slope, _ = laws.predict(np.array([[0.0, 0.0], [500.0, 500.0]]), 1000.0)
    fall = gaps[-1, 0] - curve(1500.0, 3.0, 0.5, scale, exponent)
    true_slope = curve(999.5, 3.0, 0.5, scale, exponent) - curve(1000.5, 3.0, 0.5, scale, exponent)
    _, still, _ = laws.predict(np.zeros((1, 2)), 0.0)
    assert fall == pytest.approx(gaps[-1, 0] - gap[1, 0], rel=0.35)
    assert true_slope == pytest.approx(still[0, 0] / (1 - (laws.sharing @ laws.probability[:, 0])), rel=0.35)
    assert (slope >= 0).all()


def test_a_gap_that_does_not_fall_is_known_as_such():
    """After ten measurements with little noise: it never falls, or so late that nothing is expected yet."""
    rng, rows = np.random.default_rng(1), uniform_rows(11, 2)
    gaps = np.stack([np.full(11, 4.0), curve(rows[:, 0], 3.0, 0.5, 300.0, 0.5)], axis=1)
    laws = fit_gap_laws(rows, gaps + 0.02 * rng.standard_normal(gaps.shape), np.full(gaps.shape, 0.02))
    never = np.isinf(laws.scale)
    assert laws.probability[never, 0].sum() > 0.1
    assert laws.probability[never, 1].sum() < 1e-6
    _, slope, _ = laws.predict(np.zeros((1, 2)), 0.0)
    assert slope[0, 0] < 0.1 * slope[0, 1]


def test_repeated_rows_that_teach_nothing_more_are_seen_in_the_slope():
    """A curve that stops at 300 rows: the law expects little from there on."""
    rows = uniform_rows(16, 2)
    gaps = np.stack(
        [curve(np.minimum(rows[:, 0], 300), 3.0, 0.0, 300.0, 0.9), curve(rows[:, 0], 3.0, 0.0, 300.0, 0.9)],
        axis=1,
    )
    _, slope, _ = fit_gap_laws(rows, gaps, np.full(gaps.shape, 0.01)).predict(np.zeros((1, 2)), 0.0)
    assert slope[0, 0] < 0.35 * slope[0, 1]


def test_noise_makes_slopes_uncertain():
    """Ten times the standard errors: a wider spread."""
    rows, rng = uniform_rows(6, 2), np.random.default_rng(2)
    gaps, z = curve(rows, 3.0, 0.5, 300.0, 0.5), rng.standard_normal((6, 2))
    sure, unsure = (
        fit_gap_laws(rows, gaps + e * z, np.full(gaps.shape, e)).predict(np.zeros((1, 2)), 0.0)[2]
        for e in (0.02, 0.2)
    )
    assert (unsure > 2 * sure).all()


@pytest.mark.parametrize("factor", [1e-3, 1e6])
def test_units_of_rows_and_gaps_do_not_matter(factor):
    """Rows in thousands, gaps in bits: the same law in other units."""
    rows, rng = np.cumsum(np.random.default_rng(3).uniform(0, 100, (6, 3)), axis=0), np.random.default_rng(4)
    rows[0] = 0
    gaps, errors = (
        curve(rows, 3.0, 0.5, 300.0, 0.5) + 0.02 * rng.standard_normal((6, 3)),
        np.full((6, 3), 0.02),
    )
    more = np.full((1, 3), 100.0)
    gap, slope, spread = fit_gap_laws(rows, gaps, errors).predict(more, 300.0)
    in_other = fit_gap_laws(rows * factor, gaps * 2, errors * 2).predict(more * factor, 300.0 * factor)
    for expected, actual in zip((2 * gap, 2 * slope / factor, 2 * spread / factor), in_other, strict=True):
        assert expected == pytest.approx(actual, rel=1e-6)


def test_a_uniform_mixture_says_nothing_about_who_teaches_whom():
    """All values of m explain it alike, so they stay as probable as before."""
    rows = uniform_rows(8, 5)
    laws = fit_gap_laws(rows, curve(rows, 3.0, 0.5, 300.0, 0.5), np.full(rows.shape, 0.01))
    of_m = [laws.probability[laws.sharing == m, 0].sum() for m in gap_law._SHARING]
    assert [0.25] * 4 == pytest.approx(of_m)


@pytest.mark.parametrize("sharing", [0.0, 0.4])
def test_a_varied_mixture_shows_who_teaches_whom(sharing):
    """Domains take turns; where all learn from all, the laws see it."""
    rows = np.vstack([np.zeros(4), np.cumsum(200 * np.tile(np.eye(4), (3, 1)), axis=0)])
    taught = rows + sharing * (rows.sum(axis=1, keepdims=True) - rows)
    laws = fit_gap_laws(rows, curve(taught, 3.0, 0.5, 300.0, 0.5), np.full(rows.shape, 0.01))
    assert sharing == pytest.approx(laws.sharing @ laws.probability[:, 0], abs=0.03)


def test_students_better_than_their_teacher_have_a_law_too():
    """A gap from -0.5 to -1 falls as any other."""
    rows = uniform_rows(11, 2)
    laws = fit_gap_laws(rows, curve(rows, -0.5, -1.0, 300.0, 0.9), np.full(rows.shape, 0.005))
    gap, slope, _ = laws.predict(np.zeros((1, 2)), 0.0)
    assert curve(1000.0, -0.5, -1.0, 300.0, 0.9) == pytest.approx(gap[0, 0], abs=0.02)
    assert slope[0, 0] > 0


def test_gaps_of_exactly_zero_are_no_division_by_zero():
    """Nothing to explain, nothing to gain."""
    gap, slope, spread = fit_gap_laws(uniform_rows(4, 2), np.zeros((4, 2)), np.full((4, 2), 1e-9)).predict(
        np.zeros((1, 2)), 0.0
    )
    assert np.isfinite(np.vstack([gap, slope, spread])).all()
    assert [0.0, 0.0] == pytest.approx(gap[0], abs=1e-8)

"""The nearest mixture within bounds: exact, unique, and the same whatever the order of the domains."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from ddkmix.policies import bounds
from ddkmix.policies.bounds import nearest_mixture

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
Nearest = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
Problem = tuple[np.ndarray, np.ndarray, np.ndarray]


@st.composite
def problems(draw: st.DrawFn, most: int = 8) -> Problem:
    """A wanted mixture, some of it 0, and bounds around another one."""
    count = draw(st.integers(1, most))
    shares = st.lists(st.floats(0, 1), min_size=count, max_size=count)
    raw = np.array(draw(shares)) * np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    raw = raw if raw.sum() > 1e-3 else np.ones(count)
    inside = np.array(draw(shares)) + 1e-3
    inside /= inside.sum()
    below, above = np.array(draw(shares)), np.array(draw(shares))
    return raw / raw.sum(), inside * (1 - below), inside + above * (1 - inside)


def assert_mixture(w: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """A point of the simplex that keeps its bounds to the last bit."""
    assert 1.0 == pytest.approx(w.sum(), abs=1e-12)
    assert (low <= w).all() and (w <= high).all()


def divergence(w: np.ndarray, p: np.ndarray) -> float:
    """KL(w || p)."""
    return float((w * np.log(np.maximum(w, 1e-300) / p)).sum())


def assert_nearest(nearest: Nearest, problem: Problem) -> None:
    """No other mixture within the bounds is nearer: neither scipy's minimiser nor any small exchange."""
    p, low, high = problem
    p = (p + 1e-4) / (p + 1e-4).sum()  # KL is finite
    w = nearest(p, low, high)
    assert_mixture(w, low, high)
    start = low + (high - low) * (1 - low.sum()) / max((high - low).sum(), 1e-12)
    found = minimize(
        divergence,
        start,
        args=(p,),
        jac=lambda w, p: np.log(np.maximum(w, 1e-300) / p) + 1,
        bounds=list(zip(low, high, strict=True)),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 300},
    )
    if abs(found.x.sum() - 1) < 1e-9:
        assert divergence(w, p) <= divergence(found.x, p) + 1e-7
    for i in range(len(p)):  # moving a little from any domain to any other comes no nearer
        for j in range(len(p)):
            much = min(1e-6, w[i] - low[i], high[j] - w[j])
            other = w.copy()
            other[i] -= much
            other[j] += much
            assert divergence(w, p) <= divergence(other, p) + 1e-12


def test_a_cap_by_hand() -> None:
    """0.7 is cut to 0.4; the 0.6 that are left go to 0.2 and 0.1 at 2 to 1: 0.4 and 0.2."""
    w = nearest_mixture(np.array([0.7, 0.2, 0.1]), np.zeros(3), np.full(3, 0.4))
    assert [0.4, 0.4, 0.2] == pytest.approx(w)


def test_a_floor_by_hand() -> None:
    """0.01 is raised to 0.1; the others share 0.9 at 0.66 to 0.33."""
    w = nearest_mixture(np.array([0.66, 0.33, 0.01]), np.full(3, 0.1), np.ones(3))
    assert [0.6, 0.3, 0.1] == pytest.approx(w)


def test_a_mixture_within_its_bounds_is_returned_as_it_is() -> None:
    """Bit for bit, also if its sum is off in the last place."""
    p = np.array([0.1, 0.2, 0.7 + 1e-16])
    assert p is nearest_mixture(p, np.zeros(3), np.ones(3))


def test_domains_that_were_to_have_nothing_share_what_nobody_else_may_have() -> None:
    """(1, 0, 0) with a cap of 0.4: the two zeros are alike. With a floor of 0.1 they get that and no more."""
    p = np.array([1.0, 0.0, 0.0])
    assert [0.4, 0.3, 0.3] == pytest.approx(nearest_mixture(p, np.zeros(3), np.full(3, 0.4)))
    assert [0.8, 0.1, 0.1] == pytest.approx(nearest_mixture(p, np.full(3, 0.1), np.ones(3)))
    assert [0.4, 0.2, 0.4] == pytest.approx(nearest_mixture(p, np.zeros(3), np.array([0.4, 0.2, 0.9])))


def test_zeros_are_the_limit_of_small_numbers() -> None:
    """1e-12 in their place gives nearly the same."""
    low, high = np.array([0.0, 0.05, 0.0, 0.0]), np.array([0.3, 0.9, 0.4, 0.2])
    small = nearest_mixture(np.array([0.5, 1e-12, 0.5 - 2e-12, 1e-12]), low, high)
    assert small == pytest.approx(nearest_mixture(np.array([0.5, 0.0, 0.5, 0.0]), low, high), abs=1e-9)


def test_numbers_below_the_normal_ones_count_as_zero() -> None:
    """1e-320 would overflow a quotient; no warning is raised (warnings are errors)."""
    w = nearest_mixture(np.array([1.0, 1e-320, 1e-300]), np.zeros(3), np.full(3, 0.45))
    assert_mixture(w, np.zeros(3), np.full(3, 0.45))
    assert [0.45, 0.1, 0.45] == pytest.approx(w)


def test_bounds_that_leave_one_mixture_give_it() -> None:
    """Floors that sum to 1, caps that sum to 1, a single domain."""
    p = np.array([0.2, 0.3, 0.5])
    assert [1 / 3] * 3 == pytest.approx(nearest_mixture(p, np.full(3, 1 / 3), np.ones(3)))
    assert [1 / 3] * 3 == pytest.approx(nearest_mixture(p, np.zeros(3), np.full(3, 1 / 3)))
    assert [1.0] == nearest_mixture(np.array([1.0]), np.zeros(1), np.ones(1)).tolist()


def test_bounds_that_miss_1_by_rounding_are_kept() -> None:
    """Ten tenths sum to 1 - 1e-16: frozen at them, nothing moves. Floors may exceed 1 by as much."""
    tenths, p = np.full(10, 0.1), np.arange(10) / 45
    assert tenths.tolist() == nearest_mixture(p, tenths, tenths).tolist()
    assert tenths.tolist() == nearest_mixture(np.maximum(p, 0.01) / 1.01, tenths, tenths).tolist()
    above = np.nextafter(tenths, 1)
    assert above == pytest.approx(nearest_mixture(p, above, np.ones(10)), abs=1e-15)


@SETTINGS
@given(problems())
def test_it_is_a_mixture_within_its_bounds(problem: Problem) -> None:
    """Sums to 1 and keeps every bound, whatever is wanted."""
    assert_mixture(nearest_mixture(*problem), *problem[1:])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(problems(most=5))
def test_nothing_is_nearer(problem: Problem) -> None:
    """Held against scipy's SLSQP, and against all exchanges between two domains."""
    assert_nearest(nearest_mixture, problem)


@SETTINGS
@given(problems())
def test_what_was_projected_stays(problem: Problem) -> None:
    """Idempotent, to the last bit."""
    _, low, high = problem
    once = nearest_mixture(*problem)
    assert once.tolist() == nearest_mixture(once, low, high).tolist()


@SETTINGS
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_the_domains_does_not_count(problem: Problem, random: object) -> None:
    """Domains that change places take their shares along."""
    order = np.argsort([random.random() for _ in problem[0]])  # type: ignore[attr-defined]
    p, low, high = problem
    expected = nearest_mixture(p, low, high)[order]
    assert expected == pytest.approx(nearest_mixture(p[order], low[order], high[order]), abs=1e-12)


@SETTINGS
@given(problems())
def test_shares_between_their_bounds_keep_their_ratios(problem: Problem) -> None:
    """What no bound touches is scaled by one factor."""
    p, low, high = problem
    w = nearest_mixture(p, low, high)
    free = (w > low) & (w < high) & (p > 1e-6)
    ratios = w[free] / p[free]
    assert ratios == pytest.approx(np.full(len(ratios), ratios[0] if len(ratios) else 1.0), rel=1e-6)


def clipped(p: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The common mistake: clip, then normalise."""
    w = np.clip(p, low, high)
    return np.asarray(w / w.sum())


def shifted(p: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The Euclidean projection, by bisection: within the bounds, but nearest in another sense."""
    below, above = -2.0, 2.0
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if np.clip(p - middle, low, high).sum() > 1 else (below, middle)
    return np.clip(p - above, low, high)


@pytest.mark.parametrize("sabotage", [clipped, shifted])
def test_a_projection_that_is_none_would_be_noticed(sabotage: Nearest) -> None:
    """Clip-and-normalise breaks the bounds it has just kept; Euclid's is not the nearest in KL."""
    problem = np.array([0.8, 0.15, 0.05]), np.full(3, 0.1), np.array([0.5, 0.45, 0.45])
    assert_nearest(nearest_mixture, problem)
    with pytest.raises(AssertionError):
        assert_nearest(sabotage, problem)


def test_a_search_that_stops_early_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor taken from the wrong line: the sum is no longer 1."""
    problem = np.array([0.8, 0.15, 0.05]), np.full(3, 0.1), np.array([0.5, 0.45, 0.45])

    def first_line(p: np.ndarray, low: np.ndarray, high: np.ndarray, total: float) -> np.ndarray:
        return np.clip((low / p).min() * p, low, high)

    monkeypatch.setattr(bounds, "_fill", first_line)
    with pytest.raises(AssertionError):
        assert_mixture(nearest_mixture(*problem), *problem[1:])

"""The worst mixture in a chi-square ball: the rule of DRPruning's code, and the argmax itself."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from ddkmix.policies import Chi2Dro
from ddkmix.policies.chi2_dro import worst_mixture
from tests.policies.family import weights

SETTINGS = settings(deadline=None, derandomize=True, max_examples=20)
PROBLEMS = st.integers(2, 7).flatmap(
    lambda count: st.tuples(
        st.lists(st.floats(0.05, 1), min_size=count, max_size=count),
        st.lists(st.floats(-2, 3), min_size=count, max_size=count),
    )
)


def divergence(q, p):
    """Half the chi-square divergence, 1/2 sum_i p_i (q_i / p_i - 1)^2."""
    q, p = np.array(q), np.array(p)
    return float(0.5 * (p * (q / p - 1) ** 2).sum())


def of_the_code(p, gaps, rho, floor, lift):
    """q ~ p relu(gap - eta) with q / p >= floor, eta by bisection; then at least min(p); all normalised."""
    p, gaps = np.array(p), np.array(gaps)

    def q_of(eta):
        raw = p * np.maximum(gaps - eta, 0.0)
        ratio = np.maximum(raw / raw.sum() / p, floor)
        return ratio * p / (ratio * p).sum()

    low = -(1.0 / (math.sqrt(2 * rho + 1) - 1)) * gaps.max()
    while divergence(q_of(low), p) > rho:  # their bracket grows where it has to
        low -= 2 * (gaps.max() - low)
    high = gaps.max() - 1e-12 * max(1.0, gaps.max() - low)
    for _ in range(300):
        middle = 0.5 * (low + high)
        if divergence(q_of(middle), p) > rho:
            high = middle
        else:
            low = middle
    q = q_of(low)
    q = np.maximum(q, p.min()) if lift else q
    return (q / q.sum()).tolist()


def check_code(policy, p, gaps, rho=0.1, floor=0.2, lift=True):
    """The policy gives what the code's rule gives."""
    expected = of_the_code(p, gaps, rho, floor, lift)
    actual = weights(policy, [gaps, gaps], p)[-1]
    assert expected == pytest.approx(actual, abs=1e-7)


def normalised(values):
    """Numbers as shares."""
    return [value / math.fsum(values) for value in values]


@SETTINGS
@given(PROBLEMS)
def test_weights_are_the_rule_of_the_code(drawn):
    """With its constants, wherever some gap is positive, and its bisection carried to the end."""
    p, gaps = normalised(drawn[0]), drawn[1]
    assume(max(gaps) > 0.01 and max(gaps) - min(gaps) > 0.01)
    assume(len(set(gaps)) == len(gaps))
    check_code(Chi2Dro(), p, gaps)


@pytest.mark.parametrize(
    "policy",
    [Chi2Dro(radius=0.2), Chi2Dro(min_ratio=0.0), Chi2Dro(floor_at_least_prior=False)],
    ids=["radius", "ratio", "lift"],
)
def test_another_constant_would_be_noticed(policy):
    """The comparison fails for each of the three settings that the rule has."""
    p, gaps = [0.4, 0.38, 0.2, 0.02], [2.0, 1.9, -2.0, -2.0]
    check_code(Chi2Dro(), p, gaps)
    with pytest.raises(AssertionError):
        check_code(policy, p, gaps)


def test_several_updates_do_not_add_up():
    """Every update starts from the prior, so the weights are those of the last losses alone."""
    p, history = [0.5, 0.3, 0.2], [[1.0, 2.0, 0.0], [0.5, 2.0, 1.0], [2.0, 0.5, 0.4], [2.0, 0.5, 0.4]]
    found = weights(Chi2Dro(), history, p)
    assert p == found[0]
    assert found[2] == found[3]
    for gaps, actual in zip(history[1:], found[1:], strict=True):
        assert of_the_code(p, gaps, 0.1, 0.2, lift=True) == pytest.approx(actual, abs=1e-7)


@settings(SETTINGS, max_examples=10)
@given(PROBLEMS, st.sampled_from([0.02, 0.1, 0.5]))
def test_nothing_in_the_ball_is_worse(drawn, rho):
    """Without floors q is the argmax of <q, gap>: a general optimizer finds nothing larger."""
    p, gaps = np.array(normalised(drawn[0])), np.array(drawn[1])
    q = worst_mixture(p, gaps, radius=rho, min_ratio=0.0)
    assert rho + 1e-9 >= divergence(q, p)
    found = minimize(
        lambda x: -(x @ gaps),
        p,
        jac=lambda x: -gaps,
        bounds=[(0.0, 1.0)] * len(p),
        constraints=[
            {"type": "eq", "fun": lambda x: x.sum() - 1},
            {"type": "ineq", "fun": lambda x: rho - divergence(x, p)},
        ],
        method="SLSQP",
    )
    assert -found.fun <= q @ gaps + 1e-5


def test_the_solution_is_on_the_edge_to_the_last_bits():
    """The divergence of q is the radius, as well as float64 can tell."""
    p, gaps = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.7, 0.3, 0.2])
    for floor in (0.0, 0.2):
        q = worst_mixture(p, gaps, radius=0.1, min_ratio=floor)
        assert 0.1 == pytest.approx(divergence(q, p), rel=1e-13)


def test_a_wide_ball_gives_all_to_the_largest_gap():
    """Half the divergence of (0, 1) from (1/2, 1/2) is 1/2: no larger radius changes anything."""
    p, gaps = np.array([0.5, 0.5]), np.array([0.0, 1.0])
    for radius in (0.5, 1.0, 100.0):
        assert [0.0, 1.0] == pytest.approx(worst_mixture(p, gaps, radius=radius, min_ratio=0.0))
    assert [0.01, 0.99] != pytest.approx(worst_mixture(p, gaps, radius=0.4, min_ratio=0.0), abs=5e-3)


def test_the_largest_gaps_share_by_the_prior():
    """Two domains with one gap get shares in proportion to what they had."""
    q = worst_mixture(np.array([0.2, 0.1, 0.7]), np.array([2.0, 2.0, 0.0]), radius=0.3, min_ratio=0.0)
    assert 2.0 == pytest.approx(q[0] / q[1])


@SETTINGS
@given(PROBLEMS, st.floats(-50, 50))
def test_only_differences_between_gaps_count(drawn, shift):
    """Also where all gaps are negative, where the code would change its references."""
    p, gaps = np.array(normalised(drawn[0])), np.array(drawn[1])
    assume(np.ptp(gaps) > 1e-3 and len(np.unique(gaps.round(6))) == len(gaps))
    before = worst_mixture(p, gaps, radius=0.1, min_ratio=0.2)
    assert before == pytest.approx(worst_mixture(p, gaps + shift, radius=0.1, min_ratio=0.2), abs=1e-6)


def test_equal_gaps_are_the_prior():
    """Nothing is worse than anything else."""
    p = [0.7, 0.2, 0.1]
    assert p == pytest.approx(weights(Chi2Dro(), [[1.0] * 3, [1.0] * 3], p)[-1])
    assert [1 / 3] * 3 == pytest.approx(weights(Chi2Dro(prior="uniform"), [[1.0] * 3] * 2, p)[-1])


def test_a_share_of_nothing_stays_nothing():
    """A domain that the prior leaves out is outside of the ball, however large its gap."""
    q = worst_mixture(np.array([0.5, 0.5, 0.0]), np.array([0.0, 1.0, 9.0]), radius=0.125, min_ratio=0.2)
    assert [0.25, 0.75, 0.0] == pytest.approx(q)

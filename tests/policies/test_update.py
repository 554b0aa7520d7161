"""The exponentiated step: weights * exp(step_size * score), normalised, then mixed with uniform."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.policies.update import exponentiated_update

SETTINGS = settings(deadline=None, derandomize=True, max_examples=100)
SCORES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8)


def step(weights, score, *, step_size=1.0, uniform_mix=0.0):
    """The step from and to weights instead of their logarithms."""
    with np.errstate(divide="ignore"):
        log_weights = np.log(np.array(weights))
    return np.exp(
        exponentiated_update(log_weights, np.array(score), step_size=step_size, uniform_mix=uniform_mix)
    )


def test_a_step_by_hand():
    """1/4 and 3/4 times factors 9 and 1: 9/4 and 3/4, which is 3/4 and 1/4."""
    assert [0.75, 0.25] == pytest.approx(step([0.25, 0.75], [math.log(9), 0.0]))


def test_the_step_size_multiplies_the_score():
    """Half a step with score log 9 is a step with log 3: 1/4 x 3 and 3/4 x 1 are equal."""
    assert [0.5, 0.5] == pytest.approx(step([0.25, 0.75], [math.log(9), 0.0], step_size=0.5))


def test_a_step_of_size_zero_keeps_the_weights():
    """Nothing is learnt at step size 0, whatever the scores."""
    assert [0.1, 0.9] == pytest.approx(step([0.1, 0.9], [5.0, -5.0], step_size=0.0))


def test_the_uniform_share_is_mixed_in_last():
    """At uniform_mix 0.2 the weights 3/4 and 1/4 become 0.8 w + 0.1."""
    assert [0.7, 0.3] == pytest.approx(step([0.25, 0.75], [math.log(9), 0.0], uniform_mix=0.2))


def test_uniform_mix_one_forgets_everything():
    """At uniform_mix 1 the result is uniform even from weights of exactly 0."""
    assert [0.25] * 4 == pytest.approx(step([1.0, 0.0, 0.0, 0.0], [9.0, 1.0, 2.0, 3.0], uniform_mix=1.0))


def test_uniform_mix_zero_keeps_a_weight_of_zero():
    """Without a uniform share an excluded domain stays excluded, and no warning is raised."""
    assert [1.0, 0.0] == pytest.approx(step([1.0, 0.0], [0.0, 50.0]))


def test_one_domain_gets_everything():
    """A mixture of one domain is that domain."""
    assert [1.0] == pytest.approx(step([1.0], [123.0], uniform_mix=0.5))


@pytest.mark.parametrize("size", [1e3, 1e10, 1e100, 1e300])
def test_no_score_is_too_large(size):
    """Scores up to 1e300 of either sign give the largest all but the uniform share."""
    weights = step([0.2, 0.3, 0.5], [size, -size, 0.0], uniform_mix=0.5)
    assert np.isfinite(weights).all()
    assert [0.5 + 0.5 / 3, 0.5 / 3, 0.5 / 3] == pytest.approx(weights, abs=1e-12)


@SETTINGS
@given(SCORES, st.floats(0, 1))
def test_the_result_is_a_point_of_the_simplex_above_its_floor(scores, uniform_mix):
    """Weights are >= uniform_mix / N and sum to 1."""
    count = len(scores)
    weights = step([1 / count] * count, scores, uniform_mix=uniform_mix)
    assert 1.0 == pytest.approx(weights.sum(), abs=1e-12)
    assert weights.min() >= uniform_mix / count - 1e-15


@SETTINGS
@given(SCORES, st.floats(-1e3, 1e3))
def test_only_differences_between_scores_count(scores, shift):
    """Adding a constant to all scores changes nothing."""
    count = len(scores)
    before = step([1 / count] * count, scores)
    after = step([1 / count] * count, [score + shift for score in scores])
    assert before == pytest.approx(after, abs=1e-9)


@SETTINGS
@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(-20, 20)), min_size=1, max_size=6), st.floats(0, 1))
def test_it_equals_the_formula_where_the_formula_does_not_overflow(pairs, uniform_mix):
    """For moderate scores: (1 - u) w e^s / sum(w e^s) + u / N, written as it stands."""
    weights, scores = [w for w, _ in pairs], [s for _, s in pairs]
    raw = [w * math.exp(s) for w, s in pairs]
    expected = [(1 - uniform_mix) * x / sum(raw) + uniform_mix / len(pairs) for x in raw]
    assert expected == pytest.approx(step(weights, scores, uniform_mix=uniform_mix), rel=1e-10)

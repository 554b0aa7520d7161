"""Velocitune against its rule, arXiv 2411.14318, written out literally."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.policies import Velocitune
from tests.policies.family import weights

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
HISTORIES = st.integers(2, 6).flatmap(
    lambda count: st.tuples(
        st.lists(st.floats(0.01, 6), min_size=count, max_size=count),
        st.lists(st.lists(st.floats(-2, 8), min_size=count, max_size=count), min_size=1, max_size=5),
    )
)


def published(history, teacher=2.0):
    """V = clamp((l - l_target) / (l_init - l_target), 0, 1); w exp(V), normalised."""
    l_init = [teacher + gap for gap in history[0]]
    w, found = [1 / len(l_init)] * len(l_init), []
    for gaps in history[1:]:
        velocity = [
            min(max((teacher + gap - teacher) / (start - teacher), 0.0), 1.0)
            for gap, start in zip(gaps, l_init, strict=True)
        ]
        w = [x * math.exp(v) for x, v in zip(w, velocity, strict=True)]
        w = [x / math.fsum(w) for x in w]
        found.append(w)
    return found


def check(policy, history):
    """The policy gives what the rule gives, after every update."""
    for expected, actual in zip(published(history), weights(policy, history)[1:], strict=True):
        assert expected == pytest.approx(actual, rel=1e-9)


@SETTINGS
@given(HISTORIES)
def test_weights_are_the_published_rule(drawn):
    """Over one to five updates, with gaps that close, pass the target and open again."""
    check(Velocitune(), [drawn[0], *drawn[1]])


def test_another_step_or_a_floor_would_be_noticed():
    """The comparison fails for twice the step and for a uniform share."""
    history = [[2.0, 2.0], [1.0, 2.0], [0.5, 2.0]]
    check(Velocitune(), history)
    for policy in (Velocitune(step_size=2.0), Velocitune(uniform_mix=0.1)):
        with pytest.raises(AssertionError):
            check(policy, history)


def test_scale_does_not_matter():
    """Gaps ten times as large everywhere, first and later, give the same weights: no double exponential."""
    history = [[2.0, 1.0, 3.0], [1.0, 0.9, 2.0], [0.5, 0.8, 0.1]]
    larger = [[10 * gap for gap in gaps] for gaps in history]
    for before, after in zip(weights(Velocitune(), history), weights(Velocitune(), larger), strict=True):
        assert before == pytest.approx(after)


def test_a_step_moves_no_ratio_by_more_than_e():
    """V is in [0, 1], so however far the gaps, two domains part by a factor e per update at most."""
    first, second = weights(Velocitune(), [[1.0, 1.0], [-700.0, 700.0]])
    assert [0.5, 0.5] == first
    assert math.e == pytest.approx(second[1] / second[0])


def test_without_a_floor_a_slow_domain_takes_all_in_a_long_run():
    """Differences in V add up; with a uniform share they do not."""
    history = [[1.0, 1.0], *[[0.5, 1.0]] * 60]
    assert 1e-6 > weights(Velocitune(), history)[-1][0]
    assert 0.05 < weights(Velocitune(uniform_mix=0.2), history)[-1][0]

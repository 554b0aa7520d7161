"""Dynamic batch loading against the rule of the authors' code and the rule of their paper, both literally."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.policies import Sheared
from tests.policies.family import weights

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
HISTORIES = st.integers(2, 6).flatmap(
    lambda count: st.lists(st.lists(st.floats(-3, 5), min_size=count, max_size=count), min_size=2, max_size=6)
)


def of_the_code(history, natural):
    """softmax(log w + 1.0 d), then 1 - c of it and c / n of uniform, c = 1e-4; d as it is."""
    proportion, found, c = list(natural), [list(natural)], 1e-4
    for diff in history[1:]:
        alpha = [math.log(w) + 1.0 * d for w, d in zip(proportion, diff, strict=True)]
        top = max(alpha)
        alpha = [math.exp(a - top) for a in alpha]
        proportion = [(1 - c) * a / math.fsum(alpha) + c / len(alpha) for a in alpha]
        found.append(proportion)
    return found


def of_the_paper(history, natural):
    """Algorithm 1: Delta = max(l - l_ref, 0); w exp(Delta), normalised."""
    w, found = list(natural), [list(natural)]
    for diff in history[1:]:
        alpha = [x * math.exp(max(d, 0.0)) for x, d in zip(w, diff, strict=True)]
        w = [a / math.fsum(alpha) for a in alpha]
        found.append(w)
    return found


def natural_of(history):
    """1 : 2 : 3 ..., as shares."""
    count = len(history[0])
    return [2 * (i + 1) / (count * (count + 1)) for i in range(count)]


def check(rule, policy, history):
    """The policy gives what the rule gives, after every evaluation."""
    natural = natural_of(history)
    for expected, actual in zip(rule(history, natural), weights(policy, history, natural), strict=True):
        assert expected == pytest.approx(actual, rel=1e-9, abs=1e-15)


@SETTINGS
@given(HISTORIES)
def test_the_default_is_the_rule_of_the_code(history):
    """Without a clip, with its constant c, from the corpus's proportions, over several updates."""
    check(of_the_code, Sheared(), history)


@SETTINGS
@given(HISTORIES)
def test_the_rule_of_the_paper_is_two_settings(history):
    """Clipped at zero and without a uniform share."""
    check(of_the_paper, Sheared(clip_at_zero=True, uniform_mix=0.0), history)


def test_paper_and_code_part_where_a_domain_is_past_its_target():
    """Differences 0 and -1: the code takes rows from the second, the paper leaves both where they are."""
    history = [[0.0, 0.0], [0.0, -1.0]]
    assert 0.5 < weights(Sheared(start="uniform"), history)[-1][0]
    assert [0.5, 0.5] == pytest.approx(
        weights(Sheared(clip_at_zero=True, uniform_mix=0.0, start="uniform"), history)[-1]
    )
    with pytest.raises(AssertionError):
        check(of_the_code, Sheared(clip_at_zero=True), history)
    with pytest.raises(AssertionError):
        check(of_the_paper, Sheared(), history)


def test_a_shift_of_all_gaps_changes_nothing_without_the_clip():
    """Only differences between domains count, so a weaker teacher everywhere is no reason to move."""
    before = weights(Sheared(), [[0.0, 0.0, 0.0], [1.0, 2.0, 0.5], [0.5, 1.0, 0.5]])
    after = weights(Sheared(), [[0.0, 0.0, 0.0], [-2.0, -1.0, -2.5], [3.5, 4.0, 3.5]])
    assert np.array(before) == pytest.approx(np.array(after))

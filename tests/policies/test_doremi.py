"""DoReMi against Algorithm 1 of arXiv 2305.10429, written out literally."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.policies import Doremi
from tests.conftest import domain_losses

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
HISTORIES = st.integers(2, 6).flatmap(
    lambda count: st.lists(st.lists(st.floats(0, 8), min_size=count, max_size=count), min_size=1, max_size=5)
)


def losses_with(excess, gaps=None):
    """Losses whose mean gap is something else than their mean clipped excess."""
    gaps = [0.25 * value - 1.0 for value in excess] if gaps is None else gaps
    return replace(domain_losses(gaps), excess_loss=np.array(excess, dtype=np.float64))


def algorithm_1(history, eta, c):
    """The weights w_1..w_T and their mean, in the letters of the paper; alpha_0 is 1/k."""
    k = len(history[0])
    alpha, every = [1 / k] * k, []
    for lam in history:
        alpha = [a * math.exp(eta * excess) for a, excess in zip(alpha, lam, strict=True)]
        alpha = [a / math.fsum(alpha) for a in alpha]
        alpha = [(1 - c) * a + c / k for a in alpha]
        every.append(alpha)
    return every, [math.fsum(column) / len(every) for column in zip(*every, strict=True)]


def ours(policy, history):
    """The states after each update."""
    natural = np.full(len(history[0]), 1 / len(history[0]))
    state, found = policy.init(losses_with(history[0]), natural), []
    for excess in history:
        state = policy.update(state, losses_with(excess))
        found.append(state)
    return found


def check(policy, history, eta, c):
    """Weights and average are those of Algorithm 1 after every update."""
    for count, state in enumerate(ours(policy, history), start=1):
        every, average = algorithm_1(history[:count], eta, c)
        assert every[-1] == pytest.approx(state["mixture_weights"], rel=1e-9)
        assert average == pytest.approx(state["average_weights"], rel=1e-9)


@SETTINGS
@given(HISTORIES, st.sampled_from([0.1, 1.0, 2.0]), st.sampled_from([1e-4, 1e-3, 0.5]))
def test_weights_and_their_average_are_algorithm_1(history, eta, c):
    """Over one to five updates, for several step sizes and floors."""
    check(Doremi(step_size=eta, uniform_mix=c), history, eta, c)


def test_the_defaults_are_the_published_constants():
    """eta 1 and c 1e-3; the code's class default of 1e-4 would be noticed."""
    history = [[0.1, 3.0], [0.2, 2.0], [0.1, 6.0]]
    check(Doremi(), history, 1.0, 1e-3)
    with pytest.raises(AssertionError):
        check(Doremi(uniform_mix=1e-4), history, 1.0, 1e-3)


def test_the_mean_gap_plays_no_part():
    """A domain that is ahead on the mean and behind on half its tokens draws rows: clipping is per token."""
    policy, natural = Doremi(uniform_mix=0.0), np.array([0.5, 0.5])
    losses = losses_with([math.log(3), 0.0], gaps=[-1.0, 0.0])
    state = policy.update(policy.init(losses, natural), losses)
    assert [0.75, 0.25] == pytest.approx(state["mixture_weights"])


def test_the_first_weights_are_in_no_average():
    """After one update the average is w_1, after two the mean of w_1 and w_2; w_0 counts for nothing."""
    first, second = ours(Doremi(), [[2.0, 0.0], [2.0, 0.0]])
    assert first["mixture_weights"] == pytest.approx(first["average_weights"])
    both = zip(first["mixture_weights"], second["mixture_weights"], strict=True)
    assert [(a + b) / 2 for a, b in both] == pytest.approx(second["average_weights"])


def test_it_starts_uniform_or_from_the_corpus():
    """Published is 1/k; `natural` begins where the corpus is, and multiplies from there."""
    natural, losses = np.array([0.8, 0.2]), losses_with([0.0, math.log(4)])
    assert [0.5, 0.5] == Doremi().init(losses, natural)["mixture_weights"]
    policy = Doremi(start="natural", uniform_mix=0.0)
    state = policy.init(losses, natural)
    assert [0.8, 0.2] == state["mixture_weights"]
    assert [0.5, 0.5] == pytest.approx(policy.update(state, losses)["mixture_weights"])


def test_no_weight_falls_below_its_floor():
    """c / N is left for a domain without excess, however long the others have some."""
    last = ours(Doremi(uniform_mix=0.1), [[0.0, 5.0, 5.0, 5.0]] * 30)[-1]
    assert 0.1 / 4 <= last["mixture_weights"][0] < 1.01 * 0.1 / 4

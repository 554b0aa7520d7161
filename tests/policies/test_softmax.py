"""The softmax of any signal."""

import math

import numpy as np
import pytest

from ddkmix.policies import Ddk, Softmax, signal_of
from tests.policies.family import full_losses, weights

SIGNALS = ("perplexity_ratio", "loss_gap", "excess_loss", "forward_kl", "bits_per_byte_gap", "gap_left")


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_weights_are_the_formula_for_every_signal(signal, temperature):
    """(1 - u) exp(s / temperature) / sum + u / N, written as it stands, over three updates."""
    history = [[2.0, 1.0, 0.5], [1.5, 0.9, 0.6], [0.5, 0.8, -0.1], [0.25, 0.7, -0.2]]
    policy = Softmax(signal=signal, temperature=temperature, uniform_mix=0.25)
    for gaps, actual in zip(history[1:], weights(policy, history)[1:], strict=True):
        raw = [math.exp(s / temperature) for s in signal_of(signal, full_losses(gaps), np.array(history[0]))]
        assert [0.75 * x / math.fsum(raw) + 0.25 / 3 for x in raw] == pytest.approx(actual)


def test_the_first_interval_is_the_corpus_or_the_softmax():
    """Natural as it comes, unless it is told to follow the signal at once."""
    history, natural = [[math.log(3), 0.0]], [0.2, 0.8]
    assert natural == weights(Softmax(), history, natural)[0]
    first = weights(Softmax(first_interval="signal", uniform_mix=0.0), history, natural)[0]
    assert [0.75, 0.25] == pytest.approx(first)


def test_of_the_ratio_without_a_uniform_share_it_is_equation_1_of_ddk():
    """DDK "without factor smoothing" is Eq. 1 at every evaluation."""
    gaps = [0.5, 1.0, 0.2]
    plain = Softmax(signal="perplexity_ratio", uniform_mix=0.0)
    assert weights(Ddk(first_interval="eq1"), [gaps])[0] == pytest.approx(weights(plain, [gaps, gaps])[1])


def test_a_high_temperature_is_uniform_and_a_low_one_takes_the_largest():
    """The two ends; no temperature overflows."""
    history = [[1.0, 2.0, 3.0]] * 2
    assert [1 / 3] * 3 == pytest.approx(weights(Softmax(temperature=1e9), history)[-1])
    cold = Softmax(temperature=1e-300, uniform_mix=0.0, signal="perplexity_ratio")
    assert [0.0, 0.0, 1.0] == weights(cold, [[1.0, 2.0, 700.0]] * 2)[-1]


def test_it_remembers_nothing_but_the_first_gap():
    """Another past gives the same weights; of what is left it needs to know where it began."""
    assert (
        weights(Softmax(), [[1.0, 2.0], [3.0, 0.0], [1.0, 0.5]])[-1]
        == (weights(Softmax(), [[5.0, 2.0], [1.0, 0.5]])[-1])
    )
    left = Softmax(signal="gap_left")
    assert weights(left, [[1.0, 2.0], [1.0, 1.0]])[-1] != weights(left, [[2.0, 2.0], [1.0, 1.0]])[-1]

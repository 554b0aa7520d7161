"""The signals, one number per domain each, by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ddkmix.errors import ConfigError
from ddkmix.policies import signal_of
from ddkmix.policies.signal import columns_of
from ddkmix.types import DomainLosses
from tests.conftest import domain_losses
from tests.policies.family import full_losses


def test_the_loss_gap_and_its_exponential():
    """A student at 4 nats and a teacher at 2: a gap of 2, a ratio of e^2; ahead by 1: -1 and 1/e."""
    losses = domain_losses([2.0, -1.0])
    assert [2.0, -1.0] == signal_of("loss_gap", losses).tolist()
    assert [math.exp(2), math.exp(-1)] == pytest.approx(signal_of("perplexity_ratio", losses))


def test_the_ratio_is_finite_for_every_gap():
    """From 700 nats on it stays where it is; float64 ends at 709."""
    ratio = signal_of("perplexity_ratio", domain_losses([700.0, 701.0, 1e6]))
    assert np.isfinite(ratio).all()
    assert ratio[0] == pytest.approx(math.exp(700))
    assert ratio[1] == ratio[2]


def test_measured_columns_are_taken_as_they_are():
    """The mean of clipped excesses is no function of the mean gap: here it is 0.7 where the gap is -1."""
    losses = replace(
        domain_losses([-1.0, 2.0]), excess_loss=np.array([0.7, 2.1]), forward_kl=np.array([0.5, 0.25])
    )
    assert [0.7, 2.1] == signal_of("excess_loss", losses).tolist()
    assert [0.5, 0.25] == signal_of("forward_kl", losses).tolist()


def test_the_gap_in_bits_per_byte():
    """1 nat per token and 4 bytes per token: 1 / (4 ln 2) bits per byte."""
    assert [1 / (4 * math.log(2)), 0.0] == pytest.approx(
        signal_of("bits_per_byte_gap", domain_losses([1.0, 0.0]))
    )


def test_bytes_that_nobody_counted_are_one_line():
    """Losses from plain means know no bytes, and nan weights would say nothing of it."""
    losses = DomainLosses.from_means({"code": 3.0, "math": 2.0})
    with pytest.raises(ConfigError, match=r"num_bytes of \['code', 'math'\] is 0") as error:
        signal_of("bits_per_byte_gap", losses)
    assert "\n" not in str(error.value)


def test_the_share_of_the_first_gap_that_is_left():
    """Half closed, closed, passed, wider than before: 1/2, 0, 0, 1."""
    found = signal_of("gap_left", domain_losses([1.0, 0.0, -1.0, 5.0]), np.array([2.0, 2.0, 2.0, 2.0]))
    assert [0.5, 0.0, 0.0, 1.0] == found.tolist()


def test_a_first_gap_that_was_none_is_left_only_if_the_student_has_fallen_behind():
    """First gaps 0 and -1: the printed ratio would be inf or, for a student twice as far ahead, 2 -> 1."""
    first = np.array([0.0, 0.0, -1.0, -1.0, -1.0])
    found = signal_of("gap_left", domain_losses([0.0, 0.5, -2.0, -0.5, 0.5]), first)
    assert [0.0, 1.0, 0.0, 0.0, 1.0] == found.tolist()


def test_the_rule_for_no_first_gap_is_the_limit_of_small_ones():
    """At a first gap of 1e-12 nats the formula says the same as at 0, on both sides."""
    gaps = domain_losses([0.5, -0.5])
    tiny, none = np.full(2, 1e-12), np.zeros(2)
    assert signal_of("gap_left", gaps, none).tolist() == signal_of("gap_left", gaps, tiny).tolist()
    assert [1.0] == signal_of("gap_left", domain_losses([700.0]), np.array([5e-324])).tolist()


def test_what_must_be_measured_for_a_signal():
    """Two of them; the others follow from the two losses and the bytes."""
    assert {"excess_loss"} == columns_of("excess_loss")
    assert {"forward_kl"} == columns_of("forward_kl")
    others = ("perplexity_ratio", "loss_gap", "bits_per_byte_gap", "gap_left", "student_loss")
    assert {frozenset()} == {columns_of(name) for name in others}


@pytest.mark.parametrize("name", ["excess_loss", "forward_kl"])
def test_an_unmeasured_signal_names_itself_and_the_way_out(name):
    """One line with the column, how to give it, and what does without."""
    with pytest.raises(ConfigError, match=rf"looks at {name}.*DomainLosses\({name}=\.\.\.\).*loss_gap"):
        signal_of(name, domain_losses([1.0]))
    assert [1.0] == signal_of(name, full_losses([1.0])).tolist()

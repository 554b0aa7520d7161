"""The logarithm of a mixture, and means over the classes that are there."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.losses.sums import ABSENT, centred, log_mixed, present


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.floats(1e-6, 1 - 1e-6), st.floats(-500, 500))
def test_it_is_the_logarithm_of_the_mixture(share, difference):
    """log(1 - share + share e^d), on both sides of the place where the formula changes."""
    actual = log_mixed(share, torch.tensor([[difference]], dtype=torch.float64)).item()
    assert math.log(1 - share + share * math.exp(difference)) == pytest.approx(actual, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("difference", [29.0, 31.0])
def test_a_tiny_share_is_exact_on_both_sides(difference):
    """1e-12 x e^31 is about as much as the other part."""
    actual = log_mixed(1e-12, torch.tensor([[difference]], dtype=torch.float64)).item()
    assert math.log1p(1e-12 * math.expm1(difference)) == pytest.approx(actual, rel=1e-9)


@pytest.mark.parametrize("difference", [29.9, 30.0, 30.1, -745.0, 0.0, 2.0])
def test_its_derivative_is_finite_and_continuous(difference):
    """share e^d / (1 - share + share e^d), by finite differences."""
    leaf = torch.tensor([[difference]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: log_mixed(0.3, d), (leaf,))


def test_it_is_exactly_0_without_a_difference_and_finite_at_any():
    """In float32, up to the largest numbers that stand for -inf."""
    ends = log_mixed(0.1, torch.tensor([[0.0, -ABSENT, ABSENT]]))
    assert [0.0, -ABSENT, math.log(0.9)] == pytest.approx(ends[0].tolist())
    assert 0.0 == ends[0, 0].item()


def test_absent_classes_have_probability_0_and_no_gradient():
    """-inf becomes a number whose exp is 0; others stay."""
    leaf = torch.tensor([[-math.inf, -2.0]], requires_grad=True)
    present(leaf).sum().backward()
    assert [[0.0, 1.0]] == leaf.grad.tolist()
    assert [0.0, math.exp(-2)] == pytest.approx(present(leaf)[0].exp().tolist())


def test_a_mean_is_taken_over_the_classes_that_are_there():
    """(1 + 3) / 2 comes off; the absent class is 0."""
    assert [[-1.0, 0.0, 1.0]] == centred(torch.tensor([[1.0, -math.inf, 3.0]])).tolist()

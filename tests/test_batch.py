"""The nouns with tensors: how hidden states become logits, and what a live teacher says."""

import math
from dataclasses import FrozenInstanceError

import pytest
import torch

from ddkmix.batch import DenseSignal, Head

WEIGHT = torch.eye(3)
RAW = torch.tensor([[0.0, 2.0, -4.0]])


def test_a_plain_head_leaves_logits_as_they_are():
    """No scale and no cap: the very tensor comes back, not a copy."""
    assert Head(weight=WEIGHT).finish(RAW) is RAW


def test_the_scale_multiplies():
    """Cohere's logit_scale, or one over Granite's logits_scaling."""
    assert [[0.0, 0.5, -1.0]] == Head(weight=WEIGHT, scale=0.25).finish(RAW).tolist()


def test_the_soft_cap_bounds():
    """Gemma's c tanh(z / c) with c = 2: 2 becomes 2 tanh 1, and -4 becomes -2 tanh 2."""
    expected = [0.0, 2 * math.tanh(1), -2 * math.tanh(2)]
    assert expected == pytest.approx(Head(weight=WEIGHT, softcap=2.0).finish(RAW)[0].tolist())


def test_the_cap_comes_after_the_scale():
    """softcap(scale x z): 2 x 0.5 = 1 and -4 x 0.5 = -2, each capped at 2."""
    expected = [0.0, 2 * math.tanh(0.5), -2 * math.tanh(1)]
    assert expected == pytest.approx(Head(weight=WEIGHT, scale=0.5, softcap=2.0).finish(RAW)[0].tolist())


def test_a_head_cannot_be_changed():
    """It is a value, which two ranks or two steps may share."""
    with pytest.raises(FrozenInstanceError):
        Head(weight=WEIGHT).scale = 2.0


def test_signals_are_compared_by_identity():
    """Comparing tensors element by element is never what `==` of two signals should do."""
    head = Head(weight=WEIGHT)
    signal, same = (DenseSignal(hidden=torch.zeros(1, 2, 3), head=head) for _ in range(2))
    assert signal != same
    assert head != Head(weight=WEIGHT)
    assert 2 == len({signal, same})

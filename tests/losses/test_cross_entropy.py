"""Cross-entropy against its literal formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.losses import CrossEntropy


def cross_entropy(student_logits, labels):
    """The loss of each token."""
    return CrossEntropy()(student_logits, None, labels)


SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
LOGITS = st.lists(st.floats(-30, 30), min_size=2, max_size=8)


def test_one_token_by_hand():
    """Logits log 1, log 2, log 5 and label 2: the probability is 5/8."""
    logits = torch.tensor([[math.log(1), math.log(2), math.log(5)]], dtype=torch.float64)
    assert [math.log(8 / 5)] == pytest.approx(cross_entropy(logits, torch.tensor([2])).tolist())


@SETTINGS
@given(LOGITS, st.data())
def test_it_is_minus_the_log_of_the_labels_probability(logits, data):
    """-log(e^z_y / sum e^z), in float64."""
    label = data.draw(st.integers(0, len(logits) - 1))
    expected = -math.log(math.exp(logits[label]) / math.fsum(map(math.exp, logits)))
    value = cross_entropy(torch.tensor([logits], dtype=torch.float64), torch.tensor([label]))
    assert expected == pytest.approx(value.item(), abs=1e-12)


@SETTINGS
@given(LOGITS, st.floats(-1e4, 1e4))
def test_a_constant_added_to_all_logits_changes_nothing(logits, shift):
    """Softmax knows differences alone."""
    tensor, label = torch.tensor([logits], dtype=torch.float64), torch.tensor([0])
    before, after = cross_entropy(tensor, label), cross_entropy(tensor + shift, label)
    assert before.item() == pytest.approx(after.item(), abs=1e-9)


def test_the_gradient_is_probability_minus_label():
    """d/dz = softmax(z) - e_y, and autograd agrees with finite differences."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 4, 2])
    cross_entropy(logits, labels).sum().backward()
    expected = torch.softmax(logits.detach(), -1) - torch.eye(5, dtype=torch.float64)[labels]
    torch.testing.assert_close(expected, logits.grad)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, labels), (logits,))


def test_extreme_logits_stay_finite():
    """In float32 a label 1e4 below the best class costs 1e4 nats, not inf."""
    values = cross_entropy(torch.tensor([[1e4, 0.0], [-1e4, 0.0]]), torch.tensor([1, 1]))
    assert [1e4, 0.0] == values.tolist()


def test_no_tokens_give_no_values():
    """An empty chunk is allowed."""
    assert (0,) == cross_entropy(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).shape

"""The sorted L1 distance against its literal formula, value and gradient, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.losses import ULD

SETTINGS = settings(deadline=None, derandomize=True, max_examples=40)
logits = st.lists(st.floats(-15, 15), min_size=1, max_size=8)


def literal(student, teacher):
    """sum_c |sort(q)_c - sort(p)_c|, the shorter one padded with zeros (arXiv 2402.12030, Eq. 3)."""
    q, p = (torch.tensor(x, dtype=torch.float64).softmax(0).tolist() for x in (student, teacher))
    size = max(len(q), len(p))
    q, p = (sorted(x, reverse=True) + [0.0] * (size - len(x)) for x in (q, p))
    return sum(abs(a - b) for a, b in zip(q, p, strict=True))


def ours(student, teacher, **options):
    """The loss of one token."""
    student, teacher = (torch.tensor([x], dtype=torch.float64) for x in (student, teacher))
    return ULD(**options)(student, teacher, None).item()


@SETTINGS
@given(logits, logits)
def test_the_value_is_the_literal_one(student, teacher):
    """For vocabularies of any two sizes; always between 0 and 2."""
    assert literal(student, teacher) == pytest.approx(ours(student, teacher), abs=1e-12)
    assert -1e-12 <= ours(student, teacher) <= 2


@SETTINGS
@given(logits, st.randoms())
def test_names_of_classes_do_not_matter(student, random):
    """Any permutation of a distribution is the distribution to it; another temperature is another one."""
    shuffled = random.sample(student, len(student))
    assert 0.0 == pytest.approx(ours(student, shuffled), abs=1e-12)


def test_the_temperature_divides_both():
    """Twice the logits at temperature 2 are the logits."""
    expected = ours([1.0, 0.0, -1.0], [0.5, 0.0])
    assert expected == pytest.approx(ours([2.0, 0.0, -2.0], [1.0, 0.0], temperature=2.0))
    assert expected != pytest.approx(ours([2.0, 0.0, -2.0], [1.0, 0.0]), rel=1e-3)


@pytest.mark.parametrize("classes", [3, 5, 9])
def test_the_gradient_is_that_of_finite_differences(classes):
    """In the student's logits, for a teacher of fewer, as many and more classes."""
    generator = torch.Generator().manual_seed(classes)
    student = torch.randn(4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(4, classes, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: ULD()(z, teacher, None), (student,))


def test_probabilities_that_are_not_sorted_would_be_noticed():
    """The comparison can fail: without sorting, the distance of a permutation is not 0."""
    q, p = (torch.tensor([x]).softmax(-1) for x in ([1.0, 0.0], [0.0, 1.0]))
    assert (q - p).abs().sum().item() > 0.9
    assert 0.0 == ULD().across(q, p, None).item()

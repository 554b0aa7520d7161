"""KL(teacher || student) against its literal formula, value and gradient, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.losses import ForwardKL

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
INFINITE = float("inf")


def forward_kl(student_logits, teacher_logits, **parameters):
    """The loss of each token."""
    return ForwardKL(**parameters)(student_logits, teacher_logits, None)


def pairs(largest=15.0):
    """Logits of student and teacher over the same 2 to 8 classes."""
    return st.lists(
        st.tuples(st.floats(-largest, largest), st.floats(-largest, largest)), min_size=2, max_size=8
    )


def literal(student, teacher, temperature=1.0):
    """sum_v p_v (log p_v - log q_v) with p, q the softmax of logits / temperature."""
    p = [math.exp(y / temperature) for y in teacher]
    q = [math.exp(z / temperature) for z in student]
    p, q = [x / math.fsum(p) for x in p], [x / math.fsum(q) for x in q]
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def ours(student, teacher, **options):
    """The loss of one token in float64."""
    return forward_kl(
        torch.tensor([student], dtype=torch.float64), torch.tensor([teacher], dtype=torch.float64), **options
    ).item()


def reverse(student, teacher, **options):
    """Broken: KL(student || teacher)."""
    return ours(teacher, student, **options)


def teacher_sharp(student, teacher, temperature=1.0, **options):
    """Broken: the temperature reaches the student alone."""
    return ours(student, [temperature * y for y in teacher], temperature=temperature, **options)


def check_literal(compute, student, teacher, temperature):
    """`compute` without the factor on the loss is the literal formula."""
    value = compute(student, teacher, temperature=temperature, scale_by_temperature=False)
    assert literal(student, teacher, temperature) == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_two_classes_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 log 2 + 1/2 log 2/3 = 1/2 log 4/3."""
    assert 0.5 * math.log(4 / 3) == pytest.approx(ours([0.0, math.log(3)], [0.0, 0.0]))


@SETTINGS
@given(pairs(), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_it_is_the_literal_formula(logits, temperature):
    """At any temperature the value is sum p (log p - log q)."""
    student, teacher = zip(*logits, strict=True)
    check_literal(ours, student, teacher, temperature)


@pytest.mark.parametrize("broken", [reverse, teacher_sharp])
def test_the_other_direction_and_a_lost_temperature_are_noticed(broken):
    """The comparison with the formula fails for KL(student || teacher) and for a teacher left sharp."""
    student, teacher = (0.0, 1.0, 3.0), (2.0, 0.5, 0.0)
    check_literal(ours, student, teacher, 2.0)
    with pytest.raises(AssertionError):
        check_literal(broken, student, teacher, 2.0)


@SETTINGS
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), st.floats(-100, 100))
def test_equal_distributions_have_no_divergence(logits, shift):
    """d(p, p) is exactly 0, and 0 within rounding when one side is shifted by a constant."""
    assert 0.0 == ours(logits, logits)
    assert 0.0 == pytest.approx(ours([z + shift for z in logits], logits), abs=1e-10)


@SETTINGS
@given(pairs(), st.floats(-100, 100), st.floats(-100, 100))
def test_a_constant_added_to_the_logits_changes_nothing(logits, student_shift, teacher_shift):
    """Softmax knows differences alone, on either side."""
    student, teacher = zip(*logits, strict=True)
    shifted = ours([z + student_shift for z in student], [y + teacher_shift for y in teacher])
    assert ours(student, teacher) == pytest.approx(shifted, abs=1e-9)


@SETTINGS
@given(pairs(largest=1e3))
def test_it_is_never_negative(logits):
    """Gibbs' inequality, within rounding, even for logits a thousand nats apart."""
    student, teacher = zip(*logits, strict=True)
    assert ours(student, teacher) >= -1e-9


def random_pair(seed=0, tokens=4, classes=6):
    """Logits of student and teacher in float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        2 * torch.randn(tokens, classes, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_gradient_is_q_minus_p(temperature, scaled):
    """d/dz = (q - p) / temperature, times temperature^2 if so scaled; finite differences agree."""
    student, teacher = random_pair()

    def loss(logits):
        return forward_kl(logits, teacher, temperature=temperature, scale_by_temperature=scaled)

    loss(student).sum().backward()
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student.detach() / temperature, -1)
    factor = temperature if scaled else 1 / temperature
    torch.testing.assert_close(factor * (q - p), student.grad)
    assert torch.autograd.gradcheck(loss, (student,))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_factor_on_the_value_is_the_square_of_the_temperature(temperature):
    """Scaled and unscaled differ by temperature^2; scaling is the default and moot at temperature 1."""
    student, teacher = random_pair()
    scaled = forward_kl(student, teacher, temperature=temperature)
    plain = forward_kl(student, teacher, temperature=temperature, scale_by_temperature=False)
    torch.testing.assert_close(temperature**2 * plain, scaled)


def test_classes_that_the_teacher_excludes_add_nothing():
    """Teacher logits of -inf: value and gradient are those of the formula, and no nan."""
    student = torch.tensor([[0.0, math.log(3), 5.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, -INFINITE]], dtype=torch.float64)
    value = forward_kl(student, teacher)
    z = 4 + math.exp(5)
    assert [0.5 * math.log(z / 2) + 0.5 * math.log(z / 6)] == pytest.approx(value.tolist())
    value.sum().backward()
    torch.testing.assert_close(torch.softmax(student.detach(), -1) - torch.softmax(teacher, -1), student.grad)


def test_classes_that_both_exclude_add_nothing():
    """With -inf on both sides d(p, p) is still 0, and the gradient is finite."""
    student = torch.tensor([[0.0, 1.0, -INFINITE]], dtype=torch.float64, requires_grad=True)
    value = forward_kl(student, student.detach().clone())
    assert [0.0] == value.tolist()
    value.sum().backward()
    torch.testing.assert_close(torch.zeros(1, 3, dtype=torch.float64), student.grad)


def test_a_class_that_only_the_student_excludes_costs_infinitely_much():
    """p > 0 where q = 0: the divergence is infinite, as defined."""
    assert ours([0.0, -INFINITE], [0.0, 0.0]) == INFINITE


def test_float32_is_close_to_float64_with_a_large_vocabulary():
    """50,000 classes in float32: within 1e-5 nats of float64."""
    student, teacher = random_pair(tokens=3, classes=50_000)
    exact = forward_kl(student, teacher).tolist()
    assert exact == pytest.approx(forward_kl(student.float(), teacher.float()).tolist(), abs=1e-5)


def test_no_tokens_give_no_values():
    """An empty chunk is allowed."""
    assert (0,) == forward_kl(torch.zeros(0, 4), torch.zeros(0, 4)).shape

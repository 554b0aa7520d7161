"""What divergences share: closed forms of their derivatives against autograd, for every loss and signal."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.losses import LOSSES, CrossEntropy, ForwardKL, ReverseKL
from ddkmix.losses.closed_form import LogProbs, Slope, keeps_up, logit_gradient
from ddkmix.losses.divergence import Divergence
from tests.losses.signals import KINDS, teacher_of

EXACT = {"rtol": 1e-9, "atol": 1e-10}


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlyBetween(Divergence):
    """A divergence from outside the package with no closed form: sum_v (q - p)^2."""

    def between(self, log_q: Any, log_p: Any) -> Any:
        """The squared distance."""
        return (log_q.exp() - log_p.exp()).square().sum(-1)


def pairs():
    """Every loss with every kind of signal that it accepts."""
    return [
        pytest.param(cls, kind, id=f"{cls.__name__}-{kind}")
        for cls in (*LOSSES.values(), OnlyBetween)
        for kind in KINDS
        if hasattr(cls, "value_and_slope") and kind in getattr(cls, "accepts", {"dense"})
    ]


def logits_of(seed, tokens=5, classes=9, spread=2.0):
    """Student's and teacher's logits and labels, in float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        spread * torch.randn(tokens, classes, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return student, teacher, torch.randint(classes, (tokens,), generator=generator)


def by_autograd(loss, student, teacher, labels, row):
    """Values, and the gradient of sum_i row_i loss(i) through `__call__`."""
    leaf = student.clone().requires_grad_()
    values = loss(leaf, teacher, labels)
    (gradient,) = torch.autograd.grad((values * row).sum(), leaf)
    return values.detach(), gradient


def closed(loss, student, teacher, labels, row):
    """The same by the closed form."""
    log_q = LogProbs(student)
    said = LogProbs(teacher) if isinstance(teacher, torch.Tensor) else teacher
    values, slope = loss.value_and_slope(log_q, said, labels)
    return values, logit_gradient(log_q, [(row, slope)])


def assert_same(expected, actual, **tolerance):
    """Values and gradients agree."""
    for left, right in zip(expected, actual, strict=True):
        torch.testing.assert_close(left, right, **(tolerance or EXACT))


def settings_of(cls):
    """Temperatures on both sides, on the teacher alone, and unscaled, where a loss has them."""
    if not issubclass(cls, Divergence):
        return [{}]
    return [
        {},
        {"temperature": 2.0},
        {"temperature": 2.0, "temperature_on": "teacher"},
        {"temperature": 2.0, "scale_by_temperature": False},
    ]


@pytest.mark.parametrize(("cls", "kind"), pairs())
def test_closed_forms_equal_autograd(cls, kind):
    """Value and gradient of every loss, signal and temperature, in float64."""
    student, logits, labels = logits_of(0)
    teacher, row = teacher_of(kind, logits), torch.tensor([0.1, 2.0, 0.0, -1.0, 0.5], dtype=torch.float64)
    for parameters in settings_of(cls):
        arguments = (cls(**parameters), student, teacher, labels, row)
        assert_same(by_autograd(*arguments), closed(*arguments))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(2, 30),
    st.floats(0.1, 30),
    st.sampled_from([parameter.values for parameter in pairs()]),
)
def test_closed_forms_equal_autograd_for_any_sizes_and_confidence(seed, tokens, classes, spread, pair):
    """From nearly uniform to nearly certain students and teachers, one token to five, two classes to 30."""
    cls, kind = pair
    student, logits, labels = logits_of(seed, tokens, classes, spread)
    teacher = teacher_of(kind, logits, kept=min(4, classes))
    arguments = (cls(), student, teacher, labels, torch.ones(tokens, dtype=torch.float64))
    expected, actual = by_autograd(*arguments), closed(*arguments)
    scale = 1 + expected[0].abs().max().item()
    assert_same(expected, actual, rtol=1e-7, atol=1e-9 * scale)


def test_losses_of_several_temperatures_add_up():
    """Three terms, two of them at one temperature: the gradient of their sum."""
    student, logits, labels = logits_of(1)
    terms = [(1.0, CrossEntropy()), (0.2, ForwardKL()), (3.0, ReverseKL(temperature=2.0))]
    row, log_q = torch.ones(5, dtype=torch.float64), LogProbs(student)
    expected = sum(w * by_autograd(loss, student, logits, labels, row)[1] for w, loss in terms)
    slopes = [(w * row, loss.value_and_slope(log_q, LogProbs(logits), labels)[1]) for w, loss in terms]
    torch.testing.assert_close(expected, logit_gradient(log_q, slopes), **EXACT)


def test_no_terms_have_no_gradient():
    """Nothing to learn is a gradient of 0."""
    assert [[0.0, 0.0]] == logit_gradient(LogProbs(torch.ones(1, 2)), []).tolist()


def test_each_token_may_have_its_own_temperature():
    """A loss that sets the temperature of each token says so in its slope."""
    student, _, labels = logits_of(2)
    temperature = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    leaf = student.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf / temperature[:, None], labels, reduction="sum")
    (expected,) = torch.autograd.grad(loss, leaf)
    slope = Slope(temperature=temperature, ids=labels[:, None], entries=-torch.ones(5, 1).double())
    ones = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(expected, logit_gradient(LogProbs(student), [(ones, slope)]), **EXACT)


def test_a_multiple_of_q_in_a_slope_changes_nothing():
    """Softmax is blind to it, so a closed form may leave it out."""
    student, _, _ = logits_of(3)
    log_q, row = LogProbs(student), torch.ones(5, dtype=torch.float64)
    slope = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = [
        logit_gradient(log_q, [(row, Slope(dense=slope + shift * log_q.at(1.0).exp()))]) for shift in (0, 7)
    ]
    torch.testing.assert_close(*gradients, **EXACT)


def test_the_published_gradients():
    """Forward KL: q - p; reverse KL: q (rho - D), rho = log q - log p; cross-entropy: q - e_label."""
    student, logits, labels = logits_of(4)
    row = torch.ones(5, dtype=torch.float64)
    q, p = student.softmax(-1), logits.softmax(-1)
    rho = q.log() - p.log()
    divergence = (q * rho).sum(-1, keepdim=True)
    expected = {
        ForwardKL: q - p,
        ReverseKL: q * (rho - divergence),
        CrossEntropy: q - torch.nn.functional.one_hot(labels, 9),
    }
    for cls, gradient in expected.items():
        torch.testing.assert_close(gradient, closed(cls(), student, logits, labels, row)[1], **EXACT)


def test_the_published_gradient_with_a_rest_bucket():
    """q_i - p_i for kept classes, q_j (1 - r / q_r) for all others."""
    student, logits, labels = logits_of(5)
    teacher = teacher_of("bucket", logits, kept=2)
    q, p = student.softmax(-1), teacher.log_probs.exp()
    rest, q_kept = 1 - p.sum(-1, keepdim=True), q.gather(1, teacher.ids)
    expected = q * (1 - rest / (1 - q_kept.sum(-1, keepdim=True)))
    expected.scatter_(1, teacher.ids, q_kept - p)
    actual = closed(ForwardKL(), student, teacher, labels, torch.ones(5, dtype=torch.float64))[1]
    torch.testing.assert_close(expected, actual, **EXACT)


def test_a_student_certain_of_kept_classes_still_learns_the_rest():
    """q_rest is e^-900, 0 in any precision; the tail's gradient is the softmax over the tail times -r."""
    student = torch.tensor([[900.0, 0.0, math.log(3)]], dtype=torch.float64)
    teacher = teacher_of("bucket", torch.tensor([[math.log(6), 0.0, 0.0]], dtype=torch.float64), kept=1)
    _, gradient = closed(ForwardKL(), student, teacher, torch.tensor([0]), torch.ones(1).double())
    assert [1 / 4, -1 / 16, -3 / 16] == pytest.approx(gradient[0].tolist())


@pytest.mark.parametrize("cls", [ForwardKL, CrossEntropy])
def test_classes_that_are_excluded_have_no_gradient_of_nan(cls):
    """-inf on the teacher's side, and on both."""
    student, logits, _ = logits_of(6)
    logits[:, 3] = -math.inf
    logits[:, 5] = student[:, 5] = -math.inf
    arguments = (cls(), student, logits, torch.tensor([0, 1, 2, 4, 6]), torch.ones(5, dtype=torch.float64))
    expected, actual = by_autograd(*arguments), closed(*arguments)
    assert actual[0].isfinite().all()
    assert_same(expected, actual)


def test_a_bucket_without_a_tail_is_the_dense_divergence():
    """K = V: nothing is outside, and the rest has neither mass nor gradient."""
    student, logits, labels = logits_of(7, classes=2)
    row = torch.ones(5, dtype=torch.float64)
    teacher = teacher_of("bucket", logits, kept=2)
    dense = closed(ForwardKL(), student, logits, labels, row)
    assert_same(dense, closed(ForwardKL(), student, teacher, labels, row), rtol=1e-6, atol=1e-7)


def test_finite_differences_agree():
    """gradcheck: finite differences of `__call__` in float64."""
    student, logits, labels = logits_of(8, tokens=2, classes=4)
    for loss in (cls() for cls in LOSSES.values()):
        assert torch.autograd.gradcheck(partial(_call, loss, logits, labels), (student.requires_grad_(),))


def _call(loss, logits, labels, student):
    return loss(student, logits, labels)


# --- which derivative belongs to which value ----------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Halved(ForwardKL):
    """Somebody's change of the value alone; the inherited closed form is not its derivative."""

    def between(self, log_q: Any, log_p: Any) -> Any:
        """Half of the forward KL."""
        return ForwardKL.between(self, log_q, log_p) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Squared(ForwardKL):
    """Somebody's change of the whole call."""

    def __call__(self, student_logits: Any, teacher: Any, labels: Any) -> Any:
        """The square."""
        return ForwardKL.__call__(self, student_logits, teacher, labels) ** 2


def test_a_derivative_that_was_inherited_is_not_used_for_another_value():
    """`between` overridden: autograd of it. `__call__` overridden: the closed form is not offered."""
    arguments = (*logits_of(9), torch.ones(5, dtype=torch.float64))
    assert_same(by_autograd(Halved(), *arguments), closed(Halved(), *arguments))
    assert keeps_up(Halved, "value_and_slope", "__call__")
    assert not keeps_up(Halved, "between_and_slope", "between")
    assert not keeps_up(Squared, "value_and_slope", "__call__")
    assert not keeps_up(OnlyBetween, "between_and_slope", "between")
    assert not keeps_up(int, "value_and_slope", "no_such_method")


# --- temperature and scale ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "parameters"),
    [
        ((2.0, 4.0), {"temperature": 2.0}),
        ((2.0, 1.0), {"temperature": 2.0, "scale_by_temperature": False}),
        ((1.0, 1.0), {"temperature": 2.0, "temperature_on": "teacher"}),
        ((1.0, 1.0), {}),
    ],
)
def test_temperature_and_scale(expected, parameters):
    """Of the student; the factor temperature^2 goes with a temperature on both sides only."""
    loss = ForwardKL(**parameters)
    assert expected == (loss.student_temperature, loss.scale)
    assert (parameters.get("temperature", 1.0),) == loss.temperatures


def test_log_probabilities_are_made_once():
    """Two losses at one temperature share one softmax."""
    log_q = LogProbs(logits_of(0)[0])
    assert log_q.at(2.0) is log_q.at(2.0)
    assert log_q.at(1.0) is not log_q.at(2.0)

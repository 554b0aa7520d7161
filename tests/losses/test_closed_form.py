"""`LogProbs` beside torch's log_softmax, also where float32 holds no exponentials of what is asked."""

import math

import pytest
import torch

from ddkmix.losses import ForwardKL
from ddkmix.losses.closed_form import LogProbs, Slope, logit_gradient

IDS = torch.tensor([[3, 0, 0], [1, 4, 4], [2, 3, 4]])
"""Places that are not in use repeat a class, as those of a truncated signal do."""


def logits(scale=1.0, dtype=torch.float64):
    """Of three tokens over six classes; one class of the last is excluded."""
    made = scale * torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    made[2, 5] = -math.inf
    return made


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("made_before", [False, True])
def test_single_classes_sums_and_multiples_are_those_of_log_softmax(temperature, made_before):
    """Whether the log-probabilities of all classes exist already or not."""
    student, expected = LogProbs(logits()), (logits() / temperature).log_softmax(-1)
    if made_before:
        student.at(temperature)
    torch.testing.assert_close(student.of(IDS, temperature), expected.gather(1, IDS))
    outside = expected.scatter(1, IDS, -math.inf).logsumexp(-1, keepdim=True)
    torch.testing.assert_close(student.outside(IDS, temperature), outside)
    row = torch.tensor([[2.0], [-1.0], [0.0]], dtype=torch.float64)
    torch.testing.assert_close(student.times(row, temperature), row * expected.exp())
    torch.testing.assert_close(student.times(row, temperature, outside), row * (expected - outside).exp())
    normaliser = (logits() / temperature).logsumexp(-1, keepdim=True)
    torch.testing.assert_close(student.log_normaliser(temperature), normaliser)


def test_what_was_asked_before_changes_nothing():
    """`outside` borrows the powers of all classes and gives them back, repeated ids and all."""
    student, row = LogProbs(logits()), torch.ones(3, 1, dtype=torch.float64)
    before = student.times(row, 1.0)
    student.outside(IDS, 1.0)
    torch.testing.assert_close(student.times(row, 1.0), before, rtol=0, atol=0)


@pytest.mark.parametrize("distance", [50.0, 80.0, 200.0, 512.0])
def test_a_faint_rest_keeps_its_logarithm_and_its_shares(distance):
    """A student that gives the classes outside exp(-distance): no underflow in float32, however far."""
    raw = torch.tensor([[0.0, -distance, -distance - 1.0]])
    student, ids = LogProbs(raw), torch.tensor([[0]])
    log_rest = student.outside(ids, 1.0)
    expected = -distance + math.log1p(math.exp(-1.0))
    assert log_rest.item() == pytest.approx(expected, rel=1e-6)
    shares = student.times(torch.ones(1, 1), 1.0, log_rest)[0, 1:]
    torch.testing.assert_close(shares, torch.tensor([0.0, -1.0]).softmax(0))


@pytest.mark.parametrize("distance", [1.0, 100.0])
def test_the_gradient_of_a_rest_is_that_of_autograd(distance):
    """d/dz of 0.7 log q_rest + 0.2 log q_0, also where q_rest is exp(-100)."""
    raw = torch.tensor([[0.0, -distance, -distance - 1.0, -distance + 0.5]], dtype=torch.float64)
    ids = torch.tensor([[0]])
    leaf = raw.clone().requires_grad_()
    log_q = leaf.log_softmax(-1)
    (0.7 * log_q[:, 1:].logsumexp(-1) + 0.2 * log_q[:, 0]).sum().backward()
    student = LogProbs(raw.float())
    slope = Slope(
        ids=ids,
        entries=torch.tensor([[0.2]]),
        rest=torch.tensor([[0.7]]),
        log_q_rest=student.outside(ids, 1.0),
    )
    found = logit_gradient(student, [(torch.ones(1), slope)])
    torch.testing.assert_close(found, leaf.grad.float(), rtol=1e-5, atol=1e-6)


def test_no_rest_is_minus_infinity_and_adds_no_gradient():
    """Every class is among the ids."""
    student, ids = LogProbs(torch.zeros(1, 2)), torch.tensor([[0, 1]])
    rest = student.outside(ids, 1.0)
    assert rest.item() == -math.inf
    slope = Slope(ids=ids, entries=torch.zeros(1, 2), rest=torch.zeros(1, 1), log_q_rest=rest)
    assert logit_gradient(student, [(torch.ones(1), slope)]).tolist() == [[0.0, 0.0]]


def test_forward_kl_of_excluded_classes_and_of_nan():
    """Both exclude a class: it counts nothing. A nan of the teacher stays one, whichever way is taken."""
    teacher = torch.tensor([[1.0, 0.0, -math.inf]])
    student = torch.tensor([[0.0, 0.0, -math.inf]])
    loss = ForwardKL(temperature=2.0)
    expected = ForwardKL(temperature=2.0)(student[:, :2], teacher[:, :2], torch.zeros(1).long())
    value, slope = loss.value_and_slope(LogProbs(student), LogProbs(teacher), torch.zeros(1).long())
    torch.testing.assert_close(value, expected)
    assert slope.dense[0, 2] == 0
    for adapt in ("fixed", "norm_kd"):
        broken = LogProbs(torch.tensor([[1.0, math.nan, 0.0]]))
        value, _ = ForwardKL(adapt=adapt).value_and_slope(LogProbs(teacher), broken, torch.zeros(1).long())
        assert value.isnan().all()


def test_a_student_that_excludes_what_the_teacher_says_is_infinitely_far():
    """KL = inf, not nan and not a large number."""
    teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -math.inf]])
    value, _ = ForwardKL().value_and_slope(LogProbs(student), LogProbs(teacher), torch.zeros(1).long())
    assert value.item() == math.inf

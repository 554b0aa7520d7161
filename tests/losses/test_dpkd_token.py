"""The token form of DPKD against its formula, its gradient, and what the formula implies."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.losses import CrossEntropy, DpkdToken, build_terms
from ddkmix.losses.closed_form import LogProbs, logit_gradient
from tests.losses.stores import random_pair

SETTINGS = settings(deadline=None, derandomize=True, max_examples=40)


def literal(student, teacher, beta):
    """The authors' lines, one token at a time: argmax, four log-probabilities, -logsigmoid."""

    def log_softmax(logits):
        largest = max(logits)
        total = math.fsum(math.exp(z - largest) for z in logits)
        return [z - largest - math.log(total) for z in logits]

    log_teacher_probs, log_student_probs = log_softmax(teacher), log_softmax(student)
    y_t = log_teacher_probs.index(max(log_teacher_probs))
    y_s = log_student_probs.index(max(log_student_probs))
    stu_logratios = log_student_probs[y_t] - log_student_probs[y_s]
    tea_logratios = log_teacher_probs[y_t] - log_teacher_probs[y_s]
    relative_logits = stu_logratios - tea_logratios
    return -math.log(1 / (1 + math.exp(-beta * relative_logits)))


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherWay(DpkdToken):
    """Sabotage: prefers the student's choice."""

    def __call__(self, student_logits, teacher, labels):
        """-log sigmoid(-beta u) = -log sigmoid(beta u) + beta u."""
        v, w = teacher.argmax(-1), student_logits.argmax(-1)
        rows, gap = torch.arange(len(teacher)), student_logits - teacher
        return DpkdToken.__call__(self, student_logits, teacher, labels) + self.beta * (
            gap[rows, v] - gap[rows, w]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WithoutReference(DpkdToken):
    """Sabotage: forgets the teacher's ratio (`--reference_free`)."""

    def __call__(self, student_logits, teacher, labels):
        """As if the teacher thought both choices equally likely."""
        v, w = teacher.argmax(-1), student_logits.argmax(-1)
        rows = torch.arange(len(teacher))
        return torch.nn.functional.softplus(-self.beta * (student_logits[rows, v] - student_logits[rows, w]))


def check_literal(loss):
    """`loss` is the formula at random logits, of which some agree on the first choice and some do not."""
    student, teacher = random_pair(tokens=30, classes=5)
    expected = [literal(z, y, loss.beta) for z, y in zip(student.tolist(), teacher.tolist(), strict=True)]
    assert expected == pytest.approx(loss(student, teacher, None).tolist(), abs=1e-12)
    agree = student.argmax(-1) == teacher.argmax(-1)
    assert 0 < agree.sum() < 30


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_it_is_the_authors_formula(beta):
    """Value by value, in float64."""
    check_literal(DpkdToken(beta=beta))


@pytest.mark.parametrize("broken", [OtherWay, WithoutReference])
def test_another_formula_would_be_noticed(broken):
    """The other choice preferred, a forgotten reference."""
    with pytest.raises(AssertionError):
        check_literal(broken(beta=1.0))


def test_two_classes_by_hand():
    """u = (0 - ln 4) - (ln 3 - 0) = -ln 12; with beta 1 it is log(1 + 12)."""
    student, teacher = torch.tensor([[math.log(4), 0.0]]), torch.tensor([[0.0, math.log(3)]])
    assert [math.log(13)] == pytest.approx(DpkdToken(beta=1.0)(student, teacher, None).tolist())


def test_finite_differences_agree_with_the_gradient_and_with_its_closed_form():
    """In float64; the closed form is what training uses."""
    student, teacher = random_pair(tokens=8, classes=5)
    loss = DpkdToken(beta=0.7)
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, None), (student,))
    values = loss(student, teacher, None)
    closed, slope = loss.value_and_slope(LogProbs(student.detach()), LogProbs(teacher), None)
    torch.testing.assert_close(values.detach(), closed, rtol=0, atol=0)
    row = torch.linspace(-1, 2, 8, dtype=torch.float64)
    by_slope = logit_gradient(LogProbs(student.detach()), [(row, slope)])
    torch.testing.assert_close(torch.autograd.grad((values * row).sum(), student)[0], by_slope)


@SETTINGS
@given(
    logits=st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=2, max_size=8),
    beta=st.floats(0.01, 10),
)
def test_where_the_first_choices_agree_it_is_log_2_without_a_gradient(logits, beta):
    """Exactly 0 in every class, by autograd and in closed form; elsewhere only two classes are pulled, by
    at most beta, in opposite directions."""
    student, teacher = (torch.tensor([side], dtype=torch.float64) for side in zip(*logits, strict=True))
    student.requires_grad_()
    loss = DpkdToken(beta=beta)
    value = loss(student, teacher, None)
    value.sum().backward()
    _, slope = loss.value_and_slope(LogProbs(student.detach()), LogProbs(teacher), None)
    closed = logit_gradient(LogProbs(student.detach()), [(torch.ones(1, dtype=torch.float64), slope)])
    if student.argmax() == teacher.argmax():
        assert [math.log(2)] == value.tolist()
        assert 0 == student.grad.abs().max() == closed.abs().max()
        return
    v, w = teacher.argmax().item(), student.argmax().item()
    assert beta / 2 * (1 - 1e-12) <= -closed[0, v].item() == pytest.approx(closed[0, w].item())
    assert closed[0, w] <= beta
    assert value.item() >= math.log(2) - 1e-12
    assert value.item() == pytest.approx(loss(teacher, student, None).item())
    others = [i for i in range(len(logits)) if i not in (v, w)]
    assert [0.0] * len(others) == pytest.approx(closed[0, others].tolist(), abs=1e-12)


def test_it_falls_as_the_student_turns_to_the_teachers_choice():
    """Until the student chooses the same class; there it jumps to log 2, as the code's does."""
    teacher = torch.tensor([[0.0, 2.0]])
    student = torch.tensor([[float(lead), 0.0] for lead in (8, 4, 2, 1, 0.5)])
    values = DpkdToken(beta=1.0)(student, teacher.expand(5, -1), None).tolist()
    assert sorted(values, reverse=True) == values
    assert [math.log(2)] == pytest.approx(
        DpkdToken()(torch.tensor([[-0.1, 0.0]]), teacher, None).tolist(), abs=1e-6
    )


def test_a_choice_that_the_teacher_excludes_costs_infinitely_much_with_a_finite_pull():
    """p(w) = 0: u = -inf; the derivative is beta."""
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[-math.inf, 0.0]])
    value, slope = DpkdToken().value_and_slope(LogProbs(student), LogProbs(teacher), None)
    assert [math.inf] == value.tolist()
    assert [[-0.1, 0.1]] == [pytest.approx(row) for row in slope.entries.tolist()]


def test_a_config_names_it():
    """With its parameter, beside cross-entropy, as in the authors' script."""
    terms = build_terms([{"name": "dpkd_token", "weight": 0.5, "beta": 0.2}, "cross_entropy"])
    assert DpkdToken(beta=0.2) == terms[0].loss


def test_where_the_first_choices_agree_another_loss_keeps_its_gradient_to_the_bit():
    """In float32 g - pull + pull is not g; a student that is nearly right has a small g beside that pull."""
    logits, labels = torch.tensor([[9.0, 0.0, 1.0]]), torch.tensor([0])
    student, weight = LogProbs(logits), torch.ones(1)
    ce = CrossEntropy().value_and_slope(student, None, labels)[1]
    token = DpkdToken(beta=100.0).value_and_slope(student, LogProbs(logits), labels)[1]
    alone, both = (logit_gradient(student, [(weight, s) for s in slopes]) for slopes in ([ce], [ce, token]))
    assert alone.tolist() == both.tolist()

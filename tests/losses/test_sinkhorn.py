"""The Sinkhorn loss against the authors' lines, and groups that no chunk may cut."""

import pytest
import torch

from ddkmix.batch import DenseSignal, Head
from ddkmix.losses import CrossEntropy, LossTerm, Sinkhorn, token_multiple
from ddkmix.losses.objective import distillation_objective
from tests.losses.stores import random_pair, top


def published(y_s, y_t, temperature=2.0, epsilon=0.1, n_iters=20):
    """SinKD's loss of one batch, as its code has it, without the weight."""
    x, y = (torch.softmax(logits / temperature, dim=1) for logits in (y_s, y_t))
    cost = (x[:, None, :] - y[None, :, :]).abs().sum(-1)
    plan = torch.exp(-cost / epsilon)
    for _ in range(n_iters):
        plan = plan / torch.sum(plan, dim=1, keepdim=True)
        plan = plan / torch.sum(plan, dim=0, keepdim=True)
    return torch.sum(plan * cost)


def gradient(value, student):
    """By the student's logits."""
    return torch.autograd.grad(value, student)[0]


@pytest.mark.parametrize("parameters", [{}, {"temperature": 1.0, "epsilon": 0.5, "iterations": 3}])
def test_the_sum_over_a_group_is_the_published_loss(parameters):
    """Value and gradient in float64; the gradient runs through the plan."""
    student, teacher = random_pair(tokens=5, classes=7)
    ours = Sinkhorn(group_tokens=5, **parameters)(student, teacher, None).sum()
    names = {"iterations": "n_iters"}
    theirs = published(student, teacher, **{names.get(key, key): value for key, value in parameters.items()})
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(gradient(theirs, student), gradient(ours, student))


def test_finite_differences_agree():
    """With all classes, with the first of each teacher token, and with a bucket."""
    student, teacher = random_pair(tokens=3, classes=5)
    for loss, said in (
        (Sinkhorn(group_tokens=2), teacher),
        (Sinkhorn(group_tokens=2, top_k=2), teacher),
        (Sinkhorn(group_tokens=2), top(teacher, 2, unused=1)),
    ):
        assert torch.autograd.gradcheck(lambda z, loss=loss, said=said: loss(z, said, None), (student,))


def test_groups_are_consecutive_tokens_and_the_last_may_be_short():
    """Seven tokens in groups of three are the batches 3 + 3 + 1."""
    student, teacher = random_pair(tokens=7)
    values = Sinkhorn(group_tokens=3)(student, teacher, None)
    for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
        assert published(student[part], teacher[part]).item() == pytest.approx(values[part].sum().item())


def test_a_token_alone_costs_its_distance():
    """A group of one: the plan is 1, the cost sum |q - p|."""
    student, teacher = random_pair()
    values = Sinkhorn(group_tokens=1, temperature=1.0)(student, teacher, None)
    torch.testing.assert_close((student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1), values)


def test_a_small_epsilon_does_not_underflow():
    """exp(-2 / 0.001) is 0 in any precision; in logarithms the nearest token is still found."""
    logits = 60.0 * torch.eye(3)
    values = Sinkhorn(group_tokens=3, epsilon=1e-3, temperature=1.0)(logits, logits.roll(1, 0), None)
    assert [0.0, 0.0, 0.0] == pytest.approx(values.tolist(), abs=1e-6)


def test_a_perfect_student_pays_for_the_blur_alone():
    """Not 0, as the docstring says, and less as epsilon falls."""
    _, teacher = random_pair(tokens=6)
    costs = [Sinkhorn(epsilon=e)(teacher, teacher, None).sum().item() for e in (0.5, 0.1, 0.02)]
    assert costs[0] > costs[1] > costs[2] > 0


@pytest.mark.parametrize("k", [1, 3, 5])
def test_classes_put_together_never_cost_more(k):
    """Each distance over the teacher's first k classes and one for the rest is at most the full one; a store
    of k classes gives the same; with all but one class it is the full one."""
    from ddkmix.losses.transport import distances, teacher_side

    student, teacher = random_pair(tokens=8)
    q = (student / 2).softmax(-1)
    full = distances(q, teacher_side(teacher, 2.0, None))
    some = distances(q, teacher_side(teacher, 2.0, k))
    assert (some <= full + 1e-12).all()
    torch.testing.assert_close(some, distances(q, teacher_side(top(teacher, k, unused=2), 2.0, None)))
    torch.testing.assert_close(some, distances(q, teacher_side(top(teacher, 5), 2.0, k)))
    if k == 5:
        torch.testing.assert_close(full, some)


def objective_of(terms, chunk_tokens, impl="chunked"):
    """Objective, values and gradient of 23 tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (
        torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (23, 11, 23)
    )
    hidden.requires_grad_()
    signal = DenseSignal(hidden=teacher, head=Head(weight=weight.flip(0)))
    objective, values = distillation_objective(
        hidden,
        Head(weight=weight),
        torch.arange(23) % 11,
        torch.rand(23, generator=generator, dtype=torch.float64),
        terms,
        signal=signal,
        chunk_tokens=chunk_tokens,
        impl=impl,
    )
    return objective, values, torch.autograd.grad(objective, hidden)[0]


@pytest.mark.parametrize("chunk_tokens", [1, 5, 6, 7, 100])
def test_no_chunk_cuts_a_group(chunk_tokens, monkeypatch):
    """Value and gradient are those of the unchunked objective for any chunk size, and for blocks of rows that
    would hold less than a group."""
    monkeypatch.setitem(__import__("ddkmix.losses.logits", fromlist=["x"])._BLOCK_ELEMENTS, "cpu", 11)
    terms = (LossTerm("sinkhorn", 2.0, Sinkhorn(group_tokens=6)), LossTerm("ce", 1.0, CrossEntropy()))
    for expected, actual in zip(
        objective_of(terms, 23, "reference"), objective_of(terms, chunk_tokens), strict=True
    ):
        torch.testing.assert_close(expected, actual)


def test_terms_agree_on_a_multiple():
    """Groups of 4 and of 6 need calls of 12 tokens; other losses need nothing."""
    four, six = (LossTerm(str(n), 1.0, Sinkhorn(group_tokens=n)) for n in (4, 6))
    assert (12, 4, 1) == (
        token_multiple([four, six]),
        token_multiple([four, LossTerm("ce", 1.0, CrossEntropy())]),
        token_multiple([]),
    )


def test_no_tokens_give_no_values():
    """An empty chunk is allowed."""
    assert (0,) == Sinkhorn()(torch.zeros(0, 4), torch.zeros(0, 4), None).shape

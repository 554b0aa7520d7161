"""The ranking loss against ranks by hand, a literal projection, and what it must not depend on."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from ddkmix.losses import Ranking
from ddkmix.losses.soft_ranks import decreasing_fit, soft_ranks
from tests.losses.stores import random_pair

SETTINGS = settings(deadline=None, derandomize=True, max_examples=40)


def ranks(*values, strength=1.0):
    """Soft ranks of one row of classes that are all there."""
    row = torch.tensor([values], dtype=torch.float64)
    return soft_ranks(row, torch.ones_like(row, dtype=torch.bool), strength)[0].tolist()


def pool_adjacent_violators(values):
    """The textbook loop for a non-increasing fit."""
    pools = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (b, m), (a, n) = pools.pop(), pools.pop()
            pools.append(((a * n + b * m) / (n + m), n + m))
    return [mean for mean, size in pools for _ in range(size)]


def literal(student, teacher, k, strength):
    """1 - Spearman over the union, token by token, with the textbook projection."""

    def rank(values):
        ordered = sorted(range(len(values)), key=lambda i: values[i])
        s = [-values[i] / strength for i in ordered]
        target = list(range(len(values), 0, -1))
        fit = pool_adjacent_violators([a - b for a, b in zip(s, target, strict=True)])
        out = [0.0] * len(values)
        for i, a, b in zip(ordered, s, fit, strict=True):
            out[i] = a - b
        return out

    values = []
    for z, y in zip(student.tolist(), teacher.tolist(), strict=True):
        first = [set(sorted(range(len(z)), key=lambda v: -side[v])[:k]) for side in (y, z)]
        union = sorted(first[0] | first[1])
        m = len(union)
        pairs = zip(rank([y[v] for v in union]), rank([z[v] for v in union]), strict=True)
        values.append(6 * sum((a - b) ** 2 for a, b in pairs) / (m * (m**2 - 1)))
    return values


@SETTINGS
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=12))
def test_the_fit_is_that_of_pooling_violators(values):
    """Min-max formula and textbook loop agree."""
    fit = decreasing_fit(torch.tensor([values], dtype=torch.float64))[0].tolist()
    assert pool_adjacent_violators(values) == pytest.approx(fit, abs=1e-9)


def test_ranks_by_hand():
    """Gaps of at least `strength` give the ranks, 1 for the largest; half the gap, half a rank apart."""
    assert [1.0, 3.0, 2.0] == ranks(9.0, 1.0, 4.0)
    assert [1.25, 1.75] == ranks(0.5, 0.0)
    assert [1.0, 2.5, 2.5] == pytest.approx(ranks(9.0, 0.0, 0.0))
    assert [2.0, 2.0, 2.0] == pytest.approx(ranks(3.0, 1.0, 2.0, strength=1e3), abs=0.01)


def test_the_projection_is_the_nearest_point_of_the_permutahedron():
    """No mixture of permutations of (1, 2, 3) is nearer to -values than the soft ranks."""
    values = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    soft = torch.tensor(ranks(*values.tolist()), dtype=torch.float64)
    corners = torch.tensor(list(itertools.permutations([1.0, 2.0, 3.0])), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(5000, 6, generator=generator, dtype=torch.float64) ** 3
    points = shares / shares.sum(-1, keepdim=True) @ corners
    assert (soft + values).norm() <= (points + values).norm(dim=-1).min()
    assert 6.0 == pytest.approx(soft.sum().item())


@pytest.mark.parametrize("k", [2, 3, 6, 15])
@pytest.mark.parametrize("strength", [0.3, 1.0, 5.0])
def test_it_is_the_literal_formula(k, strength):
    """Over the union of both sides' first k, which differs from token to token."""
    student, teacher = random_pair(tokens=6, classes=9)
    values = Ranking(top_k=k, strength=strength)(student, teacher, None)
    assert literal(student, teacher, k, strength) == pytest.approx(values.tolist(), abs=1e-9)


def test_hard_ranks_give_spearmans_coefficient():
    """With gaps above `strength` it is 1 - rho of scipy."""
    student, teacher = random_pair(tokens=5, classes=8)
    values = Ranking(top_k=8, strength=1e-3)(student, teacher, None)
    expected = [
        1 - spearmanr(z, y).statistic for z, y in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    assert expected == pytest.approx(values.tolist(), abs=1e-9)


@pytest.mark.parametrize("of", ["logits", "probabilities"])
def test_finite_differences_agree_and_equal_logits_cost_nothing(of):
    """Gradient through both soft regimes; exactly 0 for the teacher itself."""
    student, teacher = random_pair(tokens=5, classes=8)
    for strength in (0.1, 1.0, 4.0):
        loss = Ranking(top_k=4, strength=strength, of=of)
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, teacher, None), (student,))
        assert [0.0] * 5 == loss(teacher, teacher, None).tolist()


def test_a_reversed_order_costs_two_and_a_constant_nothing():
    """rho = -1; a shift of all logits changes no rank."""
    teacher = torch.tensor([[9.0, 6.0, 3.0, 0.0]])
    loss = Ranking(top_k=4)
    assert [2.0] == pytest.approx(loss(-teacher, teacher, None).tolist())
    assert [0.0] == pytest.approx(loss(teacher + 50, teacher, None).tolist())


def test_only_the_first_classes_of_either_side_count():
    """What neither has among its first k may be anything; a class that only the student has there counts."""
    teacher = torch.tensor([[9.0, 6.0, 0.0, 0.0, -1.0]])
    loss = Ranking(top_k=2)
    assert [0.0] == loss(torch.tensor([[8.0, 5.0, -7.0, 2.0, 1.0]]), teacher, None).tolist()
    assert loss(torch.tensor([[8.0, 5.0, 7.0, 2.0, 1.0]]), teacher, None).item() > 0


def test_a_chunk_of_many_classes_in_float32():
    """20,000 classes: finite, and the gradient is on the union alone."""
    student, teacher = random_pair(tokens=3, classes=20_000)
    student = student.detach().float().requires_grad_()
    value = Ranking()(student, teacher.float(), None)
    value.sum().backward()
    assert value.isfinite().all()
    assert ((student.grad != 0).sum(-1) <= 30).all()

"""GOLD's hybrid loss against its literal formula, value and gradient, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.config import Named
from ddkmix.errors import ConfigError
from ddkmix.losses import GOLD, build_terms

SETTINGS = settings(deadline=None, derandomize=True, max_examples=40)
PAIRS = torch.tensor([[0, 2], [3, 0], [4, 5]])
"""Of five student's and six teacher's tokens, three are the same."""


def case(seed=0, scale=1.0):
    """Merged probabilities of two spans, which need not sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    q, p = (torch.randn(2, size, generator=generator, dtype=torch.float64).softmax(-1) for size in (5, 6))
    return q * scale, p * scale


def literal(q, p, beta, same_weight=None, other_weight=None):
    """TRL 1.16, ULDLoss._compute_hybrid_uld_loss, of one span, written out."""
    ours = [q[i].item() for i, _ in PAIRS.tolist()]
    theirs = [p[j].item() for _, j in PAIRS.tolist()]
    total = 0.0
    for a, b in zip(ours, theirs, strict=True):
        m = (1 - beta) * a + beta * b
        if beta == 0:
            total += b * math.log(b / a)
        elif beta == 1:
            total += a * math.log(a / b)
        else:
            total += beta * b * math.log(b / m) + (1 - beta) * a * math.log(a / m)
    rest_q = [*sorted((q[i].item() for i in (1, 2)), reverse=True), 0.0]
    rest_p = sorted((p[j].item() for j in (1, 3, 4)), reverse=True)
    other = sum(abs(a - b) for a, b in zip(rest_q, rest_p, strict=True))
    same_weight = len(PAIRS) / len(p) if same_weight is None else same_weight
    return same_weight * total + (1 - same_weight if other_weight is None else other_weight) * other


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("weights", [{}, {"same_weight": 0.9}, {"same_weight": 2.0, "other_weight": 0.5}])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_the_value_is_the_literal_one(beta, weights, scale):
    """Any divergence, weights from the overlap or given, distributions or merged ones."""
    q, p = case(scale=scale)
    expected = [literal(*span, beta, **weights) for span in zip(q, p, strict=True)]
    assert expected == pytest.approx(GOLD(beta=beta, **weights).across(q, p, PAIRS).tolist(), rel=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_gradient_is_that_of_finite_differences(beta):
    """In the student's probabilities."""
    q, p = case()
    loss = GOLD(beta=beta)
    assert torch.autograd.gradcheck(lambda q: loss.across(q, p, PAIRS), (q.requires_grad_(),))


@SETTINGS
@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=6), st.floats(0.01, 0.99))
def test_with_one_vocabulary_it_is_the_generalised_jsd(logits, beta):
    """beta KL(p || m) + (1 - beta) KL(q || m) (arXiv 2306.13649): 0 where they agree, never negative."""
    z, y = torch.tensor(logits, dtype=torch.float64).T[:, None]
    q, p = z.softmax(-1), y.softmax(-1)
    m = beta * p + (1 - beta) * q
    expected = beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
    assert expected.item() == pytest.approx(GOLD(beta=beta)(z, y, None).item(), abs=1e-6)  # clamped at 1e-8
    assert 0.0 == pytest.approx(GOLD(beta=beta)(y, y, None).item(), abs=1e-12)


def test_beta_is_forward_and_reverse_kl_at_its_ends():
    """As TRL has it: 0 is KL(teacher || student)."""
    z, y = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    assert 0.75 * math.log(1.5) + 0.25 * math.log(0.5) == pytest.approx(GOLD(beta=0.0)(z, y, None).item())
    assert 0.5 * math.log(2 / 3) + 0.5 * math.log(2) == pytest.approx(GOLD(beta=1.0)(z, y, None).item())


def test_vocabularies_with_nothing_in_common_leave_the_sorted_distance():
    """No pair: weight 0 for what they share, 1 for the rest."""
    q, p = case()
    expected = [sum(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in sorted_pairs(q, p)]
    none = torch.zeros(0, 2, dtype=torch.int64)
    assert expected == pytest.approx(GOLD().across(q, p, none).tolist())


def sorted_pairs(q, p):
    """Each row sorted, the student's with a zero more."""
    return [
        ([*sorted(a, reverse=True), 0.0], sorted(b, reverse=True))
        for a, b in zip(q.tolist(), p.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    "parameters", [{"beta": 1.5}, {"merge": "last"}, {"same_weight": -1}, {"temperature": 0}]
)
def test_parameters_are_checked(parameters):
    """By name, in one line."""
    with pytest.raises(ConfigError, match=f"loss.0.{next(iter(parameters))}"):
        build_terms([Named.model_validate({"name": "gold", **parameters})])

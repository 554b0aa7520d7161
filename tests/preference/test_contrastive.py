"""DistiLLM-2's pair of skew divergences: weights, curricula, and the released defaults without them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.preference.contrastive import ContrastiveSkew
from tests.losses.stores import random_pair

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
SHARES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12)


def kl(a, b):
    """sum a log(a / b)."""
    return (a * (a / b).log()).sum(-1)


def skl(p, q, a):
    """KL(p || a p + (1 - a) q)."""
    return kl(p, a * p + (1 - a) * q)


def srkl(p, q, a):
    """KL(q || (1 - a) p + a q)."""
    return kl(q, (1 - a) * p + a * q)


def test_the_released_form_is_the_sum_of_both_means():
    """(2 - b) SKL on the teacher's tokens + b SRKL on the student's, with b = 1 and a = 0.1 throughout."""
    terms = ContrastiveSkew().terms(step=70, steps=100)
    (student_t, teacher_t), (student_s, teacher_s) = random_pair(0), random_pair(1)
    ours = [
        term.weight * term.loss(student, teacher, None).mean()
        for term, student, teacher in zip(terms, (student_t, student_s), (teacher_t, teacher_s), strict=True)
    ]
    b = 1.0
    chosen = skl(teacher_t.softmax(-1), student_t.softmax(-1), 0.1).mean()
    rejected = srkl(teacher_s.softmax(-1), student_s.softmax(-1), 0.1).mean()
    torch.testing.assert_close(sum(ours), (2 - b) * chosen + b * rejected)


@pytest.mark.parametrize(
    ("step", "weights"), [(0, (1.6, 0.4)), (20, (1.6, 0.4)), (50, (1.0, 1.0)), (100, (0, 2))]
)
def test_beta_grows_with_the_run(step, weights):
    """clip(share, b_0, 1), b_0 = 0.2; the weights of the paper, 1 - b and b, times 2."""
    moving = ContrastiveSkew(beta=0.2, moving_beta=True)
    assert weights == pytest.approx(tuple(term.weight for term in moving.terms(step=step, steps=100)))
    fixed = ContrastiveSkew(beta=0.2).terms(step=step, steps=100)
    assert (1.6, 0.4) == pytest.approx(tuple(term.weight for term in fixed))


def test_skews_of_a_batch_by_hand():
    """Gaps 0.2 and 0.4, mean 0.3: 1 - 0.5 x 1.5 = 0.25 and 1 - 0.5 x 0.75 = 0.625, cut at 0.5."""
    moving = ContrastiveSkew(skew=0.5, moving_skew=True)
    assert [0.25, 0.5] == moving.skews([0.4, 0.8], [0.2, 0.4])
    assert [0.5, 0.5] == ContrastiveSkew(skew=0.5).skews([0.4, 0.8], [0.2, 0.4])


@SETTINGS
@given(shares=SHARES, skew=st.floats(0.02, 0.9))
def test_skews_are_the_authors_lines_within_the_bounds(shares, skew):
    """1 - (1 - a) mean / (gap + 1e-5), clipped to [0.01, a], to a hundredth."""
    own, other = zip(*shares, strict=True)
    gaps = torch.tensor(own, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    anchor = (1 - skew) * gaps.mean()
    literal = torch.clip(1 - anchor / (gaps + 1e-5), min=1e-2, max=skew)
    found = ContrastiveSkew(skew=skew, moving_skew=True).skews(own, other)
    assert literal.tolist() == pytest.approx(found, abs=0.00501)
    assert all(0.01 <= value <= skew + 0.005 for value in found)


def test_an_easier_response_gets_less_skew():
    """The mean gap gets a_0 itself; below it, less, down to 0.01."""
    moving = ContrastiveSkew(skew=0.1, moving_skew=True)
    assert [0.1, 0.01, 0.1] == moving.skews([0.6, 0.51, 0.69], [0.5, 0.5, 0.5])
    assert [] == moving.skews([], [])


def test_terms_carry_the_skews_of_their_rows():
    """Each side its own; the bound of each is log(1 / skew)."""
    chosen, rejected = ContrastiveSkew().terms(step=0, steps=1, skews=(0.05, 0.02))
    student, teacher = torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 99.0]])
    assert [math.log(20)] == pytest.approx(chosen.loss(student, teacher, None).tolist())
    assert [math.log(50)] == pytest.approx(rejected.loss(student, teacher, None).tolist())

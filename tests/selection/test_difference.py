"""MiniPLM's selection against the sorted list, by hand, and its mistakes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.errors import ConfigError, NumericsError
from ddkmix.plugins import build
from ddkmix.selection.difference import DifferenceSelection

SETTINGS = settings(deadline=None, derandomize=True, max_examples=80)


def literal(reference, teacher, share):
    """Sort by score_ref - score_teacher, best first, and keep the first half (or another share)."""
    ranked = sorted(range(len(teacher)), key=lambda i: (teacher[i] - reference[i], i))
    count = max(1, int(share * len(teacher) + 0.5)) if teacher else 0
    return [i in ranked[:count] for i in range(len(teacher))]


@SETTINGS
@given(
    losses=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30),
    share=st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.9, 1.0]),
)
def test_it_is_the_top_of_the_sorted_list(losses, share):
    """Ties and all; exactly as many rows as the share says, one at least."""
    reference, teacher = zip(*losses, strict=True) if losses else ((), ())
    kept = DifferenceSelection(share=share).keep(np.array(reference, float), np.array(teacher, float))
    assert literal(reference, teacher, share) == kept.tolist()


def test_the_other_direction_would_be_noticed():
    """Teacher and reference exchanged keep other rows."""
    reference, teacher = np.array([3.0, 2.0, 9.0, 2.5]), np.array([2.0, 1.9, 8.8, 1.0])
    assert literal(list(reference), list(teacher), 0.5) == [True, False, False, True]
    assert DifferenceSelection().keep(teacher, reference).tolist() == [False, True, True, False]


def test_a_row_that_both_find_easy_or_hard_goes():
    """Boilerplate (both 0.1) and noise (both 11) have no difference; what only the teacher knows stays."""
    reference, teacher = np.array([0.1, 11.0, 3.0]), np.array([0.1, 11.0, 1.0])
    assert [False, False, True] == DifferenceSelection(share=0.3).keep(reference, teacher).tolist()


def test_shares_are_rounded_to_the_nearest_row():
    """0.1 of 30 rows are 3, whatever 0.1 is in binary; 0.5 of 3 rows are 2."""
    for rows, share, count in ((30, 0.1, 3), (3, 0.5, 2), (10, 0.29, 3), (5, 0.001, 1), (7, 1.0, 7)):
        kept = DifferenceSelection(share=share).keep(np.arange(rows, dtype=float), np.zeros(rows))
        assert count == kept.sum()
        assert kept[-count:].all()


@pytest.mark.parametrize(("side", "name"), [(0, "reference_loss"), (1, "teacher_loss")])
def test_a_loss_that_is_not_finite_is_one_line(side, name):
    """Which rows, how many, and why."""
    losses = [np.ones(4), np.ones(4)]
    losses[side][[1, 3]] = np.nan, np.inf
    with pytest.raises(
        NumericsError, match=rf"^{name} is not finite at rows \[1, 3\] \(2 of 4\); rows cannot"
    ):
        DifferenceSelection().keep(*losses)


def test_a_wrong_share_is_one_line():
    """Nothing would be left at 0."""
    with pytest.raises(ConfigError, match=r"selection.share = 0: Input should be greater than 0."):
        build({"name": "d", "share": 0}, {"d": DifferenceSelection}, where="selection")

"""Selection by confidence and uncertainty: by hand, order, state, and what it must never do."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.errors import NumericsError
from ddkmix.selection.confidence import ConfidenceSelection

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
BATCH = st.lists(st.tuples(st.integers(0, 2), st.floats(0, 8), st.floats(0, 8)), min_size=1, max_size=12)


def columns(batch):
    """Domain ids, teacher losses, student losses."""
    ids, teacher, student = zip(*batch, strict=True)
    return np.array(ids), np.array(teacher, dtype=np.float64), np.array(student, dtype=np.float64)


def losses_of(confidence, uncertainty):
    """Losses with these probabilities."""
    return -np.log(confidence), -np.log(1 - np.array(uncertainty))


def test_a_batch_by_hand():
    """Thresholds 0.5 and 0.4: the second row's teacher is unsure, the third row's student sure; the others
    have c u = 0.48 and 0.24, a mean of 0.36."""
    state = {"confidence": [0.5], "uncertainty": [0.4], "offered": [10], "kept": [7]}
    teacher, student = losses_of([0.8, 0.4, 0.9, 0.6], [0.6, 0.9, 0.3, 0.4])
    weights, after = ConfidenceSelection(decay=0.5).select(state, np.zeros(4, int), teacher, student)
    assert [4 / 3, 0, 0, 2 / 3] == pytest.approx(weights.tolist())
    quantiles = np.quantile([0.8, 0.4, 0.9, 0.6], 0.25), np.quantile([0.6, 0.9, 0.3, 0.4], 0.25)
    assert ([14], [9]) == (after["offered"], after["kept"])
    assert [0.25 + quantiles[0] / 2, 0.2 + quantiles[1] / 2] == pytest.approx(
        [after["confidence"][0], after["uncertainty"][0]]
    )
    plain, _ = ConfidenceSelection(weigh=False).select(state, np.zeros(4, int), teacher, student)
    assert [1.0, 0.0, 0.0, 1.0] == plain.tolist()


def test_what_a_domain_offers_first_is_kept_and_sets_its_thresholds():
    """Another domain's rows do not; a domain that is absent keeps its thresholds."""
    selection = ConfidenceSelection(weigh=False)
    weights, state = selection.select(selection.init(2), *columns([(0, 1.0, 2.0), (0, 3.0, 2.0)]))
    assert [1.0, 1.0] == weights.tolist()
    assert None is state["confidence"][1] and None is state["uncertainty"][1]
    expected = np.quantile(np.exp([-1.0, -3.0]), 0.25)
    assert expected == pytest.approx(state["confidence"][0])
    weights, after = selection.select(state, *columns([(1, 9.0, 9.0)]))
    assert [1.0] == weights.tolist()
    assert state["confidence"][0] == after["confidence"][0]


@SETTINGS
@given(batches=st.lists(BATCH, min_size=1, max_size=6), seed=st.integers(0, 99))
def test_the_order_of_rows_within_a_batch_does_not_matter(batches, seed):
    """The same weights and, to the bit, the same state: ranks that gather rows in any order agree."""
    selection, generator = ConfidenceSelection(), np.random.default_rng(seed)
    state = other = selection.init(3)
    for batch in batches:
        order = generator.permutation(len(batch))
        weights, state = selection.select(state, *columns(batch))
        turned, other = selection.select(other, *columns([batch[i] for i in order]))
        assert weights[order].tolist() == turned.tolist()
        assert state == other


@SETTINGS
@given(batches=st.lists(BATCH, min_size=1, max_size=6))
def test_weights_and_counts_always_hold(batches):
    """Weights are finite, at least 0 and of mean 1 over the rows that are kept; every row is counted as
    offered, and as kept if it was; the state survives JSON."""
    selection = ConfidenceSelection()
    state, offered, kept = selection.init(3), np.zeros(3, int), np.zeros(3, int)
    for batch in batches:
        ids, teacher, student = columns(batch)
        before = json.dumps(state)
        weights, after = selection.select(state, ids, teacher, student)
        assert before == json.dumps(state)  # a value, not changed
        assert np.isfinite(weights).all() and (weights >= 0).all()
        passed = [
            all(
                state[name][d] is None or value >= state[name][d]
                for name, value in (("confidence", math.exp(-t)), ("uncertainty", -math.expm1(-s)))
            )
            for d, t, s in batch
        ]
        if any(passed) and weights.any():
            assert 1.0 == pytest.approx(weights[passed].mean())
        assert not weights[~np.array(passed)].any()
        offered += np.bincount(ids, minlength=3)
        kept += np.bincount(ids[passed], minlength=3)
        state = json.loads(json.dumps(after))
        assert (offered.tolist(), kept.tolist()) == (state["offered"], state["kept"])


@pytest.mark.parametrize(
    ("confidence", "uncertainty", "share"), [(0.0, 0.0, 1.0), (0.25, 0.0, 0.75), (0.0, 0.5, 0.5)]
)
def test_a_quantile_drops_its_share_in_the_long_run(confidence, uncertainty, share):
    """100 batches of 50 rows of one kind; a quantile of 0 drops none at all."""
    selection = ConfidenceSelection(confidence_quantile=confidence, uncertainty_quantile=uncertainty)
    generator, state = np.random.default_rng(0), selection.init(1)
    for _ in range(100):
        teacher, student = generator.gamma(4, 0.5, (2, 50))
        _, state = selection.select(state, np.zeros(50, int), teacher, student)
    kept = state["kept"][0] / state["offered"][0]
    assert share == pytest.approx(kept, abs=0.0 if share == 1 else 0.03)


def test_a_student_that_is_sure_of_everything_learns_nothing():
    """Uncertainty 0 everywhere: no weight is a division by 0."""
    selection = ConfidenceSelection()
    weights, state = selection.select(selection.init(1), *columns([(0, 1.0, 0.0), (0, 2.0, 0.0)]))
    assert [1.0, 1.0] == weights.tolist()
    weights, _ = selection.select({**state, "uncertainty": [0.5]}, *columns([(0, 0.1, 0.2)]))
    assert [0.0] == weights.tolist()


@pytest.mark.parametrize("side", ["teacher_loss", "student_loss"])
def test_a_loss_that_is_not_finite_is_one_line(side):
    """nan >= threshold is False, and the row would be gone without a word."""
    ids, teacher, student = columns([(0, 1.0, 1.0), (0, 1.0, 1.0)])
    (teacher if side == "teacher_loss" else student)[1] = np.nan
    selection = ConfidenceSelection()
    with pytest.raises(NumericsError, match=rf"^{side} is not finite at rows \[1\] \(1 of 2\)"):
        selection.select(selection.init(1), ids, teacher, student)

"""Domain losses and their derived numbers, and weights by name as vectors."""

import json
import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.errors import ConfigError, DataError
from ddkmix.types import DomainLosses, simplex_vector
from tests.conftest import domain_losses

LOSSES = DomainLosses(
    domains=("code", "math"),
    student_loss=np.array([3.0, 2.0]),
    teacher_loss=np.array([1.0, 2.5]),
    student_error=np.array([0.1, 0.2]),
    gap_error=np.array([0.05, 0.06]),
    num_tokens=np.array([100, 200]),
    num_bytes=np.array([400, 500]),
)


def test_the_gap_is_student_minus_teacher():
    """In nats per token; negative where the student is better."""
    assert [2.0, -0.5] == LOSSES.loss_gap.tolist()


def test_the_perplexity_ratio_is_the_exponential_of_the_gap():
    """exp(l_S) / exp(l_T), DDK's signal."""
    expected = [math.exp(3.0) / math.exp(1.0), math.exp(2.0) / math.exp(2.5)]
    assert expected == pytest.approx(LOSSES.perplexity_ratio.tolist())


def test_a_gap_beyond_float64_is_an_infinite_ratio_without_a_warning():
    """e^1000 is inf; the gap itself stays exact."""
    losses = domain_losses([1000.0, 1.0])
    assert [math.inf, math.e] == pytest.approx(losses.perplexity_ratio.tolist())
    assert [1000.0, 1.0] == losses.loss_gap.tolist()


def test_bits_per_byte_by_hand():
    """3 nats x 100 tokens over 400 bytes is 0.75 nats a byte, and a bit is log 2 nats."""
    assert [0.75 / math.log(2), 0.8 / math.log(2)] == pytest.approx(LOSSES.student_bits_per_byte.tolist())
    assert [0.25 / math.log(2), 1.0 / math.log(2)] == pytest.approx(LOSSES.teacher_bits_per_byte.tolist())


def test_bits_per_byte_of_no_bytes_do_not_divide_by_zero():
    """Where nobody counted bytes there is no number (nan), and no warning."""
    losses = replace(LOSSES, num_bytes=np.array([0, 500]))
    assert [False, True] == np.isfinite(losses.student_bits_per_byte).tolist()


def test_json_holds_one_entry_per_domain_in_plain_numbers():
    """json.dumps accepts it, and it reads back equal."""
    tree = LOSSES.to_json()
    assert ["code", "math"] == list(tree)
    expected = {
        "student_loss": 3.0,
        "teacher_loss": 1.0,
        "student_error": 0.1,
        "loss_gap": 2.0,
        "gap_error": 0.05,
        "num_tokens": 100,
        "num_bytes": 400,
    }
    assert expected == {name: tree["code"][name] for name in expected}
    assert {"perplexity_ratio", "student_bits_per_byte", "teacher_bits_per_byte"} == set(tree["code"]) - set(
        expected
    )
    assert tree == json.loads(json.dumps(tree, allow_nan=False))


def test_json_has_null_where_a_number_is_not_finite():
    """A missing standard error or an overflowing ratio must not break the JSON of other readers."""
    losses = replace(domain_losses([1000.0]), gap_error=np.array([np.nan]), student_error=np.array([np.nan]))
    tree = json.loads(json.dumps(losses.to_json(), allow_nan=False))["a"]
    assert [None] * 3 == [tree[name] for name in ("gap_error", "student_error", "perplexity_ratio")]
    assert 1000.0 == tree["loss_gap"]


def test_losses_cannot_be_changed():
    """A measurement is a value."""
    with pytest.raises(FrozenInstanceError):
        LOSSES.domains = ("other",)


def test_weights_by_name_become_a_vector_in_the_order_of_the_domains():
    """{b: 1, a: 3} over (a, b) is 3/4 and 1/4."""
    assert [0.75, 0.25] == simplex_vector({"b": 1.0, "a": 3.0}, ("a", "b"), where="weights").tolist()


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=20).filter(lambda values: sum(values) > 1e-6))
def test_any_weights_are_normalised(values):
    """Non-negative numbers in any unit become a point of the simplex with the same proportions."""
    names = [f"d{i}" for i in range(len(values))]
    vector = simplex_vector(dict(zip(names, values, strict=True)), names, where="weights")
    assert vector.min() >= 0
    assert 1.0 == pytest.approx(vector.sum())
    assert [value / sum(values) for value in values] == pytest.approx(vector.tolist())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"a": 1.0, "c": 1.0},
            "policy.weights: unknown domains ['c'], missing domains ['b']; give exactly one weight for each "
            "of ['a', 'b'].",
        ),
        ({"a": 1.0}, "policy.weights: missing domains ['b'];"),
        (
            {"a": 1.0, "b": -1.0},
            "policy.weights = {'a': 1.0, 'b': -1.0}; every weight must be finite and >= 0, and one of",
        ),
        ({"a": 0.0, "b": 0.0}, "policy.weights = {'a': 0.0, 'b': 0.0}; every weight"),
        ({"a": math.nan, "b": 1.0}, "policy.weights = {'a': nan, 'b': 1.0}; every weight"),
        ({"a": math.inf, "b": 1.0}, "policy.weights = {'a': inf, 'b': 1.0}; every weight"),
    ],
)
def test_weights_that_are_no_distribution_are_one_line(weights, message):
    """The message says where they stand, what they are and the rule."""
    with pytest.raises(ConfigError) as error:
        simplex_vector(weights, ("a", "b"), where="policy.weights")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


# --- losses that somebody else has measured ---------------------------------------------------------


def test_means_become_losses_sorted_by_domain():
    """What nobody has measured is nan or 0, and None in JSON."""
    losses = DomainLosses.from_means({"math": 3.0, "code": 2.5}, {"code": 2.0, "math": 1.0})
    assert ("code", "math") == losses.domains
    assert ([2.5, 3.0], [2.0, 1.0]) == (losses.student_loss.tolist(), losses.teacher_loss.tolist())
    assert [0.5, 2.0] == losses.loss_gap.tolist()
    assert np.isnan([losses.student_error, losses.gap_error, losses.student_bits_per_byte]).all()
    assert ([0, 0], [0, 0]) == (losses.num_tokens.tolist(), losses.num_bytes.tolist())
    assert losses.to_json()["code"]["student_error"] is None
    assert json.dumps(losses.to_json())


def test_without_a_reference_the_gap_is_the_loss():
    """As an excess over nothing."""
    losses = DomainLosses.from_means({"code": 2.5})
    assert ([2.5], [0.0]) == (losses.loss_gap.tolist(), losses.teacher_loss.tolist())


@pytest.mark.parametrize(
    ("student", "reference"),
    [({}, None), ({}, {}), ({"code": 1.0}, {"math": 1.0}), ({"code": 1.0, "math": 1.0}, {"code": 1.0})],
)
def test_means_of_different_domains_are_refused(student, reference):
    """In one line with both."""
    with pytest.raises(ConfigError, match="give one of each for the same domains") as error:
        DomainLosses.from_means(student, reference)
    assert "\n" not in str(error.value)


# --- back from JSON ---------------------------------------------------------------------------------

COLUMNS = (
    "student_loss", "teacher_loss", "student_error", "gap_error", "num_tokens", "num_bytes", "excess_loss",
    "forward_kl", "rows_served", "effective_rows",
)  # fmt: skip


def assert_same_losses(expected: DomainLosses, actual: DomainLosses) -> None:
    """Every column to the last bit, nan where it was nan, None where it was None."""
    assert expected.domains == actual.domains
    for name in COLUMNS:
        there, here = getattr(expected, name), getattr(actual, name)
        assert (there is None) == (here is None), name
        if there is not None:
            assert there.dtype == here.dtype, name
            np.testing.assert_array_equal(there, here)


@settings(deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(*[st.floats(-1e300, 1e300)] * 2, *[st.floats(0, 10) | st.just(math.nan)] * 2),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**53),
    st.booleans(),
)
def test_losses_come_back_from_json_to_the_last_bit(rows, count, measured):
    """Through a text of JSON, with and without what is optional."""
    student, teacher, student_error, gap_error = (np.array(column) for column in zip(*rows, strict=True))
    optional = {
        "excess_loss": gap_error.copy(),
        "forward_kl": student_error.copy(),
        "rows_served": np.full(len(rows), count),
        "effective_rows": np.full(len(rows), 31.7),
    }
    losses = DomainLosses(
        domains=tuple("abcde"[: len(rows)]),
        student_loss=student,
        teacher_loss=teacher,
        student_error=student_error,
        gap_error=gap_error,
        num_tokens=np.full(len(rows), count),
        num_bytes=np.zeros(len(rows), dtype=np.int64),
        **(optional if measured else {}),
    )
    assert_same_losses(losses, DomainLosses.from_json(json.loads(json.dumps(losses.to_json()))))


def test_a_column_that_is_lost_would_be_noticed():
    """The comparison above can fail: an optional column that nobody reads, a value in another place."""
    losses = replace(LOSSES, rows_served=np.array([1, 2]))
    for lost in (replace(losses, rows_served=None), replace(losses, gap_error=losses.gap_error[::-1])):
        with pytest.raises(AssertionError):
            assert_same_losses(losses, DomainLosses.from_json(lost.to_json()))


def test_records_of_older_versions_are_read():
    """Errors that nobody wrote are unknown, counts 0; columns that came later are None."""
    losses = DomainLosses.from_json(
        {"b": {"student_loss": 2.0, "teacher_loss": 1.0}, "a": {"student_loss": 3, "teacher_loss": None}}
    )
    assert ("a", "b") == losses.domains
    assert [3.0, 2.0] == losses.student_loss.tolist()
    assert math.isnan(losses.teacher_loss[0]) and np.isnan(losses.gap_error).all()
    assert [0, 0] == losses.num_bytes.tolist()
    assert losses.rows_served is None and losses.excess_loss is None


@pytest.mark.parametrize(
    "tree", [{"a": {"student_loss": "much"}}, {"a": {"student_loss": [1]}}, {"a": {"num_tokens": "x"}}]
)
def test_what_is_no_losses_is_one_line(tree):
    """The text is shown, and what would do."""
    with pytest.raises(
        DataError, match=r"are no losses of domains .* give what DomainLosses.to_json wrote"
    ) as error:
        DomainLosses.from_json(tree)
    assert "\n" not in str(error.value)

"""Records: what is read back is what was written, within the stated errors, in the stated number of bytes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.errors import RowError
from ddkmix.logits_store.card import Kept
from ddkmix.logits_store.codec import RecordFormat, TokenColumns, decode, encode
from ddkmix.logits_store.quantise import (
    LOWEST,
    decode_between,
    decode_log_probs,
    decode_mass,
    encode_between,
    encode_log_probs,
    encode_mass,
    log_prob_error,
    log_z_range,
)


def kept_as(keep, num_bytes=1, k=50, draws=12):
    """Settings of each kind."""
    return Kept(
        keep=keep,
        k=None if keep == "drawn" else k,
        draws=draws if "drawn" in keep else None,
        p=0.95 if keep == "top_p_k" else None,
        log_prob_bytes=num_bytes,
    )


def columns_of_tokens(seed, n, layout, most=6):
    """Columns of n random tokens that a teacher could have."""
    random = np.random.default_rng(seed)
    kept = layout.kept
    counts = random.integers(1, most + 1, n) if kept.has_exact else np.zeros(n, dtype=np.int64)
    drawn = random.integers(1, most + 1, n) if kept.draws else np.zeros(n, dtype=np.int64)
    ids, log_probs, outside = [], [], []
    for exact, extra in zip(counts, drawn, strict=True):
        p = random.dirichlet(np.full(exact + extra + 1, 0.3)).clip(1e-9)
        p /= p.sum()
        ids += random.choice(layout.num_classes, exact + extra, replace=False).tolist()
        log_probs += np.log(p[: exact + extra]).tolist()
        outside.append(1 - p[:exact].sum() if kept.has_exact else 1.0)
    most_nats = math.log(layout.num_classes)
    return TokenColumns(
        counts=counts.astype(np.int64),
        drawn_counts=drawn.astype(np.int64),
        teacher_nats=random.exponential(3, n).astype(np.float32),
        entropy=random.uniform(0, most_nats, n).astype(np.float32),
        outside=np.array(outside, dtype=np.float64),
        log_z={
            t: random.uniform(*sorted((0, log_z_range(t, layout.num_classes))), n).astype(np.float32)
            for t in layout.temperatures
        },
        ids=np.array(ids, dtype=np.int64),
        log_probs=np.array(log_probs, dtype=np.float32),
        draws=random.integers(1, 13, int(drawn.sum())).astype(np.int64),
    )


KINDS = ["top_p_k", "top_k", "drawn", "top_k_drawn"]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(0, 7),
    st.sampled_from(KINDS),
    st.sampled_from([1, 2]),
    st.sampled_from([50, 65_536, 65_537, 151_936]),
    st.sampled_from([(), (2.0,), (0.5, 2.0, 7.3)]),
)
def test_what_is_read_back_is_what_was_written_within_the_stated_errors(
    seed, n, keep, num_bytes, classes, temperatures
):
    """Counts, classes and draws exactly; every scalar and log-probability within its bound."""
    layout = RecordFormat(num_classes=classes, kept=kept_as(keep, num_bytes), temperatures=temperatures)
    columns = columns_of_tokens(seed, n, layout)
    found = decode(encode(columns, layout), n, layout)
    for name in ("counts", "drawn_counts", "ids", "draws"):
        assert np.array_equal(getattr(columns, name), getattr(found, name)), name
    assert np.allclose(columns.teacher_nats, found.teacher_nats, rtol=2**-11, atol=1e-7)
    assert np.abs(columns.entropy - found.entropy).max(initial=0) <= math.log(classes) / 131_070 + 1e-6
    assert np.allclose(columns.outside, found.outside, rtol=2.5e-4, atol=1.2e-7)
    for t in temperatures:
        bound = abs(log_z_range(t, classes)) / 131_070 + 1e-6
        assert np.abs(columns.log_z[t] - found.log_z[t]).max(initial=0) <= bound
    # the mass of a token is made right, which may double what rounding did to one entry
    factor = 1 if keep == "drawn" else 2
    worst = [log_prob_error(x, num_bytes) for x in columns.log_probs.tolist()]
    sizes = columns.counts + columns.drawn_counts
    of_token = np.repeat(np.arange(n), sizes)
    largest = np.zeros(n)
    np.maximum.at(largest, of_token, worst)
    bound = largest[of_token] * factor + 1e-3  # and the mass itself is rounded
    assert (np.abs(columns.log_probs - found.log_probs) <= bound).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["top_p_k", "top_k", "top_k_drawn"]), st.sampled_from([1, 2]))
def test_kept_mass_and_the_mass_outside_make_one(seed, keep, num_bytes):
    """Exactly, so that the bucket for the rest has its own mass and no rounding error of others."""
    layout = RecordFormat(num_classes=1000, kept=kept_as(keep, num_bytes))
    found = decode(encode(columns_of_tokens(seed, 5, layout), layout), 5, layout)
    start = 0
    for exact, drawn, outside in zip(found.counts, found.drawn_counts, found.outside, strict=True):
        mass = np.exp(found.log_probs[start : start + exact].astype(np.float64)).sum()
        assert 1 == pytest.approx(mass + outside, abs=2e-6)
        start += exact + drawn


@pytest.mark.parametrize(
    ("keep", "classes", "num_bytes", "per_token", "per_entry"),
    [
        ("top_p_k", 49_152, 1, 9, 3),  # counts 1, nats 2, entropy 2, mass 2, log Z 2; id 2, log p 1
        ("top_p_k", 49_152, 2, 9, 4),
        ("top_p_k", 151_936, 1, 9, 4),
        ("drawn", 49_152, 1, 7, 4),  # no mass outside; the number of draws of each entry
        ("top_k_drawn", 49_152, 1, 10, 3),
    ],
)
def test_a_record_has_as_many_bytes_as_promised(keep, classes, num_bytes, per_token, per_entry):
    """At one temperature; 3 bytes an entry and 9 a token are at most 3.1 and 8 from 10 entries on."""
    layout = RecordFormat(num_classes=classes, kept=kept_as(keep, num_bytes), temperatures=(2.0,))
    columns = columns_of_tokens(0, 20, layout)
    extra = len(columns.draws) if keep == "top_k_drawn" else 0
    assert 20 * per_token + len(columns.ids) * per_entry + extra == len(encode(columns, layout))


def test_more_than_255_classes_are_counted_in_two_bytes():
    """k = 256 needs them; 255 does not."""
    assert "<u1" == RecordFormat(num_classes=1000, kept=kept_as("top_k", k=255)).count_type
    assert "<u2" == RecordFormat(num_classes=1000, kept=kept_as("top_k", k=256)).count_type


def test_a_grid_of_log_probabilities_is_finest_near_certainty():
    """-20 (c / 255)^2: the ends are exact, and the stated error holds everywhere and is nearly reached."""
    assert [0, 255, 255] == encode_log_probs(np.array([0.0, LOWEST, -90.0], dtype=np.float32), 1).tolist()
    assert [0.0, LOWEST] == decode_log_probs(np.array([0, 255], dtype=np.uint8), 1).tolist()
    values = np.linspace(LOWEST, 0, 50_001, dtype=np.float32)
    error = np.abs(decode_log_probs(encode_log_probs(values, 1), 1) - values)
    bounds = np.array([log_prob_error(x, 1) for x in values.tolist()])
    assert (error <= bounds + 1e-6).all()
    assert (error / bounds).max() > 0.9
    assert 0.018 == pytest.approx(log_prob_error(-1.0, 1), abs=5e-4)


def test_masses_keep_their_precision_at_both_ends():
    """r and 1 - r have a relative error of at most 2.5e-4; 0 and 1 are exact."""
    values = np.array([0.0, 1e-6, 1e-3, 0.05, 0.5, 0.95, 1 - 1e-3, 1 - 1e-6, 1.0])
    found = decode_mass(encode_mass(values))
    assert 0.0 == found[0]
    assert np.allclose(values, found, rtol=2.5e-4, atol=0)
    assert np.allclose(1 - values[:-1], 1 - found[:-1], rtol=2.5e-4, atol=0)


def test_fixed_point_ends_are_exact_and_nothing_leaves_the_range():
    """Rounding in the teacher may leave the range by a little."""
    values = np.array([-1e-5, 0.0, 3.0, 3.00001], dtype=np.float32)
    assert [0.0, 0.0, 3.0, 3.0] == decode_between(encode_between(values, 3.0), 3.0).tolist()
    assert [-3.0, 0.0] == decode_between(encode_between(np.array([-3.0, 0.0]), -3.0), -3.0).tolist()
    assert [0.0] == decode_between(encode_between(np.array([0.0]), 0.0), 0.0).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.5, 2.0, 10.0])
def test_normalisers_lie_between_those_of_one_class_and_of_equal_ones(temperature):
    """log sum p^(1/temperature) of random distributions over 100 classes, and of the two extremes."""
    random = np.random.default_rng(0)
    end = log_z_range(temperature, 100)
    low, high = sorted((0.0, end))
    for alpha in (0.01, 0.1, 1, 10):
        p = random.dirichlet(np.full(100, alpha)).clip(1e-300)
        assert low <= np.log((p ** (1 / temperature)).sum()) <= high
    assert end == pytest.approx(np.log((np.full(100, 0.01) ** (1 / temperature)).sum()))


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: data[:5]])
def test_a_record_of_another_length_is_refused(change):
    """Too short, too long, hardly begun."""
    layout = RecordFormat(num_classes=1000, kept=kept_as("top_k_drawn"), temperatures=(2.0,))
    data = encode(columns_of_tokens(0, 5, layout), layout)
    with pytest.raises(RowError, match="bytes where"):
        decode(change(data), 5, layout)


def test_a_class_that_does_not_exist_is_refused():
    """As a store of another vocabulary would give."""
    layout = RecordFormat(num_classes=1000, kept=kept_as("top_k"))
    data = encode(columns_of_tokens(0, 50, layout), layout)
    with pytest.raises(RowError, match=r"class .* of 20"):
        decode(data, 50, RecordFormat(num_classes=20, kept=kept_as("top_k")))

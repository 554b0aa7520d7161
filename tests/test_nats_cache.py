"""Losses of a frozen model on disk: whole, of these rows and this model, or not at all."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.held_out import select_rows
from ddkmix.nats_cache import NatsCache
from tests.hand_made import random_rows


@pytest.mark.parametrize("change", ["documents", "rows"])
def test_the_cache_is_keyed_by_rows(tmp_path, change):
    """Other documents or another choice of rows are measured anew; the old entry stays valid."""
    cache = NatsCache(tmp_path / "cache", "model")
    rows = random_rows(tmp_path)
    before = select_rows(rows, 9)
    after = (
        select_rows(replace(rows, fingerprint="other"), 9) if change == "documents" else select_rows(rows, 8)
    )
    cache.save(before, np.arange(9.0))
    assert cache.load(after) is None
    assert list(range(9)) == cache.load(before).tolist()


def test_domains_that_share_a_folder_do_not_share_files(tmp_path):
    """A logits store is one folder for several domains; the name of each goes into its file's."""
    cache = NatsCache(tmp_path / "cache", "held_out")
    one, other = (select_rows(replace(random_rows(tmp_path), domain=name), 9) for name in ("code", "math"))
    assert one.key == other.key
    cache.save(one, np.arange(9.0))
    assert cache.load(other) is None
    cache.save(other, np.ones(9))
    assert (list(range(9)), [1.0] * 9) == (cache.load(one).tolist(), cache.load(other).tolist())


def truncated(data):
    """A file whose end is missing."""
    return data[:-5]


def beheaded(data):
    """A file whose beginning is missing."""
    return data[40:]


def emptied(data):
    """A file of no bytes."""
    return b""


def zeroed(data):
    """What a crash can leave: the right size and nothing in it."""
    return bytes(len(data))


def half_zeroed(data):
    """What a crash can leave of a file of two blocks."""
    return data[:60] + bytes(len(data) - 60)


def lengthened(data):
    """Something was appended."""
    return data + bytes(8)


def flipped(data):
    """One bit of one number is wrong."""
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


DAMAGES = (truncated, beheaded, emptied, zeroed, half_zeroed, lengthened, flipped)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_no_entry(tmp_path, damage):
    """Of sums or of tokens; the other one stays."""
    cache, held_out = NatsCache(tmp_path / "cache", "m"), select_rows(random_rows(tmp_path), 9)
    tokens = np.arange(held_out.num_tokens.sum(), dtype=np.float32)
    cache.save(held_out, np.arange(9.0))
    cache.save_tokens(held_out, tokens)
    (path,) = (tmp_path / "cache").glob("*.f4")
    path.write_bytes(damage(path.read_bytes()))
    assert (None, list(range(9))) == (cache.load_tokens(held_out), cache.load(held_out).tolist())
    cache.save_tokens(held_out, tokens)
    assert tokens.tolist() == cache.load_tokens(held_out).tolist()


def test_tokens_lie_in_a_second_file(tmp_path):
    """Float32, four bytes a predicted token; sums that were there before are found as before."""
    cache, held_out = NatsCache(tmp_path / "cache", "m"), select_rows(random_rows(tmp_path), 9)
    cache.save(held_out, np.arange(9.0))
    assert cache.load_tokens(held_out) is None
    before = [path.name for path in (tmp_path / "cache").iterdir()]
    nats = np.linspace(0, 1, held_out.num_tokens.sum(), dtype=np.float32)
    cache.save_tokens(held_out, nats)
    (second,) = [path for path in (tmp_path / "cache").iterdir() if path.name not in before]
    assert (".f4", 32 + 4 * len(nats)) == (second.suffix, second.stat().st_size)
    assert (np.float32, nats.tolist()) == (
        cache.load_tokens(held_out).dtype,
        cache.load_tokens(held_out).tolist(),
    )
    cache.save_tokens(held_out, nats[:-1])
    assert cache.load_tokens(held_out) is None


def test_an_entry_for_other_rows_under_this_name_is_not_used(tmp_path):
    """A whole file with another number of sums is no entry for these rows."""
    cache, held_out = NatsCache(tmp_path / "cache", "m"), select_rows(random_rows(tmp_path), 9)
    cache.save(held_out, np.arange(8.0))
    assert cache.load(held_out) is None


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1e6), min_size=9, max_size=9))
def test_sums_come_back_from_the_cache_bit_for_bit(tmp_path_factory, sums):
    """What was measured is what is used in every later run."""
    folder = tmp_path_factory.mktemp("cache")
    cache, held_out = NatsCache(folder / "cache", "m"), select_rows(random_rows(folder), 9)
    cache.save(held_out, np.array(sums))
    assert sums == cache.load(held_out).tolist()

"""Which held-out rows a domain is measured on."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ddkmix.errors import DataError
from ddkmix.held_out import select_rows
from tests import hand_made
from tests.hand_made import random_rows


def write_rows(folder, domain, shards):
    """Packed rows from lists of lists of tokens, one list per shard."""
    return hand_made.write_rows(folder, domain, shards, seq_len=6)


def test_all_rows_are_taken_where_there_are_fewer_than_asked_for(tmp_path):
    """A small domain is measured on all that it has, in the order of the shards."""
    held_out = select_rows(random_rows(tmp_path, shards=(2, 3)), 500)
    assert ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)) == held_out.places


def test_exactly_as_many_rows_as_asked_for_are_taken(tmp_path):
    """Without repeats."""
    held_out = select_rows(random_rows(tmp_path, shards=(40, 40, 40)), 50)
    assert 50 == len(set(held_out.places)) == len(held_out.num_tokens) == len(held_out.num_bytes)


def test_the_rows_are_the_same_for_every_run(tmp_path):
    """They depend on the domain's name and shape alone: no seed, no random state, no policy."""
    rows = random_rows(tmp_path, shards=(40, 40))
    expected = select_rows(rows, 10).places
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    assert expected == select_rows(rows, 10).places
    assert expected != select_rows(replace(rows, domain="math"), 10).places


def test_a_smaller_choice_is_part_of_a_larger_one(tmp_path):
    """Asking for more rows adds rows and drops none."""
    rows = random_rows(tmp_path, shards=(40, 40))
    chosen = [set(select_rows(rows, limit).places) for limit in (5, 20, 80)]
    assert chosen[0] < chosen[1] < chosen[2]


def test_the_rows_are_spread_over_all_shards(tmp_path):
    """60 of 300 rows in three shards: about 20 of each, not the first 60."""
    places = select_rows(random_rows(tmp_path, shards=(100, 100, 100)), 60).places
    counts = [sum(shard == i for shard, _ in places) for i in range(3)]
    assert min(counts) >= 10
    assert 60 == sum(counts)


def test_rows_with_one_token_are_skipped_and_replaced(tmp_path):
    """A row without a token to predict has no loss; another one is taken in its place."""
    rows = write_rows(tmp_path, "code", [[[1], [2], [3, 4], [5]], [[6], [7, 8, 9]]])
    assert ((0, 2), (1, 1)) == select_rows(rows, 2).places
    assert 1 == len(select_rows(rows, 1).places)


def test_counts_are_of_predicted_tokens_and_their_bytes(tmp_path):
    """A row of n tokens predicts n - 1."""
    held_out = select_rows(write_rows(tmp_path, "code", [[[1, 2, 3], [4, 5]]]), 9)
    assert ([2, 1], [6, 3]) == (held_out.num_tokens.tolist(), held_out.num_bytes.tolist())


def test_a_domain_with_nothing_to_predict_is_one_line(tmp_path):
    """Only one-token rows: the domain is named."""
    with pytest.raises(DataError) as error:
        select_rows(write_rows(tmp_path, "code", [[[1], [2]]]), 9)
    assert "domain 'code': its held-out rows have no token to predict; add text." == str(error.value)

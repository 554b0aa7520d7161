"""Held-out items of a user: taken once, padded at the end, refused where their losses would be wrong."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.errors import ConfigError, DataError
from ddkmix.own_held_out import select_items


def item(length: int, **more: Any) -> dict[str, Any]:
    """Tokens 1, 2, ..."""
    return {"input_ids": list(range(1, length + 1)), **more}


def read(dataset: Any, rows: int = 100) -> tuple[list[list[int]], list[list[int]]]:
    """input_ids and labels of all selected items."""
    held_out = select_items("code", dataset, rows)
    input_ids, labels = held_out.open(None).read(range(len(held_out.items)))
    return input_ids.tolist(), labels.tolist()


def test_labels_are_the_tokens_where_there_are_none() -> None:
    """Shorter items are padded at their end, where nothing is predicted."""
    assert ([[1, 2, 3], [1, 2, 0]], [[1, 2, 3], [1, 2, -100]]) == read([item(3), item(2)])
    assert [2, 1] == select_items("code", [item(3), item(2, labels=None)], 9).num_tokens.tolist()


def test_own_labels_say_what_is_predicted() -> None:
    """A prompt is not: 5 tokens, 2 of them predicted."""
    labels = [-100, -100, -100, 4, 5]
    held_out = select_items("code", [item(5, labels=labels)], 9)
    assert ([2], [0]) == (held_out.num_tokens.tolist(), held_out.num_bytes.tolist())
    assert [labels] == read([item(5, labels=labels)])[1]


def test_padding_at_the_end_is_cut() -> None:
    """Whatever labels and tokens stand there; masks may be numbers or truth values."""
    for mask in ([1, 1, 1, 0, 0], [True, True, True, False, False], torch.tensor([1, 1, 1, 0, 0])):
        assert ([[1, 2, 3]], [[1, 2, 3]]) == read([item(5, attention_mask=mask)])
    assert ([[1, 2]], [[1, 2]]) == read([item(2, attention_mask=None)])


@pytest.mark.parametrize("mask", [[0, 1, 1], [1, 0, 1]])
def test_padding_elsewhere_is_refused(mask: list[int]) -> None:
    """A causal model would see it, and its positions would be others."""
    with pytest.raises(DataError) as info:
        select_items("code", [item(3), item(3, attention_mask=mask)], 9)
    assert "held_out['code'][1] is padded elsewhere than at its end; pad there" in str(info.value)


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, torch.tensor, lambda ids: np.array(ids, dtype=np.uint8)]
)
def test_tokens_in_any_container(kind: Any) -> None:
    """As tokenizers and datasets give them."""
    assert [[1, 2, 3]] == read([{"input_ids": kind([1, 2, 3]), "labels": kind([1, 2, 3])}])[0]


@pytest.mark.parametrize(
    ("expected", "wrong"),
    [
        ("has no input_ids; give items as tokenizers make them", [1, 2, 3]),
        ("has no input_ids", {"text": "abc"}),
        (
            "has input_ids (3,), labels (2,), attention_mask (3,); they must be one list",
            item(3, labels=[1, 2]),
        ),
        ("has input_ids (1, 3)", {"input_ids": [[1, 2, 3]]}),
        ("['input_ids'] must be whole numbers and holds <U", {"input_ids": ["a", "b"]}),
        ("['input_ids'] must be whole numbers and holds float64", {"input_ids": [1.5, 2.5]}),
        ("has token ids below 0; only labels may be, and only -100", {"input_ids": [1, -1, 2]}),
        ("has token ids below 0; only labels may be, and only -100", item(3, labels=[1, -1, 3])),
    ],
)
def test_items_that_are_none_are_refused_in_one_line(expected: str, wrong: Any) -> None:
    """With domain and number."""
    with pytest.raises(DataError) as info:
        select_items("code", [item(3), wrong], 9)
    assert str(info.value).startswith("held_out['code'][1]")
    assert expected in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("dataset", [[], [item(1)], [item(0)], [item(3, labels=[3, -100, -100])]])
def test_nothing_to_predict_is_refused(dataset: Any) -> None:
    """The first token of an item is never predicted."""
    with pytest.raises(DataError, match="domain 'code': its held-out items have no token to predict"):
        select_items("code", dataset, 9)


def test_a_stream_and_a_broken_item_are_named() -> None:
    """As held-out data, not as train data."""
    with pytest.raises(ConfigError, match=r"^held_out\['code'\] is a str; it must be map-style"):
        select_items("code", "text", 3)
    with pytest.raises(Exception, match=r"held_out\['code'\]\[0\] cannot be read \(KeyError: 'gone'\)"):
        select_items("code", Gone(), 3)


class Gone:
    """A dataset whose files are away."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Any:
        raise KeyError("gone")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(count=st.integers(1, 300), limit=st.integers(1, 300))
def test_items_are_spread_over_the_dataset(count: int, limit: int) -> None:
    """As many as asked for, without repeats, the gaps between them as even as can be."""
    held_out = select_items("code", [{"input_ids": [1, i]} for i in range(count)], limit)
    chosen = [int(ids[1]) for ids, _ in held_out.items]
    assert min(limit, count) == len(set(chosen)) == len(chosen)
    gaps = np.diff([*chosen, count])
    assert gaps.max() - gaps.min() <= 1


def test_the_key_is_of_every_token_and_label() -> None:
    """A teacher's sums of other items are not taken for theirs."""
    keys = [
        repr(select_items("code", dataset, 9).key)
        for dataset in ([item(3)], [item(4)], [item(3, labels=[1, 2, -100])], [item(3), item(3)])
    ]
    assert 4 == len(set(keys))
    assert keys[0] == repr(select_items("code", [item(3, labels=[1, 2, 3])], 9).key)

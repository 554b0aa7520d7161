"""Where rows come from: packed ones or a user's items, told apart once, and nothing of one for the other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddkmix import DomainMixture
from ddkmix.errors import ConfigError, DataError
from ddkmix.own_rows import own_rows
from ddkmix.row_tasks import RowBatch
from ddkmix.sources import (
    ItemSource,
    PackedSource,
    RowSource,
    open_source,
    position_ids,
    tensors_of,
    with_arrays,
)
from ddkmix.stream import describe_stream
from tests.hand_made import numbered_rows

OWN = {"code": [1, 2, 3], "math": [4, 5]}


def source_of(rows: Any, **options: Any) -> RowSource:
    """The source of the rows of two domains."""
    stream = describe_stream(list(rows.values()), batch_rows=2)
    options = {"collate_fn": None, "document_boundaries": False, **options}
    return open_source(stream, None, **options)


def packed(folder: Path) -> dict[str, Any]:
    """Packed rows of two domains."""
    return {name: numbered_rows(folder, name, 6, length=4, seq_len=4) for name in ("code", "math")}


def test_the_rows_say_which_source_they_need(tmp_path: Path) -> None:
    """A user names neither."""
    source = source_of(packed(tmp_path))
    assert isinstance(source, PackedSource)
    source.close()
    assert isinstance(source_of(own_rows(OWN)), ItemSource)


@pytest.mark.parametrize(
    ("expected", "own", "options"),
    [
        ("document_boundaries = True needs packed rows", True, {"document_boundaries": True}),
        ("collate_fn is for your own datasets; packed rows are tensors already", False, {"collate_fn": list}),
    ],
)
def test_an_argument_of_the_other_kind_is_refused(
    tmp_path: Path, expected: str, own: bool, options: dict[str, Any]
) -> None:
    """It would be ignored."""
    with pytest.raises(ConfigError, match=expected):
        source_of(own_rows(OWN) if own else packed(tmp_path), **options)


def test_own_and_packed_rows_do_not_mix(tmp_path: Path) -> None:
    """Their batches would not fit together; one line says which are which. (seq_len differs, too.)"""
    rows = [packed(tmp_path)["code"], own_rows(OWN)["math"]]
    with pytest.raises(DataError, match=r"of one length; seq_len by domain: \{'code': 4, 'math': None\}"):
        describe_stream(rows, batch_rows=2)


def test_items_are_collated_by_torch_where_nobody_says_how() -> None:
    """As DataLoader does."""
    mixture = DomainMixture.from_datasets(
        {"code": [{"x": i, "y": (float(i), "text")} for i in range(4)]}, batch_rows=4
    )
    batch = next(mixture)
    assert [0, 1, 2, 3] == sorted(batch["x"].tolist())
    assert (torch.float64, ("text",) * 4) == (batch["y"][0].dtype, tuple(batch["y"][1]))


def test_items_go_through_no_shared_memory_of_ours() -> None:
    """Nobody knows how large they are."""
    assert source_of(own_rows(OWN)).ring(4, 2) is None  # type: ignore[func-returns-value]


def row_batch(num_tokens: list[int]) -> RowBatch:
    """Rows of four tokens."""
    tokens = np.arange(4 * len(num_tokens), dtype=np.uint16).reshape(-1, 4)
    return RowBatch(0, 0, np.array(num_tokens), tokens)


def test_labels_are_the_tokens_but_for_padding() -> None:
    """-100 behind the last token, and only there; widened, so that a loop may write into them."""
    batch = tensors_of(row_batch([4, 2, 0]))
    assert [[0, 1, 2, 3], [4, 5, -100, -100], [-100] * 4] == batch["labels"].tolist()
    assert [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]] == batch["input_ids"].tolist()
    assert {torch.int64} == {tensor.dtype for tensor in batch.values()}


def test_labels_ignore_prompts() -> None:
    """Of the rows that have one."""
    batch = tensors_of(replace(row_batch([4, 3, 4]), num_prompt_tokens=np.array([0, 2, 3])))
    assert [[0, 1, 2, 3], [-100, -100, 6, -100], [-100, -100, -100, 11]] == batch["labels"].tolist()
    assert [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]] == batch["input_ids"].tolist()


def test_positions_of_prompts_go_on() -> None:
    """Through every separator; those of text restart there."""
    batch = replace(row_batch([4, 4]), tokens=np.array([[7, 0, 7, 0]] * 2, dtype=np.uint16))
    assert [[0, 0, 1, 0]] * 2 == position_ids(batch, 0).tolist()
    batch = replace(batch, num_prompt_tokens=np.array([0, 2]))
    assert [[0, 0, 1, 0], [0, 1, 2, 3]] == position_ids(batch, 0).tolist()


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_micro_batches_of_packed_rows_are_every_nth_row(tmp_path: Path, parts: int) -> None:
    """Each tensor is dealt alike."""
    source = source_of(packed(tmp_path))
    whole = tensors_of(row_batch([4, 3, 2, 1, 4, 4]))
    batches = source.batches(row_batch([4, 3, 2, 1, 4, 4]), parts)
    source.close()
    assert parts == len(batches)
    for part, batch in enumerate(batches):
        for name, tensor in batch.items():
            assert torch.equal(whole[name][part::parts], tensor)


def test_domain_ids_stand_beside_what_a_dict_holds() -> None:
    """Another batch is as it was; the ids are a copy of the plan's."""
    ids = np.array([0, 1])
    batch = with_arrays({"x": 1}, domain_ids=ids)
    ids[0] = 5
    assert [0, 1] == batch["domain_ids"].tolist()
    assert [1, 2] == with_arrays([1, 2], domain_ids=ids)

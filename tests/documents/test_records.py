"""Examples as documents: the same string whatever file they came from."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from ddkmix.documents import HubSplit, PromptFields, read_documents, read_hub_documents
from ddkmix.documents.parquet import _column_bytes
from ddkmix.documents.records import record_text
from ddkmix.errors import DataError
from tests.conftest import write_shard

FIELDS = PromptFields(prompt="q", response="json.a.text", context="c")
MESSAGES = PromptFields(messages="m")
PLAIN = [
    {"q": "Why?", "a": {"text": "So. 中文"}, "c": None, "id": 1},
    {"q": "Where?", "a": {"text": None}, "c": "A map", "id": 2},
    {"q": None, "a": {"text": ""}, "c": None, "id": 3},
]
PLAIN_DOCUMENTS = ['{"prompt":"Why?","response":"So. 中文"}', '{"context":"A map","prompt":"Where?"}', ""]
CHATS: list[dict[str, Any]] = [
    {"m": [{"role": "user", "content": "Hi"}, {"content": "Ho", "role": "assistant", "name": "x"}]},
    {"m": None},
    {"m": []},
]
CHAT_DOCUMENTS = [
    '{"messages":[{"content":"Hi","role":"user"},{"content":"Ho","name":"x","role":"assistant"}]}',
    "",
    "",
]


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_tar(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A tar of .json members."""
    return write_shard(path.with_suffix(".tar"), [json.dumps(row) for row in rows], extension="json")


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A Parquet file; what some messages lack is null there."""
    path = path.with_suffix(".parquet")
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("write", [as_jsonl, as_tar, as_parquet])
@pytest.mark.parametrize(
    ("fields", "rows", "expected"), [(FIELDS, PLAIN, PLAIN_DOCUMENTS), (MESSAGES, CHATS, CHAT_DOCUMENTS)]
)
def test_the_same_example_is_the_same_document(
    tmp_path: Path,
    write: Callable[[Path, list[dict[str, Any]]], Path],
    fields: PromptFields,
    rows: list[dict[str, Any]],
    expected: list[str],
) -> None:
    """Of JSON lines, tars and Parquet; null and nothing are left out, other columns are not looked at."""
    assert expected == list(read_documents(write(tmp_path / "x", rows), fields))


@pytest.mark.parametrize("fields", [FIELDS, MESSAGES])
def test_datasets(tmp_path: Path, fields: PromptFields) -> None:
    """The same of a Hugging Face data set, in parts."""
    rows = PLAIN if fields is FIELDS else CHATS[:1]
    as_jsonl(tmp_path / "train", rows)
    found = list(read_hub_documents(HubSplit(dataset=str(tmp_path)), 0, 1, fields))
    assert (PLAIN_DOCUMENTS if fields is FIELDS else CHAT_DOCUMENTS[:1]) == found


def test_a_list_of_objects_stored_as_an_object_of_lists() -> None:
    """As `datasets` stores a Sequence of features."""
    turned = {"role": ["user", "assistant"], "content": ["Hi", "Ho"]}
    expected = '{"messages":[{"content":"Hi","role":"user"},{"content":"Ho","role":"assistant"}]}'
    assert expected == record_text(MESSAGES, {"messages": turned}, "x")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Hi", "'m' is a JSON string; messages are a list of {role, content}."),
        (["Hi"], "'m[0]' is a JSON string; a message is {role, content}."),
        ([{"role": None, "content": "Hi"}], "m[0].role is empty; it says who speaks"),
        ([{"role": " ", "content": "Hi"}], "m[0].role is empty; it says who speaks"),
        ([{"from": "human", "value": "Hi"}], "'m[0]' has no role, only from, value; a message is {role"),
        ([{"role": "user", "content": [{"text": "Hi"}]}], "'m[0].content' is a JSON list; a document is a s"),
        ([{"role": 1, "content": "Hi"}], "'m[0].role' is a JSON number; a document is a string."),
        ([{"role": "user", "content": "\ud800"}], "'m[0].content' has an unpaired surrogate"),
        ([{"role": "user", "content": "", "name": "\ud800"}], "'m[0]' cannot be a message"),
        ([{"role": "user", "content": "", "at": datetime.date(2026, 1, 1)}], "'m[0]' cannot be a message"),
        ({"role": ["user"], "content": []}, "'m' is a JSON object; messages are a list"),
    ],
)
def test_what_is_no_message(value: object, message: str) -> None:
    """One line with the place."""
    with pytest.raises(DataError) as info:
        record_text(MESSAGES, {"messages": value}, "x.jsonl: line 3")
    assert str(info.value).startswith(f"x.jsonl: line 3: {message}")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("write", [as_jsonl, as_tar, as_parquet])
def test_a_missing_field(tmp_path: Path, write: Callable[[Path, list[dict[str, Any]]], Path]) -> None:
    """The line names the fields that there are, and the card's key."""
    path = write(tmp_path / "x", [{"q": "Why?", "answer": "So."}])
    with pytest.raises(DataError) as info:
        list(read_documents(path, PromptFields(prompt="q", response="a")))
    assert "has no field 'a', only q, answer; set prompt_response in the card" in str(info.value)


def test_a_number_in_a_parquet_column(tmp_path: Path) -> None:
    """The line names the row, the column and the kind."""
    path = as_parquet(tmp_path / "x", [{"q": "Why?", "a": 7}])
    with pytest.raises(DataError, match=r"row 0: 'a' is a JSON number; a document is a string."):
        list(read_documents(path, PromptFields(prompt="q", response="a")))


def test_the_size_of_nested_columns_is_known(tmp_path: Path) -> None:
    """It bounds how many rows are read at a time; a list of objects is stored as its leaves."""
    path = as_parquet(tmp_path / "x", [{**CHATS[0], "more": "x" * 999, "c": "text"}] * 9)
    group = parquet.ParquetFile(path).metadata.row_group(0)
    sizes = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    leaves = [name for name in sizes if name.startswith("m.")]
    assert len(leaves) == 3
    expected = sum(sizes[name].total_uncompressed_size for name in [*leaves, "c"])
    assert expected == _column_bytes(group, ["m", "c"])


def test_a_tar_without_json(tmp_path: Path) -> None:
    """Fields are those of a .json member."""
    path = write_shard(tmp_path / "x.tar", ["text"])
    with pytest.raises(DataError, match=r"no .json member, only .txt; prompt_response in a card reads"):
        list(read_documents(path, FIELDS))

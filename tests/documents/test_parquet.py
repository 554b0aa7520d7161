"""Parquet: every row of the column is a document, in little memory, or one line says why not."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.documents import parquet, read_documents
from ddkmix.errors import DataError

TEXTS = ["first document", "the second, héllo 😀 中文", "", "line\r\nends\0"]


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    """A Parquet file written by pyarrow."""
    pq.write_table(pa.table(columns), path, **options)
    return path


def refusal(path: Path, text_field: str = "text") -> str:
    """The one line that reading a file raises; it has the file's path."""
    with pytest.raises(DataError) as info:
        list(read_documents(path, text_field))
    message = str(info.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip", "brotli", "lz4"])
def test_rows_are_read_in_order(tmp_path: Path, compression: str) -> None:
    """Of whatever compression, one column of several."""
    columns = {"id": [1, 2, 3, 4], "text": TEXTS, "other": [b"\xff"] * 4}
    path = write(tmp_path / "a.parquet", columns, compression=compression)
    assert TEXTS == list(read_documents(path, "text"))
    assert TEXTS == list(read_documents(path, "json.text"))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    texts=st.lists(st.none() | st.text(max_size=50), max_size=30),
    row_group=st.integers(1, 12),
    batch_bytes=st.integers(1, 200),
)
def test_row_groups_and_batches_are_no_matter(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str | None], row_group: int, batch_bytes: int
) -> None:
    """However the file is cut into groups and read in batches; null is an empty document."""
    path = tmp_path_factory.mktemp("groups") / "a.parquet"
    write(path, {"text": pa.array(texts, pa.string())}, row_group_size=row_group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "_BATCH_BYTES", batch_bytes)
        assert [text or "" for text in texts] == list(read_documents(path, "text"))


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_every_type_of_string_is_text(tmp_path: Path, kind: pa.DataType) -> None:
    """Bytes too, which is what old writers call strings."""
    texts = pa.array(TEXTS)
    column = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
    assert TEXTS == list(read_documents(write(tmp_path / "a.parquet", {"text": column}), "text"))


def test_a_column_of_nothing_but_nulls_is_empty_documents(tmp_path: Path) -> None:
    """Arrow gives it a type of its own."""
    path = write(tmp_path / "a.parquet", {"text": pa.nulls(3)})
    assert ["", "", ""] == list(read_documents(path, "text"))


def test_dots_go_into_structs(tmp_path: Path) -> None:
    """A column that has the dots in its own name comes first; null on the way is an empty document."""
    columns = {"a": [{"b": {"c": "x"}, "n": 1}, None, {"b": None, "n": 2}], "a.n": ["p", "q", "r"]}
    path = write(tmp_path / "a.parquet", columns)
    assert ["x", "", ""] == list(read_documents(path, "a.b.c")) == list(read_documents(path, "json.a.b.c"))
    assert ["p", "q", "r"] == list(read_documents(path, "a.n"))


@pytest.mark.parametrize(
    ("expected", "text_field"),
    [
        (" has no field 'txt', only id, text, a; set text_field in the card", "txt"),
        (" has no field 'a.x', only id, text, a; set", "a.x"),
        (" has no field 'text.x', only", "text.x"),
        (": 'id' is a column of int64; documents are strings.", "id"),
        (": 'a' is a column of struct<b: string>; documents are strings.", "a"),
    ],
)
def test_a_wrong_column_is_named(tmp_path: Path, expected: str, text_field: str) -> None:
    """With the columns that there are."""
    path = write(tmp_path / "a.parquet", {"id": [1], "text": ["x"], "a": [{"b": "y"}]})
    assert expected in refusal(path, text_field)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    """Which one is the text?"""
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "has no field 'text', only text, text" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", [pa.string(), pa.binary()], ids=str)
def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path, kind: pa.DataType) -> None:
    """With the row, counted over the row groups."""
    values = [b"fine"] * 5 + [b"caf\xe9"]
    column = pa.Array.from_buffers(kind, 6, pa.array(values, pa.binary()).buffers())
    path = write(tmp_path / "a.parquet", {"text": column}, row_group_size=2)
    assert f"{path}: row 5" in refusal(path)
    assert "is not UTF-8 (unexpected end of data at byte 3)." in refusal(path)


def test_no_rows_are_no_documents(tmp_path: Path) -> None:
    """Spark writes such parts; they are whole."""
    path = write(tmp_path / "a.parquet", {"text": pa.array([], pa.string())})
    assert [] == list(read_documents(path, "text"))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """The directory of a Parquet file is at its end."""
    whole = write(tmp_path / "b.parquet", {"text": TEXTS}).read_bytes()
    path = tmp_path / "a.parquet"
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert "is not a whole Parquet file (" in refusal(path)
    path.write_bytes(whole + whole[:-1])
    refusal(path)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(at=st.integers(0), change=st.integers(1, 255))
def test_a_changed_byte_in_a_page_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, at: int, change: int
) -> None:
    """Where the writer put checksums into the pages: all documents as they were, or one line."""
    path = tmp_path_factory.mktemp("flip") / "a.parquet"
    write(path, {"text": TEXTS}, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[4 + at % 150] ^= change
    path.write_bytes(data)
    try:
        found = list(read_documents(path, "text"))
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert TEXTS == found


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A row group of 200 MB is read by pages (pyarrow puts 1024 rows into one, here 10 MB)."""
    texts = [f"{i} " + "x" * 10_000 for i in range(20_000)]
    path = write(tmp_path / "a.parquet", {"text": texts, "other": texts}, use_dictionary=False)
    del texts
    pool = pa.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    for i, text in enumerate(read_documents(path, "text")):
        assert text.startswith(f"{i} ")
        most = max(most, pool.bytes_allocated() - before)
    assert most < 60_000_000

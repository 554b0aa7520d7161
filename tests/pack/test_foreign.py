"""Rows that others packed: indexed where they lie, read padded, refused when they are no rows."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from ddkmix.errors import DataError
from ddkmix.pack import pack_domains
from ddkmix.pack.foreign import index_rows
from ddkmix.rows import RowReader
from ddkmix.tokenizer import TokenizerCard
from tests.pack.rows import files_of, one_domain

ROWS = [[65, 66, 67, 0], [70, 71], [72, 0, 73]]


def write_rows(path: Path, rows: Sequence[Sequence[int]], dtype: str = "<i4") -> Path:
    """A tar of arrays, as webdataset writes one, with another member beside each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, webdataset.TarWriter(file) as writer:
        for i, row in enumerate(rows):
            writer.write({"__key__": f"{i:04d}", "npy": np.array(row, dtype=dtype), "txt": f"note {i}"})
    return path


def foreign(folder: Path, rows: Sequence[Sequence[int]] = ROWS, dtype: str = "<i4") -> Path:
    """A folder of rows with two train shards."""
    write_rows(folder / "train" / "a.tar", rows, dtype)
    write_rows(folder / "train" / "b.tar", [[80, 0]], dtype)
    write_rows(folder / "held_out" / "a.tar", [[90, 91, 92]], dtype)
    return folder


def index(folder: Path, tokenizer: TokenizerCard, *, seq_len: int = 4) -> Any:
    """Index a folder."""
    return index_rows(folder, tokenizer, seq_len=seq_len, name="code", license="MIT")


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8", "<u4"])
def test_rows_are_read_padded(tmp_path: Path, tokenizer: TokenizerCard, dtype: str) -> None:
    """Whatever the integers are; short rows end in separators; the tars are untouched."""
    before = files_of(foreign(tmp_path / "rows", dtype=dtype))
    index(tmp_path / "rows", tokenizer)
    after = files_of(tmp_path / "rows")
    assert before == {name: after[name] for name in before}
    domain = one_domain(tmp_path / "code.yaml", rows="rows")
    train = pack_domains([domain], tokenizer, seq_len=4, cache_dir=tmp_path / "cache")["code"].train
    reader = RowReader(train)
    assert [[*row, 0, 0][:4] for row in ROWS] == [reader.read(0, i).tolist() for i in range(3)]
    assert [4, 2, 3] == train.shards[0].num_tokens.tolist()
    assert "code/b.tar#0" == train.name_of(1, 0)


def test_bytes_and_documents_are_counted(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """One byte per letter here; the first token of a row is not predicted, separators have no bytes."""
    manifest = index(foreign(tmp_path), tokenizer)
    facts = manifest.report["train"]
    assert (3 + 2 + 2 + 1, 3, 11, 2 * 4 + 2 * 4 - 11) == tuple(
        facts[name] for name in ("bytes", "documents", "tokens", "padding")
    )
    from ddkmix.index import read_index

    assert [2, 1, 1] == read_index(tmp_path / "train" / "a.tar").num_bytes.tolist()


def test_an_energon_index_must_agree(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """A right one changes nothing, a stale one is refused."""
    path = foreign(tmp_path) / "train" / "a.tar"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        starts = [member.offset for member in members[::2]]
        end = tar.offset
    (path.parent / "a.tar.idx").write_bytes(np.array([*starts, end], dtype="<u8").tobytes())
    index(tmp_path, tokenizer)
    (path.parent / "a.tar.idx").write_bytes(np.array([*starts[:-1], end], dtype="<u8").tobytes())
    with pytest.raises(DataError, match=r"a\.tar\.idx"):
        index(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("rows", "dtype", "message"),
    [
        ([[1, 2, 3, 4, 5]], "<i4", "0000.npy has 5 tokens; a row has 1 to --seq-len = 4."),
        ([[]], "<i4", "has 0 tokens"),
        ([[300]], "<i4", "has token 300;"),
        ([[-1]], "<i4", "has token -1;"),
        ([[1.5]], "<f4", "a row is one axis of little-endian integers"),
        ([[1]], ">i4", "a row is one axis of little-endian integers"),
        ([[[1, 2]]], "<i4", "shape (1, 2)"),
        ([], "<i4", "a.tar has no .npy member"),
    ],
)
def test_what_is_no_row_is_refused(
    tmp_path: Path, tokenizer: TokenizerCard, rows: Any, dtype: str, message: str
) -> None:
    """One line with the shard and the member; no rows.json is written."""
    foreign(tmp_path)
    write_rows(tmp_path / "train" / "a.tar", rows, dtype)
    with pytest.raises(DataError) as info:
        index(tmp_path, tokenizer)
    assert message in str(info.value)
    assert str(tmp_path / "train" / "a.tar") in str(info.value)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "rows.json").exists()


@pytest.mark.parametrize("damage", ["cut", "pickle", "types", "no shards"])
def test_damaged_shards_are_refused(tmp_path: Path, tokenizer: TokenizerCard, damage: str) -> None:
    """A tar cut between members, an array of objects, two types of tokens, an empty split."""
    path = foreign(tmp_path) / "train" / "a.tar"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:4096])
    elif damage == "pickle":
        data = io.BytesIO()
        np.save(data, np.array([{}], dtype=object), allow_pickle=True)
        with path.open("wb") as file, webdataset.TarWriter(file, encoder=False) as writer:
            writer.write({"__key__": "0", "npy": data.getvalue()})
    elif damage == "types":
        write_rows(path, ROWS, "<u2")
    else:
        for shard in (tmp_path / "train").iterdir():
            shard.unlink()
    message = {
        "cut": "end mark",
        "pickle": "not a .npy",
        "types": "write them alike",
        "no shards": "no *.tar",
    }
    with pytest.raises(DataError) as info:
        index(tmp_path, tokenizer)
    assert message[damage] in str(info.value)


@pytest.mark.parametrize("damage", ["joined", "header"])
def test_rows_behind_a_tars_end_are_not_lost_silently(
    tmp_path: Path, tokenizer: TokenizerCard, damage: str
) -> None:
    """tarfile stops without a word at the end mark of the first of two tars, and at a damaged header."""
    path = foreign(tmp_path) / "train" / "a.tar"
    data = path.read_bytes()
    if damage == "joined":
        path.write_bytes(data + data)
    else:
        with tarfile.open(path) as tar:
            second = tar.getmembers()[1].offset
        path.write_bytes(data[:second] + b"\xff" * 20 + data[second + 20 :])
    with pytest.raises(DataError, match=r"goes on after its tar ends at byte|not a whole tar file") as info:
        index(tmp_path, tokenizer)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "rows.json").exists()

"""One local file of any format: its name says what it is."""

import gzip
import json
import tarfile
from pathlib import Path

import pytest

from ddkmix.documents import digest, format_of, read_documents
from ddkmix.errors import DataError, StorageError
from tests.conftest import write_shard

TEXTS = ["first document", "the second, héllo 😀 中文", "third"]


@pytest.mark.parametrize(
    ("expected", "names"),
    [
        ("tar", "a.tar a.tar.gz a.tgz a.tar.zst a.tar.xz a.tar.bz2 A.TAR b.jsonl.tar"),
        ("jsonl", "a.jsonl a.ndjson a.json a.jsonl.gz a.ndjson.zst a.json.xz a.jsonl.bz2 a.tar.jsonl"),
        ("parquet", "a.parquet train-00000-of-00002.parquet"),
        ("tar", "s3://bucket/a.tar https://host/a.tar.gz?X-Signature=b.parquet https://host/a.tar#part"),
        ("jsonl", "what?.jsonl a#1.jsonl"),
    ],
)
def test_a_name_tells_the_format(expected: str, names: str) -> None:
    """Of files and URLs, in any case of letters; only a URL has a query."""
    assert {expected} == {format_of(name) for name in names.split()}


@pytest.mark.parametrize(
    "name", ["a.txt", "a.zip", "a", "tar", "a.tar.lz4", "a.parquet.gz", "a.gz", "", "a.tar/b"]
)
def test_other_names_are_refused(name: str) -> None:
    """At once, before anything is read; the message lists what can be."""
    for ask in (format_of, lambda name: read_documents(Path("x"), "txt", name=name)):
        with pytest.raises(DataError, match=r"known: \.tar \.jsonl .*\.gz \.zst \.xz \.bz2; \.tgz \.parquet"):
            ask(name)


def test_compressed_tars_are_read(tmp_path: Path) -> None:
    """What Python's own tarfile compresses."""
    for suffix, mode in {".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.xz": "w:xz", ".tar.bz2": "w:bz2"}.items():
        path = tmp_path / f"a{suffix}"
        with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
            for i, text in enumerate(TEXTS):
                file = tmp_path / "document"
                file.write_text(text)
                tar.add(file, f"{i}.txt")
        assert TEXTS == list(read_documents(path, "txt"))


def test_a_name_stands_for_a_temporary_copy(tmp_path: Path) -> None:
    """It gives the format, and messages have it instead of the path."""
    path = tmp_path / "copy.tmp"
    path.write_bytes(gzip.compress(json.dumps({"text": "a"}).encode() + b"\n{"))
    documents = read_documents(path, "text", name="s3://bucket/a.jsonl.gz")
    assert "a" == next(documents)
    with pytest.raises(DataError, match=r"^s3://bucket/a\.jsonl\.gz: line 2 is not JSON"):
        next(documents)
    write_shard(path, TEXTS)
    with pytest.raises(DataError, match=r"^hf://a\.tar has no \.json member"):
        list(read_documents(path, "json.text", name="hf://a.tar"))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_a_file_that_cannot_be_opened_is_a_storage_error(tmp_path: Path, name: str) -> None:
    """Missing, or a folder: it says nothing about the data."""
    with pytest.raises(StorageError, match=r"cannot be read \(No such file or directory\)"):
        list(read_documents(tmp_path / name, "text"))
    (tmp_path / name).mkdir()
    with pytest.raises(StorageError, match=r"cannot be read \(Is a directory\)"):
        list(read_documents(tmp_path / name, "text"))


def test_errors_of_the_caller_are_its_own(tmp_path: Path) -> None:
    """An OSError raised while documents are consumed is not taken for one of reading."""
    path = write_shard(tmp_path / "a.tar", TEXTS)
    with pytest.raises(PermissionError):
        for _ in read_documents(path, "txt"):
            raise PermissionError


def test_a_reader_that_stops_early_leaves_no_file_open(tmp_path: Path) -> None:
    """An open file would be a warning, which is an error here."""
    for name in ("a.tar", "a.jsonl", "a.parquet"):
        path = tmp_path / name
        if name == "a.tar":
            write_shard(path, TEXTS)
        elif name == "a.jsonl":
            path.write_text('{"txt": "first document"}\n{"txt": "b"}\n')
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table({"txt": TEXTS}), path)
        assert TEXTS[0] == next(read_documents(path, "txt"))


def test_the_digest_is_of_the_text() -> None:
    """The package hands it on."""
    assert digest("a") != digest("b")

"""Megatron-Energon's index of a tar: read, held against the tar, and used to read one document alone."""

import io
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.documents import energon, read_document, read_documents, read_tar_idx
from ddkmix.errors import DataError

TEXTS = ["first document", "the second, héllo 😀 中文", "third"]


def write_index(tar: Path) -> Path:
    """What `energon prepare` (7.4.1) writes: the first header of each sample, then the end of the members."""
    offsets, last = [], None
    with tarfile.open(tar, "r:") as file:
        for member in file:
            if not member.isreg() or re.match(r"__[^/]*__($|/)", member.name):
                continue
            match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name)
            if match and match[1] != last:
                offsets.append(member.offset)
                last = match[1]
        offsets.append(file.offset)
    path = tar.with_suffix(".tar.idx")
    path.write_bytes(b"".join(struct.pack("Q", offset) for offset in offsets))
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar with these members."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A shard of three samples with two members each, and its index beside it."""
    path = tmp_path / "a.tar"
    with path.open("wb") as file, webdataset.TarWriter(file, mtime=0) as writer:
        for i, text in enumerate(TEXTS):
            writer.write({"__key__": f"{i}", "txt": text, "json": {"text": text}})
    write_index(path)
    return path


def refusal(path: Path) -> str:
    """The one line that reading a shard raises."""
    with pytest.raises(DataError) as info:
        list(read_documents(path, "txt"))
    message = str(info.value)
    assert "\n" not in message
    return message


def test_an_index_is_read(shard: Path) -> None:
    """Each member has a header of 512 bytes and 512 of data: a sample takes 2048."""
    offsets = read_tar_idx(shard.with_suffix(".tar.idx"))
    assert [0, 2048, 4096, 6144] == offsets.tolist()
    assert np.int64 == offsets.dtype


def test_a_shard_that_fits_its_index_is_read(shard: Path) -> None:
    """In whole, and each document alone."""
    assert TEXTS == list(read_documents(shard, "txt"))
    offsets = read_tar_idx(shard.with_suffix(".tar.idx"))
    for field in ("txt", "json.text"):
        assert TEXTS == [read_document(shard, offsets, i, field) for i in range(3)]


names = st.from_regex(r"\A(__m__/|a/b\.d/|x/|\.|__MACOSX/)?[ab_]{1,2}(\.(txt|json))?\Z")


@settings(deadline=None, derandomize=True, max_examples=80)
@given(names=st.lists(names, min_size=1, max_size=8, unique=True), long=st.booleans())
def test_samples_are_counted_as_energon_counts_them(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], long: bool
) -> None:
    """Hidden files, metadata, names without a dot, long names with headers of their own: no false alarm."""
    folder = "f" * 200 + "/" if long else ""
    path = write_tar(tmp_path_factory.mktemp("names") / "a.tar", {folder + name: b"text" for name in names})
    without = _documents_or_error(path)
    write_index(path)
    assert without == _documents_or_error(path)


def _documents_or_error(path: Path) -> list[str] | str:
    try:
        return list(read_documents(path, "txt"))
    except DataError as error:
        return str(error)


def test_an_empty_document_is_found_alone(tmp_path: Path) -> None:
    """A sample without text is an empty document here too."""
    path = write_tar(tmp_path / "a.tar", {"0.json": b"{}", "1.txt": b"text", "2.txt": b""})
    offsets = read_tar_idx(write_index(path))
    assert ["", "text", ""] == [read_document(path, offsets, i, "txt") for i in range(3)]


def test_only_plain_tars_have_an_index(shard: Path) -> None:
    """An index beside a compressed tar or a file of another name is none of its."""
    import gzip

    other = shard.with_name("b.tar.gz")
    other.write_bytes(gzip.compress(shard.read_bytes()))
    other.with_name("b.tar.gz.idx").write_bytes(b"no index")
    assert TEXTS == list(read_documents(other, "txt"))
    copy = shard.rename(shard.with_name("copy"))
    copy.with_name("copy.idx").write_bytes(b"no index")
    assert TEXTS == list(read_documents(copy, "txt", name="a.tar"))


# --- stale and damaged indices ----------------------------------------------------------------------


WAY_OUT = "Copy the shard again, or prepare it again (energon prepare), or delete the index."


@pytest.mark.parametrize(
    ("expected", "members"),
    [
        (
            "has 3 samples and {tar} 2: it is stale",
            {"0.txt": b"a" * 1024, "0.json": b"", "1.txt": b"b" * 5000},
        ),
        (
            "has 3 samples and {tar} more: it is stale",
            {f"{i}.{e}": b"x" for i in range(4) for e in ("json", "txt")},
        ),
        (
            "is stale: it has sample 1 at byte 2048, {tar} has it at byte 2560",
            {f"{i}.{e}": b"x" * 600 for i in range(3) for e in ("a", "txt")} | {"0.txt": b"x"},
        ),
        (
            "is stale: it has the end at byte 6144, {tar} has it at byte 6656",
            {f"{i}.{e}": b"x" for i in range(3) for e in ("a", "txt")} | {"2.txt": b"x" * 600},
        ),
        ("is stale: it ends at byte 6144, {tar} has 3072 bytes in all", {"0.txt": b"a"}),
    ],
)
def test_the_index_of_another_tar_is_refused(shard: Path, expected: str, members: dict[str, bytes]) -> None:
    """Fewer or more samples, one elsewhere, another end, another size; the way out is named."""
    write_tar(shard, members)
    if len(members) == 1:
        shard.write_bytes(shard.read_bytes()[:3072])
    assert f"{shard}.idx {expected.format(tar=shard)}. {WAY_OUT}" == refusal(shard)


def test_without_the_check_a_stale_index_would_pass(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above notices."""
    write_tar(shard, {f"{i}.txt": b"x" * 2000 for i in range(4)})
    monkeypatch.setattr(energon.IndexCheck, "sample", lambda self, offset: None)
    monkeypatch.setattr(energon.IndexCheck, "end", lambda self, offset: None)
    assert 4 == len(list(read_documents(shard, "txt")))


@pytest.mark.parametrize(
    ("expected", "data"),
    [
        ("has 0 bytes, no whole number of 8-byte offsets", b""),
        ("has 12 bytes, no whole number", bytes(12)),
        ("has offsets that are not rising multiples of 512", struct.pack("<QQ", 0, 100)),
        ("has offsets that are not rising multiples of 512", struct.pack("<QQQ", 0, 1024, 1024)),
        ("has offsets that are not rising multiples of 512", struct.pack("<QQ", 1024, 0)),
        ("has offsets that are not rising multiples of 512", struct.pack("<QQ", 0, (1 << 64) - 512)),
        ("is stale: it ends at byte 562949953421312, ", struct.pack(">QQ", 0, 512)),
    ],
)
def test_a_damaged_index_is_refused(shard: Path, expected: str, data: bytes) -> None:
    """Cut, scrambled, of the other byte order."""
    shard.with_suffix(".tar.idx").write_bytes(data)
    assert refusal(shard).startswith(f"{shard}.idx {expected}")


def test_one_document_of_a_stale_index_is_refused(shard: Path) -> None:
    """An offset within data, in the middle of a sample, past the end; or a range of two samples."""
    for first, last in ((512, 2048), (1024, 2048), (0, 4096), (6144, 7168), (1 << 40, 1 << 41)):
        offsets = np.array([first, last])
        if (first, last) == (1024, 2048):  # the second member of a sample begins a sample of its own
            assert TEXTS[0] == read_document(shard, offsets, 0, "txt")
            continue
        with pytest.raises(DataError, match=rf"has no sample between the bytes {first} and {last}"):
            read_document(shard, offsets, 0, "txt")


def test_there_is_no_document_beyond_the_last(shard: Path) -> None:
    """Nor before the first."""
    offsets = read_tar_idx(shard.with_suffix(".tar.idx"))
    for i in (-1, 3):
        with pytest.raises(IndexError, match=f"sample {i} of 3"):
            read_document(shard, offsets, i, "txt")

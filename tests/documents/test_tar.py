"""Reading documents: whole shards give every document, and anything else gives one line that says why."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.documents import digest, read_documents
from ddkmix.documents import tar as documents
from ddkmix.errors import DataError
from tests.conftest import write_shard

TEXTS = ["first document", "the second, héllo 😀 中文", "third"]


def tar_of(path: Path, members: dict[str, bytes], *, format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar with these members, written by the standard library."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def refusal(path: Path, text_field: str = "txt") -> str:
    """The message that reading a shard raises; checked to be one line with the file's path."""
    with pytest.raises(DataError) as info:
        list(read_documents(path, text_field))
    message = str(info.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# --- what is read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["txt", "text"])
def test_documents_are_read_in_order(tmp_path: Path, extension: str) -> None:
    """The texts of a shard that webdataset wrote, exactly."""
    path = write_shard(tmp_path / "a.tar", TEXTS, extension=extension)
    assert TEXTS == list(read_documents(path, extension))


def test_a_field_of_json_members_is_read(tmp_path: Path) -> None:
    """`json.content` reads the field `content` of each .json member."""
    members = {f"{i}.json": json.dumps({"content": text, "id": i}).encode() for i, text in enumerate(TEXTS)}
    assert TEXTS == list(read_documents(tar_of(tmp_path / "a.tar", members), "json.content"))


def check_texts_survive(path: Path, texts: list[str], *, as_json: bool) -> None:
    """What was written as .txt or .json members is what is read."""
    if as_json:
        members = {f"{i}.json": json.dumps({"t": text}).encode() for i, text in enumerate(texts)}
        assert texts == list(read_documents(tar_of(path, members), "json.t"))
    else:
        members = {f"{i}.txt": text.encode() for i, text in enumerate(texts)}
        assert texts == list(read_documents(tar_of(path, members), "txt"))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(texts=st.lists(st.text(max_size=700), min_size=1, max_size=5), as_json=st.booleans())
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, texts: list[str], as_json: bool) -> None:
    """Empty documents, control characters, line ends and every script come back as they were."""
    check_texts_survive(tmp_path_factory.mktemp("texts") / "a.tar", texts, as_json=as_json)


def test_translating_line_ends_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check notices text that was read as a text file is."""
    monkeypatch.setattr(documents, "_text", lambda data, *_: data.decode().replace("\r\n", "\n"))
    with pytest.raises(AssertionError):
        check_texts_survive(tmp_path / "a.tar", ["a\r\nb"], as_json=False)


@pytest.mark.parametrize(
    "format",
    [
        pytest.param(tarfile.PAX_FORMAT, id="pax"),
        pytest.param(tarfile.GNU_FORMAT, id="gnu"),
        pytest.param(tarfile.USTAR_FORMAT, id="ustar"),
    ],
)
def test_every_tar_format_is_read(tmp_path: Path, format: int) -> None:
    """Long and non-ASCII member names use extra headers, which are no documents."""
    name = ("folder/" * 12 if format == tarfile.USTAR_FORMAT else "ordner-ä/" * 30) + "0.txt"
    path = tar_of(tmp_path / "a.tar", {name: b"text"}, format=format)
    assert ["text"] == list(read_documents(path, "txt"))


def test_other_members_are_left_alone(tmp_path: Path) -> None:
    """Only files with the card's extension are documents; the rest need not even be text."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in {"0.txt": b"text", "0.png": b"\xff\xff", "0.json": b"{", "0.mytxt": b"no"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, kind in {"d.txt": tarfile.DIRTYPE, "l.txt": tarfile.SYMTYPE}.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert ["text"] == list(read_documents(path, "txt"))


def test_member_names_are_never_used_as_paths(tmp_path: Path) -> None:
    """A member that would escape its folder is read like any other, and nothing is written."""
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    path = tar_of(folder / "a.tar", {"../../evil.txt": b"text", "/abs/olute.txt": b"more"})
    assert ["text", "more"] == list(read_documents(path, "txt"))
    assert [path] == [file for file in tmp_path.rglob("*") if file.is_file()]


def test_extra_zeros_at_the_end_are_allowed(tmp_path: Path) -> None:
    """Tars are padded to records of any size."""
    path = write_shard(tmp_path / "a.tar", TEXTS)
    with path.open("ab") as file:
        file.write(bytes(512 * 100))
    assert TEXTS == list(read_documents(path, "txt"))


# --- what is not whole ------------------------------------------------------------------------------


def check_notices_cuts(path: Path) -> None:
    """Cut at every block and around it, a shard gives all documents or an error, never fewer."""
    whole = path.read_bytes()
    end_of_data = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    outcomes = set()
    for cut in sorted({max(at + by, 0) for at in range(0, len(whole), 512) for by in (-1, 0, 1, 100)}):
        path.write_bytes(whole[:cut])
        try:
            found = list(read_documents(path, "txt"))
        except DataError as error:
            outcomes.add("refused")
            assert "\n" not in str(error)
            assert str(path) in str(error)
        else:
            outcomes.add("read")
            assert TEXTS == found
            assert cut >= end_of_data + 1024
            assert cut % 512 == 0
    assert {"refused", "read"} == outcomes


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT], ids=["pax", "ustar"])
def test_a_shard_cut_anywhere_is_refused(tmp_path: Path, format: int) -> None:
    """In a header, in a member, between two members, before or inside the end mark.

    A copy that lacks nothing but padding is whole.
    """
    members = {f"{i}.txt": text.encode() for i, text in enumerate(TEXTS)}
    check_notices_cuts(tar_of(tmp_path / "a.tar", members, format=format))


def test_trusting_tarfile_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar cut between two members reads without an error: the check notices if nobody looks."""
    path = tar_of(tmp_path / "a.tar", {f"{i}.txt": text.encode() for i, text in enumerate(TEXTS)})
    monkeypatch.setattr(documents, "_check_complete", lambda path: None)
    with pytest.raises(AssertionError):
        check_notices_cuts(path)


def test_a_missing_end_mark_is_named(tmp_path: Path) -> None:
    """The message says what is missing and after how many bytes."""
    path = tar_of(tmp_path / "a.tar", {"0.txt": b"text"})
    path.write_bytes(path.read_bytes()[:1024])
    assert f"{path} has no tar end mark after 1024 bytes: it is truncated" in refusal(path)


def test_documents_behind_a_damaged_header_are_not_lost_silently(tmp_path: Path) -> None:
    """tarfile stops at a bad header as if the shard ended there; the third document would be missing."""
    path = tar_of(tmp_path / "a.tar", {f"{i}.txt": text.encode() for i, text in enumerate(TEXTS)})
    data = bytearray(path.read_bytes())
    data[2048 + 10] ^= 0xFF  # blocks of 512: header, text, header, text, header, text
    path.write_bytes(data)
    assert "2048" in refusal(path)


def test_joined_tars_are_refused(tmp_path: Path) -> None:
    """`cat a.tar b.tar` has an end mark in its middle; the second half would be missing."""
    path = tar_of(tmp_path / "a.tar", {"0.txt": b"text"})
    path.write_bytes(path.read_bytes() * 2)
    assert "1024" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"just some text", id="text"),
        pytest.param(b"x" * 10240, id="blocks of no tar"),
        pytest.param(bytes(10240), id="only an end mark"),
        pytest.param(b"x" * 512 + bytes(1024), id="garbage with an end mark"),
    ],
)
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    """One line with the path."""
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    refusal(path)


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    """Also when it is called .tar and its length is a multiple of 512."""
    data = gzip.compress(tar_of(tmp_path / "b.tar", {"0.txt": os.urandom(700)}).read_bytes())
    path = tmp_path / "a.tar"
    path.write_bytes(data + b"x" * (-len(data) % 512))
    assert "not an uncompressed tar" in refusal(path)


# --- what is no document ----------------------------------------------------------------------------


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    """The message names the member and the first bad byte."""
    path = tar_of(tmp_path / "a.tar", {"0.txt": b"fine", "1.txt": "é".encode("latin-1")})
    assert f"{path}: member 1.txt is not UTF-8 (unexpected end of data at byte 0)." == refusal(path)


@pytest.mark.parametrize(
    ("expected", "content"),
    [
        ("is not JSON with a field 'text'", b"{"),
        ("is not JSON with a field 'text'", b'{"content": "x"}'),
        ("is not JSON with a field 'text'", b'["text"]'),
        ("is not JSON with a field 'text'", b'"text"'),
        ("is not JSON with a field 'text'", b"null"),
        ("is not JSON with a field 'text'", b"[" * 100_000),
        ("'text' is a int; a document is a string", b'{"text": 3}'),
        ("'text' is a NoneType; a document is a string", b'{"text": null}'),
        ("'text' is a list; a document is a string", b'{"text": ["x"]}'),
        ("'text' has an unpaired surrogate", b'{"text": "\\ud83d alone"}'),
        ("'text' has an unpaired surrogate", b'{"text": "\\ude00\\ud83d"}'),
        ("is not UTF-8", b'{"text": "\xff"}'),
    ],
)
def test_json_without_the_text_is_refused(tmp_path: Path, expected: str, content: bytes) -> None:
    """The message names the member, the field and what is wrong with it."""
    path = tar_of(tmp_path / "a.tar", {"0.json": b'{"text": "fine"}', "1.json": content})
    message = refusal(path, "json.text")
    assert f"{path}: member 1.json" in message
    assert expected in message


def test_escaped_surrogate_pairs_are_text(tmp_path: Path) -> None:
    """JSON writes an emoji as two escapes; together they are one character."""
    path = tar_of(tmp_path / "a.tar", {"0.json": b'{"text": "\\ud83d\\ude00"}'})
    assert ["😀"] == list(read_documents(path, "json.text"))


def test_the_wrong_text_field_is_named(tmp_path: Path) -> None:
    """A shard of .txt members has no .json; the message points at the card."""
    path = write_shard(tmp_path / "a.tar", TEXTS)
    assert f"{path} has no .json member; set text_field in the card to the documents' extension." == refusal(
        path, "json.text"
    )


# --- digests ----------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=50)
@given(text=st.text(), at=st.integers(0, 30), character=st.characters(codec="utf-8"))
def test_digests_tell_documents_apart(text: str, at: int, character: str) -> None:
    """One more character anywhere, be it a space, gives another digest."""
    assert digest(text) != digest(text[:at] + character + text[at:])
    assert 16 == len(digest(text))

"""Documents of tars: whole shards give every document, and anything else gives one line that says why."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from ddkmix.documents import read_documents
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
    monkeypatch.setattr(documents, "text_of_bytes", lambda data, *_: data.decode().replace("\r\n", "\n"))
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
        for name, kind in {"d.txt": tarfile.DIRTYPE, "f.txt": tarfile.FIFOTYPE}.items():
            member = tarfile.TarInfo(name)
            member.type = kind
            tar.addfile(member)
    assert ["text"] == list(read_documents(path, "txt"))


# --- what a sample is -------------------------------------------------------------------------------


def webdataset_texts(path: Path) -> list[str]:
    """The .txt members as webdataset itself reads them, "" for a sample without."""
    with path.open("rb") as file:
        members = tar_file_expander([{"url": "a.tar", "stream": file}])
        return [sample.get("txt", b"").decode() for sample in group_by_keys(members)]


names = st.from_regex(r"\A(__m__/|a/b\.d/|x/)?[ab_]{1,2}\.(txt|TXT|json|cls)\Z")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(members=st.lists(st.tuples(names, st.text(alphabet="xyz", min_size=1, max_size=4)), max_size=8))
def test_samples_are_those_of_webdataset(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, str]]
) -> None:
    """Whatever the names, our documents are the texts of its samples, in its order."""
    path = tmp_path_factory.mktemp("samples") / "a.tar"
    tar_of(path, {name: text.encode() for name, text in members})
    try:
        expected = webdataset_texts(path)
    except ValueError as error:
        assert "duplicate file name" in str(error)
        return  # two of one name
    if any(expected):
        assert expected == list(read_documents(path, "txt"))
    else:
        assert "has no .txt member" in refusal(path)


def test_a_sample_without_text_is_an_empty_document(tmp_path: Path) -> None:
    """It keeps its place, so that whoever drops it counts it."""
    path = tar_of(
        tmp_path / "a.tar", {"0.txt": b"a", "0.cls": b"1", "1.cls": b"2", "2.txt": b"c", "3.cls": b"4"}
    )
    assert ["a", "", "c", ""] == list(read_documents(path, "txt"))


def test_an_extension_begins_at_the_first_dot(tmp_path: Path) -> None:
    """`b.c.txt` is no `txt` for WebDataset; beside one it is another member, alone the way out is named."""
    beside = tar_of(tmp_path / "a.tar", {"a/b.c.txt": b"no", "a/b.txt": b"yes", "a.b/c.txt": b"folder"})
    assert ["yes", "folder"] == list(read_documents(beside, "txt")) == webdataset_texts(beside)
    alone = tar_of(tmp_path / "b.tar", {"a/b.c.txt": b"no"})
    assert (
        f"{alone}: member a/b.c.txt is .c.txt of sample a/b, which has no .txt: an extension begins at the "
        "first dot of the name. Rename the members (dots to underscores)."
    ) == refusal(alone)
    assert ["no"] == list(read_documents(alone, "c.txt"))


def test_upper_case_extensions_are_extensions(tmp_path: Path) -> None:
    """As in webdataset."""
    path = tar_of(tmp_path / "a.tar", {"0.TXT": b"text"})
    assert ["text"] == list(read_documents(path, "txt")) == webdataset_texts(path)


def test_hidden_files_are_no_samples(tmp_path: Path) -> None:
    """macOS adds `._0.txt` beside each file and a folder `__MACOSX`; editors and tools leave dot files."""
    members = {
        "._0.txt": b"\0\5\x16\7",
        "0.json": b"{}",
        "a/._0.txt": b"\xff",
        "0.txt": b"text",
        "__MACOSX/1.txt": b"\xff",
        "a/.hidden.txt": b"no",
        ".txt": b"no",
        "__meta__/2.txt": b"no",
    }
    assert ["text"] == list(read_documents(tar_of(tmp_path / "a.tar", members), "txt"))


def test_two_texts_of_one_name_are_two_documents(tmp_path: Path) -> None:
    """webdataset refuses the shard; nothing is lost here."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for text in (b"old", b"new"):
            member = tarfile.TarInfo("0.txt")
            member.size = 3
            tar.addfile(member, io.BytesIO(text))
    assert ["old", "new"] == list(read_documents(path, "txt"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=["symbolic", "hard"])
def test_a_link_for_a_document_is_refused(tmp_path: Path, kind: bytes) -> None:
    """It is neither followed nor passed over; a link beside the text is no matter."""
    for name in ("0.cls", "1.txt"):
        path = tmp_path / f"{name}.tar"
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo("0.txt")
            tar.addfile(member, io.BytesIO())
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert [""] == list(read_documents(tmp_path / "0.cls.tar", "txt"))
    assert "member 1.txt is a link, which is not followed" in refusal(tmp_path / "1.txt.tar")


def test_shards_of_many_members_are_those_that_webdataset_writes(tmp_path: Path) -> None:
    """ShardWriter cuts a data set into shards; text is one of several members of a sample."""
    pattern = str(tmp_path / "shard-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=2, verbose=0) as writer:
        for i, text in enumerate(TEXTS):
            writer.write({"__key__": f"part/{i}", "txt": text, "json": {"meta": {"url": f"u{i}"}}, "cls": i})
    shards = sorted(tmp_path.glob("*.tar"))
    assert TEXTS == [text for path in shards for text in read_documents(path, "txt")]
    assert ["u0", "u1", "u2"] == [t for path in shards for t in read_documents(path, "json.meta.url")]


def test_names_that_would_break_a_line_are_escaped(tmp_path: Path) -> None:
    """A message stays one printable line whatever the tar calls its members."""
    path = tar_of(tmp_path / "a.tar", {"a\nb.txt": b"\xff"})
    assert "a\\nb.txt" in refusal(path)


def test_a_sparse_member_is_read(tmp_path: Path) -> None:
    """GNU tar -S stores holes as such; here 512 bytes of text after 512 zeros."""
    path = tmp_path / "a.tar"
    text = b"x" * 512
    member = tarfile.TarInfo("0.txt")
    member.size = 512
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[156:157] = tarfile.GNUTYPE_SPARSE
    block[386:410] = b"%011o\0%011o\0" % (512, 512)
    block[483:495] = b"%011o\0" % 1024
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path.write_bytes(bytes(block) + text + bytes(1024))
    assert ["\0" * 512 + "x" * 512] == list(read_documents(path, "txt"))


def test_a_tar_of_many_members_takes_no_memory_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tarfile keeps a header of each member it has seen; a shard may have millions."""
    opened: list[tarfile.TarFile] = []
    real = documents._open_tar
    monkeypatch.setattr(documents, "_open_tar", lambda source: opened.append(real(source)) or opened[-1])
    path = write_shard(tmp_path / "a.tar", ["text"] * 50)
    for _ in read_documents(path, "txt"):
        assert len(opened[0].getnames() if opened[0]._loaded else opened[0].members) <= 1  # type: ignore[attr-defined]


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
    monkeypatch.setattr(documents, "_check_complete", lambda *_: None)
    monkeypatch.setattr(documents, "_check_end", lambda *_: None)
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


def test_a_compressed_tar_of_another_name_is_refused(tmp_path: Path) -> None:
    """Also when its length is a multiple of 512."""
    data = gzip.compress(tar_of(tmp_path / "b.tar", {"0.txt": os.urandom(700)}).read_bytes())
    path = tmp_path / "a.tar"
    path.write_bytes(data + b"x" * (-len(data) % 512))
    assert "not an uncompressed tar" in refusal(path)


def test_a_header_that_points_back_is_damage(tmp_path: Path) -> None:
    """A negative size makes Python's tarfile read one member for ever."""
    path = tar_of(tmp_path / "a.tar", {"0.txt": b"a", "1.txt": b"b"})
    data = bytearray(path.read_bytes())
    block = data[1024:1536]
    block[124:136] = b"\xff" * 10 + b"\xf8\x00"  # -2048 in base 256
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    data[1024:1536] = block
    path.write_bytes(data)
    assert "is not a whole tar file" in refusal(path)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(data=st.data())
def test_a_changed_byte_never_loses_a_document(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """All documents come (changed where the byte was text), or one line."""
    path = tar_of(tmp_path_factory.mktemp("flip") / "a.tar", {f"{i}.txt": b"text" for i in range(3)})
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, 3 * 1024 + 1023))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = list(read_documents(path, "txt"))
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert 3 == len(found)


# --- what is no document ----------------------------------------------------------------------------


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    """The message names the member and the first bad byte."""
    path = tar_of(tmp_path / "a.tar", {"0.txt": b"fine", "1.txt": "é".encode("latin-1")})
    assert f"{path}: member 1.txt is not UTF-8 (unexpected end of data at byte 0)." == refusal(path)


@pytest.mark.parametrize(
    ("expected", "content"),
    [
        ("is not JSON (Expecting property name enclosed in double quotes at character 1)", b"{"),
        ("has no field 'text', only content", b'{"content": "x"}'),
        ("is a JSON list; write an object with a field 'text'", b'["text"]'),
        ("'text' is a JSON number; a document is a string", b'{"text": 3}'),
        ("is not UTF-8", b"\xfe\xff"),
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
    assert (
        f"{path} has no .json member, only .txt; set text_field in the card to the documents' extension."
    ) == refusal(path, "json.text")

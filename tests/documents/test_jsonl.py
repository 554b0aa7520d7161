"""JSON lines: every line is a document or one line that says which is not."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.documents import read_documents
from ddkmix.errors import DataError

TEXTS = ["first document", "the second, héllo 😀 中文", "", "line\r\nends\u2028\x85 and \0"]
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def lines_of(texts: list[str], *, ascii: bool = False) -> bytes:
    """One object a line."""
    return "".join(json.dumps({"text": t, "id": 1}, ensure_ascii=ascii) + "\n" for t in texts).encode()


def refusal(path: Path, text_field: str = "text") -> str:
    """The one line that reading a file raises; it has the file's path."""
    with pytest.raises(DataError) as info:
        list(read_documents(path, text_field))
    message = str(info.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("bare", [".jsonl", ".ndjson", ".json"])
def test_lines_are_read_in_order(tmp_path: Path, bare: str, suffix: str) -> None:
    """Plain and compressed; line ends within a text are not ends of lines."""
    path = tmp_path / f"a{bare}{suffix}"
    path.write_bytes(COMPRESSORS[suffix](lines_of(TEXTS)))
    assert TEXTS == list(read_documents(path, "text"))
    assert TEXTS == list(read_documents(path, "json.text"))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(texts=st.lists(st.text(max_size=300), min_size=1, max_size=5), ascii=st.booleans())
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii: bool) -> None:
    """Every character that UTF-8 has, escaped or not."""
    path = tmp_path_factory.mktemp("texts") / "a.jsonl"
    path.write_bytes(lines_of(texts, ascii=ascii))
    assert texts == list(read_documents(path, "text"))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n', id="byte order mark"),
        pytest.param(b'{"text": "a"}\r\n{"text": "b"}\r\n', id="CRLF"),
        pytest.param(b'\n{"text": "a"}\n\n \t\r\n{"text": "b"}\n\n', id="blank lines"),
        pytest.param(b'{"text": "a"}\n{"text": "b"}', id="no end of the last line"),
        pytest.param(b' {"text": "a"} \n\t{"text":\t"b"}\n', id="spaces"),
    ],
)
def test_what_editors_and_tools_leave_is_no_matter(tmp_path: Path, content: bytes) -> None:
    """Two documents each."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert ["a", "b"] == list(read_documents(path, "text"))


def test_null_is_an_empty_document(tmp_path: Path) -> None:
    """It keeps its place, so that whoever drops it counts it."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": null}\n{"text": "b"}\n')
    assert ["", "b"] == list(read_documents(path, "text"))


def test_a_huge_line_is_a_document(tmp_path: Path) -> None:
    """20 MB in one line, compressed too, across every buffer."""
    text = "äx" * 7_000_000
    for suffix in ("", ".zst"):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(COMPRESSORS[suffix](lines_of([text, "b"])))
        assert [text, "b"] == list(read_documents(path, "text"))


@pytest.mark.parametrize(
    ("expected", "line"),
    [
        ("is not JSON (Expecting ',' delimiter at character 11)", b'{"text": 1 2}'),
        ("is not JSON (Extra data", b'{"text": "x"} {"text": "y"}'),
        ("has no field 'text', only content", b'{"content": "x"}'),
        ("is a JSON list", b'["text"]'),
        ("is not UTF-8", b'{"text": "\xff"}'),
        ("is not UTF-8", '{"text": "a"}'.encode("utf-16")),
        ("'text' is a JSON number; a document is a string", b'{"text": 3}'),
        ("'text' has an unpaired surrogate", b'{"text": "\\ud83d"}'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, expected: str, line: bytes) -> None:
    """By its number in the file, blank lines counted, as editors do."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    message = refusal(path)
    assert message.startswith(f"{path}: line 3")
    assert expected in message


def check_cuts(path: Path, compress: Callable[[bytes], bytes]) -> None:
    """Cut anywhere, a file gives an error; or whole documents when the cut is at the end of a line."""
    whole = compress(lines_of(TEXTS))
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        try:
            found = list(read_documents(path, "text"))
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert compress is bytes
            assert TEXTS[: len(found)] == found
            assert whole[:cut].rstrip().endswith(b"}")


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    """Plain text that is cut between two lines is a whole file to anyone, so that alone is read."""
    check_cuts(tmp_path / f"a.jsonl{suffix}", COMPRESSORS[suffix])


@pytest.mark.parametrize(
    ("expected", "content"),
    [
        (" is empty; remove it or write it again.", b""),
        (": line 1 begins a JSON array; write one object a line", b'[{"text": "a"}]'),
        (": line 1 begins a JSON array; write one object a line", b'[\n{"text": "a"}\n]'),
        (": line 1 is not JSON", b'{\n"text": "a"\n}\n'),
        (" is compressed; its content is .gz. Rename it so", gzip.compress(b"", mtime=0)),
        (" is compressed; its content is .zst. Rename it so", zstandard.compress(b"x")),
    ],
)
def test_what_is_no_file_of_json_lines_is_named(tmp_path: Path, expected: str, content: bytes) -> None:
    """An empty file, JSON of other layouts, a compressed file of another name."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}{expected}")


def test_a_file_compressed_twice_is_named(tmp_path: Path) -> None:
    """Uploads through a compressing proxy are."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(gzip.compress(lines_of(TEXTS))))
    assert f"{path} is compressed twice; its content is .gz." in refusal(path)

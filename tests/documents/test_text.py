"""What a document is: text in bytes, text in a field of JSON, and digests of it."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.documents.text import digest, missing_column, shown, text_of_json
from ddkmix.errors import DataError


def refusal(data: bytes, column: str = "text") -> str:
    """The one line that reading this JSON raises."""
    with pytest.raises(DataError) as info:
        text_of_json(data, column, "a.jsonl: line 3")
    message = str(info.value)
    assert message.startswith("a.jsonl: line 3")
    assert "\n" not in message
    return message


@settings(deadline=None, derandomize=True, max_examples=100)
@given(text=st.text(), ascii=st.booleans())
def test_any_text_of_json_comes_back(text: str, ascii: bool) -> None:
    """Escaped or not: line ends, zeros, every script."""
    assert text == text_of_json(json.dumps({"text": text}, ensure_ascii=ascii).encode(), "text", "here")


@pytest.mark.parametrize(
    ("column", "tree"),
    [
        ("a", {"a": "x"}),
        ("a.b", {"a": {"b": "x"}}),
        ("a.b.c", {"a": {"b": {"c": "x"}}}),
        ("a.b", {"a.b": "x", "a": {"b": "not this"}}),
    ],
)
def test_dots_go_deeper(column: str, tree: Any) -> None:
    """A name that has the dots itself comes first."""
    assert "x" == text_of_json(json.dumps(tree).encode(), column, "here")


@pytest.mark.parametrize("data", [b'{"text": null}', b'\xef\xbb\xbf{"text": null}', b'{"text": ""}'])
def test_null_is_an_empty_document(data: bytes) -> None:
    """So that it is counted; a byte order mark before it is no matter."""
    assert "" == text_of_json(data, "text", "here")


def test_null_on_the_way_is_an_empty_document() -> None:
    """`{"a": null}` has no a.b, and says so itself."""
    assert "" == text_of_json(b'{"a": null}', "a.b", "here")


@pytest.mark.parametrize(
    ("expected", "data"),
    [
        ("is not JSON (Expecting property name enclosed in double quotes at character 1)", b"{"),
        ("is not JSON (Extra data at character 14); write one JSON object.", b'{"text": "x"} {"text": "y"}'),
        ("is not JSON that can be read (nested too deep)", b"[" * 100_000),
        ("is not JSON that can be read (Exceeds the limit", b'{"text": "x", "n": ' + b"1" * 5000 + b"}"),
        ("has no field 'text', only content, id; set text_field", b'{"content": "x", "id": 1}'),
        ("has no field 'text', only nothing;", b"{}"),
        ("is a JSON list; write an object with a field 'text'", b'["text"]'),
        ("is a JSON string; write an object", b'"text"'),
        ("is a JSON null; write an object", b"null"),
        ("'text' is a JSON number; a document is a string", b'{"text": 3}'),
        ("'text' is a JSON number; a document is a string", b'{"text": NaN}'),
        ("'text' is a JSON true or false; a document is a string", b'{"text": false}'),
        ("'text' is a JSON list; a document is a string", b'{"text": ["x"]}'),
        ("'text' is a JSON object; a document is a string", b'{"text": {"text": "x"}}'),
        ("'text' has an unpaired surrogate", b'{"text": "\\ud83d alone"}'),
        ("'text' has an unpaired surrogate", b'{"text": "\\ude00\\ud83d"}'),
        ("is not UTF-8 (invalid start byte at byte 10)", b'{"text": "\xff"}'),
    ],
)
def test_json_without_the_text_is_refused(expected: str, data: bytes) -> None:
    """The message says where, and what is wrong."""
    assert expected in refusal(data)


def test_a_path_that_ends_early_is_refused() -> None:
    """The fields of the whole object are listed."""
    assert "has no field 'a.b', only a, c" in refusal(b'{"a": "x", "c": 1}', "a.b")
    assert "has no field 'a.b', only a" in refusal(b'{"a": {"c": 1}}', "a.b")


def test_many_fields_are_not_all_listed() -> None:
    """Twenty are enough to see what kind of object it is; odd names stay on the line."""
    message = str(missing_column("text", [f"f{i}" for i in range(30)], "here"))
    assert "f19, ...;" in message
    assert "f20" not in message
    assert "only 'a\\nb';" in str(missing_column("text", ["a\nb"], "here"))
    assert "'\\udc80'" == shown("\udc80")


@settings(deadline=None, derandomize=True, max_examples=50)
@given(text=st.text(), at=st.integers(0, 30), character=st.characters(codec="utf-8"))
def test_digests_tell_documents_apart(text: str, at: int, character: str) -> None:
    """One more character anywhere, be it a space, gives another digest."""
    assert digest(text) != digest(text[:at] + character + text[at:])
    assert 16 == len(digest(text))

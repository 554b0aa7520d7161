"""Rows of examples: each comes out whole, its prompt as it is by itself, and what does not fit is counted."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ddkmix.card import PromptResponse
from ddkmix.documents import PromptFields
from ddkmix.documents.records import record_text
from ddkmix.prompts import PromptFormat, PromptStream, find_format
from ddkmix.prompts import stream as stream_module
from ddkmix.token_stream import PackedRows
from ddkmix.tokenizer import TokenizerCard, read_tokenizer
from tests.conftest import EOS

END = 301
"""<|im_end|>"""


@pytest.fixture(scope="session")
def tokenizer(chat_tokenizer_folder: Path) -> TokenizerCard:
    """ChatML's tokens, and a separator that it does not use."""
    return read_tokenizer(str(chat_tokenizer_folder), separator=EOS)


def chat(*turns: tuple[str, str], **more: str) -> str:
    """A conversation as a document."""
    messages = [{"role": role, "content": content, **more} for role, content in turns]
    return record_text(PromptFields(messages="m"), {"messages": messages}, "x")


def plain(prompt: str, response: str, context: str | None = None) -> str:
    """A prompt and its response as a document."""
    values = {"prompt": prompt, "response": response, "context": context}
    return record_text(PromptFields(prompt="q", response="a", context="c"), values, "x")


def rows_of(
    tokenizer: TokenizerCard, documents: Sequence[str], *, seq_len: int = 64, **card: Any
) -> tuple[PackedRows, PromptStream]:
    """What a stream makes of documents; of chats unless the card says otherwise."""
    format = find_format(PromptResponse.model_validate(card or {"messages": "m"}), tokenizer, where="x")
    return packed(tokenizer, documents, format, seq_len)


def packed(
    tokenizer: TokenizerCard, documents: Sequence[str], format: PromptFormat, seq_len: int
) -> tuple[PackedRows, PromptStream]:
    """What a stream makes of documents."""
    stream = PromptStream(tokenizer.path, format, separator_id=tokenizer.separator_id, seq_len=seq_len)
    stream.add(documents)
    return stream.rows(), stream


def both(tokenizer: TokenizerCard, rows: PackedRows) -> list[tuple[str, str]]:
    """Prompt and response of each row as text, special tokens included, padding not."""
    library = Tokenizer.from_file(str(tokenizer.path))
    assert rows.num_prompt_tokens is not None
    texts = []
    for ids, p, n in zip(rows.tokens.tolist(), rows.num_prompt_tokens, rows.num_tokens, strict=True):
        assert {tokenizer.separator_id} >= set(ids[n:])
        texts.append(
            (
                library.decode(ids[:p], skip_special_tokens=False),
                library.decode(ids[p:n], skip_special_tokens=False),
            )
        )
    return texts


# --- what a row holds -------------------------------------------------------------------------------


def test_a_conversation(tokenizer: TokenizerCard) -> None:
    """Everything before the last answer is the prompt, and the answer ends with the end of its turn."""
    document = chat(("user", "Why?"), ("assistant", "So."), ("user", "Oh"), ("assistant", "中 ok"))
    rows, stream = rows_of(tokenizer, [document], seq_len=128)
    prompt = (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
        "<|im_start|>user\nOh<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [(prompt, "中 ok<|im_end|>")] == both(tokenizer, rows)
    assert [len("中 ok".encode())] == rows.num_bytes.tolist()
    assert (1, 0, 0) == (rows.num_documents, rows.num_truncated, rows.num_separators)
    assert len((prompt + "中 ok").encode()) == stream.num_bytes


PLAIN = {"prompt": "q", "response": "a", "context": "c"}


@pytest.mark.parametrize(
    ("document", "card", "expected"),
    [
        (plain("Why?", "So."), PLAIN, ("Why?\n", "So.<|im_end|>")),
        (plain("Why?", "So.", "A map"), PLAIN, ("A map\n\nWhy?\n", "So.<|im_end|>")),
        (
            plain("{Why}?", "{}", "{context}"),
            {**PLAIN, "template": "{{c}} {context} Q: {prompt} A:<|im_start|>"},
            ("{c} {context} Q: {Why}? A:<|im_start|>", "{}<|im_end|>"),
        ),
        (plain("Why?", "So."), {**PLAIN, "end_of_turn": EOS}, ("Why?\n", f"So.{EOS}")),
    ],
)
def test_plain_fields(
    tokenizer: TokenizerCard, document: str, card: dict[str, Any], expected: tuple[str, str]
) -> None:
    """In the card's template, or the context, a blank line, the prompt and a line break; braces are text."""
    rows, _ = rows_of(tokenizer, [document], **card)
    assert [expected] == both(tokenizer, rows)


def test_a_separator_at_the_end_parts_nothing(tokenizer: TokenizerCard) -> None:
    """Only one within a row would be taken for a document's end."""
    rows, _ = rows_of(tokenizer, [plain("Why?", "So.")], **PLAIN, end_of_turn=EOS)
    assert 0 == rows.num_separators
    inside = {**PLAIN, "template": f"{{context}}{EOS}{{prompt}}"}
    assert 1 == rows_of(tokenizer, [plain("Why?", "So.", "c")], **inside)[0].num_separators


def test_a_chat_as_transformers_has_it(chat_tokenizer_folder: Path, tokenizer: TokenizerCard) -> None:
    """The tokens of the row are those of apply_chat_template, up to the end of the turn."""
    from transformers import AutoTokenizer

    messages = [("system", "the old man"), ("user", "and the  sea?"), ("assistant", "dark\n\tnight")]
    theirs = AutoTokenizer.from_pretrained(chat_tokenizer_folder)
    turns = [{"role": role, "content": content} for role, content in messages]
    whole = theirs.apply_chat_template(turns, return_dict=False)
    prompt = theirs.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
    rows, _ = rows_of(tokenizer, [chat(*messages)], seq_len=128)
    n = int(rows.num_tokens[0])
    assert rows.num_prompt_tokens is not None
    assert whole[:n] == rows.tokens[0, :n].tolist()
    assert whole[n:] == theirs.encode("\n")
    assert len(prompt) == rows.num_prompt_tokens[0]


def test_a_template_that_writes_no_end(tokenizer: TokenizerCard) -> None:
    """With a token from the card, the response is what the template writes without its own ending."""
    format = find_format(PromptResponse(messages="m"), tokenizer, where="x").to_json()
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    fields = PromptFields(messages="m")
    own = PromptFormat(**{**format, "fields": fields, "chat_template": template, "tail": "\n"})
    rows, _ = packed(tokenizer, [chat(("user", "Why?"), ("assistant", "So.\n"))], own, 64)
    assert [("user: Why?\n", "assistant: So.\n<|im_end|>")] == both(tokenizer, rows)


def test_a_prompt_that_would_grow_into_its_response(tokenizer: TokenizerCard) -> None:
    """It keeps its own tokens, which is what a model is given, and the response is read by itself."""
    library = Tokenizer.from_file(str(tokenizer.path))
    prompt, response = "th", "e the"
    joined = library.encode(prompt + response).ids
    card = {"prompt": "q", "response": "a", "template": "{prompt}"}
    rows, _ = rows_of(tokenizer, [plain(prompt, response)], **card)
    expected = [*library.encode(prompt).ids, *library.encode(response).ids, END]
    assert joined[: len(library.encode(prompt).ids)] != library.encode(prompt).ids, "no case of this"
    assert expected == rows.tokens[0, : rows.num_tokens[0]].tolist()
    assert [len(response)] == rows.num_bytes.tolist()


def test_special_tokens_of_a_template_are_no_text(tokenizer: TokenizerCard) -> None:
    """Also where a response begins with them."""
    format = find_format(PromptResponse(messages="m"), tokenizer, where="x").to_json()
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
        "{% else %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    own = PromptFormat(**{**format, "fields": PromptFields(messages="m"), "chat_template": template})
    rows, _ = packed(tokenizer, [chat(("user", "Why?"), ("assistant", "Sö."))], own, 64)
    assert [("Why?", "<|im_start|>Sö.<|im_end|>")] == both(tokenizer, rows)
    assert [4] == rows.num_bytes.tolist()


# --- what is left out -------------------------------------------------------------------------------

LONG = "the old man and the sea " * 20


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (chat(("user", "Why?"), ("assistant", " \n")), "empty response"),
        (chat(("user", "Why?"), ("user", "Why?")), "last message not the assistant's"),
        (chat(("user", " "), ("assistant", "So.")), "empty prompt"),
        (chat(("assistant", "So.")), "empty prompt"),
        (chat(("user", LONG), ("assistant", "So.")), "prompt longer than the row"),
        (chat(("user", "Why?"), ("assistant", LONG)), "response longer than the row"),
        (chat(("user", "a<|im_end|>b"), ("assistant", "So.")), "special token in the text"),
        (chat(("user", "Why?"), ("assistant", f"a {EOS}")), "special token in the text"),
        (chat(("user", "Why?"), ("assistant", "So."), name="<|im_start|>"), "special token in the text"),
    ],
)
def test_what_is_left_out(tokenizer: TokenizerCard, document: str, reason: str) -> None:
    """And counted by its reason, while the others stay."""
    good = chat(("user", "Why?"), ("assistant", "So."))
    rows, stream = rows_of(tokenizer, [good, document, good], seq_len=48)
    assert {reason: 1} == dict(stream.dropped)
    assert 2 == rows.num_documents == len(rows.tokens)
    assert 2 * stream.num_bytes == 2 * rows_of(tokenizer, [good, good])[1].num_bytes


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (plain("", "So.", "c"), "empty prompt"),
        (plain("Why?", " "), "empty response"),
        (plain("Why?", "<|im_end|>"), "special token in the text"),
        (plain("Why?", "So.", EOS), "special token in the text"),
    ],
)
def test_what_is_left_out_of_plain_fields(tokenizer: TokenizerCard, document: str, reason: str) -> None:
    """For the same reasons."""
    assert {reason: 1} == dict(rows_of(tokenizer, [document], **PLAIN)[1].dropped)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "refused by the chat template (no system role)"),
        ("{{ messages|length }}", "prompt rewritten by the chat template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no end of turn"),
    ],
)
def test_what_a_template_cannot_write(tokenizer: TokenizerCard, template: str, reason: str) -> None:
    """Of one conversation, though it could write the one that it was tried on."""
    format = find_format(PromptResponse(messages="m"), tokenizer, where="x").to_json()
    own = PromptFormat(**{**format, "fields": PromptFields(messages="m"), "chat_template": template})
    _, stream = packed(tokenizer, [chat(("user", "Why?"), ("assistant", "So."))], own, 64)
    assert {reason: 1} == dict(stream.dropped)


def test_text_that_the_tokenizer_has_no_tokens_for(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """Nothing would be given, or nothing be said."""
    tree = json.loads(tokenizer.path.read_text())
    tree["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[xyz\n]+"}, "content": ""}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree))
    format = find_format(PromptResponse.model_validate(PLAIN), tokenizer, where="x")
    stream = PromptStream(path, format, separator_id=0, seq_len=16)
    stream.add([plain("xyz", "a"), plain("a", "xyz"), plain("a", "axb")])
    assert {"empty prompt": 1, "empty response": 1} == dict(stream.dropped)
    assert [3] == stream.rows().num_bytes.tolist(), "what a normaliser takes away is predicted with the end"


def test_a_response_that_is_cut(tokenizer: TokenizerCard) -> None:
    """Where the row ends, without the end of a turn that did not end; counted; its bytes are those there."""
    text = "中" * 40
    document = chat(("user", "Why?"), ("assistant", text))
    rows, stream = rows_of(tokenizer, [document], seq_len=48, messages="m", long_responses="cut")
    (prompt,) = rows.num_prompt_tokens.tolist() if rows.num_prompt_tokens is not None else [0]
    library = Tokenizer.from_file(str(tokenizer.path))
    assert library.encode(text).ids[: 48 - prompt] == rows.tokens[0, prompt:].tolist()
    assert (1, 48) == (rows.num_truncated, rows.num_tokens[0])
    assert [3 * -(-(48 - prompt) // 3)] == rows.num_bytes.tolist(), "a character counts with its first token"
    assert not stream.dropped


@pytest.mark.parametrize(("more", "kept"), [(-1, 0), (0, 0), (1, 1), (2, 1)])
def test_a_prompt_that_just_fits(tokenizer: TokenizerCard, more: int, kept: int) -> None:
    """There must be room for one token of the response; cut or not, that is another question."""
    document = chat(("user", "Why?"), ("assistant", "a"))
    whole, _ = rows_of(tokenizer, [document])
    assert whole.num_prompt_tokens is not None
    size = int(whole.num_prompt_tokens[0])
    rows, stream = rows_of(tokenizer, [document], seq_len=size + more, messages="m", long_responses="cut")
    assert kept == rows.num_documents
    assert ({} if kept else {"prompt longer than the row": 1}) == dict(stream.dropped)
    assert (1 if more == 1 else 0) == rows.num_truncated


# --- properties -------------------------------------------------------------------------------------

WORDS = st.text(st.sampled_from("abc the\n {}中😀\r<|"), max_size=12)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    pairs=st.lists(st.tuples(WORDS, WORDS), max_size=5),
    seq_len=st.integers(2, 40),
    cut=st.booleans(),
    batch=st.integers(1, 5),
)
def test_every_example_comes_out_whole(
    tokenizer: TokenizerCard, pairs: list[tuple[str, str]], seq_len: int, cut: bool, batch: int
) -> None:
    """Or is counted: prompt, response, end of turn, padding; whatever the batches that documents came in."""
    check_rows(tokenizer, pairs, seq_len, cut=cut, batch=batch)


def check_rows(
    tokenizer: TokenizerCard, pairs: list[tuple[str, str]], seq_len: int, *, cut: bool, batch: int = 5
) -> None:
    """Hold the stream against the library, one example after the other."""
    card = {"prompt": "q", "response": "a", "long_responses": "cut" if cut else "leave_out"}
    format = find_format(PromptResponse.model_validate(card), tokenizer, where="x")
    stream = PromptStream(tokenizer.path, format, separator_id=0, seq_len=seq_len)
    documents = [plain(*pair) for pair in pairs if any(pair)]
    for at in range(0, len(documents), batch):
        stream.add(documents[at : at + batch])
    rows = stream.rows()
    library = Tokenizer.from_file(str(tokenizer.path))
    expected = []
    for prompt, response in pairs:
        if not prompt.strip() or not response.strip():
            continue
        given = library.encode(prompt + "\n").ids
        said = [*library.encode(prompt + "\n" + response).ids, END]
        said = said[len(given) :] if said[: len(given)] == given else [*library.encode(response).ids, END]
        if len(given) < seq_len and (cut or len(given) + len(said) <= seq_len):
            whole = (given + said)[:seq_len]
            expected.append((len(given), len(whole), whole + [0] * (seq_len - len(whole))))
    assert rows.num_prompt_tokens is not None
    columns = rows.num_prompt_tokens.tolist(), rows.num_tokens.tolist(), rows.tokens.tolist()
    assert expected == list(zip(*columns, strict=True))
    assert len(documents) == rows.num_documents + stream.dropped.total()
    assert (rows.num_bytes <= 4 * (rows.num_tokens - rows.num_prompt_tokens)).all()
    if not cut:
        kept = [(p, r) for p, r in pairs if p.strip() and r.strip()]
        fitting = [r for p, r in kept if fits(library, p, r, seq_len)]
        assert [len(r.encode()) for r in fitting] == rows.num_bytes.tolist()


def fits(library: Tokenizer, prompt: str, response: str, seq_len: int) -> bool:
    """Whether an example has a row."""
    given, whole = library.encode(prompt + "\n").ids, library.encode(prompt + "\n" + response).ids
    said = whole[len(given) :] if whole[: len(given)] == given else library.encode(response).ids
    return len(given) + len(said) + 1 <= seq_len


CASES = [("the", "the"), ("a", "b" * 30), ("th", " \ne"), ("中" * 9, "😀")]


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("END", lambda row: row[:-1]),
        ("PROMPT", lambda row: row[1:]),
    ],
)
def test_the_property_fails_on_a_broken_row(
    monkeypatch: pytest.MonkeyPatch, tokenizer: TokenizerCard, name: str, broken: Callable[[Any], Any]
) -> None:
    """Without the end of a turn, or without a prompt's first token."""
    check_rows(tokenizer, CASES, 24, cut=False)
    whole = stream_module._Row

    def row(*, ids: Any, **more: Any) -> Any:
        return whole(ids=broken(ids), **more)

    monkeypatch.setattr(stream_module, "_Row", row)
    with pytest.raises(AssertionError):
        check_rows(tokenizer, CASES, 24, cut=False)


def test_no_document_at_all(tokenizer: TokenizerCard) -> None:
    """No row."""
    rows, stream = rows_of(tokenizer, [])
    assert (0, 64) == rows.tokens.shape
    assert 0 == rows.num_tokens.sum() == stream.num_bytes
    assert np.array_equal(np.zeros(0, dtype=np.int64), rows.num_bytes)

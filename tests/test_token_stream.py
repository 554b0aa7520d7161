"""A shard's rows: the tokens of its documents, the bytes that they cover, and the counts of the report."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ddkmix import token_stream
from ddkmix.row_layout import RowLayout, Strategy, row_layout
from ddkmix.token_stream import PackedRows, TokenStream

STRATEGIES: tuple[Strategy, ...] = ("concatenate", "best_fit")
text = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aé😀中\u0301 \n")), max_size=30)


def packed(
    tokenizer_folder: Path, texts: list[str], seq_len: int, strategy: Strategy, *, separator_id: int = 0
) -> PackedRows:
    """Rows of these documents, added in two calls."""
    stream = TokenStream(tokenizer_folder / "tokenizer.json", separator_id=separator_id, seq_len=seq_len)
    stream.add(texts[:1])
    stream.add(texts[1:])
    return stream.rows(strategy)


def expected(tokenizer_folder: Path, texts: list[str]) -> tuple[list[int], list[int], list[int]]:
    """Tokens of the stream, bytes that each covers, tokens of each document; by the tokenizers library."""
    library = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    library.encode_special_tokens = True
    ids, sizes, lengths = [], [], []
    for document in texts:
        encoding = library.encode(document, add_special_tokens=False)
        reached = 0
        for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
            ids.append(token)
            sizes.append(len(document[:end].encode()) - reached)
            reached += sizes[-1]
        ids.append(0)
        sizes.append(len(document.encode()) - reached)
        lengths.append(len(encoding.ids) + 1)
    return ids, sizes, lengths


def check(tokenizer_folder: Path, texts: list[str], seq_len: int, strategy: Strategy) -> None:
    """Every token lies where the layout says, with its bytes; the counters count what is there."""
    rows = packed(tokenizer_folder, texts, seq_len, strategy)
    ids, sizes, lengths = expected(tokenizer_folder, texts)
    layout = row_layout(np.array(lengths, dtype=np.int64), seq_len, strategy)
    content: list[list[int]] = [[] for _ in range(layout.num_rows)]
    covered: list[list[int]] = [[] for _ in range(layout.num_rows)]
    for start, length, place in zip(layout.start, layout.length, layout.place, strict=True):
        content[place // seq_len] += ids[start : start + length]
        covered[place // seq_len] += sizes[start : start + length]
    assert [row + [0] * (seq_len - len(row)) for row in content] == rows.tokens.tolist()
    assert [len(row) for row in content] == rows.num_tokens.tolist()
    assert [sum(row[1:]) for row in covered] == rows.num_bytes.tolist()
    assert len(texts) == rows.num_documents == rows.num_separators
    assert seq_len * len(content) - len(ids) == rows.num_padding
    assert layout.num_truncated(np.array(lengths, dtype=np.int64)) == rows.num_truncated


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(texts=st.lists(text, max_size=8), seq_len=st.integers(1, 24))
def test_rows_hold_what_the_layout_says(
    tokenizer_folder: Path, strategy: Strategy, texts: list[str], seq_len: int
) -> None:
    """Any text, any length of a row: tokens, padding, bytes of predicted tokens and counts."""
    check(tokenizer_folder, texts, seq_len, strategy)


@pytest.mark.parametrize(
    "name",
    ["concatenated", "shifted", "characters"],
)
def test_the_check_notices_wrong_rows(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The other strategy, tokens that lie one too far, and characters counted as bytes."""
    laid_out = token_stream._laid_out

    def shifted(layout: RowLayout, stream: np.ndarray, filler: int) -> np.ndarray:
        return np.roll(laid_out(layout, stream, filler), 1, axis=1)

    texts = ["qwxyz", "é中" * 4, "jkq", "zyx", "b"]
    check(tokenizer_folder, texts, 8, "best_fit")
    if name == "concatenated":
        monkeypatch.setattr(token_stream, "row_layout", lambda n, t, _: row_layout(n, t, "concatenate"))
    elif name == "shifted":
        monkeypatch.setattr(token_stream, "_laid_out", shifted)
    else:
        monkeypatch.setattr(token_stream, "utf8_lengths", lambda text: np.ones(len(text), dtype=np.int64))
    with pytest.raises(AssertionError):
        check(tokenizer_folder, texts, 8, "best_fit")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bytes_by_hand(tokenizer_folder: Path, strategy: Strategy) -> None:
    """'aé😀中' is 1 + 2 + 4 + 3 bytes in ten one-byte tokens and a separator; rows of four.

    A character's bytes count where its first token does, and a row's first token is predicted by nobody.
    """
    rows = packed(tokenizer_folder, ["aé😀中"], 4, strategy)
    assert [4, 4, 3] == rows.num_tokens.tolist()
    assert [6, 3, 0] == rows.num_bytes.tolist()


def test_best_fit_moves_bytes_with_their_tokens(tokenizer_folder: Path) -> None:
    """Rows of 4: "qxz" fills one, "é" (two tokens) and "" (none) share the other: é, sep, sep."""
    rows = packed(tokenizer_folder, ["é", "qxz", ""], 4, "best_fit")
    assert [4, 4] == rows.num_tokens.tolist()
    assert [0, 2] == rows.num_bytes.tolist()
    assert [0, 0, 0] == [rows.num_truncated, rows.num_padding, 3 - rows.num_separators]


def test_separators_that_a_text_makes_are_counted(tmp_path: Path) -> None:
    """Here the separator is a word, so a document can hold it; the special tokens of the others cannot be."""
    tree = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "sep": 1}, "unk_token": "a"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    rows = packed(tmp_path, ["a sep a", "a"], 8, "best_fit", separator_id=1)
    assert (2, 3) == (rows.num_documents, rows.num_separators)


def test_no_documents(tokenizer_folder: Path) -> None:
    """A shard without documents has no rows, of the right length."""
    for strategy in STRATEGIES:
        assert (0, 8) == packed(tokenizer_folder, [], 8, strategy).tokens.shape

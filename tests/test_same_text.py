"""The same bytes for two models: what each reads, what it predicts, and which rows are left out."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ddkmix import same_text
from ddkmix.errors import DataError
from ddkmix.held_out import select_rows
from ddkmix.same_text import RowTexts, TextReader, left_out_notes, read_both
from ddkmix.sources import IGNORE
from ddkmix.tokenizer import read_tokenizer
from tests.conftest import WORDS, documents
from tests.hand_made import write_rows


@pytest.fixture(scope="module")
def cards(tokenizer_folder, other_teacher, sentence_teacher):
    """Tokenizers: the rows' (byte-level), another of that kind, and one that is not made of bytes."""
    folders = {"rows": tokenizer_folder, "bytes": other_teacher, "words": sentence_teacher}
    return {name: read_tokenizer(str(folder)) for name, folder in folders.items()}


def rows_of(folder, card, texts, *, seq_len=24, domain="code"):
    """Documents end to end, each followed by the separator, cut into rows."""
    encode = Tokenizer.from_file(str(card.path)).encode
    stream = [t for text in texts for t in [*encode(text, add_special_tokens=False).ids, card.separator_id]]
    rows = [stream[i : i + seq_len] for i in range(0, len(stream), seq_len)]
    return {domain: select_rows(write_rows(folder, domain, [rows], seq_len=seq_len), 100)}


def predicted_text(card, labels):
    """What the predicted tokens of a row stand for."""
    ids = [label for label in labels.tolist() if label != IGNORE]
    return Tokenizer.from_file(str(card.path)).decode(ids, skip_special_tokens=False)


TEXTS = [text for domain in WORDS for text in documents(domain, 3, words=12)]


@pytest.mark.parametrize("other", ["bytes", "words"])
def test_both_predict_every_byte_of_the_text(tmp_path, cards, other):
    """Rows of several documents, cut anywhere: the text of the labels is the row's on both sides, and as long
    as it says."""
    held_out = rows_of(tmp_path, cards["rows"], TEXTS)
    texts = RowTexts(cards["rows"])
    readers = [TextReader(cards[name], None) for name in ("rows", other)]
    same = read_both(held_out, texts, *readers)
    own, theirs = same.student["code"], same.teacher["code"]
    assert {"code": 0} == same.left_out
    assert len(held_out["code"].num_tokens) == len(own.items) == len(theirs.items) > 5
    whole = re.sub(" ", "", "".join(TEXTS))
    seen = ""
    for i, (ids, labels) in enumerate(own.items):
        text = predicted_text(cards["rows"], labels)
        assert text.replace(" ", "") == predicted_text(cards[other], theirs.items[i][1]).replace(" ", "")
        assert len(text.encode()) == own.num_bytes[i] == theirs.num_bytes[i]
        assert own.num_tokens[i] == (labels != IGNORE).sum()
        assert cards["rows"].separator_id == ids[0]
        seen += text.replace(" ", "")
    assert whole == seen
    assert own.key != theirs.key


def test_a_row_by_hand(cards):
    """A separator before the text or the tokenizer's own beginning, and each one's separator between
    documents; none of them has a loss."""
    texts = ["the sea", "old man"]
    for name in ("rows", "bytes", "words"):
        card = cards[name]
        encode = Tokenizer.from_file(str(card.path)).encode
        first, second = (encode(text, add_special_tokens=False).ids for text in texts)
        begin = 1 if name == "words" else card.separator_id
        ids, labels = TextReader(card, None).read(texts)
        assert [begin, *first, card.separator_id, *second] == ids.tolist()
        assert [IGNORE, *first, IGNORE, *second] == labels.tolist()


@pytest.mark.parametrize("name", ["rows", "bytes"])
def test_a_separator_that_is_written_in_a_text_is_text(cards, name):
    """As in packing: its characters are tokens with a loss like all others, and no document ends there."""
    card = cards[name]
    text = f"the {card.separator} sea"
    ids, labels = TextReader(card, None).read([text, "old man"])
    assert [0] == [i for i, label in enumerate(ids.tolist()) if label == card.separator_id][:1]
    assert 2 == (ids == card.separator_id).sum() == (labels == IGNORE).sum()  # before and between the two
    assert f"{text}old man" == predicted_text(card, labels)


def test_the_documents_of_a_row(cards):
    """Between separators; "" where one stands at an end. A character that the row's ends have cut is left
    out."""
    card = cards["rows"]
    encode = Tokenizer.from_file(str(card.path)).encode
    texts = RowTexts(card)
    ids = [*encode("ab").ids, card.separator_id, *encode("c d").ids]
    assert ["ab", "c d"] == texts.of(np.array(ids))
    assert ["", "ab", ""] == texts.of(np.array([card.separator_id, *encode("ab").ids, card.separator_id]))
    cut = encode("é a é").ids
    assert [" a "] == texts.of(np.array(cut[1:-1]))


def test_rows_of_tokens_that_are_no_bytes_are_text_again(tmp_path, cards):
    """Packed by a tokenizer of the SentencePiece kind, read by it and by one of bytes."""
    held_out = rows_of(tmp_path, cards["words"], TEXTS, seq_len=40)
    readers = [TextReader(cards[name], None) for name in ("words", "bytes")]
    same = read_both(held_out, RowTexts(cards["words"]), *readers)
    pairs = zip(same.student["code"].items, same.teacher["code"].items, strict=True)
    for (_, own), (_, other) in pairs:
        both = [predicted_text(cards[name], ids) for name, ids in (("words", own), ("bytes", other))]
        assert both[0].replace(" ", "") == both[1].replace(" ", "") != ""


@pytest.mark.parametrize(("short", "long"), [(12, None), (None, 12), (9, 7)])
def test_a_text_that_is_too_long_for_one_is_cut_for_both(tmp_path, cards, short, long):
    """At the same character: what both predict is the beginning of the row's text."""
    held_out = rows_of(tmp_path, cards["rows"], TEXTS)
    readers = [TextReader(cards["rows"], short), TextReader(cards["bytes"], long)]
    same = read_both(held_out, RowTexts(cards["rows"]), *readers)
    whole = read_both(
        held_out, RowTexts(cards["rows"]), *(TextReader(cards[n], None) for n in ("rows", "bytes"))
    )
    for rows, limit in ((same.student["code"], short), (same.teacher["code"], long)):
        assert limit is None or max(len(ids) for ids, _ in rows.items) <= limit
    fuller = 0
    for i, (_, labels) in enumerate(same.student["code"].items):
        text = predicted_text(cards["rows"], labels)
        assert text == predicted_text(cards["bytes"], same.teacher["code"].items[i][1])
        full = predicted_text(cards["rows"], whole.student["code"].items[i][1])
        assert full.startswith(text)
        assert 0 < len(text.encode()) == same.student["code"].num_bytes[i]
        fuller += len(full) > len(text)
    assert fuller


def test_a_row_that_one_cannot_spell_is_left_out_for_both(tmp_path, cards):
    """Unknown characters: the other rows stay in pairs, and it is said."""
    texts = ["the old man and the sea", "Ünknown", "the whale looked out of the window"]
    held_out = rows_of(tmp_path, cards["rows"], texts, seq_len=10)
    readers = [TextReader(cards[name], None) for name in ("rows", "words")]
    same = read_both(held_out, RowTexts(cards["rows"]), *readers)
    count = same.left_out["code"]
    assert 0 < count < len(held_out["code"].num_tokens)
    assert len(same.student["code"].items) == len(same.teacher["code"].items)
    assert len(held_out["code"].num_tokens) - count == len(same.student["code"].items)
    (note,) = left_out_notes(same, held_out)
    assert note.startswith(
        f"Domain code: {count} of {len(held_out['code'].num_tokens)} held-out rows left out; "
    )


def test_text_that_cannot_be_counted_is_one_line(tmp_path, cards):
    """No row comes back as it was: both tokenizers are named."""
    held_out = rows_of(tmp_path, cards["rows"], ["ÄÖÜ", "ÄÖÜ"])
    readers = [TextReader(cards[name], None) for name in ("rows", "words")]
    with pytest.raises(DataError, match=r"domain 'code': no held-out row comes back as it was from the") as e:
        read_both(held_out, RowTexts(cards["rows"]), *readers)
    assert "\n" not in str(e.value)
    assert cards["words"].name in str(e.value)


def test_rows_are_padded_and_read_like_others(tmp_path, cards):
    """input_ids and labels of a batch; nothing is predicted in the padding."""
    held_out = rows_of(tmp_path, cards["rows"], TEXTS)
    readers = [TextReader(cards[name], None) for name in ("rows", "bytes")]
    rows = read_both(held_out, RowTexts(cards["rows"]), *readers).teacher["code"]
    ids, labels = rows.open(None).read([0, len(rows.items) - 1])
    assert ids.shape == labels.shape
    assert rows.num_tokens[[0, -1]].tolist() == (labels[:, 1:] != IGNORE).sum(1).tolist()


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    st.lists(st.text(alphabet="ab é中\U0001f600\n", max_size=8), min_size=1, max_size=4),
    st.integers(2, 9),
    st.integers(2, 30),
)
def test_any_text_is_the_same_bytes_for_both(cards, texts, short, long):
    """Characters of one to four bytes, empty documents, any limits of positions."""
    readers = [TextReader(cards["rows"], short), TextReader(cards["bytes"], long)]
    own, theirs, size = same_text._both(texts, *readers)
    pieces = [predicted_text(cards[name], r[1]) for name, r in (("rows", own), ("bytes", theirs))]
    assert pieces[0] == pieces[1]
    assert size == len(pieces[0].encode())
    assert "".join(texts).startswith(pieces[0])
    assert len(own[0]) <= short or not size
    assert len(theirs[0]) <= long or not size


def test_shortening_always_ends():
    """At least one character fewer each time, down to none."""
    texts, sizes = ["abc", "", "de"], []
    for _ in range(6):
        texts = same_text._shortened(texts, 0.999)
        sizes.append(sum(map(len, texts)))
    assert all(a > b or b == 0 for a, b in pairwise([5, *sizes]))
    assert 0 == sizes[-1]

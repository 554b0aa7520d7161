"""Two tokenisations of one text, brought together by bytes."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.alignment import Retokenizer, aligned_spans, same_tokens, token_bytes
from ddkmix.errors import DataError, ModelError
from tests.conftest import EOS, REPO

TEACHER = REPO / "models" / "smollm2-135m-instruct" / "tokenizer.json"
SEP, TEACHER_SEP = 0, 5
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def literal_spans(student, teacher):
    """GOLD's walk along both arrays: the side that ends earlier goes on (TRL, `_align_by_byte_offsets`)."""
    spans, start, s, t = [], (0, 0), 0, 0
    while s < len(student) and t < len(teacher):
        if student[s] < teacher[t]:
            s += 1
        elif student[s] > teacher[t]:
            t += 1
        else:
            s, t = s + 1, t + 1
            spans.append([start[0], s, start[1], t])
            start = (s, t)
    return spans


def ends(*values):
    """Ends of tokens."""
    return np.array(values, dtype=np.int64)


def test_spans_are_as_short_as_the_two_allow():
    """ "the| cats" against "the| cat|s" gives two spans, "ab|c" against "a|bc" one."""
    assert [[0, 1, 0, 1], [1, 2, 1, 3]] == aligned_spans(ends(3, 8), ends(3, 7, 8)).tolist()
    assert [[0, 2, 0, 2]] == aligned_spans(ends(2, 3), ends(1, 3)).tolist()


def test_what_follows_the_last_common_byte_is_in_no_span():
    """A row that ends inside a teacher's token."""
    assert [[0, 1, 0, 1]] == aligned_spans(ends(3, 8), ends(3, 9)).tolist()
    assert [] == aligned_spans(ends(2), ends(3)).tolist()
    assert [] == aligned_spans(ends(), ends(3)).tolist()


def test_a_token_of_no_bytes_belongs_to_the_one_before_it():
    """Offsets of characters give every piece of a split character the same end; only the last one counts."""
    assert [[0, 3, 0, 1], [3, 4, 1, 2]] == aligned_spans(ends(4, 4, 4, 5), ends(4, 5)).tolist()


sizes = st.lists(st.integers(1, 4), max_size=12)


@given(sizes, sizes)
def test_spans_are_those_of_the_walk(student, teacher):
    """For tokens of any size, byte for byte."""
    student, teacher = (np.cumsum(each, dtype=np.int64) for each in (student, teacher))
    assert literal_spans(student.tolist(), teacher.tolist()) == aligned_spans(student, teacher).tolist()


@given(sizes, sizes)
def test_spans_follow_each_other_and_cover_the_same_bytes(student, teacher):
    """Nothing lies between two spans; both sides of each end at one byte."""
    student, teacher = (np.cumsum(each, dtype=np.int64) for each in (student, teacher))
    before = (0, 0)
    for start, stop, their_start, their_stop in aligned_spans(student, teacher).tolist():
        assert before == (start, their_start)
        assert student[stop - 1] == teacher[their_stop - 1]
        before = (stop, their_stop)


# --- tokenizers -------------------------------------------------------------------------------------


class Both:
    """The small tokenizer of the tests, that of the real teacher, and what reads one with the other."""

    def __init__(self, own):
        from tokenizers import Tokenizer

        self.student, self.teacher = (Tokenizer.from_file(str(path)) for path in (own, TEACHER))
        for tokenizer in (self.student, self.teacher):
            tokenizer.encode_special_tokens = True
        self.read = Retokenizer(own, SEP, TEACHER, TEACHER_SEP).read
        self.pieces = bytes_of(self.student, SEP)
        self.their_pieces = bytes_of(self.teacher, TEACHER_SEP)
        known = {piece for piece in self.their_pieces.values() if len(piece) == 1}
        self.unknown = bytes(set(range(256)) - {piece[0] for piece in known})
        """Bytes for which the real teacher has no token: it leaves them out."""

    def bytes_of_span(self, row, read, span):
        """What a span stands for on both sides, without what the teacher cannot read."""
        start, stop, their_start, their_stop = span
        ours = b"".join(self.pieces[i] for i in row[start:stop])
        theirs = b"".join(self.their_pieces[i] for i in read.teacher_ids[their_start:their_stop])
        return ours.translate(None, self.unknown), theirs


def bytes_of(tokenizer, separator):
    """Bytes of each token, from the library's vocabulary; separators are one and the same byte."""
    alphabet = {char: bytes([byte]) for byte, char in gpt2_table().items()}
    vocab = tokenizer.get_vocab(with_added_tokens=False).items()
    return {i: b"".join(alphabet.get(c, b"?") for c in piece) for piece, i in vocab} | {separator: b"\xff"}


@pytest.fixture(scope="module")
def both(tokenizer_folder):
    """The two tokenizers."""
    if not TEACHER.exists():
        pytest.skip("the real teacher is not here")
    return Both(tokenizer_folder / "tokenizer.json")


def row_of(tokenizer, documents):
    """Documents, each followed by a separator, as a row."""
    ids = [i for text in documents for i in [*tokenizer.encode(text, add_special_tokens=False).ids, SEP]]
    return np.array(ids, dtype=np.int64)


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(texts, max_size=4))
def test_no_text_is_lost(both, documents):
    """Any unicode: the teacher's tokens are those of the documents themselves, with its separator between,
    and the tokens of every span, on both sides, stand for the same bytes."""
    row = row_of(both.student, documents)
    read = both.read(row)
    encoded = [both.teacher.encode(text, add_special_tokens=False).ids for text in documents]
    expected = [i for ids in encoded for i in [*ids, TEACHER_SEP]]
    assert expected == read.teacher_ids.tolist()
    for span in read.spans().tolist():
        ours, theirs = both.bytes_of_span(row, read, span)
        assert ours == theirs != b""
    if documents:
        assert [len(row), len(expected)] == read.spans()[-1][[1, 3]].tolist()


def gpt2_table():
    """GPT-2's bytes_to_unicode, as published."""
    bs = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    cs, n = bs[:], 0
    for b in range(256):
        if b not in bs:
            bs.append(b)
            cs.append(256 + n)
            n += 1
    return {b: chr(c) for b, c in zip(bs, cs, strict=True)}


@settings(max_examples=40, deadline=None)
@given(documents=st.lists(texts, min_size=1, max_size=3), data=st.data())
def test_a_row_may_begin_and_end_inside_a_character(both, documents, data):
    """Rows are cut anywhere: nothing fails, and spans still cover the same bytes."""
    row = row_of(both.student, documents)
    start = data.draw(st.integers(0, len(row)))
    row = row[start : data.draw(st.integers(start, len(row)))]
    read = both.read(row)
    for span in read.spans().tolist():
        if span[0] > 0:  # the first span may hold what is left of a character
            ours, theirs = both.bytes_of_span(row, read, span)
            assert ours == theirs


def test_a_character_cut_at_the_rows_start_is_left_out(both):
    """The small tokenizer reads the euro sign as three bytes; a row that begins with the last of them."""
    row = row_of(both.student, ["€ cat"])
    whole, cut = both.read(row), both.read(row[2:])
    assert [*both.teacher.encode(" cat").ids, TEACHER_SEP] == cut.teacher_ids.tolist()
    assert whole.teacher_ends[-1] - 2 == cut.teacher_ends[-1] == cut.student_ends[-1]


def test_tokens_that_are_no_text_are_refused(both):
    """A continuation byte in the middle: somebody else's rows."""
    (number,) = [i for i, piece in both.pieces.items() if piece == b"\xac"]
    letter = both.student.encode("a").ids[0]
    with pytest.raises(DataError, match="a row's tokens are no UTF-8 at byte 1 of a document"):
        both.read(np.array([letter, number, letter, SEP]))


def test_offsets_serve_where_the_teachers_tokens_are_not_bytes(tokenizer_folder, tmp_path):
    """A teacher with a vocabulary of words, unknown ones among them: spans end at words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    own = tokenizer_folder / "tokenizer.json"
    read = Retokenizer(own, SEP, tmp_path / "tokenizer.json", 3).read(
        row_of(Tokenizer.from_file(str(own)), ["the big cat", "cat "])
    )
    assert [1, 0, 2, 3, 2, 3] == read.teacher_ids.tolist()
    assert [3, 7, 11, 12, 15, 17] == read.teacher_ends.tolist()


def test_a_students_tokenizer_must_be_made_of_bytes(tmp_path):
    """Its rows could not be turned into text again."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ModelError, match="is not a byte-level tokenizer, and the text of a row cannot be had"
    ):
        token_bytes(tmp_path / "tokenizer.json")


def test_tokens_are_their_bytes(tokenizer_folder: Path):
    """All 256 bytes are tokens; added tokens are their own text."""
    pieces = token_bytes(tokenizer_folder / "tokenizer.json")
    assert EOS.encode() == pieces[SEP]
    assert {bytes([byte]) for byte in range(256)} <= set(pieces)
    vocab = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocab) == len(pieces)


def test_same_tokens_are_paired_once():
    """By their bytes; a second one of the same bytes and empty ones have no partner."""
    student, teacher = [b"a", b"", b"bc", b"a", b"x"], [b"bc", b"y", b"a", b"a", b""]
    assert [[0, 2], [2, 0]] == same_tokens(student, teacher).tolist()

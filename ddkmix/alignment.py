"""Two tokenisations of one text, brought together where they agree. numpy only.

    bytes      t h e   c a t s
    student    |t h e|   c a t s|      one span each: "the"; " cats" = 1 student token, 2 teacher tokens
    teacher    |t h e|   c a t|s|

A span ends where a token of both ends at the same byte; between two such bytes lie as few tokens as possible.
A token that ends inside a character is no reason to doubt: bytes are counted, not characters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ddkmix.errors import DataError, ModelError
from ddkmix.hub import read_json_object
from ddkmix.token_stream import utf8_lengths

_SEPARATOR_BYTES = 1
"""A separator covers no text; it counts as one byte, so that both separators of a document's end align."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TwoReadings:
    """A row of the student's tokens, and the same text in the teacher's."""

    teacher_ids: Int[np.ndarray, " m"]
    """The row as the teacher reads it, its own separator between documents."""
    student_ends: Int[np.ndarray, " n"]
    """Bytes of the row up to the end of each student token; does not decrease."""
    teacher_ends: Int[np.ndarray, " m"]
    """The same of the teacher's tokens."""

    def spans(self) -> Int[np.ndarray, "g 4"]:
        """See `aligned_spans`."""
        return aligned_spans(self.student_ends, self.teacher_ends)


def aligned_spans(
    student_ends: Int[np.ndarray, " n"], teacher_ends: Int[np.ndarray, " m"]
) -> Int[np.ndarray, "g 4"]:
    """The smallest groups of tokens that cover the same bytes (as in TRL's GOLD trainer).

    Tokens behind the last byte at which both end are in no span. Of tokens that end at the same byte (the
    offsets of a character that was split), only the last one may end a span.

    Args:
        student_ends: bytes up to the end of each token; must not decrease.
        teacher_ends: the same of the other tokenisation.

    Returns:
        A line (student start, student stop, teacher start, teacher stop) for each span, in order; stops are
        exclusive, and the first line starts at 0.
    """
    student_last, teacher_last = _last_of_each_end(student_ends), _last_of_each_end(teacher_ends)
    _, s, t = np.intersect1d(
        student_ends[student_last], teacher_ends[teacher_last], assume_unique=True, return_indices=True
    )
    stops = np.stack([student_last[s] + 1, teacher_last[t] + 1], axis=1).reshape(-1, 2)
    starts = np.concatenate([np.zeros((1, 2), dtype=np.int64), stops])[: len(stops)]
    spans: Int[np.ndarray, "g 4"] = np.stack([starts, stops], axis=2).reshape(-1, 4)
    return spans


def token_bytes(tokenizer: Path) -> list[bytes]:
    """The bytes that each token stands for, by its id.

    Args:
        tokenizer: a tokenizer.json.

    Raises:
        ModelError: its tokens are not made of bytes, so that the text cannot be told from them.
    """
    tree = read_json_object(tokenizer)
    if not _is_byte_level(tree):
        raise ModelError(
            f"{tokenizer} is not a byte-level tokenizer, and the text of a row cannot be had back from its "
            "tokens byte by byte; for a teacher with another vocabulary use a student whose tokenizer is "
            "byte-level (GPT-2, Llama 3, Qwen, SmolLM)."
        )
    byte_of = {char: byte for byte, char in _byte_characters().items()}
    vocab: dict[str, int] = dict(tree["model"]["vocab"])
    added = {entry["content"]: entry["id"] for entry in tree.get("added_tokens", [])}
    pieces = [b""] * (1 + max([*vocab.values(), *added.values()]))
    for piece, number in vocab.items():
        if piece not in added:
            pieces[number] = bytes(byte_of[char] for char in piece)
    for content, number in added.items():
        pieces[number] = content.encode()
    return pieces


class Retokenizer:
    """Reads rows of the student's tokens with the teacher's tokenizer."""

    def __init__(self, student: Path, student_separator: int, teacher: Path, teacher_separator: int) -> None:
        """Both as tokenizer.json, and what each has between documents.

        Raises:
            ModelError: the student's tokens are not made of bytes.
        """
        from tokenizers import Tokenizer

        self._pieces, self._separator = token_bytes(student), student_separator
        self._sizes = np.array([len(piece) for piece in self._pieces], dtype=np.int64)
        self._sizes[student_separator] = _SEPARATOR_BYTES
        self._teacher, self._teacher_separator = Tokenizer.from_file(str(teacher)), teacher_separator
        self._teacher.no_truncation()
        self._teacher.no_padding()
        self._teacher.encode_special_tokens = True  # as in packing: a document's text is never its end
        exact = _is_byte_level(read_json_object(teacher))
        self._teacher_pieces = token_bytes(teacher) if exact else None
        known = {piece[0] for piece in self._teacher_pieces or () if len(piece) == 1}
        self._known = np.array([byte in known for byte in range(256)])
        """Bytes for which the teacher has a token; its library leaves the others out, and its offsets are
        wrong from there on (tokenizers 0.23)."""

    def read(self, row: Int[np.ndarray, " n"]) -> TwoReadings:
        """The row, without its padding, as both read it.

        Raises:
            DataError: the tokens of a document are not text.
        """
        ids: list[int] = []
        ends: list[Int[np.ndarray, " _"]] = []
        begin = 0
        borders = [*np.flatnonzero(row == self._separator).tolist(), len(row)]
        position = 0
        for border in borders:
            data = b"".join(self._pieces[i] for i in row[position:border].tolist())
            own, own_ends = self._encode(data)
            ids += own
            ends.append(own_ends + begin)
            begin += len(data)
            if border < len(row):
                ids.append(self._teacher_separator)
                begin += _SEPARATOR_BYTES
                ends.append(np.array([begin]))
            position = border + 1
        return TwoReadings(
            teacher_ids=np.array(ids, dtype=np.int64),
            student_ends=np.cumsum(self._sizes[row]),
            teacher_ends=np.concatenate(ends).astype(np.int64),
        )

    def _encode(self, data: bytes) -> tuple[list[int], Int[np.ndarray, " m"]]:
        """The teacher's tokens of some bytes, and where in them each ends."""
        text, skipped = text_of(data)
        encoding = self._teacher.encode(text, add_special_tokens=False)
        if self._teacher_pieces is not None:
            pieces, read = (
                [self._teacher_pieces[i] for i in encoding.ids],
                np.frombuffer(text.encode(), np.uint8),
            )
            kept = np.flatnonzero(self._known[read])
            if b"".join(pieces) == read[kept].tobytes():  # its normaliser has left the text alone
                stops = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
                return encoding.ids, kept[stops - 1] + 1 + skipped
        before = np.concatenate([[0], np.cumsum(utf8_lengths(text))])
        offsets = np.array([end for _, end in encoding.offsets], dtype=np.int64)
        return encoding.ids, np.maximum.accumulate(before[offsets]) + skipped


def same_tokens(student: Sequence[bytes], teacher: Sequence[bytes]) -> Int[np.ndarray, "p 2"]:
    """(student id, teacher id) of tokens that stand for the same bytes; of several, the first."""
    first: dict[bytes, int] = {}
    for number, piece in enumerate(teacher):
        first.setdefault(piece, number)
    seen: set[bytes] = {b""}
    pairs = []
    for number, piece in enumerate(student):
        if piece in first and piece not in seen:
            pairs.append((number, first[piece]))
            seen.add(piece)
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _last_of_each_end(ends: Int[np.ndarray, " n"]) -> Int[np.ndarray, " _"]:
    assert (np.diff(ends) >= 0).all()
    return np.flatnonzero(np.append(ends[1:] != ends[:-1], np.ones(min(1, len(ends)), dtype=bool)))


def text_of(data: bytes) -> tuple[str, int]:
    """The text of a document or of what a row's ends left of it, and how many bytes are missing before it.

    Raises:
        DataError: it is no UTF-8.
    """
    begin = 0
    while begin < min(3, len(data)) and data[begin] & 0xC0 == 0x80:  # the rest of a character cut by the row
        begin += 1
    try:
        return data[begin:].decode(), begin
    except UnicodeDecodeError as error:
        if error.end != len(data) - begin or error.reason != "unexpected end of data":
            raise DataError(
                f"a row's tokens are no UTF-8 at byte {begin + error.start} of a document ({error.reason}); "
                "its rows were packed with another tokenizer, pack them again."
            ) from None
        return data[begin : begin + error.start].decode(), begin


def is_byte_level(tokenizer: Path) -> bool:
    """Whether the tokens of a tokenizer.json are made of bytes (BPE over GPT-2's characters for them)."""
    return _is_byte_level(read_json_object(tokenizer))


def _is_byte_level(tree: dict[str, Any]) -> bool:
    """Whether the vocabulary is BPE over GPT-2's characters for bytes."""
    decoder = tree.get("decoder") or {}
    kinds = {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", []))}
    return tree["model"].get("type") == "BPE" and "ByteLevel" in kinds


def _byte_characters() -> dict[int, str]:
    """GPT-2's table (Radford et al. 2019, `bytes_to_unicode`): printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}

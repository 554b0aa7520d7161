"""The same held-out text in the tokens of two models, for gaps between models that read differently.

    a row                 ...o sat.| The d        | ends a document; the text is all characters that are whole
    each model reads      ^ o sat . | The d       in tokens of its own, its separator for |, and before the
                                                  text what its tokenizer puts there (or its separator)

Both models predict every byte of the text and nothing else: what stands before the text has no loss, nor has
a separator. A row whose text is too long for the positions of either model is cut for both at one character.
A row that a tokenizer cannot give back (unknown characters, a normaliser) is left out for both: its loss
would be that of another text. A space at the beginning of a document is overlooked there, since tokenizers
that put one before every text cannot tell it from none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from ddkmix.alignment import is_byte_level, text_of, token_bytes
from ddkmix.common_tokenizer import refuse_prompts
from ddkmix.config import Storage
from ddkmix.errors import DataError
from ddkmix.held_out import HeldOut, OpenRows
from ddkmix.own_held_out import padded
from ddkmix.sources import IGNORE
from ddkmix.tokenizer import TokenizerCard

Reading = tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]
"""input_ids and labels of a row, equally many."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TextRows:
    """Held-out text as one model reads it."""

    domain: str
    items: tuple[Reading, ...]
    """(input_ids, labels) of each row."""
    num_tokens: Int[np.ndarray, " R"]
    """Predicted tokens of each row: those of its text."""
    num_bytes: Int[np.ndarray, " R"]
    """UTF-8 bytes of its text, the same for every model."""

    @property
    def key(self) -> object:
        """Every token and label."""
        digest = sha256()
        for ids, labels in self.items:
            digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes())
            digest.update(labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def open(self, storage: Storage | None) -> OpenRows:
        """The rows, padded at the end to the longest of a batch."""
        return OpenRows(partial(padded, self.items), lambda: None)


class RowTexts:
    """Turns packed rows back into text."""

    def __init__(self, packer: TokenizerCard) -> None:
        """`packer` is the tokenizer of the rows."""
        from tokenizers import Tokenizer

        self._separator = packer.separator_id
        self._pieces = token_bytes(packer.path) if is_byte_level(packer.path) else None
        self._tokenizer = Tokenizer.from_file(str(packer.path))

    def of(self, row: Int[np.ndarray, " n"]) -> list[str]:
        """The documents of a row without its padding, or what its ends left of them; "" behind a separator
        at the end. Characters that the row's ends have cut are left out.

        Raises:
            DataError: the tokens are not text.
        """
        borders = [-1, *np.flatnonzero(row == self._separator).tolist(), len(row)]
        return [self._text(row[a + 1 : b].tolist()) for a, b in pairwise(borders)]

    def _text(self, ids: list[int]) -> str:
        if self._pieces is not None:
            return text_of(b"".join(self._pieces[i] for i in ids))[0]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text.strip("\ufffd")  # characters in bytes, cut by the row


class TextReader:
    """Reads text in the tokens of one model."""

    def __init__(self, card: TokenizerCard, positions: int | None) -> None:
        """`positions`: the longest row that the model can read; None if it has no such limit."""
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(card.path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as in packing: a document's text is never its end
        self.name, self.positions, self._separator = card.name, positions, card.separator_id
        self._before = self._usual_start() or [card.separator_id]

    def _usual_start(self) -> list[int]:
        """What the tokenizer's own template puts before a text: a beginning of sequence, or nothing."""
        probe = self._tokenizer.encode("a")
        special = [*probe.special_tokens_mask, 0]
        ids: list[int] = probe.ids[: special.index(0)]
        return ids

    def read(self, texts: Sequence[str]) -> Reading | None:
        """Documents of a row as tokens, the text's as labels; None where the tokens are not this text."""
        ids, labels = list(self._before), [IGNORE] * len(self._before)
        for i, text in enumerate(texts):
            own = self._tokenizer.encode(text, add_special_tokens=False).ids
            back = self._tokenizer.decode(own, skip_special_tokens=False)
            if back not in (text, text.removeprefix(" "), f" {text}"):
                return None
            ids += [self._separator] * (i > 0) + own
            labels += [IGNORE] * (i > 0) + own
        return np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SameText:
    """The held-out text of every domain, as student and teacher read it; rows correspond."""

    student: Mapping[str, TextRows]
    teacher: Mapping[str, TextRows]
    left_out: Mapping[str, int]
    """Rows of each domain that one of the tokenizers cannot spell."""


def read_both(
    held_out: Mapping[str, HeldOut],
    texts: RowTexts,
    student: TextReader,
    teacher: TextReader,
    *,
    storage: Storage | None = None,
) -> SameText:
    """The text of packed held-out rows in the tokens of two models.

    Args:
        held_out: rows of each domain.
        texts: of the tokenizer that packed them.
        student: reads for the student.
        teacher: reads for the teacher.
        storage: how remote rows are read.

    Raises:
        DataError: a row cannot be read, no row of a domain can be spelt by both tokenizers, or a domain holds
            prompts, which each model has a chat template of its own for.
    """
    own, theirs, left_out = {}, {}, {}
    for name, rows in held_out.items():
        refuse_prompts(rows.rows)
        found = [_both(documents, student, teacher) for documents in _documents(rows, texts, storage)]
        kept = [one for one in found if one is not None and one[2]]
        left_out[name] = sum(one is None for one in found)
        if not kept:
            raise DataError(
                f"domain {name!r}: no held-out row comes back as it was from the tokenizers of both "
                f"{student.name} and {teacher.name} (unknown characters, or a normaliser that changes text), "
                "so there are no bytes that both predict; measure them on other text."
            )
        num_bytes = np.array([size for _, _, size in kept], dtype=np.int64)
        own[name] = _rows(name, [one for one, _, _ in kept], num_bytes)
        theirs[name] = _rows(name, [one for _, one, _ in kept], num_bytes)
    return SameText(student=own, teacher=theirs, left_out=left_out)


def left_out_notes(same: SameText, held_out: Mapping[str, HeldOut]) -> list[str]:
    """A sentence for each domain that lacks rows which a tokenizer cannot spell."""
    return [
        f"Domain {name}: {count} of {len(held_out[name].num_tokens)} held-out rows left out; one of the two "
        "tokenizers cannot spell them."
        for name, count in same.left_out.items()
        if count
    ]


def _documents(rows: HeldOut, texts: RowTexts, storage: Storage | None) -> list[list[str]]:
    opened = rows.open(storage)
    try:
        lengths = (rows.num_tokens + 1).tolist()
        return [texts.of(opened.read([i])[0][0, :size].numpy()) for i, size in enumerate(lengths)]
    finally:
        opened.close()


def _both(
    texts: Sequence[str], student: TextReader, teacher: TextReader
) -> tuple[Reading, Reading, int] | None:
    """A row as both read it, and its bytes; cut until both have positions for it. None if one cannot."""
    while True:
        size = sum(len(text.encode()) for text in texts)
        own, theirs = student.read(texts), teacher.read(texts)
        if own is None or theirs is None:
            return None
        share = min(_share_that_fits(own, student), _share_that_fits(theirs, teacher))
        if share >= 1 or not size:
            return own, theirs, size
        texts = _shortened(texts, share)


def _share_that_fits(reading: Reading, reader: TextReader) -> float:
    return 1.0 if reader.positions is None else reader.positions / len(reading[0])


def _shortened(texts: Sequence[str], share: float) -> list[str]:
    """The first characters of a row's documents, at least one fewer."""
    left = int(share * (sum(map(len, texts)) - 1))
    kept = []
    for text in texts:
        kept.append(text[:left])
        left -= len(kept[-1])
        if not left:
            break
    return kept


def _rows(domain: str, items: Sequence[Reading], num_bytes: Int[np.ndarray, " R"]) -> TextRows:
    counts = [int((labels != IGNORE).sum()) for _, labels in items]
    return TextRows(
        domain=domain,
        items=tuple(items),
        num_tokens=np.array(counts, dtype=np.int64),
        num_bytes=num_bytes,
    )

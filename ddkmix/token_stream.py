"""The tokens of one shard's documents, one after the other, and the rows that they become."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ddkmix.row_layout import RowLayout, Strategy, row_layout


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedRows:
    """The rows of one shard and what they hold."""

    tokens: Int[np.ndarray, "R T"]
    """Token ids; the end of a row that is not full is padded with the separator."""
    num_tokens: Int[np.ndarray, " R"]
    """Tokens of text and separators in each row; the rest, at the end, is padding."""
    num_bytes: Int[np.ndarray, " R"]
    """UTF-8 bytes of the text that the row's predicted tokens (all but its first, or its prompt) cover."""
    num_documents: int
    num_truncated: int
    """Documents that lie, with their separator, in more than one row."""
    num_separators: int
    """Tokens with the separator's id, without padding: one for each document, and any that a text made. Of
    prompts and responses: those that are not a row's last token."""
    num_prompt_tokens: Int[np.ndarray, " R"] | None = None
    """The first tokens of each row, which are given and not predicted; None where rows are text."""

    @property
    def num_padding(self) -> int:
        """Padding tokens in all rows."""
        return int(self.tokens.size - self.num_tokens.sum())


class TokenStream:
    """The tokens of one shard, and for each the bytes of text that it covers."""

    def __init__(self, tokenizer: Path, *, separator_id: int, seq_len: int) -> None:
        from tokenizers import Tokenizer

        self._separator_id, self._seq_len = separator_id, seq_len
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # "<|endoftext|>" written in a document is text, not a document's end
        self._tokenizer.encode_special_tokens = True
        self._ids: list[Int[np.ndarray, " n"]] = []
        self._sizes: list[Int[np.ndarray, " n"]] = []
        self.num_bytes = 0

    @property
    def num_documents(self) -> int:
        """Documents so far."""
        return len(self._ids)

    def add(self, documents: Sequence[str]) -> None:
        """Append documents, each followed by the separator."""
        encodings = self._tokenizer.encode_batch(list(documents), add_special_tokens=False)
        for text, encoding in zip(documents, encodings, strict=True):
            ends = np.array([end for _, end in encoding.offsets], dtype=np.int64)
            bytes_before = np.concatenate([[0], np.cumsum(utf8_lengths(text))])
            size = int(bytes_before[-1])
            # offsets of a normalised text may lack its end; the separator closes the count
            covered = np.concatenate([np.maximum.accumulate(bytes_before[ends]), [size]])
            self._ids.append(np.array([*encoding.ids, self._separator_id], dtype=np.int32))
            self._sizes.append(np.diff(covered, prepend=0).astype(np.int32))
            self.num_bytes += size

    def rows(self, strategy: Strategy = "concatenate") -> PackedRows:
        """All documents so far as rows; `row_layout` explains the strategies."""
        lengths = np.array([len(ids) for ids in self._ids], dtype=np.int64)
        layout = row_layout(lengths, self._seq_len, strategy)
        ids = np.concatenate([np.zeros(0, np.int32), *self._ids])
        sizes = _laid_out(layout, np.concatenate([np.zeros(0, np.int32), *self._sizes]), 0)
        return PackedRows(
            tokens=_laid_out(layout, ids, self._separator_id),
            num_tokens=layout.num_tokens(),
            num_bytes=sizes[:, 1:].sum(axis=1, dtype=np.int64),
            num_documents=len(lengths),
            num_truncated=layout.num_truncated(lengths),
            num_separators=int((ids == self._separator_id).sum()),
        )


def _laid_out(layout: RowLayout, stream: Int[np.ndarray, " n"], filler: int) -> Int[np.ndarray, "R T"]:
    """One number per token of the stream -> rows; a slice at a time, because index arrays would be large."""
    rows = np.full(layout.num_rows * layout.seq_len, filler, dtype=stream.dtype)
    slices = zip(layout.start.tolist(), layout.length.tolist(), layout.place.tolist(), strict=True)
    for start, length, place in slices:
        rows[place : place + length] = stream[start : start + length]
    return rows.reshape(layout.num_rows, layout.seq_len)


def utf8_lengths(text: str) -> Int[np.ndarray, " n"]:
    """Bytes of each character of a text."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    lengths: Int[np.ndarray, " n"] = np.searchsorted([0x80, 0x800, 0x10000], points, side="right") + 1
    return lengths

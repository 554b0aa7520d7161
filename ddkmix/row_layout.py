"""Where each token of a shard goes: its documents, one after the other, are cut into slices of rows.

`concatenate` cuts the stream where a row ends:

    doc1 doc1 | doc1 doc2 | doc2 doc3 | doc3 ____

`best_fit` never cuts a document that fits into a row (Ding et al., Fewer Truncations Improve Language
Modeling, arXiv 2404.10830). A longer one becomes full rows and a remainder; then the pieces, longest first,
each go to the row that has the least space left for them, and to a new row where none has. The number of
rows is close to that of `concatenate`, and what stays empty is padding. Numbers only: no text, no tokens.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

Strategy = Literal["concatenate", "best_fit"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowLayout:
    """Slices of a shard's tokens in the order of the rows; together every token once."""

    seq_len: int
    num_rows: int
    start: Int[np.ndarray, " P"]
    """First token of each slice, counted in the stream of all documents."""
    length: Int[np.ndarray, " P"]
    """Its tokens; a slice lies in one row."""
    place: Int[np.ndarray, " P"]
    """Where its first token goes, counted from the first token of the first row; increasing."""

    def num_tokens(self) -> Int[np.ndarray, " R"]:
        """Tokens in each row; the rest, at the end, is padding."""
        filled = np.zeros(self.num_rows, dtype=np.int64)
        np.add.at(filled, self.place // self.seq_len, self.length)
        return filled

    def num_truncated(self, lengths: Int[np.ndarray, " n"]) -> int:
        """How many of the documents with these lengths lie in more than one row."""
        by_start = np.argsort(self.start)
        starts = self.start[by_start]
        rows = self.place[by_start] // self.seq_len
        ends = np.cumsum(lengths)
        first = np.searchsorted(starts, ends - lengths, side="right") - 1
        last = np.searchsorted(starts, ends - 1, side="right") - 1
        return int((rows[first] != rows[last]).sum())


def row_layout(lengths: Int[np.ndarray, " n"], seq_len: int, strategy: Strategy) -> RowLayout:
    """The layout of documents with these lengths.

    Args:
        lengths: tokens of each document, its separator included.
        seq_len: tokens in a row.
        strategy: see the module.
    """
    assert seq_len >= 1
    assert (lengths >= 1).all()
    return (_concatenate if strategy == "concatenate" else _best_fit)(lengths, seq_len)


def _concatenate(lengths: Int[np.ndarray, " n"], seq_len: int) -> RowLayout:
    total = int(lengths.sum())
    start = np.arange(0, total, seq_len)
    return RowLayout(
        seq_len=seq_len,
        num_rows=len(start),
        start=start,
        length=np.minimum(total - start, seq_len),
        place=start,
    )


def _best_fit(lengths: Int[np.ndarray, " n"], seq_len: int) -> RowLayout:
    """Rows are in the order of the first document that they hold, so neighbours in the shard stay near.

    Sorted by fill, blocks of rows, which is what a run shuffles, would hold documents of one length. In a
    row the documents keep their order too, but a document's remainder comes first: behind a separator it
    would look like a document that begins in the middle.
    """
    num_pieces = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), num_pieces)
    part = np.arange(len(document)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    start = (np.cumsum(lengths) - lengths)[document] + part * seq_len
    length = np.minimum(lengths[document] - part * seq_len, seq_len)

    opened, first_piece, row = np.unique(
        best_fit_decreasing(length, seq_len), return_index=True, return_inverse=True
    )
    row = np.argsort(np.argsort(first_piece))[row]
    order = np.lexsort((start, part == 0, row))
    start, length, row = start[order], length[order], row[order]
    before = np.cumsum(length) - length
    first_of_row = np.searchsorted(row, np.arange(len(opened)))
    return RowLayout(
        seq_len=seq_len,
        num_rows=len(opened),
        start=start,
        length=length,
        place=row * seq_len + before - before[first_of_row][row],
    )


def best_fit_decreasing(lengths: Int[np.ndarray, " n"], capacity: int) -> Int[np.ndarray, " n"]:
    """The bin of each piece, numbered as they are opened; pieces are at most `capacity` long.

    Longest first, and the earlier of two equals first. Among bins with the same space left, the one that
    was filled last; they are interchangeable. About 2 microseconds a piece: the spaces that exist are bits
    of one integer, in which the least that is large enough is a shift and the lowest bit.
    """
    order = np.argsort(-lengths, kind="stable")
    bins_with = defaultdict[int, list[int]](list)
    spaces, num_bins, chosen = 0, 0, []
    for length in lengths[order].tolist():
        enough = spaces >> length
        if enough:
            space = length + (enough & -enough).bit_length() - 1
            number = bins_with[space].pop()
            if not bins_with[space]:
                spaces ^= 1 << space
        else:
            space, number = capacity, num_bins
            num_bins += 1
        chosen.append(number)
        if space > length:
            bins_with[space - length].append(number)
            spaces |= 1 << (space - length)
    bins = np.empty(len(lengths), dtype=np.int64)
    bins[order] = chosen
    return bins

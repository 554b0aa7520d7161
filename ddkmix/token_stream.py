"""The tokens of one shard's documents, one after the other, cut into rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int


class TokenStream:
    """The tokens of one shard, and for each the bytes of text that end with it."""

    def __init__(self, tokenizer: Path, *, separator_id: int, seq_len: int) -> None:
        from tokenizers import Tokenizer

        self._separator_id, self._seq_len = separator_id, seq_len
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # "<|endoftext|>" written in a document is text, not a document's end
        self._tokenizer.encode_special_tokens = True
        self._ids: list[Int[np.ndarray, " n"]] = []
        self._ends: list[Int[np.ndarray, " n"]] = []
        self.num_documents = 0
        self.num_bytes = 0

    def add(self, documents: Sequence[str]) -> None:
        """Append documents, each followed by the separator."""
        encodings = self._tokenizer.encode_batch(list(documents), add_special_tokens=False)
        for text, encoding in zip(documents, encodings, strict=True):
            ends = np.array([end for _, end in encoding.offsets], dtype=np.int64)
            bytes_before = np.concatenate([[0], np.cumsum(_utf8_lengths(text))])
            size = int(bytes_before[-1])
            self._ids.append(np.array([*encoding.ids, self._separator_id], dtype=np.int64))
            # offsets of a normalised text may lack its end; the separator closes the count
            self._ends.append(
                np.concatenate([np.maximum.accumulate(bytes_before[ends]), [size]]) + self.num_bytes
            )
            self.num_bytes += size
            self.num_documents += 1

    def rows(
        self,
    ) -> tuple[Int[np.ndarray, "R T"], Int[np.ndarray, " R"], Int[np.ndarray, " R"]]:
        """Rows of tokens, their valid tokens, and the bytes that all but the first of those cover."""
        seq_len = self._seq_len
        ids = np.concatenate([np.zeros(0, np.int64), *self._ids])
        ends = np.concatenate([np.zeros(0, np.int64), *self._ends])
        num_rows = -(-len(ids) // seq_len)
        padded = np.full(num_rows * seq_len, self._separator_id, dtype=np.int64)
        padded[: len(ids)] = ids
        starts = np.arange(num_rows) * seq_len
        last = np.minimum(starts + seq_len, len(ids)) - 1
        return padded.reshape(num_rows, seq_len), last - starts + 1, ends[last] - ends[starts]


def _utf8_lengths(text: str) -> Int[np.ndarray, " n"]:
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    lengths: Int[np.ndarray, " n"] = np.searchsorted([0x80, 0x800, 0x10000], points, side="right") + 1
    return lengths

"""The rows of one shard of a prompt domain: one example each, counted, and left out where it does not fit.

    prompt prompt prompt | response response <end of turn> | padding

A prompt's tokens are those that it has by itself, because they are what a model is given when it answers.
The response's are those that follow when both are read as one text; where the tokenizer would join the two
across the border, the response is read by itself.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ddkmix.prompts.examples import EMPTY_PROMPT, EMPTY_RESPONSE, Example, LeftOut, example_of
from ddkmix.prompts.format import PromptFormat
from ddkmix.row_layout import Strategy
from ddkmix.token_stream import PackedRows, utf8_lengths

LONG_PROMPT = "prompt longer than the row"
LONG_RESPONSE = "response longer than the row"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Row:
    ids: Int[np.ndarray, " n"]
    num_prompt: int
    num_bytes: int
    """Of the response, as far as the row holds it."""
    whole: bool


class PromptStream:
    """The examples of one shard as tokens."""

    def __init__(self, tokenizer: Path, format: PromptFormat, *, separator_id: int, seq_len: int) -> None:
        from tokenizers import Tokenizer

        self._format, self._separator_id, self._seq_len = format, separator_id, seq_len
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = np.array(sorted(format.special_tokens.values()), dtype=np.int64)
        self._rows: list[_Row] = []
        self.num_bytes = 0
        """Of prompts, with what templates write, and of responses, as far as rows hold them."""
        self.dropped: Counter[str] = Counter()
        """Examples left out, by reason."""

    def add(self, documents: Sequence[str]) -> None:
        """Append documents as `documents.records` makes them."""
        found = [example_of(document, self._format) for document in documents]
        self.dropped.update(one.reason for one in found if isinstance(one, LeftOut))
        examples = [one for one in found if isinstance(one, Example)]
        prompts = self._encode([one.prompt for one in examples])
        both = self._encode([one.prompt + one.response for one in examples])
        for example, prompt, whole in zip(examples, prompts, both, strict=True):
            first = len(prompt.ids)
            if whole.ids[:first] == prompt.ids:
                text, border, own = example.prompt + example.response, len(example.prompt), whole
            else:
                text, border, first = example.response, 0, 0
                (own,) = self._encode([text])
            before = self._bytes_before(text, own)
            covered = np.append(before[border], before[[end for _, end in own.offsets[first:]]])
            self._append(example, prompt.ids, own.ids[first:], np.append(covered, before[-1]))

    def rows(self, strategy: Strategy = "concatenate") -> PackedRows:
        """All examples so far, one a row; there is no other strategy."""
        tokens = np.full((len(self._rows), self._seq_len), self._separator_id, dtype=np.int32)
        for line, row in zip(tokens, self._rows, strict=True):
            line[: len(row.ids)] = row.ids

        def column(values: Sequence[int]) -> Int[np.ndarray, " R"]:
            return np.array(values, dtype=np.int64)

        inner = [row.ids[:-1] for row in self._rows]  # a separator at the end parts nothing
        return PackedRows(
            tokens=tokens,
            num_tokens=column([len(row.ids) for row in self._rows]),
            num_bytes=column([row.num_bytes for row in self._rows]),
            num_documents=len(self._rows),
            num_truncated=sum(not row.whole for row in self._rows),
            num_separators=sum(int((ids == self._separator_id).sum()) for ids in inner),
            num_prompt_tokens=column([row.num_prompt for row in self._rows]),
        )

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        """As models are given text: special tokens are read as such, and none are added."""
        return list(self._tokenizer.encode_batch(list(texts), add_special_tokens=False))

    def _bytes_before(self, text: str, encoding: Any) -> Int[np.ndarray, " n"]:
        """UTF-8 bytes of text before each character, and before the end; special tokens are no text."""
        sizes = utf8_lengths(text)
        for i in np.flatnonzero(np.isin(np.array(encoding.ids), self._special)).tolist():
            start, end = encoding.offsets[i]
            sizes[start:end] = 0
        before: Int[np.ndarray, " n"] = np.concatenate([[0], np.cumsum(sizes)])
        return before

    def _append(
        self, example: Example, prompt: list[int], response: list[int], covered: Int[np.ndarray, " r_plus_2"]
    ) -> None:
        """`covered`: bytes of text before the response, up to each of its tokens, and up to its end."""
        room = self._seq_len - len(prompt)
        whole = len(response) < room
        reason = None
        if not prompt or not response:  # of text that the tokenizer has no tokens for
            reason = EMPTY_PROMPT if not prompt else EMPTY_RESPONSE
        elif room < 1:
            reason = LONG_PROMPT
        elif not whole and self._format.long_responses == "leave_out":
            reason = LONG_RESPONSE
        if reason is not None:
            self.dropped[reason] += 1
            return
        kept = [*response, self._format.end_of_turn_id] if whole else response[:room]
        # offsets of a normalised text may go back, and may lack its end, which the end of the turn closes
        up_to = covered[-1] if whole else np.maximum.accumulate(covered)[len(kept)]
        row = _Row(
            ids=np.array([*prompt, *kept], dtype=np.int32),
            num_prompt=len(prompt),
            num_bytes=int(up_to - covered[0]),
            whole=whole,
        )
        self._rows.append(row)
        self.num_bytes += len(example.prompt.encode()) + row.num_bytes

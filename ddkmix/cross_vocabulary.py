"""A live teacher with another tokenizer: it reads the text of the student's rows in its own tokens."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddkmix.alignment import Retokenizer, same_tokens, token_bytes
from ddkmix.batch import CrossSignal
from ddkmix.errors import DataError
from ddkmix.predicted_tokens import about_predicted, predicted
from ddkmix.sources import IGNORE
from ddkmix.teacher import LiveTeacher, label_nats
from ddkmix.tokenizer import TokenizerCard


class CrossVocabularyTeacher:
    """A frozen model that comments on batches of another tokenizer's tokens.

    A row is text again, read with the teacher's tokenizer and its separator between documents. Spans of
    tokens that cover the same bytes are compared; the first span of a row, which nothing predicts, and what
    lies behind the teacher's last position are not.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        student: TokenizerCard,
        teacher: TokenizerCard,
        document_boundaries: bool = False,
    ) -> None:
        """`student` is the tokenizer of the rows, `teacher` that of the model.

        Raises:
            ModelError: a tokenizer's tokens are not made of bytes, or the model cannot be split.
        """
        self._teacher = LiveTeacher(model, separator_id=teacher.separator_id if document_boundaries else None)
        self._reader = Retokenizer(student.path, student.separator_id, teacher.path, teacher.separator_id)
        self._filler = teacher.separator_id
        ends = (student.separator_id, teacher.separator_id)  # the same, whatever they are called
        same = same_tokens(token_bytes(student.path), token_bytes(teacher.path)).tolist()
        self._pairs = torch.tensor(
            [ends, *(pair for pair in same if pair[0] != ends[0] and pair[1] != ends[1])]
        )
        self._longest = getattr(model.config, "max_position_embeddings", None)

    def signal(self, batch: Mapping[str, Tensor]) -> CrossSignal:
        """What the teacher says about the text of a batch.

        Args:
            batch: `input_ids` and `labels` (B, T); labels are -100 behind a row's text.

        Raises:
            DataError: a row's tokens are not text, or it begins with a prompt.
        """
        ids, labels = batch["input_ids"], batch["labels"]
        if ((labels[:, 0] == IGNORE) & (labels != IGNORE).any(1)).any():
            raise DataError(
                "a row's first labels are ignored, as those of a prompt are; with another tokenizer a "
                "teacher reads rows of text, so leave prompt domains out."
            )
        lengths = (labels != IGNORE).sum(1).tolist()
        readings = [
            self._reader.read(row[:size].numpy()) for row, size in zip(ids.cpu(), lengths, strict=True)
        ]
        own = [reading.teacher_ids[: self._longest] for reading in readings]
        spans = _flat_spans([reading.spans() for reading in readings], lengths, [len(row) for row in own])
        rows = torch.full((len(own), max(1, *map(len, own))), self._filler)
        targets = torch.full_like(rows, IGNORE)
        for i, row in enumerate(own):
            rows[i, : len(row)] = targets[i, : len(row)] = torch.from_numpy(row)
        where = predicted(targets)
        said = self._teacher.signal({"input_ids": rows.to(ids.device)})
        return CrossSignal(
            teacher=about_predicted(said, where.to(ids.device)),
            labels=targets[:, 1:][where].to(ids.device),
            spans=torch.from_numpy(spans).to(ids.device),
            pairs=self._pairs.to(ids.device),
        )

    def nats(
        self, input_ids: Int[Tensor, "B T"], labels: Int[Tensor, "B T"], *, chunk_tokens: int
    ) -> Float[Tensor, " n"]:
        """The teacher's loss on the same text, given to the student's n predicted tokens, nats.

        Summed over a row it is the teacher's loss on that row's spans, divided by the student's tokens in
        them and multiplied by all of the student's predicted tokens: what stands outside the spans, a few
        tokens at the ends of a row, is taken for as hard as the rest. So the gap to the student is that of
        nats on the same bytes.
        """
        signal = self.signal({"input_ids": input_ids, "labels": labels})
        own = label_nats(signal.teacher, signal.labels, chunk_tokens=chunk_tokens).double()
        total = torch.cat([own.new_zeros(1), own.cumsum(0)])
        start, stop, their_start, their_stop = signal.spans.unbind(1)
        row_of = predicted(labels).nonzero()[:, 0]
        inside = own.new_zeros(len(labels)).index_add(0, row_of[start], (stop - start).double())
        share = row_of.bincount(minlength=len(labels)) / inside.clamp(min=1)
        nats = own.new_zeros(len(row_of)).index_add(0, start, total[their_stop] - total[their_start])
        return (nats * share[row_of]).float()


def _flat_spans(
    spans: list[Int[np.ndarray, "_ 4"]], student: list[int], teacher: list[int]
) -> Int[np.ndarray, "g 4"]:
    """Spans of the tokens of each row -> spans of the predicted tokens of all rows (the first is not)."""
    found, before = [np.zeros((0, 4), dtype=np.int64)], np.zeros(4, dtype=np.int64)
    for own, n, m in zip(spans, student, teacher, strict=True):
        kept = own[(own[:, 0] > 0) & (own[:, 2] > 0) & (own[:, 3] <= m)]
        found.append(kept - 1 + before)
        before = before + np.array([max(n - 1, 0)] * 2 + [max(m - 1, 0)] * 2)
    return np.concatenate(found)

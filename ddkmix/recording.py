"""What a teacher says about the rows of one shard, as records.

Rows are read in batches that begin at fixed rows of the shard, and draws are seeded with the row's content:
neither the number of ranks nor an interruption changes a byte.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddkmix.batch import DenseSignal, EnsembleSignal, Head
from ddkmix.config import Storage
from ddkmix.index import DomainRows
from ddkmix.logits_store.card import StoreCard
from ddkmix.logits_store.codec import RecordFormat, decode, encode
from ddkmix.logits_store.hidden import decode_hidden, encode_hidden
from ddkmix.logits_store.signal import columns_of
from ddkmix.logits_store.totals import Totals, totals_of
from ddkmix.models import head_of
from ddkmix.predicted_tokens import about_predicted
from ddkmix.rows import RowReader, byte_reader
from ddkmix.teacher import CHUNK_TOKENS, EnsembleTeacher, LiveTeacher, label_nats
from ddkmix.truncation import seeded_uniforms, truncate_said


def head_of_teacher(teacher: LiveTeacher | EnsembleTeacher, vocab_size: int | None) -> Head:
    """The output layer of a teacher, or of the first of several, which have as many classes."""
    member = teacher if isinstance(teacher, LiveTeacher) else teacher.members[0]
    return head_of(member.model, vocab_size, check=False)


class Recorder:
    """Makes the records of one shard."""

    def __init__(
        self,
        rows: DomainRows,
        shard: int,
        card: StoreCard,
        teacher: LiveTeacher | EnsembleTeacher,
        *,
        device: torch.device,
        batch_rows: int,
        storage: Storage | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            rows: packed rows of a domain.
            shard: number of the shard in them.
            card: of the domain's store.
            teacher: of the domain.
            device: where the teacher is.
            batch_rows: rows in a forward pass.
            storage: how remote rows are read; the default settings when None.
        """
        self._rows, self._number, self._card, self._teacher = rows, shard, card, teacher
        self._shard = rows.shards[shard]
        self._device, self._batch_rows, self._storage = device, batch_rows, storage
        head = head_of_teacher(teacher, card.vocab_size)
        self._width, self._dtype = head.weight.shape[1], head.weight.dtype
        self.layout = RecordFormat(
            num_classes=len(head.weight[: head.vocab_size]), kept=card.kept, temperatures=card.temperatures
        )

    def records(self, first: int) -> Iterator[tuple[int, bytes]]:
        """(row, record) of every row from `first` on."""
        reader = RowReader(self._rows, remote=byte_reader(self._storage))
        size = self._batch_rows
        try:
            for start in range(first // size * size, self._shard.num_rows, size):
                rows = np.arange(start, min(start + size, self._shard.num_rows))
                for row, record in zip(rows.tolist(), self.batch(reader, rows), strict=True):
                    if row >= first:
                        yield row, record
        finally:
            reader.close()

    def totals(self, row: int, record: bytes) -> Totals:
        """What a record holds."""
        n = self._num_tokens(row)
        kept = self._card.kept
        if kept.hidden_bytes is None:
            return totals_of(decode(record, n, self.layout), len(record))
        nats = decode_hidden(record, n, self._width, kept.hidden_bytes, self._dtype)[1]
        nats_sum = float(nats.sum(dtype=np.float64))
        return Totals(rows=1, tokens=n, bytes=len(record), kept_mass=float(n), teacher_nats=nats_sum)

    def said(
        self, reader: RowReader, rows: Int[np.ndarray, " B"]
    ) -> tuple[DenseSignal | EnsembleSignal, Int[Tensor, " n"]]:
        """What the teacher says about the tokens that predict, row after row, and the next tokens."""
        tokens = np.empty((len(rows), self._rows.seq_len), dtype=self._rows.dtype)
        for failure in reader.read_into(tokens, np.full(len(rows), self._number), rows).values():
            raise failure
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self._device)
        lengths = torch.tensor([self._num_tokens(row) for row in rows.tolist()], device=ids.device)
        where = torch.arange(ids.shape[1] - 1, device=ids.device) < lengths[:, None]
        said = self._teacher.signal({"input_ids": ids})
        return about_predicted(said, where), ids[:, 1:][where]

    def batch(self, reader: RowReader, rows: Int[np.ndarray, " B"]) -> Iterator[bytes]:
        """The records of some rows, in their order."""
        said, labels = self.said(reader, rows)
        lengths = [self._num_tokens(row) for row in rows.tolist()]
        ends = np.cumsum([0, *lengths])
        kept = self._card.kept

        def name(i: int) -> str:
            which = int(np.searchsorted(ends, i, side="right")) - 1
            row = self._rows.name_of(self._number, int(rows[which]))
            return f"{row}, position {i - int(ends[which])}"

        parts = [slice(start, end) for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
        if kept.hidden_bytes is not None:
            nats = label_nats(said, labels, chunk_tokens=CHUNK_TOKENS).cpu().numpy()
            assert isinstance(said, DenseSignal)
            hidden = said.hidden.cpu()
            for part in parts:
                yield encode_hidden(hidden[part], nats[part], kept.hidden_bytes)
            return
        signal = truncate_said(
            said, labels, kept, self._card.temperatures, uniforms=self._uniforms(rows, lengths), name=name
        )
        for part in parts:
            yield encode(columns_of(signal.at(part)), self.layout)

    def _uniforms(self, rows: np.ndarray, lengths: Sequence[int]) -> Float[Tensor, "n N"] | None:
        draws = self._card.kept.draws
        if draws is None:
            return None
        content = [self._card.key, self._shard.sha256]
        parts = [
            seeded_uniforms([*content, row], n, draws) for row, n in zip(rows.tolist(), lengths, strict=True)
        ]
        return torch.from_numpy(np.concatenate(parts))

    def _num_tokens(self, row: int) -> int:
        return max(self._rows.tokens_at(self._number, row) - 1, 0)

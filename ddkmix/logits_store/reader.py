"""Reading what was captured: rows of a batch -> the teacher's signal, without a teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ddkmix.batch import DenseSignal, Head, Tail, TruncatedSignal
from ddkmix.errors import DataError, RowError
from ddkmix.index import DomainRows
from ddkmix.logits_store.card import StoreCard, find_store, read_card
from ddkmix.logits_store.codec import RecordFormat, TokenColumns, decode
from ddkmix.logits_store.hidden import decode_hidden, load_head
from ddkmix.logits_store.sidecar import Sidecar, open_sidecar, sidecar_path
from ddkmix.logits_store.signal import signal_of

Place = tuple[str, int, int]
"""Domain, number of the shard in its `DomainRows`, number of the row in the shard."""


class LogitsStore:
    """A store and the rows that it is read for."""

    def __init__(self, folder: Path, rows: Mapping[str, DomainRows], *, tail: Tail = "bucket") -> None:
        """Open a store whatever it was made of; `open` checks that.

        Args:
            folder: of the store, with its store.json.
            rows: packed rows of each domain.
            tail: what becomes of the mass outside the kept classes.

        Raises:
            DataError: store.json or the output weights are missing or damaged.
        """
        self.folder, self.rows, self.tail = folder, dict(rows), tail
        self.card, self.num_classes = read_card(folder)
        self._sidecars: dict[tuple[str, int], Sidecar] = {}
        self._head = load_head(folder) if self.card.kept.is_hidden else None

    @classmethod
    def open(
        cls, folder: Path, wanted: StoreCard, rows: Mapping[str, DomainRows], *, tail: Tail = "bucket"
    ) -> "LogitsStore":
        """The store of a folder of stores that serves a run.

        Args:
            folder: of stores (`capture.folder`), or of one.
            wanted: what the run asks for.
            rows: packed rows of each domain.
            tail: what becomes of the mass outside the kept classes.

        Raises:
            DataError: no store fits; the message says what the nearest one differs in.
        """
        return cls(find_store(folder, wanted), rows, tail=tail)

    def head_on(self, device: torch.device) -> Head:
        """The output weights of a store of hidden states, on a device and kept there."""
        assert self._head is not None
        head = self._head
        if head.weight.device != device:
            bias = None if head.bias is None else head.bias.to(device)
            self._head = replace(head, weight=head.weight.to(device), bias=bias)
        return self._head

    @property
    def layout(self) -> RecordFormat:
        """How its records are laid out."""
        return RecordFormat(
            num_classes=self.num_classes, kept=self.card.kept, temperatures=self.card.temperatures
        )

    def path(self, domain: str, shard: int) -> Path:
        """Where the records of a shard are or would be."""
        return sidecar_path(self.folder, domain, self.rows[domain].shards[shard])

    def has(self, domain: str, shard: int) -> bool:
        """Whether a shard has been captured. Shards that have are never looked for again.

        Raises:
            DataError: its sidecar is damaged.
        """
        return (domain, shard) in self._sidecars or self.path(domain, shard).exists()

    def missing(self) -> dict[str, int]:
        """Shards of each domain that have not been captured; domains without any are left out."""
        counts = {
            name: sum(not self.has(name, shard) for shard in range(len(rows.shards)))
            for name, rows in self.rows.items()
        }
        return {name: count for name, count in counts.items() if count}

    def sidecar(self, domain: str, shard: int) -> Sidecar:
        """The open sidecar of a shard.

        Raises:
            DataError: it is missing, damaged, or of another shard.
        """
        if (domain, shard) not in self._sidecars:
            index = self.rows[domain].shards[shard]
            found = open_sidecar(self.path(domain, shard))
            shard_of = found.facts.get("shard", "?")
            if shard_of != index.sha256 or found.num_rows != index.num_rows:
                raise DataError(
                    f"{found.path} has {found.num_rows} rows of the shard {shard_of[:12]}; the run has "
                    f"{index.num_rows} of {index.sha256[:12]}. Delete it and capture again."
                )
            self._sidecars[domain, shard] = found
        return self._sidecars[domain, shard]

    def read(self, places: Sequence[Place]) -> DenseSignal | TruncatedSignal:
        """What the teacher says about some rows of one length T.

        Args:
            places: the rows.

        Returns:
            A TruncatedSignal of shape (B, T), with as many entries as its richest token has, or, of a store
            of hidden states, a DenseSignal. Positions that predict nothing (the last, and padding) say
            something valid that means nothing.

        Raises:
            RowError: a record is not the one that was captured.
            DataError: a sidecar is missing or damaged.
        """
        seq_len = self.rows[places[0][0]].seq_len
        if self.card.kept.is_hidden:
            return self._dense(places, seq_len)
        columns = [self.columns(place) for place in places]
        return replace(signal_of(columns, seq_len, self.layout), tail=self.tail)

    def columns(self, place: Place) -> TokenColumns:
        """What is kept of one row.

        Raises:
            RowError: its record is not the one that was captured.
        """
        with _naming(self, place):
            return decode(self._record(place), self.num_tokens(place), self.layout)

    def num_tokens(self, place: Place) -> int:
        """Predicted tokens of a row: all but the first, without padding."""
        domain, shard, row = place
        return max(self.rows[domain].tokens_at(shard, row) - 1, 0)

    def _record(self, place: Place) -> memoryview:
        domain, shard, row = place
        return self.sidecar(domain, shard).record(row)

    def _dense(self, places: Sequence[Place], seq_len: int) -> DenseSignal:
        assert self._head is not None
        dtype, size = getattr(torch, self.card.dtype), self._head.weight.shape[1]
        hidden = torch.zeros((len(places), seq_len, size), dtype=dtype)
        for i, place in enumerate(places):
            n = self.num_tokens(place)
            hidden[i, :n] = self.hidden(place)[0]
        return DenseSignal(hidden=hidden, head=self._head)

    def hidden(self, place: Place) -> tuple[torch.Tensor, np.ndarray]:
        """Hidden states (n, D) of a row's predicting tokens and the teacher's own loss (n,), nats.

        Raises:
            RowError: its record is not the one that was captured.
        """
        assert self._head is not None
        assert self.card.kept.hidden_bytes is not None
        size, dtype = self._head.weight.shape[1], getattr(torch, self.card.dtype)
        with _naming(self, place):
            return decode_hidden(
                self._record(place), self.num_tokens(place), size, self.card.kept.hidden_bytes, dtype
            )


class _naming:
    """Adds to a RowError which row it is about, and the way out."""

    def __init__(self, store: LogitsStore, place: Place) -> None:
        self._store, self._place = store, place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, RowError):
            domain, shard, row = self._place
            name = self._store.rows[domain].name_of(shard, row)
            raise RowError(
                f"{name}: its record in {self._store.path(domain, shard)} is damaged: {error}. Delete that "
                "file and capture again; `ddkmix capture --verify` looks for more."
            ) from None

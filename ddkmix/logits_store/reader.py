"""Reading what was captured: rows of a batch -> the teacher's signal, without a teacher."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ddkmix.batch import DenseSignal, Head, RoutedSignal, Tail, TruncatedSignal
from ddkmix.errors import RowError
from ddkmix.index import DomainRows
from ddkmix.logits_store.card import Kept, StoreCard, find_store, read_card
from ddkmix.logits_store.codec import RecordFormat, TokenColumns, decode
from ddkmix.logits_store.hidden import decode_hidden, load_head
from ddkmix.logits_store.sidecar import Sidecar, sidecar_of, sidecar_path
from ddkmix.logits_store.signal import signal_of

Place = tuple[str, int, int]
"""Domain, number of the shard in its `DomainRows`, number of the row in the shard."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Opened:
    folder: Path
    card: StoreCard
    layout: RecordFormat
    head: Head | None


class LogitsStore:
    """What the teachers of some domains said about their rows; a store for each teacher."""

    def __init__(
        self, folders: Mapping[str, Path], rows: Mapping[str, DomainRows], *, tail: Tail = "bucket"
    ) -> None:
        """Open stores whatever they were made of; `open` checks that.

        Args:
            folders: of each domain's store, with its store.json.
            rows: packed rows of each domain.
            tail: what becomes of the mass outside the kept classes.

        Raises:
            DataError: store.json or the output weights are missing or damaged.
        """
        opened = {folder: _open_folder(folder) for folder in set(folders.values())}
        self._stores = {domain: opened[folder] for domain, folder in folders.items()}
        self.rows, self.tail = dict(rows), tail
        self._sidecars: dict[tuple[str, int], Sidecar] = {}

    @classmethod
    def open(
        cls,
        folder: Path,
        wanted: Mapping[str, StoreCard],
        rows: Mapping[str, DomainRows],
        *,
        tail: Tail = "bucket",
    ) -> "LogitsStore":
        """The stores of a folder of stores that serve a run.

        Args:
            folder: of stores (`capture.folder`), or of one.
            wanted: what the run asks for, for each domain; of different teachers, but kept in one way.
            rows: packed rows of each domain.
            tail: what becomes of the mass outside the kept classes.

        Raises:
            DataError: no store fits; the message says what the nearest one differs in.
        """
        return cls({name: find_store(folder, wanted[name]) for name in rows}, rows, tail=tail)

    @property
    def kept(self) -> Kept:
        """What is kept of each token."""
        return next(iter(self._stores.values())).card.kept

    def layout(self, domain: str) -> RecordFormat:
        """How the records of a domain are laid out."""
        return self._stores[domain].layout

    def folder(self, domain: str) -> Path:
        """The store of a domain's teacher."""
        return self._stores[domain].folder

    def path(self, domain: str, shard: int) -> Path:
        """Where the records of a shard are or would be."""
        return sidecar_path(self._stores[domain].folder, domain, self.rows[domain].shards[shard])

    def has(self, domain: str, shard: int) -> bool:
        """Whether a shard has been captured."""
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
            self._sidecars[domain, shard] = sidecar_of(
                self.path(domain, shard), self.rows[domain].shards[shard]
            )
        return self._sidecars[domain, shard]

    def read(self, places: Sequence[Place]) -> DenseSignal | TruncatedSignal | RoutedSignal:
        """What the teachers say about some rows of one length T.

        Args:
            places: the rows.

        Returns:
            A TruncatedSignal of shape (B, T), with as many entries as its richest token has. Of hidden
            states, a DenseSignal, or several where the rows have several teachers. Positions that predict
            nothing (the last, and padding) say something valid that means nothing.

        Raises:
            RowError: a record is not the one that was captured.
            DataError: a sidecar is missing or damaged.
        """
        if self.kept.is_hidden:
            return self._dense(places)
        columns = [self.columns(place) for place in places]
        seq_len = self.rows[places[0][0]].seq_len
        return replace(signal_of(columns, seq_len, self.kept.draws or 0), tail=self.tail)

    def columns(self, place: Place) -> TokenColumns:
        """What is kept of one row.

        Raises:
            RowError: its record is not the one that was captured.
        """
        domain, shard, row = place
        sidecar = self.sidecar(domain, shard)
        with self._naming(place):
            return decode(sidecar.record(row), self.num_tokens(place), self.layout(domain))

    def num_tokens(self, place: Place) -> int:
        """Predicted tokens of a row: all but the first, without padding."""
        domain, shard, row = place
        return max(self.rows[domain].tokens_at(shard, row) - 1, 0)

    def hidden(self, place: Place) -> tuple[Float[Tensor, "n D"], Float[np.ndarray, " n"]]:
        """Hidden states of a row's tokens that predict, and the teacher's own loss of each, nats.

        Raises:
            RowError: its record is not the one that was captured.
        """
        domain, shard, row = place
        store, sidecar = self._stores[domain], self.sidecar(domain, shard)
        assert store.head is not None
        assert store.card.kept.hidden_bytes is not None
        with self._naming(place):
            return decode_hidden(
                sidecar.record(row),
                self.num_tokens(place),
                store.head.weight.shape[1],
                store.card.kept.hidden_bytes,
                store.head.weight.dtype,
            )

    def _dense(self, places: Sequence[Place]) -> DenseSignal | RoutedSignal:
        rows: list[Tensor] = []
        signals: list[DenseSignal] = []
        for store in dict.fromkeys(self._stores[domain] for domain, _, _ in places):
            own = [i for i, (domain, _, _) in enumerate(places) if self._stores[domain] is store]
            assert store.head is not None
            shape = (len(own), self.rows[places[0][0]].seq_len, store.head.weight.shape[1])
            hidden = torch.zeros(shape, dtype=store.head.weight.dtype)
            for row, i in zip(hidden, own, strict=True):
                row[: self.num_tokens(places[i])] = self.hidden(places[i])[0]
            rows.append(torch.tensor(own))
            signals.append(DenseSignal(hidden=hidden, head=store.head))
        return signals[0] if len(signals) == 1 else RoutedSignal(rows=tuple(rows), signals=tuple(signals))

    @contextmanager
    def _naming(self, place: Place) -> Iterator[None]:
        """Adds to a RowError which row it is about, and the way out."""
        try:
            yield
        except RowError as error:
            domain, shard, row = place
            raise RowError(
                f"{self.rows[domain].name_of(shard, row)}: its record in {self.path(domain, shard)} is "
                f"damaged: {error}. Delete that file and capture again; `ddkmix capture --verify` looks for "
                "more."
            ) from None


def _open_folder(folder: Path) -> _Opened:
    card, num_classes = read_card(folder)
    return _Opened(
        folder=folder,
        card=card,
        layout=RecordFormat(num_classes=num_classes, kept=card.kept, temperatures=card.temperatures),
        head=load_head(folder) if card.kept.is_hidden else None,
    )

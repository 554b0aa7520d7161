"""The teacher signal of a logits store; of rows that it lacks, that of a live teacher if there is one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from ddkmix.batch import CrossSignal, DenseSignal, Head, RoutedSignal, Signal, TruncatedSignal
from ddkmix.logits_store.reader import LogitsStore, Place
from ddkmix.teacher import SignalSource


class StoredTeacher:
    """What was captured, by the place of each row of a batch."""

    def __init__(
        self,
        store: LogitsStore,
        domains: Sequence[str],
        *,
        device: torch.device,
        fallback: SignalSource | None = None,
    ) -> None:
        """`domains`: names, in the order of `domain_ids`. `fallback` answers for shards not captured."""
        self._store, self._domains, self._device = store, tuple(domains), device
        self._fallback = fallback
        self._heads: dict[int, tuple[Head, Head]] = {}

    def signal(self, batch: Mapping[str, Tensor]) -> Signal | RoutedSignal:
        """What the teachers said about a batch's rows: `domain_ids` (B,) and `row_places` (B, 2).

        Raises:
            RowError: a record is damaged.
            DataError: a shard was not captured and there is no live teacher.
        """
        ids, rows = batch["domain_ids"].tolist(), batch["row_places"].tolist()
        places = [(self._domains[domain], shard, row) for domain, (shard, row) in zip(ids, rows, strict=True)]
        if self._fallback is None:
            return self._read(places)
        kept = torch.tensor([self._store.has(domain, shard) for domain, shard, _ in places])
        if kept.all():
            return self._read(places)
        if not kept.any():
            return self._live(batch)
        captured, others = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0].to(batch["domain_ids"].device)
        live = self._live({name: tensor[others] for name, tensor in batch.items()})
        stored = self._read([places[i] for i in captured.tolist()])
        numbers, signals = zip(
            *_parts(captured.to(others.device), stored), *_parts(others, live), strict=True
        )
        return RoutedSignal(rows=numbers, signals=signals)

    def _live(self, batch: Mapping[str, Tensor]) -> Signal | RoutedSignal:
        assert self._fallback is not None
        said = self._fallback.signal(batch)
        assert not isinstance(said, CrossSignal)  # nobody stores what is said in another vocabulary
        return said

    def _read(self, places: Sequence[Place]) -> Signal | RoutedSignal:
        said = self._store.read(places)
        if not isinstance(said, RoutedSignal):
            return self._moved(said)
        rows = tuple(own.to(self._device) for own in said.rows)
        return RoutedSignal(rows=rows, signals=tuple(self._moved(part) for part in said.signals))

    def _moved(self, said: Signal) -> Signal:
        if isinstance(said, TruncatedSignal):
            return said.to(self._device)
        assert isinstance(said, DenseSignal)  # nobody stores hidden states of ensembles
        return replace(said, hidden=said.hidden.to(self._device), head=self._head(said.head))

    def _head(self, head: Head) -> Head:
        """Output weights on the device; moved once, not with every batch."""
        if id(head) not in self._heads:
            bias = None if head.bias is None else head.bias.to(self._device)
            moved = replace(head, weight=head.weight.to(self._device), bias=bias)
            self._heads[id(head)] = head, moved  # the first is kept, or its number could be another's
        return self._heads[id(head)][1]


def _parts(
    rows: Int[Tensor, " n"], said: Signal | RoutedSignal
) -> Iterator[tuple[Int[Tensor, " _"], Signal]]:
    """(rows of the batch, what is said about them), where `said` is about `rows` of it."""
    if isinstance(said, RoutedSignal):
        yield from ((rows[own], part) for own, part in zip(said.rows, said.signals, strict=True))
    else:
        yield rows, said

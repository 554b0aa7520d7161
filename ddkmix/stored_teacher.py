"""The teacher signal of a logits store; of rows that it lacks, that of a live teacher if there is one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ddkmix.batch import DenseSignal, RoutedSignal, Signal
from ddkmix.logits_store.reader import LogitsStore
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
        """`domains`: their names, in the order of `domain_ids`. `fallback` answers for shards not captured."""
        self._store, self._domains, self._device = store, tuple(domains), device
        self._fallback = fallback

    def signal(self, batch: Mapping[str, Tensor]) -> Signal | RoutedSignal:
        """What the teacher said about a batch's rows: `domain_ids` (B,) and `row_places` (B, 2).

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
            return self._fallback.signal(batch)
        captured, others = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]
        others = others.to(batch["domain_ids"].device)
        live = self._fallback.signal({name: tensor[others] for name, tensor in batch.items()})
        assert not isinstance(live, RoutedSignal)
        stored = self._read([places[i] for i in captured.tolist()])
        return RoutedSignal(rows=(captured.to(others.device), others), signals=(stored, live))

    def _read(self, places: Sequence[tuple[str, int, int]]) -> Signal:
        said = self._store.read(places)
        if isinstance(said, DenseSignal):  # the output weights are moved once, not with every batch
            return replace(said, hidden=said.hidden.to(self._device), head=self._store.head_on(self._device))
        return said.to(self._device)

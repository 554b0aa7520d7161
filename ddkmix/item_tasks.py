"""What a reader process does with a user's own datasets: a task in, the micro-batches of a step out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from jaxtyping import Int

from ddkmix.errors import DataError
from ddkmix.order import locate_rows
from ddkmix.own_rows import OwnRows, asking_user_code, read_item
from ddkmix.row_tasks import Task
from ddkmix.stream import Stream

Collate = Callable[[list[Any]], Any]
"""Items of one micro-batch -> what the loop receives."""


@dataclass(frozen=True, slots=True, eq=False)
class ItemBatch:
    """What a worker sends back."""

    version: int
    slot: int
    parts: tuple[Any, ...] = ()
    """What `collate_fn` made of each micro-batch."""
    error: DataError | None = None
    substitutions: Sequence[Any] = ()
    """Always empty: a user's items have no checksums."""


class ItemReader:
    """A map-style dataset whose keys are tasks."""

    def __init__(self, stream: Stream[OwnRows], version: Any, collate_fn: Collate) -> None:
        self._rows, self._orders, self._version = stream.rows, stream.orders, version
        self._collate = collate_fn
        self._was_sent = False

    def __getitem__(self, task: Task) -> ItemBatch:
        if task.version < self._version.value:
            return ItemBatch(task.version, task.slot)  # reading it would be wasted
        try:
            parts = tuple(self._part(task, part) for part in range(task.parts))
            self._check_can_be_sent(parts)
        except DataError as error:
            return ItemBatch(task.version, task.slot, error=error)
        return ItemBatch(task.version, task.slot, parts)

    def _part(self, task: Task, part: int) -> Any:
        """One micro-batch: every `parts`-th row of the step."""
        domains = task.domain_ids[part :: task.parts]
        numbers = task.row_numbers[part :: task.parts]
        items, names = [], []
        for domain in np.unique(domains).tolist():  # sorted, as in the task
            rows, places = self._rows[domain], self._places(domain, numbers[domains == domain])
            items += [read_item(rows.domain, rows.dataset, place) for place in places]
            names += [rows.name_of(0, place) for place in places]
        return asking_user_code(f"collate_fn fails on {', '.join(names)}", lambda: self._collate(items))

    def _places(self, domain: int, numbers: Int[np.ndarray, " n"]) -> list[int]:
        return [int(place) for place in locate_rows(self._orders[domain], numbers)[1].tolist()]

    def _check_can_be_sent(self, parts: tuple[Any, ...]) -> None:
        """A batch that cannot be pickled is lost on its way, and the loop would wait for it for ever."""
        from torch import save
        from torch.utils.data import get_worker_info

        if self._was_sent or get_worker_info() is None:
            return
        asking_user_code(
            f"collate_fn gives a {type(parts[0]).__name__} that no worker can send; use num_workers=0",
            lambda: save(parts, BytesIO()),
        )
        self._was_sent = True

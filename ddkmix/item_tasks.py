"""What a reader process does with a user's own datasets: a task in, the micro-batches of a step out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ddkmix.errors import DataError
from ddkmix.order import locate_rows
from ddkmix.own_rows import OwnRows, read_item
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

    def __getitem__(self, task: Task) -> ItemBatch:
        if task.version < self._version.value:
            return ItemBatch(task.version, task.slot)  # reading it would be wasted
        try:
            parts = tuple(self._part(task, part) for part in range(task.parts))
        except DataError as error:
            return ItemBatch(task.version, task.slot, error=error)
        return ItemBatch(task.version, task.slot, parts)

    def _part(self, task: Task, part: int) -> Any:
        """One micro-batch: every `parts`-th row of the step."""
        items = []
        ids = task.domain_ids[part :: task.parts].tolist()
        for i, domain in enumerate(ids):
            rows = self._rows[domain]
            number = task.row_numbers[part :: task.parts][i : i + 1]
            _, places = locate_rows(self._orders[domain], number)
            items.append(read_item(rows.domain, rows.dataset, int(places[0])))
        return self._collate(items)

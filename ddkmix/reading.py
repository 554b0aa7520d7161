"""Reading planned rows, here or in worker processes, ahead of the loop that wants them.

Workers are pure functions `(domain, j) -> row` and hold no state. A task carries the version of the plan that
it belongs to; when plans change, older tasks become stale: workers skip them and the loop drops them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Value
from typing import Any

import numpy as np

from ddkmix.errors import DataError
from ddkmix.index import DomainRows, RowReader
from ddkmix.order import DomainOrder, locate

IGNORE = -100
"""Label of a position that predicts nothing (transformers' convention)."""
_DEAD_WORKER = (RuntimeError, EOFError, ConnectionError, FileNotFoundError)
"""What torch and multiprocessing raise in the main process when a worker was killed."""


@dataclass(frozen=True, slots=True)
class Task:
    """What one worker call must read."""

    version: int
    rows: tuple[tuple[int, int], ...]
    """(domain, j) of each row."""


class ReadAhead:
    """Batches of planned rows in the order of their tasks, read by `num_workers` processes."""

    def __init__(
        self,
        rows: Sequence[DomainRows],
        orders: Sequence[DomainOrder],
        tasks: Callable[[], Iterator[Task]],
        *,
        num_workers: int,
        prefetch_steps: int,
    ) -> None:
        """`tasks` is called when reading starts; its iterator is advanced whenever there is room ahead."""
        self._rows, self._orders, self._tasks = rows, orders, tasks
        self._num_workers, self._prefetch_steps = num_workers, prefetch_steps
        self._version = Value("q", 0, lock=False)
        self._batches: Iterator[dict[str, Any]] | None = None

    @property
    def version(self) -> int:
        """The version that new tasks must carry; tasks of older ones are dropped."""
        return int(self._version.value)

    def invalidate(self) -> None:
        """Make everything that was read or is being read stale."""
        self._version.value += 1

    def close(self) -> None:
        """Stop the workers and close the files; `receive` starts anew."""
        self._batches = None

    def receive(self) -> dict[str, Any] | None:
        """The batch of the next task that is not stale, or None when there are no tasks.

        Raises:
            DataError: a row cannot be read, or a reader process ended.
        """
        try:
            item = self._next()
        except _DEAD_WORKER as error:  # from a signal handler or a broken pipe: anywhere in here
            reason = " ".join(str(error).split()) or type(error).__name__
            named = reason.startswith("DataLoader worker (pid")
            if not self._num_workers or (isinstance(error, RuntimeError) and not named):
                raise
            self.close()
            raise DataError(
                f"a reader process ended: {reason} Often it ran out of memory; use fewer loader.workers, "
                "then resume."
            ) from None
        if item is None:
            self.close()
        elif "error" in item:
            self.close()  # what was read ahead of it is dropped: whoever goes on starts at this step
            raise DataError(item["error"])
        return item

    def _next(self) -> dict[str, Any] | None:
        if self._batches is None:
            self._batches = self._start()
        for item in self._batches:
            if int(item.pop("version")) == self.version:
                return item
        return None

    def _start(self) -> Iterator[dict[str, Any]]:
        from torch import Generator
        from torch.utils.data import DataLoader

        dataset = _Rows([RowReader(rows) for rows in self._rows], self._orders, self._version)
        loader: DataLoader[dict[str, Any]] = DataLoader(
            dataset,  # type: ignore[arg-type]  # a map-style dataset without a length
            batch_size=None,
            sampler=_Iterable(self._tasks),
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_steps if self._num_workers else None,
            generator=Generator(),  # its own, or starting workers would move the run's random state
        )
        return iter(loader)


class _Rows:
    """A map-style dataset whose keys are tasks; the only code that runs in workers."""

    def __init__(self, readers: Sequence[RowReader], orders: Sequence[DomainOrder], version: Any) -> None:
        self._readers, self._orders, self._version = readers, orders, version

    def __getitem__(self, task: Task) -> dict[str, Any]:
        if task.version < self._version.value:
            return {"version": task.version}  # dropped by the loop; reading it would be wasted
        try:
            return {"version": task.version, **self._read(task)}
        except DataError as error:  # as a value, or the worker's traceback would bury the message
            return {"version": task.version, "error": str(error)}

    def _read(self, task: Task) -> dict[str, Any]:
        seq_len = self._readers[0].rows.seq_len
        input_ids = np.empty((len(task.rows), seq_len), dtype=np.int64)
        labels = np.full_like(input_ids, IGNORE)
        for i, (domain, j) in enumerate(task.rows):
            shard, row = locate(self._orders[domain], j)
            input_ids[i] = self._readers[domain].read(shard, row)
            valid = int(self._readers[domain].rows.shards[shard].num_tokens[row])
            labels[i, :valid] = input_ids[i, :valid]
        return {
            "input_ids": input_ids,
            "labels": labels,
            "domain_ids": np.array([domain for domain, _ in task.rows], dtype=np.int64),
        }


class _Iterable:
    """An iterable over a generator function, as DataLoader wants its sampler."""

    def __init__(self, function: Callable[[], Iterator[Task]]) -> None:
        self._function = function

    def __iter__(self) -> Iterator[Task]:
        return self._function()

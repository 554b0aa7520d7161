"""Reading planned rows, here or in worker processes, ahead of the loop that wants them.

Workers are pure functions `(domain, j) -> row` and hold no state. A task carries the version of the plan that
it belongs to; when plans change, older tasks become stale: workers skip them and the loop drops them.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import Value
from typing import Any

import numpy as np
from jaxtyping import Int

from ddkmix.errors import ConfigError, DataError
from ddkmix.row_tasks import Ring, RowBatch, Task, TaskReader
from ddkmix.segments import document_positions
from ddkmix.storage.reader import ByteReader
from ddkmix.stream import Stream

IGNORE = -100
"""Label of a position that predicts nothing (transformers' convention)."""
_DEAD_WORKER = (RuntimeError, EOFError, ConnectionError, FileNotFoundError)
"""What torch and multiprocessing raise in the main process when a worker was killed."""


def tensors_of(batch: RowBatch, domain_ids: Int[np.ndarray, " b"]) -> dict[str, Any]:
    """What a loop receives: `input_ids` and `labels` (b, T) int64, `domain_ids` (b,) int64."""
    from torch import arange, from_numpy, int64

    assert batch.tokens is not None
    input_ids = from_numpy(batch.tokens).to(int64)
    labels, seq_len = input_ids.clone(), input_ids.shape[1]
    if batch.num_tokens.min(initial=seq_len) < seq_len:
        labels.masked_fill_(arange(seq_len) >= from_numpy(batch.num_tokens)[:, None], IGNORE)
    return {"input_ids": input_ids, "labels": labels, "domain_ids": from_numpy(domain_ids)}


def position_ids(batch: RowBatch, separator_id: int) -> Any:
    """Positions (b, T) int64 that restart at every document; see `segments`."""
    from torch import from_numpy

    assert batch.tokens is not None
    return from_numpy(document_positions(batch.tokens, separator_id))


class ReadAhead:
    """Batches of planned rows in the order of their tasks, read by `num_workers` processes."""

    def __init__(
        self,
        stream: Stream,
        tasks: Callable[[], Iterator[Task]],
        remote: ByteReader,
        *,
        batch_rows: int,
        num_workers: int,
        prefetch_steps: int,
    ) -> None:
        """Read nothing yet.

        Args:
            stream: what the rows are of.
            tasks: called when reading starts; its iterator is advanced whenever there is room ahead.
            remote: how remote shards are read.
            batch_rows: rows of each task.
            num_workers: reader processes; 0 reads in this one.
            prefetch_steps: tasks that each of them has under way.

        Raises:
            ConfigError: one of the last two is out of range.
        """
        if num_workers < 0 or prefetch_steps < 1:
            raise ConfigError(
                f"num_workers = {num_workers}, prefetch_steps = {prefetch_steps}; workers must be >= 0 and "
                "each must read at least 1 step ahead."
            )
        self._stream, self._tasks, self._remote, self._batch_rows = stream, tasks, remote, batch_rows
        self._num_workers, self._prefetch_steps = num_workers, prefetch_steps
        self._version = Value("q", 0, lock=False)
        self._batches: Iterator[RowBatch] | None = None
        self._ring: Ring | None = None
        self._free: list[int] = []
        """Slots of the ring that no task holds."""

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

    def receive(self) -> RowBatch | None:
        """The rows of the next task that is not stale, or None when there are no tasks.

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
        elif item.error is not None:
            self.close()  # what was read ahead of it is dropped: whoever goes on starts at this step
            raise item.error
        return item

    def _next(self) -> RowBatch | None:
        if self._batches is None:
            self._batches = self._start()
        for item in self._batches:
            if self._ring is not None:
                self._free.append(item.slot)  # taken again at the earliest when the loop comes back
                item = replace(item, tokens=self._ring.slot(item.slot))
            if item.version == self.version:
                return item
        return None

    def _start(self) -> Iterator[RowBatch]:
        from torch import Generator
        from torch.utils.data import DataLoader

        under_way = self._num_workers * self._prefetch_steps
        self._free = list(range(under_way + 1))  # and the one that the loop is looking at
        self._ring = None
        if self._num_workers:
            shape = (self._batch_rows, self._stream.rows[0].seq_len)
            self._ring = Ring(len(self._free), shape, self._stream.dtype)
        loader: DataLoader[RowBatch] = DataLoader(
            TaskReader(self._stream, self._remote, self._version, self._ring),  # type: ignore[arg-type]  # it has no length
            batch_size=None,
            sampler=_Iterable(self._placed_tasks),
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_steps if self._num_workers else None,
            collate_fn=_as_it_is,  # the default one walks through every value
            generator=Generator(),  # its own, or starting workers would move the run's random state
        )
        return iter(loader)

    def _placed_tasks(self) -> Iterator[Task]:
        for task in self._tasks():
            yield task if self._ring is None else replace(task, slot=self._free.pop(0))


def _as_it_is(batch: Any) -> Any:
    return batch


class _Iterable:
    """An iterable over a generator function, as DataLoader wants its sampler."""

    def __init__(self, function: Callable[[], Iterator[Task]]) -> None:
        self._function = function

    def __iter__(self) -> Iterator[Task]:
        return self._function()

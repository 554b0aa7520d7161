"""Reading planned rows, here or in worker processes, ahead of the loop that wants them.

Workers are pure functions `(domain, j) -> row` and hold no state. A task carries the version of the plan that
it belongs to; when plans change, older tasks become stale: workers skip them and the loop drops them.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import Value
from typing import Any

from ddkmix.errors import ConfigError, DataError
from ddkmix.item_tasks import ItemBatch
from ddkmix.row_tasks import Ring, RowBatch, Task
from ddkmix.sources import RowSource

Batch = RowBatch | ItemBatch
_DEAD_WORKER = (RuntimeError, EOFError, ConnectionError, FileNotFoundError)
"""What torch and multiprocessing raise in the main process when a worker was killed."""


class ReadAhead:
    """Batches of planned rows in the order of their tasks, read by `num_workers` processes."""

    def __init__(
        self,
        source: RowSource,
        tasks: Callable[[], Iterator[Task]],
        *,
        num_rows: Callable[[], int],
        num_workers: int,
        prefetch_steps: int,
        seed: Callable[[], int] = lambda: 0,
    ) -> None:
        """Read nothing yet.

        Args:
            source: where the rows come from.
            tasks: called when reading starts; its iterator is advanced whenever there is room ahead.
            num_rows: called when reading starts: rows of each task.
            num_workers: reader processes; 0 reads in this one.
            prefetch_steps: tasks that each of them has under way.
            seed: called when reading starts: of what a user's dataset draws in the reader processes, which
                should differ between ranks and from one start to the next.

        Raises:
            ConfigError: one of the last two is out of range.
        """
        if num_workers < 0 or prefetch_steps < 1:
            raise ConfigError(
                f"num_workers = {num_workers}, prefetch_steps = {prefetch_steps}; workers must be >= 0 and "
                "each must read at least 1 step ahead."
            )
        self._source, self._tasks, self._num_rows = source, tasks, num_rows
        self._num_workers, self._prefetch_steps, self._seed = num_workers, prefetch_steps, seed
        self._version = Value("q", 0, lock=False)
        self._batches: Iterator[Batch] | None = None
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

    def receive(self) -> Batch | None:
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

    def _next(self) -> Batch | None:
        if self._batches is None:
            self._batches = self._start()
        for item in self._batches:
            if self._ring is not None:
                assert isinstance(item, RowBatch)
                self._free.append(item.slot)  # taken again at the earliest when the loop comes back
                item = replace(item, tokens=self._ring.slot(item.slot))
            if item.version == self.version:
                return item
        return None

    def _start(self) -> Iterator[Batch]:
        from torch import Generator
        from torch.utils.data import DataLoader

        under_way = self._num_workers * self._prefetch_steps
        self._free = list(range(under_way + 1))  # and the one that the loop is looking at
        self._ring = None
        if self._num_workers:
            self._ring = self._source.ring(len(self._free), self._num_rows())
        loader: DataLoader[Batch] = DataLoader(
            self._source.reader(self._version, self._ring),
            batch_size=None,
            sampler=_Iterable(self._placed_tasks),
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_steps if self._num_workers else None,
            collate_fn=_as_it_is,  # the default one walks through every value
            # its own, or starting workers would move the run's random state
            generator=Generator().manual_seed(self._seed()),
        )
        try:
            return iter(loader)
        except (AttributeError, TypeError, ValueError) as error:
            if not self._num_workers or "pickl" not in str(error).lower():
                raise
            raise ConfigError(
                f"workers cannot be started ({' '.join(str(error).split())}); where processes are not "
                "forked, datasets and collate_fn must be of a module's top level. Or use num_workers=0."
            ) from error

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

"""Reading planned rows, here or in worker processes, ahead of the loop that wants them.

Workers are pure functions `(domain, j) -> row` and hold no state. A task carries the version of the plan that
it belongs to; when plans change, older tasks become stale: workers skip them and the loop drops them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from multiprocessing import Value
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from ddkmix.errors import ConfigError, DataError, RowError
from ddkmix.order import locate_rows
from ddkmix.rows import OpenFiles, RowReader
from ddkmix.stream import Stream

IGNORE = -100
"""Label of a position that predicts nothing (transformers' convention)."""
_DEAD_WORKER = (RuntimeError, EOFError, ConnectionError, FileNotFoundError)
"""What torch and multiprocessing raise in the main process when a worker was killed."""
_ATTEMPTS = 8
"""Substitutes to try for one row; when all are bad, it is not a matter of single rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What one worker call must read."""

    version: int
    domain_ids: Int[np.ndarray, " b"]
    """Sorted."""
    row_numbers: Int[np.ndarray, " b"]
    """The j of each row."""
    slot: int = 0
    """Where in the ring a worker leaves the tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Substitution:
    """A row that was not the one that was packed, and the row of its domain that was served instead."""

    domain: str
    j: int
    row: str
    """Name of the bad row."""
    substitute: str
    """Name of the row that took its place."""
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class RowBatch:
    """What a worker sends back: compact, because it crosses a process boundary."""

    version: int
    slot: int
    num_tokens: Int[np.ndarray, " b"]
    tokens: UInt[np.ndarray, "b T"] | None = None
    """Of the stored type; None while they are in the ring."""
    substitutions: tuple[Substitution, ...] = ()
    error: str | None = None


def tensors_of(batch: RowBatch, domain_ids: Int[np.ndarray, " b"]) -> dict[str, Any]:
    """What a loop receives: `input_ids` and `labels` (b, T) int64, `domain_ids` (b,) int64."""
    from torch import arange, from_numpy, int64

    assert batch.tokens is not None
    input_ids = from_numpy(batch.tokens).to(int64)
    labels, seq_len = input_ids.clone(), input_ids.shape[1]
    if batch.num_tokens.min(initial=seq_len) < seq_len:
        labels.masked_fill_(arange(seq_len) >= from_numpy(batch.num_tokens)[:, None], IGNORE)
    return {"input_ids": input_ids, "labels": labels, "domain_ids": from_numpy(domain_ids)}


class _Ring:
    """Shared memory that workers write tokens into, a slot for every task that can be under way.

    A tensor that a worker sends costs about a millisecond of shared memory and sockets, whatever its size; a
    slot costs nothing, and the loop copies it anyway when it widens the tokens.
    """

    def __init__(self, slots: int, shape: tuple[int, int], dtype: str) -> None:
        from torch import empty, uint8

        self._shape, self._dtype = shape, np.dtype(dtype)
        self._size = shape[0] * shape[1] * self._dtype.itemsize
        memory: Any = empty(slots * self._size, dtype=uint8)
        self._memory = memory.share_memory_()

    def slot(self, i: int) -> UInt[np.ndarray, "b T"]:
        """A view of one slot."""
        part = self._memory[i * self._size : (i + 1) * self._size]
        tokens: UInt[np.ndarray, "b T"] = part.numpy().view(self._dtype).reshape(self._shape)
        return tokens


class ReadAhead:
    """Batches of planned rows in the order of their tasks, read by `num_workers` processes."""

    def __init__(
        self,
        stream: Stream,
        tasks: Callable[[], Iterator[Task]],
        *,
        batch_rows: int,
        num_workers: int,
        prefetch_steps: int,
    ) -> None:
        """Read nothing yet.

        Args:
            stream: what the rows are of.
            tasks: called when reading starts; its iterator is advanced whenever there is room ahead.
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
        self._stream, self._tasks, self._batch_rows = stream, tasks, batch_rows
        self._num_workers, self._prefetch_steps = num_workers, prefetch_steps
        self._version = Value("q", 0, lock=False)
        self._batches: Iterator[RowBatch] | None = None
        self._ring: _Ring | None = None
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
            raise DataError(item.error)
        return item

    def _next(self) -> RowBatch | None:
        if self._batches is None:
            self._batches = self._start()
        for item in self._batches:
            self._free.append(item.slot)  # taken again at the earliest when the loop comes back
            if item.version == self.version:
                return item if self._ring is None else replace(item, tokens=self._ring.slot(item.slot))
        return None

    def _start(self) -> Iterator[RowBatch]:
        from torch import Generator
        from torch.utils.data import DataLoader

        under_way = self._num_workers * self._prefetch_steps
        self._free = list(range(under_way + 1))  # and the one that the loop is looking at
        self._ring = None
        if self._num_workers:
            shape = (self._batch_rows, self._stream.rows[0].seq_len)
            self._ring = _Ring(len(self._free), shape, self._stream.dtype)
        loader: DataLoader[RowBatch] = DataLoader(
            _Rows(self._stream, self._version, self._ring),  # type: ignore[arg-type]  # it has no length
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
            yield replace(task, slot=self._free.pop(0))


def _as_it_is(batch: Any) -> Any:
    return batch


class _Rows:
    """A map-style dataset whose keys are tasks; the only code that runs in workers."""

    def __init__(self, stream: Stream, version: Any, ring: _Ring | None) -> None:
        files = OpenFiles()
        self._readers = [RowReader(domain, files) for domain in stream.rows]
        self._orders, self._version = stream.orders, version
        self._ring, self._dtype = ring, stream.dtype

    def __getitem__(self, task: Task) -> RowBatch:
        if task.version < self._version.value:
            return RowBatch(task.version, task.slot, task.row_numbers)  # reading it would be wasted
        if self._ring is None:
            tokens = np.empty((len(task.row_numbers), self._readers[0].rows.seq_len), dtype=self._dtype)
        else:
            tokens = self._ring.slot(task.slot)
        try:
            num_tokens, substitutions = self._read(task, tokens)
        except DataError as error:  # as a value, or the worker's traceback would bury the message
            return RowBatch(task.version, task.slot, task.row_numbers, error=str(error))
        sent = tokens if self._ring is None else None
        return RowBatch(task.version, task.slot, num_tokens, sent, substitutions)

    def _read(
        self, task: Task, tokens: UInt[np.ndarray, "b T"]
    ) -> tuple[Int[np.ndarray, " b"], tuple[Substitution, ...]]:
        num_tokens = np.empty(len(tokens), dtype=np.int64)
        substitutions: list[Substitution] = []
        domains, starts = np.unique(task.domain_ids, return_index=True)
        for domain, start, end in zip(domains, starts, [*starts[1:], len(tokens)], strict=True):
            reader, numbers = self._readers[domain], task.row_numbers[start:end]
            shards, rows = locate_rows(self._orders[domain], numbers)
            num_tokens[start:end] = reader.num_tokens(shards, rows)
            failures = self._fill(reader, tokens[start:end], shards, rows)
            for i, failure in failures.items():
                bad = reader.rows.name_of(int(shards[i]), int(rows[i]))
                record, row, length = self._substitute(int(domain), int(numbers[i]), bad, failure)
                tokens[start + i], num_tokens[start + i] = row, length
                substitutions.append(record)
        return num_tokens, tuple(substitutions)

    def _fill(
        self,
        reader: RowReader,
        tokens: UInt[np.ndarray, "n T"],
        shards: Int[np.ndarray, " n"],
        rows: Int[np.ndarray, " n"],
    ) -> dict[int, RowError]:
        if reader.rows.dtype == self._dtype:
            return reader.read_into(tokens, shards, rows)
        narrow = np.empty(tokens.shape, dtype=reader.rows.dtype)
        failures = reader.read_into(narrow, shards, rows)
        tokens[:] = narrow
        return failures

    def _substitute(
        self, domain: int, j: int, bad: str, failure: RowError
    ) -> tuple[Substitution, UInt[np.ndarray, " T"], int]:
        """A row that depends on seed, domain and j alone, whoever reads it."""
        reader, order = self._readers[domain], self._orders[domain]
        starts = reader.rows.places.starts
        for attempt in range(_ATTEMPTS):
            key = f"{order.seed}\0{order.domain}\0{j}\0{attempt}".encode()
            place = int.from_bytes(blake2b(key, digest_size=8).digest()) % order.num_rows
            shard = int(np.searchsorted(starts, place, side="right")) - 1
            row = place - int(starts[shard])
            try:
                tokens = reader.read(shard, row)
            except RowError:
                continue
            name = reader.rows.name_of(shard, row)
            record = Substitution(domain=order.domain, j=j, row=bad, substitute=name, reason=str(failure))
            return record, tokens, int(reader.rows.places.num_tokens[place])
        raise DataError(f"{failure} {_ATTEMPTS} substitutes of the domain are damaged too.")


class _Iterable:
    """An iterable over a generator function, as DataLoader wants its sampler."""

    def __init__(self, function: Callable[[], Iterator[Task]]) -> None:
        self._function = function

    def __iter__(self) -> Iterator[Task]:
        return self._function()

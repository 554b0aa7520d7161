"""What a reader process does: one task in, the rows of one step out. Nothing here holds any state.

    Task (domain, j) -> (shard, row) -> bytes, checked -> RowBatch

A damaged row is replaced by another of its domain that depends on seed, domain and j alone, so neither counts
nor any other row move, whoever reads it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice, pairwise
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from ddkmix.errors import DataError, RowError
from ddkmix.index import DomainRows
from ddkmix.order import locate_rows, place_of
from ddkmix.rows import OpenFiles, RowReader
from ddkmix.storage.reader import ByteReader
from ddkmix.stream import Stream

__all__ = ["Substitution"]

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
    parts: int = 1
    """Micro-batches that the rows are dealt into, where readers make batches of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Substitution:
    """A row that was not the one that was packed, and the row of its domain that was served instead."""

    domain: str
    """The domain of both."""
    j: int
    """Rows that the domain had served before this one."""
    attempt: int
    """Substitute rows that were damaged too."""
    shard: str
    """The damaged row's shard."""
    row: int
    """The damaged row's number in its shard."""
    substitute_shard: str
    """The shard of the row that stands in for it."""
    substitute_row: int
    """That row's number in its shard."""
    reason: str
    """What is wrong with the damaged row."""

    @property
    def name(self) -> str:
        """The damaged row's name."""
        return f"{self.domain}/{self.shard}#{self.row}"

    @property
    def substitute(self) -> str:
        """The other row's name."""
        return f"{self.domain}/{self.substitute_shard}#{self.substitute_row}"


@dataclass(frozen=True, slots=True, eq=False)
class RowBatch:
    """What a worker sends back: compact, because it crosses a process boundary."""

    version: int
    slot: int
    num_tokens: Int[np.ndarray, " b"]
    tokens: UInt[np.ndarray, "b T"] | None = None
    """Of the stored type; None while they are in the ring."""
    num_prompt_tokens: Int[np.ndarray, " b"] | None = None
    """The first tokens of each row, which are given and not predicted, 0 of text; None where all are text."""
    substitutions: tuple[Substitution, ...] = ()
    error: DataError | None = None
    """As a value: raised in a worker, its traceback would bury the message."""


class Ring:
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


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The rows of one domain in a task."""

    domain: int
    reader: RowReader
    slots: slice
    """Where they go."""
    numbers: Int[np.ndarray, " n"]
    shards: Int[np.ndarray, " n"]
    rows: Int[np.ndarray, " n"]


class TaskReader:
    """A map-style dataset whose keys are tasks; the only code that runs in workers."""

    def __init__(
        self, stream: Stream[DomainRows], remote: ByteReader, version: Any, ring: Ring | None, dtype: str
    ) -> None:
        files = OpenFiles()
        self._readers = [RowReader(domain, files, remote) for domain in stream.rows]
        self._remote = remote
        self._orders, self._version = stream.orders, version
        self._ring, self._dtype = ring, dtype

    def __getitem__(self, task: Task) -> RowBatch:
        if task.version < self._version.value:
            return RowBatch(task.version, task.slot, task.row_numbers)  # reading it would be wasted
        if self._ring is None:
            tokens = np.empty((len(task.row_numbers), self._readers[0].rows.seq_len), dtype=self._dtype)
        else:
            tokens = self._ring.slot(task.slot)
        try:
            num_tokens, prompts, substitutions = self._read(task, tokens)
        except DataError as error:
            return RowBatch(task.version, task.slot, task.row_numbers, error=error)
        sent = tokens if self._ring is None else None
        return RowBatch(task.version, task.slot, num_tokens, sent, prompts, substitutions)

    def _read(
        self, task: Task, tokens: UInt[np.ndarray, "b T"]
    ) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"] | None, tuple[Substitution, ...]]:
        num_tokens = np.empty(len(tokens), dtype=np.int64)
        prompts = np.zeros_like(num_tokens)
        substitutions: list[Substitution] = []
        parts = list(self._parts(task))
        answers = self._ask(parts)
        for part in parts:
            failures = self._fill(part, tokens[part.slots], num_tokens[part.slots], answers)
            prompts[part.slots] = part.reader.rows.prompt_tokens(part.shards, part.rows)
            for i, failure in failures.items():
                bad = int(part.shards[i]), int(part.rows[i])
                record, row, place = self._substitute(part.domain, int(part.numbers[i]), bad, failure)
                slot = part.slots.start + i
                tokens[slot], num_tokens[slot] = row, part.reader.rows.tokens_at(*place)
                prompts[slot] = part.reader.rows.prompt_tokens_at(*place)
                substitutions.append(record)
        return num_tokens, prompts if prompts.any() else None, tuple(substitutions)

    def _parts(self, task: Task) -> Iterator[_Part]:
        ids = task.domain_ids
        edges = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), len(ids)]
        for start, end in pairwise(edges if len(ids) else []):
            domain = int(ids[start])
            numbers = task.row_numbers[start:end]
            shards, rows = locate_rows(self._orders[domain], numbers)
            yield _Part(domain, self._readers[domain], slice(start, end), numbers, shards, rows)

    def _ask(self, parts: Sequence[_Part]) -> Iterator[bytes]:
        """The bytes of all remote rows: one round trip for all domains."""
        requests = [
            r for part in parts if part.reader.is_remote for r in part.reader.requests(part.shards, part.rows)
        ]
        return iter(self._remote.read(requests)) if requests else iter(())

    def _fill(
        self,
        part: _Part,
        tokens: UInt[np.ndarray, "n T"],
        lengths: Int[np.ndarray, " n"],
        answers: Iterator[bytes],
    ) -> dict[int, RowError]:
        reader = part.reader
        own = list(islice(answers, len(tokens))) if reader.is_remote else None
        if reader.rows.dtype == self._dtype:
            return reader.read_into(tokens, part.shards, part.rows, own, lengths)
        narrow = np.empty(tokens.shape, dtype=reader.rows.dtype)
        failures = reader.read_into(narrow, part.shards, part.rows, own, lengths)
        tokens[:] = narrow
        return failures

    def _substitute(
        self, domain: int, j: int, bad: tuple[int, int], failure: RowError
    ) -> tuple[Substitution, UInt[np.ndarray, " T"], tuple[int, int]]:
        """A row that depends on seed, domain and j alone, whoever reads it; and its shard and number."""
        reader, order = self._readers[domain], self._orders[domain]
        for attempt in range(_ATTEMPTS):
            key = f"{order.seed}\0{order.domain}\0{j}\0{attempt}".encode()
            shard, row = place_of(
                order, int.from_bytes(blake2b(key, digest_size=8).digest()) % order.num_rows
            )
            try:
                tokens = reader.read(shard, row)
            except RowError:
                continue
            record = Substitution(
                domain=order.domain,
                j=j,
                attempt=attempt,
                shard=reader.rows.shards[bad[0]].name,
                row=bad[1],
                substitute_shard=reader.rows.shards[shard].name,
                substitute_row=row,
                reason=str(failure),
            )
            return record, tokens, (shard, row)
        raise DataError(f"{failure} {_ATTEMPTS} substitutes of the domain are damaged too.")


def places_of(
    stream: Stream[DomainRows],
    domain_ids: Int[np.ndarray, " b"],
    row_numbers: Int[np.ndarray, " b"],
    substitutions: Sequence[Substitution],
) -> Int[np.ndarray, "b 2"]:
    """Shard and row of each row that a reader gave, those that stood in for damaged ones included."""
    places = np.empty((len(domain_ids), 2), dtype=np.int64)
    for domain in np.unique(domain_ids).tolist():
        mine = domain_ids == domain
        places[mine] = np.stack(locate_rows(stream.orders[domain], row_numbers[mine]), axis=1)
    names = [rows.domain for rows in stream.rows]
    for record in substitutions:
        domain = names.index(record.domain)
        shards = [shard.name for shard in stream.rows[domain].shards]
        instead = shards.index(record.substitute_shard), record.substitute_row
        places[(domain_ids == domain) & (row_numbers == record.j)] = instead
    return places

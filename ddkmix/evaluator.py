"""Held-out loss of student and teacher per domain.

Nats are summed per row and divided once at the end. Standard errors are over rows, because tokens of one
row are not independent: with row sums s_r and token counts n_r, the mean is m = sum s / sum n and its
standard error sqrt(R / (R - 1) sum (s_r - m n_r)^2) / sum n (the linearised ratio estimator). The error of
the gap pairs student and teacher row by row. The teacher never changes, so its row sums are kept on disk.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddkmix.config import Storage
from ddkmix.distillation import predicted
from ddkmix.errors import DataError
from ddkmix.fingerprint import hash_json, replacing
from ddkmix.index import DomainRows
from ddkmix.order import DomainOrder, locate
from ddkmix.rows import RowReader, byte_reader
from ddkmix.sources import IGNORE
from ddkmix.types import DomainLosses

_DIGEST_BYTES = 32

TokenNats = Callable[[Tensor, Tensor], Tensor]
"""(input_ids (B, T), labels (B, T)) -> cross-entropy (n,) of the predicted tokens in row order."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeldOut:
    """The held-out rows that a domain is measured on."""

    rows: DomainRows
    places: tuple[tuple[int, int], ...]
    """(shard, row) of each."""
    num_tokens: Int[np.ndarray, " R"]
    """Predicted tokens of each row."""
    num_bytes: Int[np.ndarray, " R"]
    """Bytes of text that they cover."""

    @property
    def domain(self) -> str:
        """The domain's name."""
        return self.rows.domain

    @property
    def key(self) -> object:
        """What a model's sums of these rows depend on; JSON-able."""
        return [self.rows.fingerprint, self.places]

    def open(self, storage: Storage | None) -> "OpenRows":
        """The rows, ready to be read."""
        reader = RowReader(self.rows, remote=byte_reader(storage))

        def read(chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
            ids = _read(reader, np.array([self.places[i] for i in chosen]))
            input_ids = torch.from_numpy(ids)
            valid = torch.from_numpy(self.num_tokens[list(chosen)] + 1)
            padding = torch.arange(ids.shape[1]) >= valid[:, None]
            return input_ids, input_ids.masked_fill(padding, IGNORE)

        return OpenRows(read, reader.close)


@dataclass(frozen=True, slots=True, eq=False)
class OpenRows:
    """Held-out rows that can be read."""

    read: Callable[[Sequence[int]], tuple[Tensor, Tensor]]
    """Numbers of rows -> input_ids (B, T), labels (B, T)."""
    close: Callable[[], None]


@runtime_checkable
class HeldOutRows(Protocol):
    """What is measured: packed rows (`HeldOut`) or a user's own items (`own_held_out.OwnHeldOut`)."""

    @property
    def domain(self) -> str:
        """The domain's name."""
        ...

    @property
    def num_tokens(self) -> Int[np.ndarray, " R"]:
        """Predicted tokens of each row."""
        ...

    @property
    def num_bytes(self) -> Int[np.ndarray, " R"]:
        """Bytes of text that they cover; 0 where unknown."""
        ...

    @property
    def key(self) -> object:
        """What a model's sums of these rows depend on; JSON-able."""
        ...

    def open(self, storage: Storage | None) -> OpenRows:
        """The rows, ready to be read."""
        ...


def select_rows(rows: DomainRows, limit: int) -> HeldOut:
    """Up to `limit` held-out rows spread over all shards; the same ones for every run, seed and student.

    Raises:
        DataError: no row has a token to predict.
    """
    order = DomainOrder(
        domain=rows.domain,
        shard_rows=rows.shard_rows,
        seed=0,
        block_rows=rows.num_rows,
    )
    located = (locate(order, j) for j in range(rows.num_rows))
    places = sorted(islice((p for p in located if rows.shards[p[0]].num_tokens[p[1]] > 1), limit))
    if not places:
        raise DataError(f"domain {rows.domain!r}: its held-out rows have no token to predict; add text.")
    return HeldOut(
        rows=rows,
        places=tuple(places),
        num_tokens=np.array([rows.shards[s].num_tokens[r] - 1 for s, r in places], dtype=np.int64),
        num_bytes=np.array([rows.shards[s].num_bytes[r] for s, r in places], dtype=np.int64),
    )


def row_nats(
    held_out: HeldOutRows,
    token_nats: TokenNats,
    *,
    batch_rows: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    storage: Storage | None = None,
) -> Float[Tensor, " R"]:
    """Cross-entropy summed over each row, float64; rows of other ranks are 0.

    Every rank calls the model equally often, because wrapped models (FSDP, DDP with buffers) exchange data in
    their forward pass: a rank without rows of its own goes through the first one for the others' sake.
    """
    rows = held_out.open(storage)
    sums = torch.zeros(len(held_out.num_tokens), dtype=torch.float64)
    mine = list(range(rank, len(sums), world_size))
    most = -(-len(sums) // world_size)
    try:
        for start in range(0, most, batch_rows):
            chosen = mine[start : start + batch_rows]
            input_ids, labels = rows.read(chosen or [0])
            nats = token_nats(input_ids.to(device), labels.to(device)).double().cpu()
            if chosen:
                row_of = predicted(labels).nonzero()[:, 0]
                sums[torch.tensor(chosen)] = torch.zeros(len(chosen), dtype=torch.float64).index_add(
                    0, row_of, nats
                )
    finally:
        rows.close()
    return sums


def _read(reader: RowReader, places: Int[np.ndarray, "B 2"]) -> Int[np.ndarray, "B T"]:
    """Rows by (shard, row); all of them must be as they were packed."""
    tokens = np.empty((len(places), reader.rows.seq_len), dtype=reader.rows.dtype)
    for failure in reader.read_into(tokens, places[:, 0], places[:, 1]).values():
        raise failure
    return tokens.astype(np.int64)


def summarise(
    held_out: Mapping[str, HeldOutRows],
    student: Mapping[str, Float[np.ndarray, " R"]],
    teacher: Mapping[str, Float[np.ndarray, " R"]],
) -> DomainLosses:
    """Row sums of every domain -> losses with their standard errors."""
    names = tuple(sorted(held_out))
    means = {name: _mean_and_error(student[name], held_out[name].num_tokens) for name in names}
    teacher_means = {name: _mean_and_error(teacher[name], held_out[name].num_tokens) for name in names}
    gaps = {name: _mean_and_error(student[name] - teacher[name], held_out[name].num_tokens) for name in names}
    return DomainLosses(
        domains=names,
        effective_rows=np.array([_effective_rows(held_out[name].num_tokens) for name in names]),
        student_loss=np.array([means[name][0] for name in names]),
        teacher_loss=np.array([teacher_means[name][0] for name in names]),
        student_error=np.array([means[name][1] for name in names]),
        gap_error=np.array([gaps[name][1] for name in names]),
        num_tokens=np.array([held_out[name].num_tokens.sum() for name in names]),
        num_bytes=np.array([held_out[name].num_bytes.sum() for name in names]),
    )


def _mean_and_error(sums: Float[np.ndarray, " R"], counts: Int[np.ndarray, " R"]) -> tuple[float, float]:
    total, num_rows = counts.sum(), len(sums)
    mean = sums.sum() / total
    if num_rows < 2:
        return float(mean), float("nan")
    spread = np.sqrt(num_rows / (num_rows - 1) * ((sums - mean * counts) ** 2).sum())
    return float(mean), float(spread / total)


def _effective_rows(counts: Int[np.ndarray, " R"]) -> float:
    """How many equally long rows would weigh as these do: Kish's effective size."""
    return float(counts.sum() ** 2 / (counts**2).sum())


class NatsCache:
    """Row sums of one frozen model on disk, one small file per domain, keyed by content.

    A file is the SHA-256 of what follows and the sums as float64: damage costs a measurement, no more.
    """

    def __init__(self, folder: Path, model: str) -> None:
        """`model` is the fingerprint of everything about the model that changes its losses."""
        self._folder, self._model = folder, model

    def load(self, held_out: HeldOutRows) -> Float[np.ndarray, " R"] | None:
        """The sums, or None if they are not there or cannot be read."""
        try:
            data = self._path(held_out).read_bytes()
        except OSError:
            return None
        digest, data = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if digest != sha256(data).digest() or len(data) != 8 * len(held_out.num_tokens):
            return None
        return np.frombuffer(data, dtype="<f8").copy()

    def save(self, held_out: HeldOutRows, sums: Float[np.ndarray, " R"]) -> None:
        """Keep the sums; atomic."""
        data = sums.astype("<f8").tobytes()
        with replacing(self._path(held_out)) as file:
            file.write(sha256(data).digest() + data)

    def _path(self, held_out: HeldOutRows) -> Path:
        key = hash_json([self._model, held_out.key])
        return self._folder / f"{held_out.domain}-{key[:16]}.f8"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluator:
    """Measures models on the same held-out rows, the rows split over ranks."""

    held_out: Mapping[str, HeldOutRows]
    batch_rows: int
    device: torch.device
    rank: int = 0
    world_size: int = 1
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """Sum over ranks."""
    storage: Storage | None = None
    """How remote rows are read."""

    def sums(
        self, token_nats: TokenNats, cache: NatsCache | None = None
    ) -> dict[str, Float[np.ndarray, " R"]]:
        """Row sums of a model for every domain, taken from the cache and put there if one is given."""
        result = {}
        for name, held_out in self.held_out.items():
            known = cache.load(held_out) if cache else None
            # all ranks measure or none does: a rank that sees the file late must not wait alone
            absent = self.reduce(torch.tensor(float(known is None), device=self.device))
            if known is None or absent.item() > 0:
                known = self._measure(held_out, token_nats)
                if cache and self.rank == 0:
                    cache.save(held_out, known)
            result[name] = known
        return result

    def cached(self, cache: NatsCache) -> dict[str, Float[np.ndarray, " R"]] | None:
        """Row sums of every domain from the cache; None on all ranks if one of them lacks one."""
        known = {name: cache.load(held_out) for name, held_out in self.held_out.items()}
        found = {name: sums for name, sums in known.items() if sums is not None}
        absent = torch.tensor(float(len(found) < len(known)), device=self.device)
        return None if self.reduce(absent).item() > 0 else found

    def _measure(self, held_out: HeldOutRows, token_nats: TokenNats) -> Float[np.ndarray, " R"]:
        sums = row_nats(
            held_out,
            token_nats,
            batch_rows=self.batch_rows,
            device=self.device,
            rank=self.rank,
            world_size=self.world_size,
            storage=self.storage,
        )
        return self.reduce(sums.to(self.device)).cpu().numpy()

    def measure(self, student: TokenNats, teacher: Mapping[str, Float[np.ndarray, " R"]]) -> DomainLosses:
        """The student's losses beside the teacher's row sums."""
        return summarise(self.held_out, self.sums(student), teacher)

"""Held-out rows: which ones a domain is measured on, and how they are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ddkmix.config import Storage
from ddkmix.errors import DataError
from ddkmix.index import DomainRows
from ddkmix.order import DomainOrder, locate
from ddkmix.references import CountedRows
from ddkmix.rows import RowReader, byte_reader
from ddkmix.sources import IGNORE


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeldOut:
    """The held-out rows that a domain is measured on."""

    rows: DomainRows
    places: tuple[tuple[int, int], ...]
    """(shard, row) of each."""
    num_tokens: Int[np.ndarray, " R"]
    """Predicted tokens of each row: all but the first, of a prompt and its response those of the response."""
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
            places = np.array([self.places[i] for i in chosen])
            input_ids = torch.from_numpy(_read(reader, places))
            prompts = torch.from_numpy(self.rows.prompt_tokens(places[:, 0], places[:, 1]))
            # behind a text's first token, or behind its prompt, so many are predicted
            ends = prompts.clamp(min=1) + torch.from_numpy(self.num_tokens[list(chosen)])
            index = torch.arange(input_ids.shape[1])
            ignored = (index < prompts[:, None]) | (index >= ends[:, None])
            return input_ids, input_ids.masked_fill(ignored, IGNORE)

        return OpenRows(read, reader.close)


@dataclass(frozen=True, slots=True, eq=False)
class OpenRows:
    """Held-out rows that can be read."""

    read: Callable[[Sequence[int]], tuple[Tensor, Tensor]]
    """Numbers of rows -> input_ids (B, T), labels (B, T)."""
    close: Callable[[], None]


@runtime_checkable
class HeldOutRows(CountedRows, Protocol):
    """What is measured: packed rows (`HeldOut`) or a user's own items (`own_held_out.OwnHeldOut`)."""

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
        kept_rows=rows.kept_rows,
    )
    located = (locate(order, j) for j in range(rows.num_rows))
    places = sorted(islice((p for p in located if _predicted(rows, *p) > 0), limit))
    if not places:
        raise DataError(f"domain {rows.domain!r}: its held-out rows have no token to predict; add text.")
    return HeldOut(
        rows=rows,
        places=tuple(places),
        num_tokens=np.array([_predicted(rows, *place) for place in places], dtype=np.int64),
        num_bytes=np.array([rows.shards[s].num_bytes[r] for s, r in places], dtype=np.int64),
    )


def _predicted(rows: DomainRows, shard: int, row: int) -> int:
    return rows.tokens_at(shard, row) - max(rows.prompt_tokens_at(shard, row), 1)


def _read(reader: RowReader, places: Int[np.ndarray, "B 2"]) -> Int[np.ndarray, "B T"]:
    """Rows by (shard, row); all of them must be as they were packed."""
    tokens = np.empty((len(places), reader.rows.seq_len), dtype=reader.rows.dtype)
    for failure in reader.read_into(tokens, places[:, 0], places[:, 1]).values():
        raise failure
    return tokens.astype(np.int64)

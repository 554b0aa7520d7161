"""Where the rows of a stream come from: packed shards, or datasets that the user already has.

A source says what a reader process runs and what a loop receives; it knows nothing of plans or versions.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Int

from ddkmix.config import Storage
from ddkmix.errors import ConfigError
from ddkmix.index import DomainRows
from ddkmix.item_tasks import Collate, ItemBatch, ItemReader
from ddkmix.own_rows import OwnRows
from ddkmix.planner import OnCap
from ddkmix.prefetching import ShardPrefetch
from ddkmix.row_tasks import Ring, RowBatch, TaskReader
from ddkmix.rows import byte_reader
from ddkmix.segments import document_positions
from ddkmix.stream import Count, Stream

IGNORE = -100
"""Label of a position that predicts nothing (transformers' convention)."""


class MixtureOptions(TypedDict, total=False):
    """Optional arguments of `loader.DomainMixture`, which has their meaning."""

    weights: Mapping[str, float] | None
    seed: int
    rank: int | None
    world_size: int | None
    num_workers: int
    prefetch_steps: int
    max_epochs: float | None
    on_cap: OnCap
    count: Count
    block_rows: int
    max_substitutes: int
    storage: Storage | None
    document_boundaries: bool
    collate_fn: Collate | None


@runtime_checkable
class RowSource(Protocol):
    """What `reading.ReadAhead` and `loader.DomainMixture` want of a source."""

    def ring(self, slots: int, rows: int) -> Ring | None:
        """Shared memory for that many batches of so many rows; None where workers send their batches."""
        ...

    def reader(self, version: Any, ring: Ring | None) -> Any:
        """What runs in reader processes: a map-style dataset whose keys are tasks."""
        ...

    def batches(self, item: Any, parts: int) -> list[Any]:
        """What a reader sent, as the micro-batches that a loop receives: every `parts`-th row each."""
        ...

    def follow(self, served: Sequence[int], weights: Sequence[int]) -> None:
        """How far each domain has been planned, and which still have weight."""
        ...

    def close(self) -> None:
        """Let go of everything that reading needs."""
        ...


class PackedSource:
    """Packed rows: tensors of tokens."""

    def __init__(
        self, stream: Stream[DomainRows], storage: Storage | None, *, document_boundaries: bool
    ) -> None:
        self._stream, self._document_boundaries = stream, document_boundaries
        self._remote = byte_reader(storage)
        self._prefetch = ShardPrefetch(stream, self._remote)
        self.dtype = max((rows.dtype for rows in stream.rows), key=lambda dtype: np.dtype(dtype).itemsize)
        """numpy type that holds the tokens of every domain."""

    def ring(self, slots: int, rows: int) -> Ring | None:
        """Tokens go through it."""
        return Ring(slots, (rows, self._stream.rows[0].seq_len), self.dtype)

    def reader(self, version: Any, ring: Ring | None) -> TaskReader:
        """Reads the rows of tasks."""
        return TaskReader(self._stream, self._remote, version, ring, self.dtype)

    def batches(self, item: RowBatch, parts: int) -> list[dict[str, Any]]:
        """Every `parts`-th row of the step each, as tensors."""
        tensors = tensors_of(item)
        if self._document_boundaries:
            tensors["position_ids"] = position_ids(item, self._stream.rows[0].padding_id)
        return [{name: tensor[part::parts] for name, tensor in tensors.items()} for part in range(parts)]

    def follow(self, served: Sequence[int], weights: Sequence[int]) -> None:
        """Fetch remote shards ahead."""
        self._prefetch.follow(served, weights)

    def close(self) -> None:
        """Stop fetching."""
        self._prefetch.close()


def open_source(
    stream: Stream[Any],
    storage: Storage | None,
    *,
    collate_fn: Collate | None,
    document_boundaries: bool,
) -> RowSource:
    """The source of a stream's rows.

    Raises:
        ConfigError: packed rows and own datasets together, or an argument of the other kind.
    """
    own = [isinstance(rows, OwnRows) for rows in stream.rows]
    if any(own) and not all(own):
        names = [rows.domain for rows, mine in zip(stream.rows, own, strict=True) if mine]
        raise ConfigError(f"domains {names} are your own datasets and the others packed rows; use one kind.")
    if all(own):
        if document_boundaries:
            raise ConfigError("document_boundaries = True needs packed rows; your collate_fn sets positions.")
        return ItemSource(stream, collate_fn)
    if collate_fn is not None:
        raise ConfigError("collate_fn is for your own datasets; packed rows are tensors already.")
    return PackedSource(stream, storage, document_boundaries=document_boundaries)


class ItemSource:
    """Items of a user's own datasets, collated by the user's own function."""

    def __init__(self, stream: Stream[OwnRows], collate_fn: Collate | None) -> None:
        if collate_fn is None:
            from torch.utils.data import default_collate

            collate_fn = default_collate
        self._stream, self._collate = stream, collate_fn

    def ring(self, slots: int, rows: int) -> None:
        """Items have no known size."""

    def reader(self, version: Any, ring: Ring | None) -> ItemReader:
        """Reads and collates the items of tasks."""
        return ItemReader(self._stream, version, self._collate)

    def batches(self, item: ItemBatch, parts: int) -> list[Any]:
        """What the user's function made of them in the reader."""
        assert len(item.parts) == parts
        return list(item.parts)

    def follow(self, served: Sequence[int], weights: Sequence[int]) -> None:
        """Nothing is fetched."""

    def close(self) -> None:
        """Nothing is open."""


def tensors_of(batch: RowBatch) -> dict[str, Any]:
    """What a loop receives: `input_ids` and `labels` (b, T) int64, which ignore padding and prompts."""
    from torch import arange, from_numpy, int64

    assert batch.tokens is not None
    input_ids = from_numpy(batch.tokens).to(int64)
    labels, seq_len = input_ids.clone(), input_ids.shape[1]
    if batch.num_tokens.min(initial=seq_len) < seq_len:
        labels.masked_fill_(arange(seq_len) >= from_numpy(batch.num_tokens)[:, None], IGNORE)
    if batch.num_prompt_tokens is not None:
        labels.masked_fill_(arange(seq_len) < from_numpy(batch.num_prompt_tokens)[:, None], IGNORE)
    return {"input_ids": input_ids, "labels": labels}


def with_arrays(batch: Any, **arrays: Int[np.ndarray, "b ..."]) -> Any:
    """The batch with more int64 tensors beside what it holds; as it is where it is no dict."""
    from torch import from_numpy

    if isinstance(batch, MutableMapping):
        batch.update({name: from_numpy(array.copy()) for name, array in arrays.items()})
    return batch


def position_ids(batch: RowBatch, separator_id: int) -> Any:
    """Positions (b, T) int64 that restart at every document; see `segments`.

    A prompt and its response are one document, whatever a chat template puts between the turns.
    """
    from torch import from_numpy

    assert batch.tokens is not None
    positions = document_positions(batch.tokens, separator_id)
    if batch.num_prompt_tokens is not None:
        positions[batch.num_prompt_tokens > 0] = np.arange(positions.shape[1])
    return from_numpy(positions)

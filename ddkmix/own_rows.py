"""Datasets that a user already has, one per domain: no packing, no shards, any items.

A dataset is anything with `__len__` and `__getitem__`; each of its items is a row. What the planner promises
for packed rows holds for them too, because it only ever sees (domain, j).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from ddkmix.errors import ConfigError, DataError
from ddkmix.fingerprint import hash_json

_LOOKED_AT = 8
"""Items whose content tells one dataset from another."""


@runtime_checkable
class MapDataset(Protocol):
    """What torch calls a map-style dataset: lists, `datasets.Dataset`, `torch.utils.data.Dataset`, ..."""

    def __len__(self) -> int:
        """Items."""
        ...

    def __getitem__(self, i: Any, /) -> Any:
        """Item i."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OwnRows:
    """The items of one dataset as the train rows of a domain."""

    domain: str
    dataset: MapDataset
    num_rows: int
    fingerprint: str
    """Changes with the number of items and with the content of a few of them."""
    num_tokens: Int[np.ndarray, " R"] | None = None
    """Tokens of each item, where weights are to count them."""
    max_epochs: float | None = None
    prior: float | None = None

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """All items are one shard."""
        return (self.num_rows,)

    @property
    def seq_len(self) -> int | None:
        """Items may differ in length."""
        return None

    def tokens_at(self, shard: int, row: int) -> int:
        """Tokens of an item; 1 where nobody said."""
        return 1 if self.num_tokens is None else int(self.num_tokens[row])

    def name_of(self, shard: int, row: int) -> str:
        """`code#17`."""
        return f"{self.domain}#{row}"


def own_rows(
    datasets: Mapping[str, MapDataset], num_tokens: Mapping[str, Sequence[int]] | None = None
) -> dict[str, OwnRows]:
    """A user's datasets as rows of domains.

    Args:
        datasets: one map-style dataset per domain.
        num_tokens: tokens of each item of each domain.

    Raises:
        ConfigError: a dataset has no length or no items by number, or `num_tokens` does not fit.
        DataError: an item cannot be read.
    """
    if not datasets:
        raise ConfigError("datasets = {}; give one map-style dataset per domain.")
    if num_tokens is not None and set(num_tokens) != set(datasets):
        raise ConfigError(f"num_tokens is of {sorted(num_tokens)} and datasets of {sorted(datasets)}.")
    return {
        name: _rows_of(name, dataset, None if num_tokens is None else num_tokens[name])
        for name, dataset in datasets.items()
    }


def _rows_of(name: str, dataset: MapDataset, num_tokens: Sequence[int] | None) -> OwnRows:
    kind = type(dataset).__name__
    if not isinstance(dataset, MapDataset) or isinstance(dataset, (str, bytes, Mapping)):
        raise ConfigError(
            f"datasets[{name!r}] is a {kind}; it must be map-style (__len__ and __getitem__ by number). "
            "Turn a stream into one, or pack it (ddkmix pack) and use DomainMixture.from_cards."
        )
    count = len(dataset)
    lengths = None if num_tokens is None else np.asarray(num_tokens, dtype=np.int64)
    if lengths is not None and (lengths.shape != (count,) or (lengths < 1).any()):
        raise ConfigError(
            f"num_tokens[{name!r}] has {lengths.size} entries for {count} items; it needs one number >= 1 "
            "for each."
        )
    return OwnRows(
        domain=name,
        dataset=dataset,
        num_rows=count,
        fingerprint=_fingerprint(name, dataset, count),
        num_tokens=lengths,
    )


def read_item(domain: str, dataset: MapDataset, i: int) -> Any:
    """Item i of a domain's dataset.

    Raises:
        DataError: the dataset raised; its own error is the cause, and its traceback a note.
    """
    import traceback

    try:
        return dataset[i]
    except Exception as error:  # whatever a user's dataset may raise
        reason = " ".join(str(error).split())
        wrapped = DataError(f"datasets[{domain!r}][{i}] cannot be read ({type(error).__name__}: {reason}).")
        wrapped.add_note(traceback.format_exc())  # the cause itself may not cross a process boundary
        raise wrapped from error


def _fingerprint(name: str, dataset: MapDataset, count: int) -> str:
    """Of the length and of items spread over the dataset; those that differ when read twice do not count."""
    digests = []
    for i in sorted({count * k // _LOOKED_AT for k in range(_LOOKED_AT)} if count else ()):
        first, second = (_digest(read_item(name, dataset, i)) for _ in range(2))
        digests.append(first if first == second else None)
    return hash_json([count, digests])


def _digest(item: Any) -> str:
    """Of everything in an item that has a plain value; of other objects, their type."""
    found = hashlib.sha256()
    _feed(found, item)
    return found.hexdigest()


def _feed(found: Any, item: Any) -> None:
    found.update(f"{type(item).__name__}:".encode())
    if hasattr(item, "detach") and hasattr(item, "numpy"):
        item = item.detach().cpu()
        item = item.float().numpy() if "bfloat16" in str(item.dtype) else item.numpy()
    if isinstance(item, np.ndarray):
        found.update(f"{item.dtype}{item.shape}".encode() + np.ascontiguousarray(item).tobytes())
    elif isinstance(item, Mapping):
        for key in item:
            found.update(repr(key).encode())
            _feed(found, item[key])
    elif isinstance(item, (list, tuple)):
        found.update(f"{len(item)}".encode())
        for value in item:
            _feed(found, value)
    elif isinstance(item, (str, bytes, int, float, bool, type(None))):
        found.update(repr(item).encode())

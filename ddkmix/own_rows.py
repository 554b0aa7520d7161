"""Datasets that a user already has, one per domain: no packing, no shards, any items.

A dataset is anything with `__len__` and `__getitem__`; each of its items is a row. What the planner promises
for packed rows holds for them too, because it only ever sees (domain, j).
"""

import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int, Integer

from ddkmix.errors import ConfigError, DataError
from ddkmix.fingerprint import hash_json

__all__ = ["MapDataset"]

_LOOKED_AT = 8
"""Items whose content tells one dataset from another."""
T = TypeVar("T")
Numbers = Sequence[int] | Integer[np.ndarray, " _"]
"""One for each item."""


@runtime_checkable
class MapDataset(Protocol):
    """What torch calls a map-style dataset: lists, `datasets.Dataset`, `torch.utils.data.Dataset`, ..."""

    def __len__(self) -> int:
        """Items."""
        ...

    def __getitem__(self, i: Any, /) -> Any:
        """Item i.

        Args:
            i: its number, from 0.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OwnRows:
    """The items of one dataset as the train rows of a domain."""

    domain: str
    dataset: MapDataset
    num_rows: int
    fingerprint: str
    """Changes with the number of items, the content of a few of them, and `num_tokens`."""
    num_tokens: Int[np.ndarray, " R"] | None = None
    """Tokens of each item, where weights are to count them."""
    max_epochs: float | None = None
    prior: float | None = None

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """All items are one shard."""
        return (self.num_rows,)

    @property
    def kept_rows(self) -> None:
        """All of them are served."""
        return None

    @property
    def seq_len(self) -> int | None:
        """Items may differ in length."""
        return None

    def counted_tokens_at(self, shard: int, row: int) -> int:
        """Tokens of an item; 1 where nobody said."""
        return 1 if self.num_tokens is None else int(self.num_tokens[row])

    def name_of(self, shard: int, row: int) -> str:
        """`code#17`."""
        return f"{self.domain}#{row}"


def own_rows(
    datasets: Mapping[str, MapDataset], num_tokens: Mapping[str, Numbers] | None = None
) -> dict[str, OwnRows]:
    """A user's datasets as rows of domains.

    Args:
        datasets: one map-style dataset per domain.
        num_tokens: tokens of each item of each domain.

    Raises:
        ConfigError: a dataset has no length or no items by number, or `num_tokens` does not fit.
        DataError: an item cannot be read.
    """
    if not isinstance(datasets, Mapping) or not datasets:
        raise ConfigError(f"datasets is {_in_short(datasets)}; give one map-style dataset per domain.")
    if num_tokens is not None and set(num_tokens) != set(datasets):
        raise ConfigError(f"num_tokens is of {sorted(num_tokens)} and datasets of {sorted(datasets)}.")
    return {
        name: _rows_of(name, dataset, None if num_tokens is None else num_tokens[name])
        for name, dataset in datasets.items()
    }


def _in_short(value: Any) -> str:
    return "empty" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _rows_of(name: str, dataset: MapDataset, num_tokens: Numbers | None) -> OwnRows:
    count = count_items(f"datasets[{name!r}]", dataset)
    lengths = None if num_tokens is None else integers(f"num_tokens[{name!r}]", num_tokens)
    if lengths is not None and (lengths.shape != (count,) or (lengths < 1).any()):
        raise ConfigError(
            f"num_tokens[{name!r}] has {lengths.size} entries for {count} items; it needs one number >= 1 "
            "for each."
        )
    return OwnRows(
        domain=name,
        dataset=dataset,
        num_rows=count,
        fingerprint=_fingerprint(name, dataset, count, lengths),
        num_tokens=lengths,
    )


def count_items(where: str, dataset: Any) -> int:
    """The length of a map-style dataset.

    Args:
        where: what messages call it.
        dataset: what somebody gave as one.

    Raises:
        ConfigError: it is not map-style, or its length cannot be had.
    """
    streams = any(kind.__name__ == "IterableDataset" for kind in type(dataset).__mro__)
    if not isinstance(dataset, MapDataset) or isinstance(dataset, (str, bytes, Mapping, type)) or streams:
        raise ConfigError(
            f"{where} is a {type(dataset).__name__}; it must be map-style (__len__ and __getitem__ by "
            "number). Turn a stream into one, or pack it (ddkmix pack) and use DomainMixture.from_cards."
        )
    try:
        return len(dataset)
    except Exception as error:  # whatever a user's dataset may raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where} has no length ({type(error).__name__}: {reason}).") from error


def integers(where: str, values: Any) -> Int[np.ndarray, "..."]:
    """Whole numbers as an array; masks and fractions would become other numbers without a word.

    Args:
        where: what messages call them.
        values: what somebody gave.

    Raises:
        ConfigError: they are not whole numbers, or of lists of different length.
    """
    try:
        found = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} must be whole numbers ({' '.join(str(error).split())}).") from None
    if found.size and found.dtype.kind not in "iu":
        raise ConfigError(
            f"{where} must be whole numbers and holds {found.dtype}; of a mask, give numpy.flatnonzero(mask)."
        )
    return found.astype(np.int64)


def read_item(domain: str, dataset: MapDataset, i: int, *, where: str = "datasets") -> Any:
    """Item i of a domain's dataset.

    Args:
        domain: its name.
        dataset: its items.
        i: which.
        where: what messages call the datasets of all domains.

    Raises:
        DataError: the dataset raised; its own error is the cause, and its traceback a note.
    """
    return asking_user_code(f"{where}[{domain!r}][{i}] cannot be read", lambda: dataset[i])


def asking_user_code(what: str, ask: Callable[[], T]) -> T:
    """The answer of a user's own code, whatever it may raise (a StopIteration would end the stream).

    Args:
        what: the start of the message.
        ask: calls it.

    Raises:
        DataError: it raised; its own error is the cause, and its traceback a note.
    """
    import traceback

    try:
        return ask()
    except Exception as error:
        reason = " ".join(str(error).split())
        wrapped = DataError(f"{what} ({type(error).__name__}{': ' if reason else ''}{reason}).")
        wrapped.add_note(traceback.format_exc())  # the cause itself may not cross a process boundary
        raise wrapped from error


def _fingerprint(name: str, dataset: MapDataset, count: int, num_tokens: Int[np.ndarray, " R"] | None) -> str:
    """Of length, sizes, and items spread over the dataset; of these none, where one differs when read twice.

    All or none: a dataset that changes its items at random may give the same one twice by chance.
    """
    places = sorted({count * k // _LOOKED_AT for k in range(_LOOKED_AT)} if count else ())
    digests: list[str | None] = []
    for i in places:
        with _fixed_randomness():
            first, second = (_digest(read_item(name, dataset, i)) for _ in range(2))
        if first != second:
            digests = [None] * len(places)
            break
        digests.append(first)
    sizes = None if num_tokens is None else hashlib.sha256(num_tokens.tobytes()).hexdigest()
    return hash_json([count, digests, sizes])


@contextmanager
def _fixed_randomness() -> Iterator[None]:
    """The same random numbers every time, and a program's own go on as if nobody had asked."""
    torch: Any = sys.modules.get("torch")
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what users' code draws from)
    tensors = None if torch is None else torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    if torch is not None:
        torch.random.default_generator.manual_seed(0)  # torch.manual_seed would touch accelerators too
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        if torch is not None:
            torch.set_rng_state(tensors)


def _digest(item: Any) -> str:
    """Of everything in an item that has a plain value; of other objects, their type."""
    found = hashlib.sha256()
    _feed(found, item)
    return found.hexdigest()


def _feed(found: Any, item: Any) -> None:
    found.update(f"{type(item).__name__}:".encode())
    if hasattr(item, "detach") and hasattr(item, "numpy"):
        item = _array_of(item.detach().cpu())
    if isinstance(item, (np.ndarray, np.generic)):
        found.update(f"{item.dtype}{item.shape}".encode())
        if item.dtype.hasobject:  # its bytes are addresses
            _feed(found, item.tolist())
        else:
            found.update(item.tobytes())
    elif isinstance(item, Mapping):
        for key in item:
            found.update(repr(key).encode())
            _feed(found, item[key])
    elif isinstance(item, (list, tuple)):
        found.update(f"{len(item)}".encode())
        for value in item:
            _feed(found, value)
    elif is_dataclass(item) and not isinstance(item, type):
        for field in fields(item):
            _feed(found, getattr(item, field.name))
    elif isinstance(item, (str, bytes, int, float, bool, type(None))):
        found.update(repr(item).encode())


def _array_of(tensor: Any) -> Any:
    """A tensor as an array, or as text where numpy knows no such type."""
    try:
        return tensor.float().numpy() if "bfloat16" in str(tensor.dtype) else tensor.numpy()
    except (TypeError, RuntimeError):  # sparse, eight bits of a float, ...
        return repr(tensor)

"""Held-out items of a user's own datasets, taken once and kept in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ddkmix.config import Storage
from ddkmix.errors import ConfigError, DataError
from ddkmix.fingerprint import hash_json
from ddkmix.held_out import OpenRows
from ddkmix.own_rows import MapDataset, count_items, integers, read_item
from ddkmix.sources import IGNORE


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OwnHeldOut:
    """The items that a domain is measured on."""

    domain: str
    items: tuple[tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]], ...]
    """(input_ids, labels) of each."""
    num_tokens: Int[np.ndarray, " R"]
    """Predicted tokens of each item."""

    @property
    def num_bytes(self) -> Int[np.ndarray, " R"]:
        """Nobody knows the text: 0."""
        return np.zeros(len(self.items), dtype=np.int64)

    @property
    def key(self) -> object:
        """Every token and label."""
        return [hash_json([ids.tolist(), labels.tolist()]) for ids, labels in self.items]

    def open(self, storage: Storage | None) -> OpenRows:
        """The items, padded at the end to the longest of a batch."""
        return OpenRows(partial(padded, self.items), lambda: None)


def padded(
    items: Sequence[tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]], chosen: Sequence[int]
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """input_ids and labels of some items, padded at the end to the longest."""
    longest = max(len(items[i][0]) for i in chosen)
    input_ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE)
    for row, i in enumerate(chosen):
        ids, own = items[i]
        input_ids[row, : len(ids)] = torch.from_numpy(ids)
        labels[row, : len(own)] = torch.from_numpy(own)
    return input_ids, labels


def select_items(domain: str, dataset: MapDataset, limit: int) -> OwnHeldOut:
    """Up to `limit` items spread evenly over a dataset.

    Args:
        domain: its name.
        dataset: items with `input_ids` and optionally `labels` (unshifted, -100 where nothing is
            predicted) and `attention_mask` (0 where there is padding, at the end).
        limit: the most items.

    Raises:
        ConfigError: the dataset is not map-style.
        DataError: an item lacks `input_ids` or pads at its start, or no item has a token to predict.
    """
    count = count_items(f"held_out[{domain!r}]", dataset)
    chosen = sorted({count * k // min(limit, count) for k in range(min(limit, count))}) if count else []
    items = [_tokens_of(domain, i, read_item(domain, dataset, i, where="held_out")) for i in chosen]
    kept = tuple(pair for pair in items if (pair[1][1:] != IGNORE).any())
    if not kept:
        raise DataError(f"domain {domain!r}: its held-out items have no token to predict; add text.")
    predicted = [int((labels[1:] != IGNORE).sum()) for _, labels in kept]
    return OwnHeldOut(domain=domain, items=kept, num_tokens=np.array(predicted, dtype=np.int64))


def _tokens_of(domain: str, i: int, item: Any) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    where = f"held_out[{domain!r}][{i}]"
    if not isinstance(item, Mapping) or "input_ids" not in item:
        raise DataError(f"{where} has no input_ids; give items as tokenizers make them.")
    ids = _column(where, item, "input_ids")
    labels = ids if item.get("labels") is None else _column(where, item, "labels")
    seen = item.get("attention_mask")
    mask = np.ones(ids.shape, dtype=bool) if seen is None else np.asarray(_on_cpu(seen)) != 0
    if ids.ndim != 1 or ids.shape != labels.shape or ids.shape != mask.shape:
        raise DataError(
            f"{where} has input_ids {ids.shape}, labels {labels.shape}, attention_mask {mask.shape}; they "
            "must be one list of the same length each."
        )
    length = int(mask.sum())
    if not mask[:length].all():
        raise DataError(
            f"{where} is padded elsewhere than at its end; pad there, where a causal model cannot see it."
        )
    ids, labels = ids[:length].copy(), labels[:length].copy()
    if ids.min(initial=0) < 0 or labels[labels != IGNORE].min(initial=0) < 0:
        raise DataError(f"{where} has token ids below 0; only labels may be, and only {IGNORE}.")
    return ids, labels


def _column(where: str, item: Mapping[str, Any], name: str) -> Int[np.ndarray, "..."]:
    try:
        return integers(f"{where}[{name!r}]", _on_cpu(item[name]))
    except ConfigError as error:
        raise DataError(str(error)) from None


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value

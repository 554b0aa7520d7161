"""What every contestant must hand over: int64 `input_ids` and `labels`, both (B, T)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch


def collate(rows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """A batch of stored rows: stacked in the stored type first, which is the cheapest way known here."""
    return as_batch(torch.from_numpy(np.stack(rows).astype(np.int64)))


def as_batch(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch of int64 rows; labels are a tensor of their own because losses may mask them."""
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Epoch after epoch of a loader that ends."""
    while True:
        yield from loader

"""Training losses between two lines of the log, summed on the device and fetched once per line.

The sums are part of a checkpoint, so that a line which spans an interruption is the line of the
uninterrupted run.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class LossWindow:
    """Per loss term and domain: the sum of nats; per domain: the number of predicted tokens."""

    def __init__(self, terms: Sequence[str], domains: Sequence[str], device: torch.device) -> None:
        self._terms, self._domains = list(terms), list(domains)
        self._sums = torch.zeros((len(terms) + 1, len(domains)), dtype=torch.float64, device=device)

    def add(self, values: Float[Tensor, "terms n"], domain_ids: Int[Tensor, " n"]) -> None:
        """Add the losses of n tokens."""
        rows = torch.cat([values.double(), torch.ones_like(values[:1], dtype=torch.float64)])
        self._sums.index_add_(1, domain_ids, rows)

    def close(self, weights: Sequence[float], reduce: Callable[[Tensor], Tensor]) -> dict[str, float | int]:
        """Means over all ranks since the last call, and start anew.

        Returns:
            `train/objective`, `train/tokens`, and per term `train/<term>` and `train/<term>/<domain>`
            (domains without a token are left out), nats per token.
        """
        sums = reduce(self._sums).cpu()
        self._sums = torch.zeros_like(self._sums)
        *terms, counts = sums.tolist()
        total = max(sum(counts), 1.0)
        record: dict[str, float | int] = {
            "train/objective": sum(w * sum(t) for w, t in zip(weights, terms, strict=True)) / total,
            "train/tokens": int(sum(counts)),
        }
        for name, term in zip(self._terms, terms, strict=True):
            record[f"train/{name}"] = sum(term) / total
            for domain, nats, count in zip(self._domains, term, counts, strict=True):
                if count:
                    record[f"train/{name}/{domain}"] = nats / count
        return record

    def to_json(self, reduce: Callable[[Tensor], Tensor]) -> list[list[float]]:
        """The sums over all ranks, for a checkpoint."""
        sums: list[list[float]] = reduce(self._sums).tolist()
        return sums

    def load_json(self, sums: list[list[float]], *, is_main: bool) -> None:
        """Take up saved sums; only the main rank holds them, or they would count once per rank."""
        if is_main:
            self._sums = torch.tensor(sums, dtype=torch.float64, device=self._sums.device)

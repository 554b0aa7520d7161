"""Training losses between two lines of the log, summed on the device and fetched once per line.

The sums are part of a checkpoint, so that a line which spans an interruption is the line of the
uninterrupted run.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddkmix.errors import RunError


class LossWindow:
    """Per domain: the sum of nats of each loss term and of the objective, and the number of tokens.

    The objective has a sum of its own, because the weights of its terms may move within a window. Other
    values of other things (pairs, responses) are summed alike.
    """

    def __init__(
        self,
        terms: Sequence[str],
        domains: Sequence[str],
        device: torch.device,
        *,
        name: str = "train",
        unit: str = "tokens",
    ) -> None:
        """Metrics begin with `name`; `unit` is what is counted."""
        self._terms, self._domains = list(terms), list(domains)
        self._name, self._unit = name, unit
        self._sums = torch.zeros((len(terms) + 2, len(domains)), dtype=torch.float64, device=device)

    def add(
        self,
        values: Float[Tensor, "terms n"],
        domain_ids: Int[Tensor, " n"],
        weights: Sequence[float],
    ) -> None:
        """Add the losses of n tokens and their sum with the weights of the terms that are in force."""
        nats = values.double()
        objective = nats.new_tensor(weights) @ nats
        rows = torch.cat([nats, objective[None], torch.ones_like(objective)[None]])
        self._sums.index_add_(1, domain_ids, rows)

    def close(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float | int]:
        """Means over all ranks since the last call, and start anew.

        Returns:
            `train/objective`, `train/tokens`, and per term `train/<term>` and `train/<term>/<domain>`
            (domains without a token are left out), nats per token; for `train` and `tokens` the names that
            the window was made with.
        """
        sums = reduce(self._sums).cpu()
        self._sums = torch.zeros_like(self._sums)
        *terms, objective, counts = sums.tolist()
        total = max(sum(counts), 1.0)
        record: dict[str, float | int] = {
            f"{self._name}/objective": sum(objective) / total,
            f"{self._name}/{self._unit}": int(sum(counts)),
        }
        for name, term in zip(self._terms, terms, strict=True):
            record[f"{self._name}/{name}"] = sum(term) / total
            for domain, nats, count in zip(self._domains, term, counts, strict=True):
                if count:
                    record[f"{self._name}/{name}/{domain}"] = nats / count
        return record

    def to_json(self, reduce: Callable[[Tensor], Tensor]) -> list[list[float]]:
        """The sums over all ranks, for a checkpoint."""
        sums: list[list[float]] = reduce(self._sums).tolist()
        return sums

    def load_json(self, sums: list[list[float]], *, is_main: bool) -> None:
        """Take up saved sums; only the main rank holds them, or they would count once per rank.

        Raises:
            RunError: they are of other terms, or of a version without a sum for the objective.
        """
        if len(sums) != len(self._sums):
            raise RunError(
                f"the checkpoint sums {len(sums)} losses where this run sums {len(self._sums)}; another "
                "version of ddkmix wrote it. Resume with that version, or choose another run_dir."
            )
        if is_main:
            self._sums = torch.tensor(sums, dtype=torch.float64, device=self._sums.device)

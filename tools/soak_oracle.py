"""What the mixed stream promised, computed without the planner: an independent count of every row.

The oracle keeps, per domain, how many rows were served and the integral of its weights. It knows the
rows' tokens (each row says its domain and number in its first two tokens) and asks `order.locate` for
nothing but the order of a pass; that every pass holds each row once, it checks itself.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ddkmix.order import DomainOrder, locate

_ROUNDING = 1e-6
"""Rows per change that the planner's integers (2^-32 of a row) may differ from the floats here."""


class Violation(Exception):
    """A promise was broken."""


class Oracle:
    """Checks step after step."""

    def __init__(
        self, rows: Mapping[str, Sequence[np.ndarray]], *, seed: int, batch_rows: int, block_rows: int
    ) -> None:
        self.domains = tuple(sorted(rows))
        self.rows = {name: list(rows[name]) for name in self.domains}
        self.sizes = {name: sum(len(shard) for shard in self.rows[name]) for name in self.domains}
        self.orders = {
            name: DomainOrder(
                domain=name,
                shard_rows=tuple(len(shard) for shard in self.rows[name]),
                seed=seed,
                block_rows=block_rows,
            )
            for name in self.domains
        }
        self.batch_rows = batch_rows
        self.step = 0
        self.served = dict.fromkeys(self.domains, 0)
        self.owed = dict.fromkeys(self.domains, 0.0)
        self.weights: dict[str, float] = {}
        self.set_weights(self.sizes)
        self.seen: dict[str, Counter[int]] = {name: Counter() for name in self.domains}
        """Rows of the pass under way, by their number."""
        self.bound = sum(1 / k for k in range(1, len(self.domains) + 1))
        self.largest_deviation = 0.0

    def set_weights(self, raw: Mapping[str, float]) -> None:
        """In force from the next step on."""
        total = sum(raw.values())
        self.weights = {name: raw[name] / total for name in self.domains}

    def check(self, batches: Sequence[Mapping[str, np.ndarray]], states: Sequence[Mapping[str, Any]]) -> None:
        """One step: the batches of all ranks, and their states after it.

        Raises:
            Violation: with what is wrong.
        """
        self._check_sizes(batches)
        arrived = self._arrived(batches)
        for name in self.domains:
            self._check_domain(name, arrived[name])
        for name in self.domains:
            self.owed[name] += self.weights[name] * self.batch_rows
            deviation = abs(self.owed[name] - self.served[name])
            self.largest_deviation = max(self.largest_deviation, deviation)
            if deviation > self.bound + _ROUNDING * (self.step + 1):
                raise Violation(f"{name} is {deviation:.3f} rows off its share, more than {self.bound:.3f}")
        self.step += 1
        self._check_states(states)

    def _check_sizes(self, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
        for rank, batch in enumerate(batches):
            wanted = self.batch_rows // len(batches)
            found = {name: len(array) for name, array in batch.items() if name in _ARRAYS}
            if found != dict.fromkeys(_ARRAYS, wanted):
                raise Violation(f"rank {rank} of {len(batches)} received {found} rows, not {wanted}")
            if not np.array_equal(batch["input_ids"], batch["labels"]):
                raise Violation(f"rank {rank}: labels differ from input_ids though no row is padded")

    def _arrived(self, batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, list[np.ndarray]]:
        arrived: dict[str, list[np.ndarray]] = {name: [] for name in self.domains}
        for batch in batches:
            for tokens, domain in zip(batch["input_ids"], batch["domain_ids"], strict=True):
                arrived[self.domains[int(domain)]].append(tokens)
        return arrived

    def _check_domain(self, name: str, arrived: Sequence[np.ndarray]) -> None:
        """The rows j, j + 1, ... of the domain arrived, in whatever slots; nothing else did."""
        first = self.served[name]
        wanted = Counter(self._row(name, j).tobytes() for j in range(first, first + len(arrived)))
        found = Counter(tokens.astype(np.uint16).tobytes() for tokens in arrived)
        if wanted != found:
            numbers = sorted(int(tokens[1]) for tokens in arrived)
            expected = sorted(int(self._row(name, first + i)[1]) for i in range(len(arrived)))
            raise Violation(f"{name}: rows {numbers} arrived, j = {first}... are rows {expected}")
        for j in range(first, first + len(arrived)):
            self._count_in_epoch(name, j)
        self.served[name] = first + len(arrived)

    def _row(self, name: str, j: int) -> np.ndarray:
        shard, row = locate(self.orders[name], j)
        return self.rows[name][shard][row]

    def _count_in_epoch(self, name: str, j: int) -> None:
        seen = self.seen[name]
        number = int(self._row(name, j)[1])
        seen[number] += 1
        if seen[number] > 1:
            raise Violation(f"{name}: row {number} came twice in epoch {j // self.sizes[name]}")
        if len(seen) == self.sizes[name]:
            seen.clear()

    def _check_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        for rank, state in enumerate(states):
            if state != states[0]:
                raise Violation(f"rank {rank} has another state than rank 0")
            if state["step"] != self.step or list(state["served"]) != list(self.served.values()):
                raise Violation(
                    f"rank {rank} says step {state['step']}, served {state['served']}; "
                    f"it was step {self.step}, {list(self.served.values())}"
                )


_ARRAYS = ("input_ids", "labels", "domain_ids")

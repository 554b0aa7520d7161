"""A policy whose weights depend on the number of updates alone, so that every loop moves them alike."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ddkmix import DomainLosses


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotating:
    """Gives `share` of the mixture to one domain after the other."""

    share: float = 0.9

    def init(self, losses: DomainLosses, natural_weights: np.ndarray) -> dict[str, Any]:
        """The first domain's turn."""
        return self._state(0, len(losses.domains))

    def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
        """The next one's."""
        return self._state(state["turn"] + 1, len(losses.domains))

    def _state(self, turn: int, count: int) -> dict[str, Any]:
        weights = [self.share if i == turn % count else (1 - self.share) / (count - 1) for i in range(count)]
        return {"turn": turn, "mixture_weights": weights}

"""What the tests of the policies share: losses with everything measured, and whole runs of a policy."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ddkmix.policies import PolicyState, WeightPolicy
from tests.conftest import domain_losses

ROWS = 100
"""Rows of each domain between two evaluations."""


def full_losses(gaps: Sequence[float], *, step: int = 0, rows: Sequence[int] | None = None) -> Any:
    """Losses with these gaps in nats, with every optional column; step evaluations after the first."""
    above = np.maximum(np.array(gaps, dtype=np.float64), 0.0)
    served = np.full(len(gaps), ROWS * step) if rows is None else np.array(rows)
    return replace(domain_losses(gaps), excess_loss=above, forward_kl=np.abs(gaps) + 0.0, rows_served=served)


def states(
    policy: WeightPolicy, history: Sequence[Sequence[float]], natural: Sequence[float] | None = None
) -> list[PolicyState]:
    """The states after each evaluation of a run, of which the first is of the untrained student."""
    count = len(history[0])
    start = np.full(count, 1 / count) if natural is None else np.array(natural)
    found = [policy.init(full_losses(history[0]), start)]
    for step, gaps in enumerate(history[1:], start=1):
        found.append(policy.update(found[-1], full_losses(gaps, step=step)))
    return found


def weights(
    policy: WeightPolicy, history: Sequence[Sequence[float]], natural: Sequence[float] | None = None
) -> list[list[float]]:
    """The mixture weights after each evaluation."""
    return [state["mixture_weights"] for state in states(policy, history, natural)]

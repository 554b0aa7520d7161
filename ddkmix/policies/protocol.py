"""What a policy is, and what its answers are held to."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from ddkmix.errors import ConfigError
from ddkmix.types import DomainLosses

PolicyState = dict[str, Any]
"""What a policy remembers between intervals: JSON-able, with `mixture_weights`, a list of N shares that sum
to 1. Every other key is the policy's own."""


@runtime_checkable
class WeightPolicy(Protocol):
    """What a policy must offer: two pure functions."""

    def init(self, losses: DomainLosses, natural_weights: Float[np.ndarray, " N"]) -> PolicyState:
        """The state before the first step.

        Args:
            losses: those of the untrained student, nats per token.
            natural_weights: shares of the corpus as it is; sum to 1.
        """
        ...

    def update(self, state: PolicyState, losses: DomainLosses) -> PolicyState:
        """The state for the next interval.

        Args:
            state: what `init` or the last `update` gave.
            losses: those at the end of the last interval, nats per token.
        """
        ...


def checked_weights(policy: WeightPolicy, state: Any, losses: DomainLosses) -> Float[np.ndarray, " N"]:
    """The mixture weights of a state that a policy gave.

    Args:
        policy: for the message.
        state: its answer, which may be anything.
        losses: what it was asked about.

    Raises:
        ConfigError: they are not a distribution over the domains.
    """
    try:
        weights = np.asarray(state["mixture_weights"], dtype=np.float64)
    except (TypeError, ValueError, KeyError, IndexError):
        raise ConfigError(
            f"policy {type(policy).__name__} gave the state {str(state)[:200]}; it must be a dict whose "
            "'mixture_weights' is a list with one number for each domain, in the order of losses.domains."
        ) from None
    if (
        weights.shape != (len(losses.domains),)
        or not np.isfinite(weights).all()
        or (weights < 0).any()
        or abs(weights.sum() - 1) > 1e-9
    ):
        raise ConfigError(
            f"policy {type(policy).__name__} gave mixture weights {weights.tolist()}; they must be "
            f"{len(losses.domains)} numbers >= 0 that sum to 1."
        )
    return weights

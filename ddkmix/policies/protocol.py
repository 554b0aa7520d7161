"""What a policy is, and what its answers are held to."""

from dataclasses import fields, is_dataclass, replace
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


def at_interval(policy: WeightPolicy, interval_steps: int) -> WeightPolicy:
    """A policy that knows how many steps lie between its updates, if it has a field for it that is unset.

    Args:
        policy: with an `interval_steps` of None, inside guards too (a field `policy`); any other stays.
        interval_steps: optimizer steps between two updates.
    """
    if not is_dataclass(policy) or isinstance(policy, type):
        return policy
    names = {field.name for field in fields(policy) if field.init}
    changed: dict[str, Any] = {}
    if "interval_steps" in names and getattr(policy, "interval_steps") is None:  # noqa: B009
        changed["interval_steps"] = interval_steps
    inner = getattr(policy, "policy", None) if "policy" in names else None
    if isinstance(inner, WeightPolicy) and (told := at_interval(inner, interval_steps)) is not inner:
        changed["policy"] = told
    return replace(policy, **changed) if changed else policy


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

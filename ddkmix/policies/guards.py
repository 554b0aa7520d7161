"""Guards: what holds the mixture weights of any policy. A policy around another one.

The policy inside keeps its own memory, as if nobody held it: what the guards cut off changes the mixture,
never what the policy remembers. All guards are bounds, and one projection keeps all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import ValidationError

from ddkmix.config import Guards
from ddkmix.errors import ConfigError
from ddkmix.policies.bounds import nearest_mixture
from ddkmix.policies.evidence import require_errors, weight_errors
from ddkmix.policies.protocol import PolicyState, WeightPolicy, checked_weights
from ddkmix.types import DomainLosses
from ddkmix.validation import explain

_ROUNDING = 1e-12
"""By which ten times 0.1 may miss 1, and DDK's largest share (1 + 1 / N) / 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guarded:
    """A policy whose mixture keeps bounds.

    With the weights w in force, the policy's own proposal p and its standard error se(p), the next mixture is
    the one nearest to p (the smallest KL(w' || p)) among those with, for every domain i,

        floor <= w'[i] <= cap
        |w'[i] - w[i]| <= max_move
        w'[i] between w[i] and w[i] + sign(p[i] - w[i]) max(|p[i] - w[i]| - evidence se(p)[i], 0)

    The first is kept by the first mixture too, which is the policy's own, projected. w keeps all three, so
    there always is such a mixture. se(p) is `gap_error` carried through the policy's update by differences
    (the delta method); a share whose move is within `evidence` standard errors stays exactly as it is. It
    does not act on a policy that weighs the errors itself (`marginal_gain`, which decides what is noise). A
    floor or cap that is not set spares what already lies outside in the corpus, natural weights: it bounds by
    these instead. It does not bound a policy that never moves. The first `warmup_intervals` updates return w,
    which the policy inside does not know. Where a domain is at its `max_epochs`, the planner shares its
    weight among the others, even beyond the cap.

    A proposal of (0.7, 0.2, 0.1) under a cap of 0.4: the other two share what is left, 0.6, at 2 to 1.

    >>> import numpy as np
    >>> from ddkmix import DomainLosses
    >>> from ddkmix.policies import Static, guarded
    >>> losses = DomainLosses.from_means({"code": 3.0, "math": 2.0, "prose": 2.0})
    >>> policy = guarded(
    ...     Static(weights={"code": 7.0, "math": 2.0, "prose": 1.0}), {"cap": 0.4, "evidence": 0.0}
    ... )
    >>> state = policy.init(losses, natural_weights=np.full(3, 1 / 3))
    >>> [round(share, 6) for share in state["mixture_weights"]]
    [0.4, 0.4, 0.2]
    """

    policy: WeightPolicy
    """What proposes."""
    guards: Guards
    """What holds."""

    @property
    def needs(self) -> frozenset[str]:
        """What the policy inside wants measured beside the losses."""
        needs: frozenset[str] = getattr(self.policy, "needs", frozenset())
        return needs

    @property
    def reads_errors(self) -> bool:
        """Whether `evidence` acts; not where a policy never moves, or weighs the errors itself."""
        own = _says(self.policy, "fixed") or _says(self.policy, "weighs_errors")
        return self.guards.evidence > 0 and not own

    def init(self, losses: DomainLosses, natural_weights: Float[np.ndarray, " N"]) -> PolicyState:
        """The policy's first mixture between floor and cap.

        Args:
            losses: those of the untrained student, nats per token.
            natural_weights: shares of the corpus as it is; sum to 1.

        Raises:
            ConfigError: the guards do not fit the number of domains, or evidence lacks standard errors.
        """
        check_guards(self.guards, len(losses.domains))
        if self.reads_errors:
            require_errors(losses)  # now, and not after the first interval
        inner = self.policy.init(losses, natural_weights)
        proposed = checked_weights(self.policy, inner, losses)
        weights = nearest_mixture(proposed, *self._bounds(natural_weights))
        return {
            "mixture_weights": weights.tolist(),
            "policy": inner,
            "natural_weights": natural_weights.tolist(),
            "updates": 0,
            "weight_errors": None,
        }

    def update(self, state: PolicyState, losses: DomainLosses) -> PolicyState:
        """The mixture nearest to the policy's among those that the guards allow.

        Args:
            state: what `init` or the last `update` gave; `policy` is the state of the policy inside.
            losses: those at the end of the last interval, nats per token.

        Raises:
            ConfigError: evidence lacks standard errors, or the policy's weights are no distribution.
        """
        inner = self.policy.update(state["policy"], losses)
        proposed = checked_weights(self.policy, inner, losses)
        low, high = self._bounds(np.array(state["natural_weights"]))
        now = nearest_mixture(np.array(state["mixture_weights"]), low, high)
        updates, errors = state["updates"] + 1, None
        if updates > self.guards.warmup_intervals:
            if self.reads_errors:
                errors = self._errors(state["policy"], losses)
            least, most = self._reach(now, proposed, errors)
            now = nearest_mixture(proposed, np.maximum(low, least), np.minimum(high, most))
        return {
            "mixture_weights": now.tolist(),
            "policy": inner,
            "natural_weights": state["natural_weights"],
            "updates": updates,
            "weight_errors": None if errors is None else errors.tolist(),
        }

    def _bounds(
        self, natural: Float[np.ndarray, " N"]
    ) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        """Floor and cap of every domain."""
        count, floor, cap = len(natural), self.guards.floor, self.guards.cap
        mild = (0.0, 1.0) if _says(self.policy, "fixed") else (0.1 / count, (1 + 1 / count) / 2 + _ROUNDING)
        low = np.minimum(mild[0], natural) if floor is None else np.full(count, floor)
        high = np.maximum(mild[1], natural) if cap is None else np.full(count, cap)
        return low, high

    def _errors(self, before: PolicyState, losses: DomainLosses) -> Float[np.ndarray, " N"]:
        """Standard errors of the proposal."""
        require_errors(losses)
        return weight_errors(
            lambda other: checked_weights(self.policy, self.policy.update(before, other), other),
            losses,
            fits_laws=_says(self.policy, "fits_laws"),
        )

    def _reach(
        self,
        now: Float[np.ndarray, " N"],
        proposed: Float[np.ndarray, " N"],
        errors: Float[np.ndarray, " N"] | None,
    ) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        """Smallest and largest share that `max_move` and the evidence let every domain have."""
        low, high = now - self.guards.max_move, now + self.guards.max_move
        if errors is None:
            return low, high
        move = proposed - now
        target = now + np.sign(move) * np.maximum(np.abs(move) - self.guards.evidence * errors, 0.0)
        return np.maximum(low, np.minimum(now, target)), np.minimum(high, np.maximum(now, target))


def guarded(policy: WeightPolicy, guards: Guards | Mapping[str, Any] | bool | str | None) -> WeightPolicy:
    """A policy with guards around it, or as it is where there are none.

    Args:
        policy: what proposes.
        guards: settings, as a `ddkmix.config.Guards` or by name ({"cap": 0.4}); True or "on" for the
            defaults; None, False, "off" and guards that bound nothing leave the policy alone.

    Raises:
        ConfigError: a setting is wrong, or the policy has guards already.
    """
    if guards is None:
        return policy
    if not isinstance(guards, Guards | Mapping | bool) and guards not in ("on", "off"):
        raise ConfigError(f"guards = {guards!r}; give on, off or settings such as {{cap: 0.4}}.")
    try:
        settings = Guards.model_validate(dict(guards) if isinstance(guards, Mapping) else guards)
    except ValidationError as error:
        raise ConfigError(" ".join(explain(error, "guards", Guards).split())) from None
    if isinstance(policy, Guarded):
        raise ConfigError(f"policy {type(policy.policy).__name__} has guards already; give them once.")
    if settings == Guards.model_validate(False):
        return policy
    return Guarded(policy=policy, guards=settings)


def describe(policy: WeightPolicy, num_domains: int) -> str:
    """What holds a policy's weights over so many domains, in a few words: `floor 0.0125, cap 0.5625`.

    Bounds that are not set are meant for domains that lie within them in the corpus.
    """
    if not isinstance(policy, Guarded):
        return "off"
    guards, uniform = policy.guards, np.full(num_domains, 1 / num_domains)
    low, high = (float(bound[0]) for bound in policy._bounds(uniform))
    words = [
        (low > 0, f"floor {low:.4g}"),
        (high < 1, f"cap {high:.4g}"),
        (guards.max_move < 1, f"largest move {guards.max_move:g}"),
        (guards.warmup_intervals > 0, f"warm-up of {guards.warmup_intervals} updates"),
        (policy.reads_errors, f"evidence {guards.evidence:g} standard errors"),
        (guards.evidence > 0 and _says(policy.policy, "weighs_errors"), "evidence left to the policy"),
    ]
    return ", ".join(text for acts, text in words if acts) or "off"


def _says(policy: WeightPolicy, trait: str) -> bool:
    """`fixed`, `weighs_errors` or `fits_laws`: what a policy may say of itself."""
    return bool(getattr(policy, trait, False))


def unguarded(policy: WeightPolicy) -> WeightPolicy:
    """The policy inside the guards; itself where it has none.

    Args:
        policy: with or without them.
    """
    return policy.policy if isinstance(policy, Guarded) else policy


def check_guards(guards: Guards, num_domains: int) -> None:
    """Refuse bounds that no mixture of so many domains keeps.

    Args:
        guards: the settings.
        num_domains: domains of the mixture.

    Raises:
        ConfigError: the floors sum to more than 1 or the caps to less.
    """
    floor, cap, share = guards.floor, guards.cap, 1 / num_domains
    if floor is not None and floor * num_domains > 1 + _ROUNDING:
        raise ConfigError(
            f"guards.floor = {floor:g} for each of {num_domains} domains is {floor * num_domains:g}, more "
            f"than the whole mixture; use at most {share:.6g}."
        )
    if cap is not None and cap * num_domains < 1 - _ROUNDING:
        raise ConfigError(
            f"guards.cap = {cap:g} for each of {num_domains} domains is {cap * num_domains:g}, less than the "
            f"whole mixture; use at least {share:.6g}."
        )

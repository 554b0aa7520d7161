"""Weight policies: the losses of the domains in, mixture weights out. One method a file, all pure.

A policy is a frozen dataclass whose fields are its parameters. Its state is JSON-able and holds
`mixture_weights`; the history of states is the history of weights. No torch, no IO, no logging.
`signal.py` says what policies look at; one that looks at what is not always measured says so in `needs`.
To add one: write the file, add a line to `POLICIES`. Outside the package: `name: package.module:Class`.

Axis letter: N domains, in the order of `ddkmix.DomainLosses.domains`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from ddkmix.config import Guards, Named
from ddkmix.errors import ConfigError, NumericsError
from ddkmix.plugins import build
from ddkmix.policies.ado import Ado
from ddkmix.policies.chi2_dro import Chi2Dro
from ddkmix.policies.ddk import Ddk
from ddkmix.policies.doremi import Doremi
from ddkmix.policies.guards import Guarded, guarded
from ddkmix.policies.marginal_gain import MarginalGain
from ddkmix.policies.odm import Odm
from ddkmix.policies.protocol import PolicyState, WeightPolicy, checked_weights
from ddkmix.policies.sheared import Sheared
from ddkmix.policies.signal import Signal, signal_of
from ddkmix.policies.skill_it import SkillIt
from ddkmix.policies.softmax import Softmax
from ddkmix.policies.static import Static
from ddkmix.policies.update import exponentiated_update
from ddkmix.policies.velocitune import Velocitune
from ddkmix.types import DomainLosses, simplex_vector

__all__ = [
    "POLICIES",
    "Ado",
    "Chi2Dro",
    "Ddk",
    "Doremi",
    "Guarded",
    "MarginalGain",
    "Odm",
    "PolicyState",
    "Sheared",
    "Signal",
    "SkillIt",
    "Softmax",
    "Static",
    "Velocitune",
    "WeightPolicy",
    "exponentiated_update",
    "guarded",
    "reweight",
    "signal_of",
]

POLICIES: dict[str, type] = {
    "ado": Ado,
    "chi2_dro": Chi2Dro,
    "ddk": Ddk,
    "doremi": Doremi,
    "marginal_gain": MarginalGain,
    "odm": Odm,
    "sheared": Sheared,
    "skill_it": SkillIt,
    "softmax": Softmax,
    "static": Static,
    "velocitune": Velocitune,
}
"""The policies that a config can name; each class states its equation, its source, and where code and paper
of that source part."""


def build_policy(spec: Named) -> WeightPolicy:
    """The policy that a config names.

    Raises:
        ConfigError: the name or a parameter is wrong.
    """
    return policy_of(spec.model_dump())


def policy_of(policy: "str | Mapping[str, Any] | WeightPolicy") -> WeightPolicy:
    """A policy by its name, by name and parameters, or as it is.

    Args:
        policy: `"ddk"`, `{"name": "ddk", "signal": "loss_gap"}`, or an object with `init` and `update`.

    Raises:
        ConfigError: the name or a parameter is wrong.
    """
    if isinstance(policy, str):
        policy = {"name": policy}
    if not isinstance(policy, Mapping):
        if isinstance(policy, type) or not isinstance(policy, WeightPolicy):
            raise ConfigError(
                f"policy = {policy!r}; give a name, a mapping with a name and parameters, or an object (not "
                "its class) with init and update."
            )
        return policy
    built: WeightPolicy = build(dict(policy), POLICIES, where="policy")
    return built


def reweight(
    policy: "str | Mapping[str, Any] | WeightPolicy",
    losses: DomainLosses,
    state: PolicyState | None = None,
    natural_weights: Mapping[str, float] | None = None,
    guards: Guards | Mapping[str, Any] | bool | None = None,
) -> tuple[dict[str, float], PolicyState]:
    """One update of a policy as a plain function: losses in, mixture weights out.

    Args:
        policy: `"ddk"`, `{"name": "ddk", "signal": "loss_gap"}`, or an object with `init` and `update`.
        losses: held-out losses of every domain, nats per token.
        state: what the last call returned; None the first time.
        natural_weights: shares of the domains in the corpus, for policies that start from them; uniform when
            None.
        guards: what holds the weights, as a config has it ({"cap": 0.4, "evidence": 0.0}; True for a config's
            defaults); None holds nothing. The same at every call.

    Returns:
        Mixture weights by domain, and the JSON-able state for the next call.

    Raises:
        ConfigError: the policy, its weights or the guards are wrong.
        NumericsError: a loss is not finite.

    >>> from ddkmix import DomainLosses, reweight
    >>> losses = DomainLosses.from_means({"code": 3.0, "math": 2.0}, {"code": 1.0, "math": 1.0})
    >>> weights, state = reweight({"name": "ddk", "signal": "loss_gap"}, losses)
    >>> weights  # DDK's first interval follows the corpus
    {'code': 0.5, 'math': 0.5}
    >>> weights, state = reweight({"name": "ddk", "signal": "loss_gap"}, losses, state)
    >>> {name: round(weight, 4) for name, weight in weights.items()}
    {'code': 0.6904, 'math': 0.3096}
    """
    if natural_weights is None:
        vector = np.full(len(losses.domains), 1 / len(losses.domains))
    else:
        vector = simplex_vector(natural_weights, losses.domains, where="natural_weights")
    state = next_state(guarded(policy_of(policy), guards), state, losses, vector)
    return dict(weights_of(state, losses)), state


def next_state(
    policy: WeightPolicy,
    state: PolicyState | None,
    losses: DomainLosses,
    natural_weights: Float[np.ndarray, " N"],
) -> PolicyState:
    """The policy's first or next state, with everything checked that a policy promises.

    Raises:
        NumericsError: a loss is not finite; the policy is not asked.
        ConfigError: the policy's weights are not a distribution.
    """
    for name, column in (
        ("student_loss", losses.student_loss),
        ("teacher_loss", losses.teacher_loss),
    ):
        if not np.isfinite(column).all():
            bad = {d: float(v) for d, v in zip(losses.domains, column, strict=True) if not np.isfinite(v)}
            raise NumericsError(
                f"held-out {name} is not finite: {bad}; weights are not updated from it. Lower "
                "optimizer.lr or look at the rows of these domains."
            )
    new = policy.init(losses, natural_weights) if state is None else policy.update(state, losses)
    checked_weights(policy, new, losses)
    return new


def weights_of(state: PolicyState, losses: DomainLosses) -> Mapping[str, float]:
    """A state's mixture weights by domain."""
    return dict(zip(losses.domains, map(float, state["mixture_weights"]), strict=True))

"""Policies that play in a world: interval by interval, as the `Reweighter` would ask them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from ddkmix.policies import POLICIES, WeightPolicy, guarded, next_state, policy_of
from simulator.optimum import OBJECTIVES, best_fixed, lower_bound, power_mean, random_search, value_of
from simulator.worlds import World, draw_world

OURS = "marginal_gain"
AIMS: dict[str, str | float] = {"mean gap": "mean", "power mean 4": 4.0, "worst gap": "worst"}
"""What our policy is told for each objective of the simulator."""
SPECS: dict[str, dict[str, Any]] = {
    "uniform": {"name": "static", "weights": "uniform"},
    "natural": {"name": "static", "weights": "natural"},
    "ddk": {"name": "ddk"},
    "ddk (loss_gap)": {"name": "ddk", "signal": "loss_gap"},
}
"""Contestants with parameters of their own; every other policy of the package plays with its defaults."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A world, what was possible in it and what each contestant reached; all in nats per token."""

    world: World
    best: Mapping[str, float]
    """By objective: the best fixed mixture in hindsight."""
    bound: Mapping[str, float]
    """By objective: no mixture does better than this."""
    reached: Mapping[str, Mapping[str, float]]
    """By contestant and objective: what the run ended with."""
    guards: bool = False
    """Whether everybody had a config's default guards."""

    def regret(self, contestant: str, objective: str) -> float:
        """Above the best fixed mixture, nats per token."""
        return self.reached[contestant][objective] - self.best[objective]

    def against_uniform(self, contestant: str, objective: str) -> float:
        """What it ended with as a share of what uniform ended with, less 1."""
        return self.reached[contestant][objective] / self.reached["uniform"][objective] - 1


def contestants() -> dict[str, dict[str, Any]]:
    """Specs of all who play, by the name in the table; ours is not among them, it plays once an objective."""
    return SPECS | {name: {"name": name} for name in POLICIES if name not in ("static", "ddk", OURS)}


def play(world: World, policy: WeightPolicy) -> Float[np.ndarray, " N"]:
    """Rows of each domain that a run with this policy serves.

    Args:
        world: where it plays; it sees noisy losses and rows served, and nothing else.
        policy: asked before the first interval and after every one but the last.
    """
    rows, state = np.zeros(world.count), None
    for interval in range(world.intervals):
        state = next_state(policy, state, world.losses(rows, interval), world.natural)
        rows = rows + world.rows_per_interval * np.asarray(state["mixture_weights"])
    return rows


def run_world(
    seed: int,
    names: Mapping[str, dict[str, Any]],
    ours: Callable[[str | float], WeightPolicy] | None = None,
    *,
    kind: str | None = None,
    guards: bool = False,
) -> Outcome:
    """Everybody plays in the world of a seed.

    Args:
        seed: of the world.
        names: specs of the contestants, by name; `uniform` must be among them.
        ours: makes our policy for an objective; None for the one of the package.
        kind: of the world; that of the seed where None.
        guards: whether everybody has a config's default guards.
    """
    world = draw_world(seed, kind)
    shares = {name: best_fixed(world, power) for name, power in OBJECTIVES.items()}
    best = {name: value_of(world, shares[name], power) for name, power in OBJECTIVES.items()}
    bound = {name: lower_bound(world, shares[name], power) for name, power in OBJECTIVES.items()}
    reached = {}
    for name, spec in names.items():
        gaps = world.gaps(play(world, guarded(policy_of(spec), guards)))
        reached[name] = {aim: float(power_mean(gaps, power)) for aim, power in OBJECTIVES.items()}
    ours = (lambda aim: policy_of({"name": OURS, "objective": aim})) if ours is None else ours
    reached[OURS] = {
        name: float(power_mean(world.gaps(play(world, guarded(ours(AIMS[name]), guards))), power))
        for name, power in OBJECTIVES.items()
    }
    return Outcome(world=world, best=best, bound=bound, reached=reached, guards=guards)


def luck(outcome: Outcome, points: int = 2000) -> float:
    """By how much random search beats the best fixed mixture, over all objectives: <= 0 if it is the best."""
    return max(
        outcome.best[name] - random_search(outcome.world, power, points=points)
        for name, power in OBJECTIVES.items()
    )

"""What the outcomes of many worlds say: Markdown tables for people, one JSON object for programs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from simulator.optimum import OBJECTIVES
from simulator.play import OURS, Outcome
from simulator.worlds import KINDS

RIVALS = ("ddk", "uniform")
"""Whose mean regret ours is to halve."""
MOST_ABOVE_UNIFORM = 0.05


def regrets(outcomes: Sequence[Outcome], contestant: str, objective: str) -> np.ndarray:
    """One number a world, nats per token."""
    return np.array([outcome.regret(contestant, objective) for outcome in outcomes])


def markdown(outcomes: Sequence[Outcome], objective: str) -> str:
    """A row for each contestant: mean (worst) regret by kind of world; the worst world against uniform.

    The best fixed mixture in hindsight has none by definition; its row says what it ends with on average.
    """
    kinds = [kind for kind in KINDS if any(outcome.world.kind == kind for outcome in outcomes)]
    names = sorted(outcomes[0].reached, key=lambda name: regrets(outcomes, name, objective).mean())
    held = "default guards" if outcomes[0].guards else "no guards"
    lines = [
        f"| {objective}: regret, nats ({held}) | all | {' | '.join(kinds)} | against uniform |",
        f"|---|{'---:|' * (len(kinds) + 2)}",
    ]
    best = np.array([outcome.best[objective] for outcome in outcomes])
    above = 100 * max(best / [outcome.reached["uniform"][objective] for outcome in outcomes] - 1)
    zeros = " | ".join(["0"] * (len(kinds) + 1))
    lines.append(f"| best fixed ({best.mean():.3f} nats) | {zeros} | {above:+.1f} % |")
    for name in names:
        groups = [outcomes, *([o for o in outcomes if o.world.kind == kind] for kind in kinds)]
        cells = [_cell(regrets(group, name, objective)) for group in groups]
        above = 100 * max(outcome.against_uniform(name, objective) for outcome in outcomes)
        bold = "**" if name == OURS else ""
        lines.append(f"| {bold}{name}{bold} | {' | '.join(cells)} | {above:+.1f} % |")
    return "\n".join(lines)


def _cell(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ({values.max():.3f})"


def goals(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The goals of the policy, one entry an objective: what was reached, and whether that is enough."""
    found = []
    for objective in OBJECTIVES:
        own = regrets(outcomes, OURS, objective).mean()
        rivals = [name for name in RIVALS if name in outcomes[0].reached]
        shares = {name: own / regrets(outcomes, name, objective).mean() for name in rivals}
        worst = max(outcomes, key=lambda outcome: outcome.against_uniform(OURS, objective))
        above = worst.against_uniform(OURS, objective)
        found.append(
            {
                "objective": objective,
                "mean regret, as a share of that of": {name: float(share) for name, share in shares.items()},
                "worst world against uniform": float(above),
                "seed of that world": worst.world.seed,
                "reached": bool(max(shares.values()) <= 0.5 and above <= MOST_ABOVE_UNIFORM),
            }
        )
    return found


def as_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything, world by world, with the goals; the certificate says how good the best mixtures are."""
    return {
        "guards": outcomes[0].guards,
        "goals": goals(outcomes),
        "certificate": {
            "a better fixed mixture gains at most, nats": max(
                o.best[name] - o.bound[name] for o in outcomes for name in OBJECTIVES
            ),
            "lowest regret, nats": min(
                o.regret(n, a) for o in outcomes for n in o.reached for a in OBJECTIVES
            ),
        },
        "worlds": [
            {
                "seed": outcome.world.seed,
                "kind": outcome.world.kind,
                "domains": outcome.world.count,
                "intervals": outcome.world.intervals,
                "rows": outcome.world.budget,
                "best": dict(outcome.best),
                "reached": {name: dict(values) for name, values in outcome.reached.items()},
            }
            for outcome in outcomes
        ],
    }

"""How long an update of every policy takes. Results: BENCHMARKS.md.

    python tools/bench_policies.py [--domains 300] [--updates 40] [--quick]

Medians over the later updates of one run, whose gaps shrink with noise and whose states are full: of the
policy as it is, and inside the default guards, which ask it several times for its standard errors. Goals for
both: 5 ms for 300 domains, 1 s for policies that fit laws.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from bench_loader import machine, say  # noqa: E402

from ddkmix.policies import POLICIES, WeightPolicy, guarded, next_state  # noqa: E402
from ddkmix.types import DomainLosses  # noqa: E402

FITTING = {"ado", "marginal_gain"}
"""Policies that fit a law per domain."""
GOAL_MS, GOAL_MS_FITTING = 5.0, 1000.0


def losses_at(step: int, domains: int) -> DomainLosses:
    """Made-up losses whose gaps shrink as power laws, with noise; nats per token."""
    noise = np.random.default_rng([domains, step])
    names = [f"domain-{i:04d}" for i in range(domains)]
    gaps = np.linspace(0.5, 4.0, domains) * (step + 1.0) ** -np.linspace(0.1, 0.6, domains)
    gaps = gaps + noise.normal(0.0, 0.01, domains)
    losses = DomainLosses.from_means(dict(zip(names, 2.0 + gaps, strict=True)), dict.fromkeys(names, 2.0))
    excess = np.maximum(gaps, 0.0)
    rows = np.full(domains, 100 * step)
    errors = np.full(domains, 0.01)
    return replace(losses, gap_error=errors, excess_loss=excess, forward_kl=excess, rows_served=rows)


def time_updates(policy: WeightPolicy, domains: int, updates: int) -> list[float]:
    """Milliseconds of each update, the checks around it included."""
    uniform = np.full(domains, 1.0 / domains)
    state, taken = next_state(policy, None, losses_at(0, domains), uniform), []
    for step in range(1, updates + 1):
        losses = losses_at(step, domains)
        started = time.perf_counter()
        state = next_state(policy, state, losses, uniform)
        taken.append(1000 * (time.perf_counter() - started))
    return taken


def time_late(policy: WeightPolicy, domains: int, updates: int) -> dict[str, float]:
    """Median and slowest of the later updates, with all the history that a policy keeps."""
    late = time_updates(policy, domains, updates)[updates // 2 :]
    return {"median_ms": statistics.median(late), "slowest_ms": max(late)}


def main(arguments: list[str] | None = None) -> int:
    """Print a table, or JSON; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--domains", type=int, default=300)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs; proves nothing")
    args = parser.parse_args(arguments)
    domains, updates = (5, 8) if args.quick else (args.domains, args.updates)
    result: dict[str, Any] = {"machine": machine(), "domains": domains, "updates": updates, "policies": {}}
    say(f"{domains} domains, {updates} updates, ms an update: median, slowest; the same with default guards")
    missed = []
    for name, kind in POLICIES.items():
        bare, held = (time_late(guarded(kind(), guards), domains, updates) for guards in (None, True))
        result["policies"][name] = {**bare, "guarded": held}
        goal = GOAL_MS_FITTING if name in FITTING else GOAL_MS
        misses = max(bare["median_ms"], held["median_ms"]) > goal
        missed += [name] if misses else []
        cells = " ".join(
            f"{taken[key]:9.3f}" for taken in (bare, held) for key in ("median_ms", "slowest_ms")
        )
        say(f"{name:13} {cells}   goal {goal:.0f}{' MISSED' if misses else ''}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())

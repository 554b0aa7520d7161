"""Every policy in hundreds of random worlds whose learning curves are known: regret against the best mixture.

    python tools/simulate_policies.py                      # worlds 0..199: for development
    python tools/simulate_policies.py --verify             # worlds 1000..1199: kept for verification
    python tools/simulate_policies.py --guards             # everybody inside a config's default guards
    python tools/simulate_policies.py --worlds 12 --policies ddk --json results.json

Regret is what a run ends with above what the best fixed mixture in hindsight would have ended with, in nats
per token, for three objectives: the mean gap, the power mean of the gaps with exponent 4, the worst gap. See
tools/simulator/worlds.py for the laws. Goals for our policy: mean regret at most half of uniform's and DDK's,
and no world in which it ends more than 5 % above uniform; of these two, those that play.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from simulator.optimum import OBJECTIVES  # noqa: E402
from simulator.play import contestants, luck, run_world  # noqa: E402
from simulator.table import as_json, markdown  # noqa: E402

DEVELOPMENT, VERIFICATION = range(200), range(1000, 1200)


def main(arguments: Sequence[str] | None = None) -> int:
    """Play, print tables, write JSON. Exit code 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=200, help="how many, from the first")
    parser.add_argument("--verify", action="store_true", help="worlds 1000..1199 instead of 0..199")
    parser.add_argument("--guards", action="store_true", help="everybody inside the default guards")
    parser.add_argument("--policies", nargs="*", help="only these beside uniform and ours")
    parser.add_argument("--json", type=Path, help="everything, world by world")
    parser.add_argument("--check", action="store_true", help="hold best mixtures against random search too")
    options = parser.parse_args(arguments)
    if not 1 <= options.worlds <= len(DEVELOPMENT):
        parser.error(
            f"--worlds {options.worlds}: must be 1 to {len(DEVELOPMENT)}; there are no more of a kind"
        )
    names = contestants()
    if options.policies is not None:
        unknown = sorted(set(options.policies) - set(names))
        if unknown:
            parser.error(f"unknown policies {unknown}; known: {', '.join(names)}")
        names = {name: spec for name, spec in names.items() if name in {"uniform", *options.policies}}
    seeds = (VERIFICATION if options.verify else DEVELOPMENT)[: options.worlds]
    started = time.perf_counter()
    outcomes = [run_world(seed, names, guards=options.guards) for seed in seeds]
    for objective in OBJECTIVES:
        print(f"\n{markdown(outcomes, objective)}")
    report = {"seeds": [seeds[0], seeds[-1]], **as_json(outcomes)}
    if options.check:
        report["certificate"]["random search gains, nats"] = max(map(luck, outcomes))
    print(f"\n{json.dumps({key: report[key] for key in ('seeds', 'goals', 'certificate')}, indent=1)}")
    print(f"{len(outcomes)} worlds in {time.perf_counter() - started:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(goal["reached"] for goal in report["goals"]) else 1


if __name__ == "__main__":
    sys.exit(main())

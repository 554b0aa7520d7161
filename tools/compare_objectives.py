"""Train one student with several objectives and seeds, and compare what it answers before and after.

    python tools/compare_objectives.py configs/dpkd_quickstart.yaml student.model=RUN/student --first-steps 60

With --first-steps every seed's student is trained with cross-entropy on the data's responses first, and all
methods begin with that one, as in the papers; `sft` goes on with it for as many steps as the others have.

The teacher's responses must be there (`ddkmix generate CONFIG --by teacher`). Every run is `ddkmix train`
with the objective's lines in the place of the config's; its measurements are `ddkmix rouge` and the run's
own held-out losses. A run that is whole is not made again, so the tool goes on where it was stopped;
results.json holds all numbers as they come.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ddkmix.fingerprint import write_atomically

SFT = ["objective={name: distill}", "loss=[{name: cross_entropy, weight: 1.0}]"]
METHODS = {
    "sft": SFT,
    "seqkd": ["objective={name: seqkd}", "loss=[{name: cross_entropy, weight: 1.0}]"],
    "gkd": ["objective={name: gkd, share: 0.5}", "loss=[{name: jsd, weight: 1.0, beta: 0.5}]"],
    "dpkd": [],
}
"""What each changes in the config; DPKD is the config's own."""

COLUMNS = ("rouge_l", "gap", "nats", "tokens", "ended")
"""Rouge-L, then on held-out responses the student's gap to the teacher and its loss in nats per token, mean
tokens of its own responses and the share of those that it ended by itself."""


def main(arguments: list[str] | None = None) -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value of the config, for all runs")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--first-steps", type=int, default=0, help="steps of cross-entropy on the data before"
    )
    asked = parser.parse_intermixed_args(arguments)
    results: dict[str, dict[str, float]] = {}

    def measured(name: str, seed: int, *overrides: str) -> Path:
        """Train and measure, unless that was done; the first run says what was before all of them."""
        run_dir = asked.out / f"{name}-{seed}"
        own = [*asked.overrides, f"seed={seed}", *overrides, f"run_dir={run_dir}"]
        _claim(asked.out / f"{name}-{seed}.json", own)
        if not (run_dir / "student").exists():
            resume = ["--resume"] if (run_dir / "config.yaml").exists() else []
            _ddkmix("train", str(asked.config), *own, *resume)
        first, last = _losses(run_dir)
        if "before" not in results:
            results["before"] = {**first, **_rouge(asked.out / "before.json", asked.config, own)}
        student = run_dir / "student"
        after = _rouge(run_dir / "rouge.json", asked.config, own, "--student", str(student))
        results[f"{name}-{seed}"] = {**last, **after}
        write_atomically(asked.out / "results.json", json.dumps(results, indent=1) + "\n")
        return student

    for seed in asked.seeds:
        begun = []
        if asked.first_steps:
            student = measured("start", seed, *SFT, f"trainer.steps={asked.first_steps}")
            # other rows than those it began with, and the same for all methods
            begun = [f"student.model={student}", f"seed={seed + 1000}"]
        for method in asked.methods:
            measured(method, seed, *METHODS[method], *begun)
    print(table(results, ["start", *asked.methods] if asked.first_steps else asked.methods))


def table(results: dict[str, dict[str, float]], methods: list[str]) -> str:
    """Markdown: means over seeds, with the standard deviation over seeds where there are several.

    Args:
        results: `COLUMNS` by `before` or METHOD-SEED.
        methods: rows of the table, after `before`.
    """
    lines = [f"| objective | seeds | {' | '.join(COLUMNS)} |", "|---|--:|" + "--:|" * len(COLUMNS)]
    for method in ["before", *methods]:
        own = [numbers for name, numbers in results.items() if name.rpartition("-")[0] == method]
        own = own or [results[method]] if method in results else own
        cells = [_cell([numbers[column] for numbers in own]) for column in COLUMNS if own]
        lines.append(f"| {method} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def _losses(run_dir: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Gap and student's loss on held-out responses, before and after: means over their tokens."""
    lines = (run_dir / "intervals.jsonl").read_text().splitlines()
    found = []
    for line in (lines[0], lines[-1]):
        domains = list(json.loads(line)["losses"].values())
        tokens = sum(domain["num_tokens"] for domain in domains)
        student, teacher = (
            sum(domain[f"{who}_loss"] * domain["num_tokens"] for domain in domains) / tokens
            for who in ("student", "teacher")
        )
        found.append({"gap": student - teacher, "nats": student})
    return found[0], found[1]


def _rouge(path: Path, config: Path, overrides: list[str], *options: str) -> dict[str, float]:
    """What `ddkmix rouge` says, kept beside the run."""
    if not path.exists():
        said = _ddkmix("rouge", str(config), *overrides, *options, "--format", "json")
        write_atomically(path, said)
    rows: dict[str, Any] = json.loads(path.read_text())["student"]["all_rows"]
    return {name: float(rows[name]) for name in ("rouge_l", "tokens", "ended")}


def _claim(path: Path, overrides: list[str]) -> None:
    """Write down what a run is made with; one that was made otherwise does not count as this one."""
    said = json.dumps(overrides, indent=1)
    if path.exists() and path.read_text() != said:
        raise SystemExit(f"{path} says that this run was made with other settings; choose another --out.")
    write_atomically(path, said)


def _ddkmix(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ddkmix", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


if __name__ == "__main__":
    main()

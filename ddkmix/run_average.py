"""The mixture that a run had on average, from its directory: what a static run can take."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from ddkmix.errors import RunError

__all__ = ["average_weights"]


def average_weights(run_dir: str | Path) -> dict[str, float]:
    """Mixture weights of a run, each counted for as many steps as it was in force.

        w[i] = sum over intervals of (last step - first step) w_interval[i] / steps until the last evaluation

    These are the weights that were set, of `intervals.jsonl`: with their floors, caps and limits of epochs. A
    run that is still going on counts until its last evaluation. It is DoReMi's result (arXiv 2305.10429),
    and the control of Velocitune (arXiv 2411.14318), for any policy.

        average_weights("runs/ddk")  # {'code': 0.31, 'prose': 0.69}

    Args:
        run_dir: the folder of a run of `ddkmix train`.

    Returns:
        One weight for each domain; they sum to 1.

    Raises:
        RunError: the folder is no run, has no two evaluations at different steps, or its domains changed.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise RunError(f"{run_dir} is not a run directory (no config.yaml); give the run_dir of a run.")
    path = run_dir / "intervals.jsonl"
    records = list(_records(path)) if path.is_file() else []
    steps = records[-1]["step"] - records[0]["step"] if records else 0
    if not steps:
        raise RunError(
            f"{path} has {len(records)} evaluations; an average over time needs two, at different steps. Let "
            "the run go on, or give weights: {domain: weight, ...}."
        )
    domains = sorted(records[0]["weights"])
    average = dict.fromkeys(domains, 0.0)
    for record, following in pairwise(records):
        if sorted(record["weights"]) != domains:
            raise RunError(
                f"{path}: the run began with the domains {domains} and has {sorted(record['weights'])} at "
                f"step {record['step']}; there is no average of that. Give weights: {{domain: weight, ...}}."
            )
        share = (following["step"] - record["step"]) / steps
        for name, weight in record["weights"].items():
            average[name] += share * weight
    return average


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The evaluations; a line that a killed process left unfinished is none."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
                yield {
                    "step": int(record["step"]),
                    "weights": {k: float(v) for k, v in record["weights"].items()},
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RunError(
                    f"{path}, line {number} is no evaluation ({type(error).__name__}: {error}); mend or "
                    "remove it."
                ) from None

"""The mixture that a run had on average, from its directory: what a static run can take."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ddkmix.errors import RunError
from ddkmix.records import read_evaluations

__all__ = ["average_weights"]


def average_weights(run_dir: str | Path) -> dict[str, float]:
    """Mixture weights of a run on average.

    Where the policy keeps an average of its own, that one, as of the last evaluation. `doremi` does:

        w[i] = mean over its updates t = 1..T of w_t[i]

    without the first mixture w_0 and before any guards. It is DoReMi's result (arXiv 2305.10429).
    For every other policy the mixture that was served, each counted for as many steps as it was in force:

        w[i] = sum over intervals of (last step - first step) w_interval[i] / steps until the last evaluation

    These are the weights that were set, of `intervals.jsonl`, from the first on: with their floors, caps and
    limits of epochs. It is the control of Velocitune (arXiv 2411.14318). A run that is still going on counts
    until its last evaluation. `ddkmix show RUN` prints the first kind; a config that takes an average
    says which in `policy.averaged_from`.

        average_weights("runs/ddk")  # {'code': 0.31, 'prose': 0.69}

    Args:
        run_dir: the folder of a run of `ddkmix train`.

    Returns:
        One weight for each domain; they sum to 1.

    Raises:
        RunError: the folder is no run, its record is damaged or has no two evaluations at different steps, or
            its domains changed.
    """
    return average_of_run(run_dir)[0]


def average_of_run(run_dir: str | Path) -> tuple[dict[str, float], str]:
    """`average_weights`, and which average that is, in a few words.

    Raises:
        RunError: as there.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise RunError(f"{run_dir} is not a run directory (no config.yaml); give the run_dir of a run.")
    path = run_dir / "intervals.jsonl"
    records = read_evaluations(path, needs=("weights",))
    if not records or records[-1]["step"] == records[0]["step"]:
        raise RunError(
            f"{path} has {len(records)} evaluations; an average over time needs two, at different steps. Let "
            "the run go on, or give weights: {domain: weight, ...}."
        )
    until = f"until step {records[-1]['step']}"
    own = policy_average(records[-1])
    if own is not None:
        return own, f"average_weights of its policy {until}"
    return _served_average(records, path), f"weights as served, by steps, {until}"


def policy_average(record: Mapping[str, Any]) -> dict[str, float] | None:
    """The average that a run's policy keeps (`average_weights` of its state) at an evaluation, by domain.

    Args:
        record: a line of `intervals.jsonl`, with `weights`; guards have the policy's state inside theirs.

    Returns:
        One weight for each domain; None where the policy keeps no such list.
    """
    state = record.get("policy") or {}
    inner = state.get("policy")
    kept = (inner if isinstance(inner, dict) else state).get("average_weights")
    domains = sorted(record["weights"])  # states are in the order of `DomainLosses.domains`
    if not isinstance(kept, list) or len(kept) != len(domains):
        return None
    if not all(isinstance(weight, int | float) for weight in kept) or not abs(sum(kept) - 1) < 1e-6:
        return None
    return dict(zip(domains, map(float, kept), strict=True))


def _served_average(records: Sequence[Mapping[str, Any]], path: Path) -> dict[str, float]:
    steps = records[-1]["step"] - records[0]["step"]
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

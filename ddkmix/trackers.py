"""Experiment trackers beside the run's own files: which there are, and what they are told.

Accelerate drives them and leaves out, without a word, those that it cannot use; a run whose curves nobody
sees would be found out at its end. So names are checked before anything is loaded, and once more against
what Accelerate took. A run keeps its name after `--resume`, and its id where a tracker goes on with runs.
"""

import importlib.util
import json
import math
import secrets
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ddkmix.errors import ConfigError, did_you_mean
from ddkmix.fingerprint import write_atomically
from ddkmix.types import DomainLosses

_PACKAGES = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Accelerate's names, and the packages of which one must be there."""
_TOLD = (
    "student_loss",
    "teacher_loss",
    "loss_gap",
    "gap_error",
    "student_bits_per_byte",
    "teacher_bits_per_byte",
    "effective_rows",
    "excess_loss",
    "forward_kl",
)
_RUN_ID = "tracker_id"
"""In the run's folder: what trackers know it by."""


def check_trackers(names: Iterable[str]) -> None:
    """Refuse names that nobody answers to, without loading anything.

    Args:
        names: those of Accelerate, or of classes that were given to its `register_tracker_class`.

    Raises:
        ConfigError: a name is unknown, or its package is not installed.
    """
    # somebody who registered a class has loaded this module; nobody else needs it for that
    registered = getattr(sys.modules.get("accelerate.tracking"), "LOGGER_TYPE_TO_CLASS", {})
    for name in names:
        if name in _PACKAGES:
            if not any(importlib.util.find_spec(package) for package in _PACKAGES[name]):
                raise ConfigError(f"tracking.trackers: {name!r} is not installed; pip install {name}.")
        elif name not in registered:
            raise ConfigError(
                f"tracking.trackers: {name!r} is unknown; {did_you_mean(name, {*_PACKAGES, *registered})}"
            )


def check_taken(names: Iterable[str], taken: Iterable[Any]) -> None:
    """Refuse to start where Accelerate has left out a tracker that was asked for.

    Args:
        names: asked for.
        taken: `Accelerator.log_with`.

    Raises:
        ConfigError: one is missing, for instance because of its version.
    """
    found = {str(getattr(one, "value", one)) for one in taken}
    for name in names:
        if name not in found:
            raise ConfigError(
                f"tracking.trackers: Accelerate cannot use {name!r} as it is installed; install a version "
                "that it supports, or leave it out."
            )


def settings_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config for trackers: one plain value for each key that an override could have (`loss.1.weight`).

    Args:
        tree: of `dump_config`. Lists without sections in them become strings, for trackers take no others.
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            value = {str(i): one for i, one in enumerate(value)}
        if isinstance(value, dict):
            found |= {f"{key}.{name}": own for name, own in settings_of(value).items()}
        else:
            found[key] = json.dumps(value) if isinstance(value, list) else value
    return found


def run_options(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What Accelerate hands to each tracker: the run's name, and what it goes on with after a resume.

    The id is made once and kept in the run's folder, so that another run in a folder of that name is another
    run. MLflow gives ids itself: a resumed run is a second one there, of the same name. TensorBoard's files
    lie in the run's folder.

    Args:
        run_dir: the run's; it exists.
    """
    kept = run_dir / _RUN_ID
    if not kept.exists():
        write_atomically(kept, secrets.token_hex(8) + "\n")
    name, own = run_dir.resolve().name, kept.read_text(encoding="utf-8").strip()
    return {
        "wandb": {"name": name, "id": own, "resume": "allow"},
        "trackio": {"name": f"{name}-{own}", "resume": "allow"},  # which knows runs by their names
        "mlflow": {"run_name": name},
    }


def evaluation_metrics(
    losses: DomainLosses, weights: Mapping[str, float], served: Mapping[str, int]
) -> dict[str, float]:
    """What trackers are told of an evaluation: `loss_gap/NAME` and so on; numbers that are not known are not.

    Mean and worst gap are those of all domains or of none: where a gap is not finite they are left out, and
    `evaluation/domains_not_finite` says how many.

    Args:
        losses: of every domain, nats per token.
        weights: those of the steps that follow; shares. They have a name of their own, because trackers keep
            one value for a name and step, and `mixture/weight/NAME` is that of the step that was taken.
        served: rows of each domain that the student has learned from.
    """
    columns = {name: getattr(losses, name) for name in _TOLD}
    told = {
        f"{column}/{domain}": float(values[i])
        for column, values in columns.items()
        if values is not None
        for i, domain in enumerate(losses.domains)
    }
    told |= {f"rows_served/{domain}": float(rows) for domain, rows in served.items()}
    told |= {f"mixture/next_weight/{domain}": float(weight) for domain, weight in weights.items()}
    gaps = losses.loss_gap.tolist()
    not_finite = sum(not math.isfinite(gap) for gap in gaps)
    told["evaluation/domains_not_finite"] = float(not_finite)
    if not not_finite:
        told |= {"evaluation/mean_loss_gap": sum(gaps) / len(gaps), "evaluation/worst_loss_gap": max(gaps)}
    return {name: value for name, value in told.items() if math.isfinite(value)}

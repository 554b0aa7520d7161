"""Experiment trackers beside the run's own files: which there are, and what they are told of an evaluation.

Accelerate drives them and leaves out, without a word, those that it cannot use; a run whose curves nobody
sees would be found out at its end. So names are checked before anything is loaded, and once more against
what Accelerate took.
"""

import importlib.util
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ddkmix.errors import ConfigError, did_you_mean
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
_TOLD = ("student_loss", "teacher_loss", "loss_gap", "gap_error", "excess_loss", "forward_kl")


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


def evaluation_metrics(losses: DomainLosses, weights: Mapping[str, float]) -> dict[str, float]:
    """What trackers are told of an evaluation: `loss_gap/NAME` and so on; numbers that are not known are not.

    Args:
        losses: of every domain, nats per token.
        weights: those of the steps that follow; shares. They have a name of their own, because trackers keep
            one value for a name and step, and `mixture/weight/NAME` is that of the step that was taken.
    """
    columns = {name: getattr(losses, name) for name in _TOLD}
    told = {
        f"{column}/{domain}": float(values[i])
        for column, values in columns.items()
        if values is not None
        for i, domain in enumerate(losses.domains)
    }
    told |= {f"mixture/next_weight/{domain}": float(weight) for domain, weight in weights.items()}
    told |= {
        "evaluation/mean_loss_gap": float(losses.loss_gap.mean()),
        "evaluation/worst_loss_gap": float(losses.loss_gap.max()),
    }
    return {name: value for name, value in told.items() if math.isfinite(value)}

"""ddkmix: distil a large language model into a small one, with a data mixture that follows the student.

The names below are the public interface; they are loaded when first used, so that importing ddkmix costs
nothing and imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddkmix.batch_sampler import MixtureBatchSampler, domain_indices
    from ddkmix.config import RunConfig, load_config
    from ddkmix.errors import DdkmixError
    from ddkmix.gap_evaluator import GapEvaluator
    from ddkmix.gaps import measure_gaps
    from ddkmix.loader import DomainMixture
    from ddkmix.losses import LOSSES, build_terms
    from ddkmix.losses.objective import distillation_objective
    from ddkmix.policies import POLICIES, WeightPolicy, reweight
    from ddkmix.reweighting import Reweighter
    from ddkmix.run_average import average_weights
    from ddkmix.setup import train
    from ddkmix.step_loader import StepLoader
    from ddkmix.types import DomainLosses
else:  # a type checker that sees this takes every misspelt name for a name

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'ddkmix' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOME[name]), name)


__version__ = "0.1.0"

_HOME = {
    "DdkmixError": "ddkmix.errors",
    "DomainLosses": "ddkmix.types",
    "DomainMixture": "ddkmix.loader",
    "GapEvaluator": "ddkmix.gap_evaluator",
    "LOSSES": "ddkmix.losses",
    "MixtureBatchSampler": "ddkmix.batch_sampler",
    "POLICIES": "ddkmix.policies",
    "Reweighter": "ddkmix.reweighting",
    "RunConfig": "ddkmix.config",
    "StepLoader": "ddkmix.step_loader",
    "WeightPolicy": "ddkmix.policies",
    "average_weights": "ddkmix.run_average",
    "build_terms": "ddkmix.losses",
    "distillation_objective": "ddkmix.losses.objective",
    "domain_indices": "ddkmix.batch_sampler",
    "load_config": "ddkmix.config",
    "measure_gaps": "ddkmix.gaps",
    "reweight": "ddkmix.policies",
    "train": "ddkmix.setup",
}

__all__ = [
    "LOSSES",
    "POLICIES",
    "DdkmixError",
    "DomainLosses",
    "DomainMixture",
    "GapEvaluator",
    "MixtureBatchSampler",
    "Reweighter",
    "RunConfig",
    "StepLoader",
    "WeightPolicy",
    "average_weights",
    "build_terms",
    "distillation_objective",
    "domain_indices",
    "load_config",
    "measure_gaps",
    "reweight",
    "train",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

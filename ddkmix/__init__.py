"""ddkmix: distil a large language model into a small one, with a data mixture that follows the student.

The names below are the public interface; they are loaded when first used, so that importing ddkmix costs
nothing and imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddkmix.config import RunConfig, load_config
    from ddkmix.errors import DdkmixError
    from ddkmix.loader import DomainMixture
    from ddkmix.losses import LOSSES
    from ddkmix.policies import POLICIES
    from ddkmix.setup import measure_gaps, train
    from ddkmix.types import DomainLosses

__version__ = "0.1.0"

_HOME = {
    "DdkmixError": "ddkmix.errors",
    "DomainLosses": "ddkmix.types",
    "DomainMixture": "ddkmix.loader",
    "LOSSES": "ddkmix.losses",
    "POLICIES": "ddkmix.policies",
    "RunConfig": "ddkmix.config",
    "load_config": "ddkmix.config",
    "measure_gaps": "ddkmix.setup",
    "train": "ddkmix.setup",
}

__all__ = [
    "LOSSES",
    "POLICIES",
    "DdkmixError",
    "DomainLosses",
    "DomainMixture",
    "RunConfig",
    "load_config",
    "measure_gaps",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ddkmix' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

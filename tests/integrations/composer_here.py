"""Composer where its image libraries are not: what to import before the first `import composer`.

Composer 0.32 imports torchvision, Pillow and MosaicML's command line client as soon as it is imported, for
augmentations of images and for its own platform. torchvision has no build on PyPI for PyTorch without CUDA,
and none of them has a part in training a language model. So where they are not installed, empty modules stand
in for them while Composer is imported, and are gone afterwards. All that the tests use (Trainer, State,
Engine, checkpoints) is Composer's own code.

    python -m tests.integrations.composer_here PROGRAM [ARGUMENT ...]

runs a program with them; a machine with all of Composer's requirements needs no such thing.
"""

import importlib
import importlib.util
import runpy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

ABSENT_HERE = (
    *("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets"),
    *("torchvision.models", "torchvision.models.resnet", "torchvision.ops", "torchvision.utils"),
    *("PIL", "PIL.Image", "PIL.ImageEnhance", "PIL.ImageOps"),
    "mcli",
)
"""Parents before their children."""


class _StandIn(ModuleType):
    """A module in which every name is an empty class: enough for `from x import Y` and `class Z(Y)`."""

    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def _standing_in() -> Iterator[None]:
    names = [name for name in ABSENT_HERE if importlib.util.find_spec(name.partition(".")[0]) is None]
    for name in names:
        sys.modules[name] = module = _StandIn(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def import_composer() -> None:
    """Import all of Composer that its Trainer imports sooner or later."""
    if "composer" in sys.modules:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that Composer brings up to date in its own time
        for name in ("torchmetrics", "transformers"):  # these ask once whether torchvision is there
            importlib.import_module(name)
        with _standing_in():
            for name in ("composer", "composer.algorithms", "composer.models"):
                importlib.import_module(name)


if __name__ == "__main__":
    import_composer()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")

"""TRL from PyPI: two pinned versions, each in a folder of its own that only its processes import from.

torch, transformers, accelerate and datasets are those of this interpreter, so that both systems are
measured on one build of torch; asked for again, torch would pull gigabytes of CUDA packages.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

NEWEST, LAST_WITH_MINILLM = "1.16.0", "1.14.2"
"""TRL 1.15 and 1.16 have no MiniLLM trainer any more."""
VERSION = {"trl-gkd": NEWEST, "trl-distillation": NEWEST, "trl-minillm": LAST_WITH_MINILLM}
"""Of each peer."""


def make(cache: Path, version: str, say: Callable[[str], None]) -> Path:
    """The folder with one version of TRL, installed without its dependencies when it is not there."""
    folder = cache / f"trl-{version}"
    done = folder / "installed"
    if not done.exists():
        say(f"installing TRL {version} into {folder}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target"]
        subprocess.run([*command, str(folder), f"trl=={version}"], check=True)
        done.write_text(version + "\n")
    return folder.absolute()

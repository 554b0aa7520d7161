"""The peers' packages: pinned, in a folder of their own that only measuring processes import from."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent / "requirements.txt"


def make(folder: Path, say: Callable[[str], None]) -> Path:
    """The folder with the peers, installed when it is not there or its pins changed.

    Without their dependencies: torch, transformers and trl are those of this interpreter, so that everything
    is measured on one build of torch.
    """
    done = folder / "installed"
    if done.exists() and done.read_text() == REQUIREMENTS.read_text():
        return folder.absolute()
    say(f"installing the peers into {folder}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target"]
    subprocess.run([*command, str(folder), "--requirement", str(REQUIREMENTS)], check=True)
    done.write_text(REQUIREMENTS.read_text())
    return folder.absolute()

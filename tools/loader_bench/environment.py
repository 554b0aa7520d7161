"""The peers' own environment: pinned, made once, never the one that ddkmix is developed in."""

import subprocess
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
_HERE = Path(__file__).resolve().parent
_REQUIREMENTS = _HERE / "requirements.txt"
_WITHOUT_DEPENDENCIES = _HERE / "requirements-no-deps.txt"


def make(folder: Path, say: Callable[[str], None]) -> Path:
    """The interpreter of the environment in `folder`, installed when it is not there or its pins changed."""
    python = folder / "bin" / "python"
    pins = _REQUIREMENTS.read_text() + _WITHOUT_DEPENDENCIES.read_text()
    done = folder / "installed"
    if done.exists() and done.read_text() == pins:
        return python.absolute()
    say(f"installing the peers into {folder}")
    venv.create(folder, with_pip=True)
    for arguments in commands():
        subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)
    done.write_text(pins)
    return python.absolute()


def commands() -> list[list[str]]:
    """pip's arguments, in order.

    torch first and alone, so that nothing chooses another build of it. Two peers without their
    dependencies: both ask for torchvision, whose PyPI build cannot be imported beside a CPU build of
    torch and which serving tokens does not touch; mosaicml-streaming also asks for transformers below 5
    and numpy below 2.2 and runs with today's. What the two import is in requirements.txt.
    """
    constraints = ["--constraint", str(REPO / "constraints.txt")]
    return [
        [*constraints, "torch"],
        [*constraints, *_dependencies(), "--requirement", str(_REQUIREMENTS)],
        [*constraints, "--no-deps", "--requirement", str(_WITHOUT_DEPENDENCIES)],
    ]


def _dependencies() -> list[str]:
    """What ddkmix, imported from the checkout, needs."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["dependencies"])

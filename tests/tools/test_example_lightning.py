"""The programs for Lightning run as they are, and differ by ten lines."""

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

EXAMPLES = REPO / "tools" / "examples"


def program(name: str) -> list[str]:
    """The lines of an example."""
    return (EXAMPLES / f"lightning_{name}.py").read_text().splitlines()


def test_ten_lines_make_the_difference() -> None:
    """Added plus removed, those without a character not counted; and both fit on a page."""
    plain, mixed = program("plain"), program("mixed")
    diff = list(difflib.unified_diff(plain, mixed, n=0, lineterm=""))[2:]
    assert 10 >= len([line for line in diff if line[0] in "+-" and line[1:].strip()])
    assert 60 > max(len(plain), len(mixed))


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that one program has made, the other finds again."""
    return tmp_path_factory.mktemp("hub")


@pytest.mark.parametrize("name", ["plain", "mixed"])
def test_it_runs(tmp_path: Path, hub_cache: Path, name: str) -> None:
    """Two steps of it, in a folder that has what the repository has."""
    for folder in ("domains", "models"):
        (tmp_path / folder).symlink_to(REPO / folder)
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"lightning_{name}.py", "2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO), "HF_HOME": str(hub_cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    assert "`max_steps=2` reached" in done.stderr + done.stdout
    assert list((tmp_path / "lightning_logs").rglob("*.ckpt"))

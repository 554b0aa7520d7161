"""The programs for Lightning run as they are, and differ by ten lines."""

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO, TEACHER

EXAMPLES = REPO / "tools" / "examples"


def program(name: str) -> list[str]:
    """The lines of an example."""
    return (EXAMPLES / f"lightning_{name}.py").read_text().splitlines()


def test_ten_lines_make_the_difference() -> None:
    """Added plus removed, blank ones too; and both fit on a page."""
    plain, mixed = program("plain"), program("mixed")
    diff = list(difflib.unified_diff(plain, mixed, n=0, lineterm=""))[2:]
    assert 10 >= len([line for line in diff if line[0] in "+-"])
    assert 60 > max(len(plain), len(mixed))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository, with two of its domains."""
    if not TEACHER.exists():
        pytest.skip("no teacher here; `make teacher` fetches it (`make test` does)")
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "models").symlink_to(REPO / "models")
    (folder / "domains").mkdir()
    for name in ("code", "math"):
        for entry in (name, f"{name}.yaml"):
            (folder / "domains" / entry).symlink_to(REPO / "domains" / entry)
    return folder


@pytest.mark.parametrize("name", ["plain", "mixed"])
def test_it_runs(quickstart: Path, name: str) -> None:
    """Two steps on real rows; the weights are in Lightning's own log."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"lightning_{name}.py", "2"],
        cwd=quickstart,
        env={**os.environ, "PYTHONPATH": str(REPO), "HF_HOME": str(quickstart / "cache")},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert 0 == done.returncode, done.stderr
    assert "`max_steps=2` reached" in done.stderr + done.stdout
    assert "loss" in done.stdout
    logs = [path.read_text() for path in (quickstart / "lightning_logs").rglob("metrics.csv")]
    assert (name == "mixed") == any("mixture/weight/code" in log for log in logs)

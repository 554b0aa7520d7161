"""The examples for Composer and for loops in torchtitan's shape: they run, and differ in few lines."""

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO, TEACHER

EXAMPLES = REPO / "tools" / "examples"
RUNNER = {"composer": ["-m", "tests.integrations.composer_here"], "torchtitan": []}
"""What runs a program here; see there for why Composer needs it."""
DOMAINS = ("math", "prose")
"""Of the quickstart's, to be quick."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some of the quickstart's domains and its teacher."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "domains").mkdir()
    for name in DOMAINS:
        for part in (name, f"{name}.yaml"):
            (folder / "domains" / part).symlink_to(REPO / "domains" / part)
    (folder / "models").symlink_to(TEACHER.parent)
    return folder


@pytest.mark.skipif(not TEACHER.is_dir(), reason="needs `make teacher`")
@pytest.mark.parametrize(
    "program", ["composer_plain", "composer_mixed", "torchtitan_plain", "torchtitan_mixed"]
)
def test_an_example_runs(workplace: Path, program: str) -> None:
    """Three steps from the quickstart's documents; with ddkmix, gaps are measured before the first."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "HF_HOME": str(workplace / "cache")}
    result = subprocess.run(
        [sys.executable, *RUNNER[program.split("_")[0]], str(EXAMPLES / f"{program}.py"), "3"],
        cwd=workplace,
        env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert 0 == result.returncode, result.stderr[-2000:]
    printed = result.stdout + result.stderr
    if program.startswith("torchtitan"):
        assert ["step 1", "step 2", "step 3"] == [line.split(":")[0] for line in result.stdout.splitlines()]
    else:
        assert "[batch=3/3]" in printed
    assert ("loss_gap/math" in printed) == (program == "composer_mixed")


@pytest.mark.parametrize("name", sorted(RUNNER))
def test_ddkmix_is_at_most_ten_changed_lines(name: str) -> None:
    """Added and removed together, blank ones too; and the programs are short."""
    plain, mixed = ((EXAMPLES / f"{name}_{kind}.py").read_text().splitlines() for kind in ("plain", "mixed"))
    changed = [line for line in difflib.ndiff(plain, mixed) if line[0] in "+-"]
    assert 10 >= len(changed), "\n".join(changed)
    assert 70 > len(mixed)

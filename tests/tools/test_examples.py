"""The example programs: each runs on real data as it stands, and differs little from one without ddkmix."""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO, TEACHER

EXAMPLES = REPO / "tools" / "examples"
NAMES = ("accelerate", "composer", "lightning", "torchtitan", "transformers", "trl")
RUNNERS = {"composer": ["-m", "tests.integrations.composer_here"]}
"""What runs a program here; see there for why Composer needs it."""
SHOWS_WEIGHTS = ("composer", "lightning", "transformers", "trl")
"""Frameworks whose adapters log by themselves."""
MOST_CHANGED_LINES, MOST_LINES = 10, 70
DOMAINS = ("code", "math")
"""Two of the eight, so that it takes seconds."""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository: domains and the teacher."""
    if not TEACHER.exists():
        pytest.skip("no teacher here; `make teacher` fetches it (`make test` does)")
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "models").symlink_to(REPO / "models")
    (folder / ".cache").mkdir()  # so that the teacher is measured once
    (folder / "domains").mkdir()
    for name in DOMAINS:
        for entry in (name, f"{name}.yaml"):
            (folder / "domains" / entry).symlink_to(REPO / "domains" / entry)
    return folder


def changed_lines(name: str) -> list[str]:
    """What ddkmix adds to a program and takes from it, blank lines too."""
    plain, mixed = ((EXAMPLES / f"{name}_{kind}.py").read_text().splitlines() for kind in ("plain", "mixed"))
    return [line.rstrip() for line in difflib.ndiff(plain, mixed) if line.startswith(("+ ", "- "))]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_as_it_stands(quickstart: Path, tmp_path: Path, name: str) -> None:
    """Two steps on real rows, with a measurement before the first. The plain programs, which show what is
    changed, differ by ten lines and are not run: each would take half a minute."""
    for entry in quickstart.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "HF_HOME": str(quickstart / "cache"),
        "HF_HUB_OFFLINE": "1",
        "CI": "1",  # TRL sends no telemetry then
    }
    result = subprocess.run(
        [sys.executable, *RUNNERS.get(name, []), str(EXAMPLES / f"{name}_mixed.py"), "2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert 0 == result.returncode, result.stderr[-3000:]
    logs = [path.read_text() for path in (tmp_path / "lightning_logs").rglob("metrics.csv")]
    printed = "\n".join([result.stdout, result.stderr, *logs])
    assert "loss" in printed
    shows = all(f"mixture/weight/{domain}" in printed for domain in DOMAINS)
    assert (name in SHOWS_WEIGHTS) == shows


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_costs_few_lines(name: str) -> None:
    """Added plus removed; and a program fits on a page."""
    assert 0 < len(changed_lines(name)) <= MOST_CHANGED_LINES
    for kind in ("plain", "mixed"):
        assert len((EXAMPLES / f"{name}_{kind}.py").read_text().splitlines()) < MOST_LINES


def test_the_readme_shows_the_difference() -> None:
    """Each program's, as it is."""
    shown = re.findall(
        r"\]\(tools/examples/(\w+)_mixed\.py\)\.?\s+```diff\n(.*?)```", README, flags=re.DOTALL
    )
    assert sorted(NAMES) == sorted(name for name, _ in shown)
    for name, block in shown:
        assert changed_lines(name) == block.splitlines()


README = (REPO / "README.md").read_text()

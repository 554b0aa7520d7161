"""The example programs: each runs on real data as it stands, and differs little from one without ddkmix."""

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO, TEACHER

EXAMPLES = REPO / "tools" / "examples"
MOST_CHANGED_LINES = {
    "transformers": 10,
    "trl": 10,
}
"""Lines added and removed between NAME_plain.py and NAME_mixed.py."""
DOMAINS = ("code", "math")
"""Two of the eight, so that it takes seconds."""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository: domains and the teacher."""
    if not TEACHER.exists():
        pytest.skip("no teacher here; `make teacher` fetches it (`make test` does)")
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "models").symlink_to(REPO / "models")
    (folder / "domains").mkdir()
    for name in DOMAINS:
        for entry in (name, f"{name}.yaml"):
            (folder / "domains" / entry).symlink_to(REPO / "domains" / entry)
    return folder


@pytest.mark.parametrize("kind", ["plain", "mixed"])
@pytest.mark.parametrize("name", MOST_CHANGED_LINES)
def test_an_example_runs_as_it_stands(quickstart: Path, name: str, kind: str) -> None:
    """Two steps on real rows; the mixed one says what its weights are."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "HF_HOME": str(quickstart / "cache"),
        "HF_HUB_OFFLINE": "1",
        "CI": "1",  # TRL sends no telemetry then
    }
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}_{kind}.py"), "2"],
        cwd=quickstart,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert 0 == result.returncode, result.stderr[-3000:]
    assert "loss" in result.stdout
    assert (kind == "mixed") == all(f"mixture/weight/{domain}" in result.stdout for domain in DOMAINS)


@pytest.mark.parametrize(("name", "most"), MOST_CHANGED_LINES.items())
def test_a_mixture_costs_few_lines(name: str, most: int) -> None:
    """Added plus removed, blank ones too."""
    plain, mixed = ((EXAMPLES / f"{name}_{kind}.py").read_text().splitlines() for kind in ("plain", "mixed"))
    changed = [line for line in difflib.ndiff(plain, mixed) if line.startswith(("+ ", "- "))]
    assert 0 < len(changed) <= most, "\n".join(changed)
    assert len(mixed) < 60

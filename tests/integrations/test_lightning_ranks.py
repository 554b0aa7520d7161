"""Two real processes of Lightning's DDP on the CPU serve the global batches of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddkmix.planner import deal
from tests.conftest import REPO
from tests.integrations.conftest import Rows, dealt, rows_of
from tests.integrations.lightning_ranks import STEPS, reweighter_of
from tests.integrations.lightning_student import Language


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run on two processes has left its notes."""
    folder = tmp_path_factory.mktemp("ranks")
    reweighter_of(folder)  # packs the rows, once
    done = subprocess.run(
        [sys.executable, "-m", "tests.integrations.lightning_ranks", str(folder)],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert 0 == done.returncode, done.stderr
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[tuple[Rows, Rows]]:
    """The rows of each step on one process, dealt to two ranks."""
    reweighter, found = reweighter_of(folder), []
    for step in range(STEPS):
        reweighter.step(Language(), step)
        rows, plan = rows_of(next(reweighter.mixture)["input_ids"]), reweighter.mixture.last_plan
        found.append(tuple([rows[slot] for slot in deal(plan, rank, 2)] for rank in (0, 1)))
        assert sorted(rows) == sorted(found[-1][0] + found[-1][1])
    return found


@pytest.mark.parametrize(("run", "first"), [("whole", 0), ("resumed", 3)])
def test_global_batches_are_those_of_one_process(
    folder: Path, expected: list[tuple[Rows, Rows]], run: str, first: int
) -> None:
    """Also after a resume: every rank has exactly its own rows of each step, in two micro-batches."""
    for rank in (0, 1):
        seen = json.loads((folder / f"rank-{rank}-{run}.json").read_text())
        assert [step for step in range(first, STEPS) for _ in range(2)] == [step for step, _ in seen]
        for step in range(first, STEPS):
            rows = dealt([rows for done, rows in seen if done == step])
            assert expected[step][rank] == [tuple(row) for row in rows]

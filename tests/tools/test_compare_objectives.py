"""The comparison of objectives: its table, and the numbers that it takes from a run."""

import json
import sys
from pathlib import Path

import pytest

from ddkmix.config import load_config
from tests.conftest import REPO

sys.path.insert(0, str(REPO / "tools"))

import compare_objectives as tool


def numbers(value: float) -> dict[str, float]:
    """All columns alike."""
    return dict.fromkeys(tool.COLUMNS, value)


def test_a_row_is_the_mean_over_seeds_with_its_spread() -> None:
    """Of the student before there is one measurement; what was not run has an empty row."""
    results = {
        "before": numbers(1.0),
        "seqkd-0": numbers(1.0),
        "seqkd-1": numbers(2.0),
        "gkd-0": numbers(0.5),
    }
    lines = tool.table(results, ["seqkd", "gkd", "dpkd"]).splitlines()
    assert 6 == len(lines)
    assert lines[2].startswith("| before | 1 | 1.000 | 1.000 |")
    assert lines[3].startswith("| seqkd | 2 | 1.500 ± 0.707 | 1.500 ± 0.707 |")
    assert lines[4].startswith("| gkd | 1 | 0.500 | 0.500 |")
    assert lines[5].startswith("| dpkd | 0 |")


def test_losses_are_means_over_the_tokens_of_all_domains(tmp_path: Path) -> None:
    """Of the first and of the last measurement."""
    intervals = [
        {
            "losses": {
                "a": {"num_tokens": 10, "student_loss": 4.0 - i, "teacher_loss": 1.0},
                "b": {"num_tokens": 30, "student_loss": 2.0 - i, "teacher_loss": 1.0},
            }
        }
        for i in range(3)
    ]
    (tmp_path / "intervals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in intervals))
    first, last = tool._losses(tmp_path)
    assert {"gap": 1.5, "nats": 2.5} == first
    assert {"gap": -0.5, "nats": 0.5} == last


@pytest.mark.parametrize("method", tool.METHODS)
def test_every_method_is_a_config(method: str) -> None:
    """What a method changes fits the quickstart's config, and names the objective."""
    config = load_config(REPO / "configs/dpkd_quickstart.yaml", tool.METHODS[method])
    assert (method if method != "sft" else "distill") == config.objective.name
    assert config.loss


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """Its numbers would stand in the wrong table."""
    path = tmp_path / "gkd-0.json"
    for _ in range(2):
        tool._claim(path, ["seed=0", "trainer.steps=20"])
    with pytest.raises(SystemExit, match="made with other settings; choose another --out"):
        tool._claim(path, ["seed=0", "trainer.steps=200"])

"""The race of the policies: every one runs, the goals are told, a quick run ends."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import bench_policies  # noqa: E402

from ddkmix.policies import POLICIES  # noqa: E402


def test_a_quick_run_times_every_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each on standard error, and the same numbers as JSON."""
    out = tmp_path / "times.json"
    bench_policies.main(["--quick", "--json", str(out)])
    found = json.loads(out.read_text())
    assert set(POLICIES) == set(found["policies"])
    assert (5, 8) == (found["domains"], found["updates"])
    assert all(0 < times["median_ms"] <= times["slowest_ms"] for times in found["policies"].values())
    held = {name: times["guarded"] for name, times in found["policies"].items()}
    assert all(0 < times["median_ms"] <= times["slowest_ms"] for times in held.values())
    assert held["ddk"]["median_ms"] > 2 * found["policies"]["ddk"]["median_ms"]  # evidence asks it anew
    assert bench_policies.FITTING == {name for name, kind in POLICIES.items() if hasattr(kind, "fits_laws")}
    said = capsys.readouterr().err
    assert all(name in said for name in POLICIES)


def test_a_goal_that_is_missed_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says which."""
    monkeypatch.setattr(bench_policies, "GOAL_MS", 0.0)
    assert 1 == bench_policies.main(["--quick"])
    assert "MISSED" in capsys.readouterr().err


def test_made_up_losses_have_everything_and_shrink() -> None:
    """Every policy finds its columns; the same step gives the same numbers."""
    early, late = (bench_policies.losses_at(step, 4) for step in (0, 40))
    assert (late.loss_gap < early.loss_gap).all()
    assert np.isfinite(early.gap_error).all()
    assert early.excess_loss is not None and early.forward_kl is not None
    assert late.rows_served is not None and [4000] * 4 == late.rows_served.tolist()
    assert late.loss_gap.tolist() == bench_policies.losses_at(40, 4).loss_gap.tolist()

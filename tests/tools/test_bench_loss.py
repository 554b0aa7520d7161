"""The losses' race with what is here: one objective for all, tables, what is skipped, a quick run."""

import json
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import bench_loss  # noqa: E402
from bench_loss import Runner, Size  # noqa: E402
from loss_bench import child, contestants, environment  # noqa: E402

HERE = ("ddkmix", "naive")
"""Contestants that need nothing installed."""


@pytest.mark.parametrize("name", HERE)
def test_contestants_compute_one_objective(name: str) -> None:
    """CE + 0.2 KL, mean over tokens, against float64 written out; gradients close to those of float64."""
    problem = contestants.make_problem(300, 20, torch.float32)
    exact = problem.to(torch.float64)
    log_q = (exact.hidden @ exact.weight.T).log_softmax(-1)
    log_p = (exact.teacher_hidden @ exact.teacher_weight.T).log_softmax(-1)
    nats = -log_q[range(20), exact.labels]
    expected = (nats + 0.2 * (log_p.exp() * (log_p - log_q)).sum(-1)).mean()
    assert expected.item() == pytest.approx(contestants.CONTESTANTS[name](problem).item(), rel=1e-6)
    assert child.errors([name], 300, 20, torch.float32)["errors"][name] == pytest.approx([0, 0], abs=1e-5)


def test_an_error_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contestant without the divergence is far from the truth."""

    def forgetful(problem: contestants.Problem) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(problem.hidden @ problem.weight.T, problem.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    monkeypatch.setitem(contestants.CONTESTANTS, "naive", forgetful)
    assert min(child.errors(["naive"], 300, 20, torch.float32)["errors"]["naive"]) > 1e-2


def test_contestants_take_turns() -> None:
    """Two rounds of two: two times each, and the losses agree."""
    found = child.times(list(HERE), 300, 20, 2, torch.float32)
    assert [2, 2] == [len(found["seconds"][name]) for name in HERE]
    assert found["losses"]["naive"] == pytest.approx(found["losses"]["ddkmix"], rel=1e-6)


def test_peers_that_are_installed_compute_the_same() -> None:
    """TRL's divergence alone is what the two losses leave when cross-entropy is taken off."""
    problem = contestants.make_problem(300, 20, torch.float32)
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(problem.hidden @ problem.weight.T, problem.labels)
    whole = contestants.naive(problem) - nats
    assert whole.item() == pytest.approx(contestants.trl(problem).item(), rel=1e-4)


def test_what_does_not_fit_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    """30 bytes x 151,936 x 8,192 are 37 GB: a line says so, and the table too."""
    runner = Runner(None, 1, ["naive"], 24.0)
    [row] = runner.memory(Size(151_936, 8192, 0, ("naive", "trl")), "float32")
    assert {"vocab": 151_936, "tokens": 8192, "dtype": "float32", "name": "naive", "skipped": True} == row
    assert "naive at 151936 x 8192 needs 37 GB of 24: skipped" in capsys.readouterr().err
    assert [] == runner.times(Size(10, 10), "float32")


def test_tables_by_hand() -> None:
    """Medians, ratios to the naive loss and to the best peer, memory as a share of the naive loss's."""
    where = {"vocab": 1000, "tokens": 10, "dtype": "float32"}
    results = {
        "command": "x",
        "date": "today",
        "threads": 2,
        "machine": "m",
        "minutes": 1.2,
        "time": [
            {**where, "seconds": {"ddkmix": [1.0, 9.0, 2.0], "naive": [4.0], "trl": [5.0], "liger": [2.5]}}
        ],
        "memory": [
            {**where, "name": "ddkmix", "bytes": 2_000_000},
            {**where, "name": "naive", "bytes": 30_000_000},
            {**where, "name": "trl", "failed": "no memory"},
        ],
        "error": [{**where, "errors": {"ddkmix": [1e-7, 2e-7]}}],
    }
    text = bench_loss.markdown(results)
    assert "| 1,000 x 10, float32 | 2.00 | 4.00 | 2.50 | 5.00 | - | 0.50 | 0.80 |" in text
    assert "| 1,000 x 10, float32 | ddkmix | 2 | 1/15.0 |" in text
    assert "| 1,000 x 10, float32 | trl | failed | - |" in text
    assert "| 1,000 x 10, float32 | ddkmix | 1.00e-07 | 2.00e-07 |" in text
    assert 'failed: {"vocab": 1000' in text


def test_a_process_that_fails_does_not_stop_the_others() -> None:
    """Its last line stands in the results."""
    row = Runner(None, 1, ["nobody"], 24.0).errors(10, 2, "float32")
    assert "KeyError: 'nobody'" == row["failed"]


def test_the_peers_are_pinned() -> None:
    """Each with a version, and none of them torch."""
    lines = environment.REQUIREMENTS.read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    assert not any(pin.startswith("torch==") for pin in pins)


def test_a_quick_run_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real processes, Markdown and JSON."""
    bench_loss.main(
        ["--quick", "--only", ",".join(HERE), "--threads", "1", "--json", str(tmp_path / "results.json")]
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert [1, 1, 1] == [len(results[part]) for part in ("time", "memory", "error")]
    assert all("failed" not in row for part in ("time", "memory", "error") for row in results[part])
    assert "| 2,000 x 128, bfloat16 | ddkmix |" in capsys.readouterr().out

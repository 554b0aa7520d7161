"""The main job on the real teacher and the real domains, short: what the toy tests cannot show."""

from pathlib import Path

import pytest

from ddkmix.config import load_config
from ddkmix.gaps import measure_gaps
from ddkmix.records import read_lines
from ddkmix.setup import train
from ddkmix.types import DomainLosses
from tests.conftest import REPO, TEACHER

pytestmark = pytest.mark.skipif(not TEACHER.exists(), reason="`make teacher` fetches it (`make test` does)")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that make the quickstart small; the packed rows are shared with it."""
    monkeypatch.chdir(REPO)
    return [f"run_dir={tmp_path / 'run'}", "evaluation.rows=2", "trainer.batch_rows=4"]


def test_a_few_steps_close_gaps_that_are_16_nats_wide(small: list[str]) -> None:
    """The pruned student starts far behind in all eight domains, and each gap falls within six steps; the
    weights of the second interval follow the gaps."""
    overrides = [*small, "trainer.steps=6", "mixture.interval_steps=3", "schedule.decay_steps=2"]
    config = load_config(REPO / "configs" / "quickstart.yaml", [*overrides, "schedule.warmup_steps=1"])
    train(config)
    first, middle, last = read_lines(config.run_dir / "intervals.jsonl")
    for domain, losses in first["losses"].items():
        assert 1.5 < losses["teacher_loss"] < 5
        assert 10 < losses["loss_gap"] < 25
        assert last["losses"][domain]["loss_gap"] < losses["loss_gap"] - 2
    assert middle["weights"] != pytest.approx(first["weights"], abs=0.01)
    assert min(middle["weights"].values()) >= 0.5 / 8 - 1e-9


def test_the_teacher_has_no_gap_to_itself(small: list[str]) -> None:
    """Loaded as its own student: gaps are float32 against bfloat16 rounding, bits per byte equal."""
    overrides = ["student.init=load", "student.layers=null", f"student.model={TEACHER}"]
    config = load_config(REPO / "configs" / "quickstart.yaml", [*small, *overrides])
    losses, _ = measure_gaps(config)
    assert isinstance(losses, DomainLosses)
    assert abs(losses.loss_gap).max() < 0.03
    assert losses.student_bits_per_byte == pytest.approx(losses.teacher_bits_per_byte, rel=0.02)

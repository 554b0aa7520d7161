"""Every objective in the trainer: it learns, its metrics are there, and a stopped run goes on bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ddkmix import trainer
from ddkmix.config import RunConfig
from ddkmix.objectives import OBJECTIVES
from ddkmix.setup import train
from tests.objectives.conftest import OBJECTIVES_IN_RUNS, STEPS

MakeRun = Callable[..., RunConfig]


def lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Records of a run."""
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def student(run_dir: Path) -> dict[str, torch.Tensor]:
    """Parameters of a run's result."""
    return load_file(run_dir / "student" / "model.safetensors")


def stop_after(steps: int, config: RunConfig) -> None:
    """Run until a step is interrupted, as by a kill."""
    whole, count = trainer.train_step, iter(range(99))

    def stopping(*args: Any) -> Any:
        if next(count) == steps:
            raise KeyboardInterrupt
        return whole(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(config)


def test_every_objective_is_run() -> None:
    """The table of runs lacks none that asks for responses."""
    assert {*OBJECTIVES} - {"distill"} == {case.split()[0] for case in OBJECTIVES_IN_RUNS}


@pytest.mark.parametrize("case", OBJECTIVES_IN_RUNS)
def test_a_stopped_run_goes_on_bit_for_bit(case: str, make_run: MakeRun) -> None:
    """Parameters and metrics of a run that was killed at its third step are those of the whole one."""
    sections = OBJECTIVES_IN_RUNS[case]
    whole, stopped = make_run("whole", **sections), make_run("stopped", **sections)
    train(whole)
    stop_after(3, stopped)
    train(stopped, resume=True)
    for name, value in student(whole.run_dir).items():
        assert torch.equal(value, student(stopped.run_dir)[name]), name
    assert lines(whole.run_dir) == lines(stopped.run_dir)
    assert STEPS == len(lines(whole.run_dir))

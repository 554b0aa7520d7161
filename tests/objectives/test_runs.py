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


def stop_after(steps: int, config: RunConfig, **options: bool) -> None:
    """Run until a step is interrupted, as by a kill."""
    whole, count = trainer.train_step, iter(range(99))

    def stopping(*args: Any) -> Any:
        if next(count) == steps:
            raise KeyboardInterrupt
        return whole(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(config, **options)


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


def test_a_change_is_not_forgotten_by_a_kill(make_run: MakeRun) -> None:
    """A run that goes on with another policy and dies before its next checkpoint begins that policy again, as
    the one that lived did, though its config is the new one by now."""
    sections = OBJECTIVES_IN_RUNS["dpkd"]
    other = {**sections, "policy": {"name": "ddk"}}
    for name in ("lived", "died"):
        stop_after(3, make_run(name, **sections))
        if name == "died":
            stop_after(0, make_run(name, **other), resume=True, allow_changes=True)
        train(make_run(name, **other), resume=True, allow_changes=name == "lived")
    lived, died = (make_run(name, **other).run_dir for name in ("lived", "died"))
    for name in ("metrics.jsonl", "intervals.jsonl", "changes.jsonl"):
        assert lines(lived, name) == lines(died, name)
    assert any("policy.name" in change for change in lines(died, "changes.jsonl")[0]["changes"])
    for name, value in student(lived).items():
        assert torch.equal(value, student(died)[name]), name


def test_an_objective_that_begins_anew_moves_no_weights(make_run: MakeRun) -> None:
    """Another batch size empties the buffer; the policy goes on, and has its turn at the next interval."""
    sections = {**OBJECTIVES_IN_RUNS["gkd"], "mixture": {"interval_steps": 4}, "policy": {"name": "ddk"}}
    stop_after(3, make_run(**sections))
    train(make_run(**sections, trainer={"batch_rows": 4}), resume=True, allow_changes=True)
    run_dir = make_run(**sections).run_dir
    assert [0, 4] == [line["step"] for line in lines(run_dir, "intervals.jsonl")]
    assert (
        "the replay buffer begins empty, and the objective anew"
        in lines(run_dir, "changes.jsonl")[0]["changes"]
    )

"""Invariant 6: stop anywhere, resume, and nothing tells the run from one that was never stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddkmix.config import parse_config
from ddkmix.errors import Interrupted, RunError
from ddkmix.records import read_lines
from ddkmix.setup import train
from tests.conftest import ConfigTree

Make = Callable[..., ConfigTree]


def run(tree: ConfigTree, run_dir: Path, *, resume: bool = False) -> Path:
    """Train in this process."""
    train(parse_config({**tree, "run_dir": str(run_dir)}, where="test"), resume=resume)
    return run_dir


def outcome(run_dir: Path) -> dict[str, bytes]:
    """The bytes of everything that a run computes."""
    names = ["metrics.jsonl", "intervals.jsonl", "student/model.safetensors"]
    last = max((run_dir / "checkpoints").glob("step-*"))
    files = {name: run_dir / name for name in names}
    files |= {
        f"last/{name}": last / name
        for name in ("model.safetensors", "state.json", "random-rank0.safetensors")
    }
    return {name: path.read_bytes() for name, path in files.items()}


def optimizer_state(run_dir: Path) -> dict[tuple[int, str], Any]:
    """The optimizer's tensors at the end (torch.save adds nothing comparable around them)."""
    import torch

    last = max((run_dir / "checkpoints").glob("step-*"))
    state = torch.load(last / "optimizer.bin", weights_only=True)["state"]
    return {(key, name): tensor for key, value in state.items() for name, tensor in value.items()}


def assert_same_outcome(expected: Path, actual: Path) -> None:
    """Metrics, intervals, parameters, states and the optimizer agree to the last bit."""
    for name, content in outcome(expected).items():
        assert content == outcome(actual)[name], name
    theirs = optimizer_state(actual)
    for key, tensor in optimizer_state(expected).items():
        assert tensor.equal(theirs[key]), key


def rewound(full: Path, target: Path, step: int) -> Path:
    """A run as `kill -9` leaves it some time after the checkpoint of `step`: later lines, a torn one, and a
    half-written checkpoint are there."""
    target.mkdir()
    tree = yaml.safe_load((full / "config.yaml").read_text())
    (target / "config.yaml").write_text(yaml.safe_dump({**tree, "run_dir": str(target)}))
    for name in ("metrics.jsonl", "intervals.jsonl"):
        lines = (full / name).read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= step + 2]
        (target / name).write_text("".join(kept) + '{"step": 99, "torn')
    name = f"step-{step:06d}"
    shutil.copytree(full / "checkpoints" / name, target / "checkpoints" / name)
    (target / "checkpoints" / ".partial-step-000099").mkdir()
    (target / "checkpoints" / ".partial-step-000099" / "model.safetensors").write_bytes(b"half")
    return target


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_after_any_step_is_the_uninterrupted_run(
    tmp_path: Path, tiny_config: Make, workers: int
) -> None:
    """Resumed after each step, in and between intervals, also within a log window: same bits at the end."""
    tree = tiny_config(
        trainer={"steps": 9, "checkpoint_steps": 1, "keep_checkpoints": 99, "log_steps": 2},
        loader={"workers": workers},
    )
    full = run(tree, tmp_path / "full")
    steps = range(1, 9) if workers == 0 else (3, 4, 7)
    for step in steps:
        part = rewound(full, tmp_path / f"part{step}", step)
        assert_same_outcome(full, run(tree, part, resume=True))
        assert not list((part / "checkpoints").glob(".partial*"))


def test_weights_that_move_go_on_exactly(tmp_path: Path, tiny_config: Make) -> None:
    """WSD-alpha with its learning rate, resumed in the warm-up, the stable phase and the decay, within and
    between log windows: nothing about the weights is saved but the sum of the objective."""
    wsd = {"name": "wsd", "warmup_steps": 2, "decay_share": 0.5}
    loss = [
        {"name": "cross_entropy", "weight": "rest"},
        {"name": "forward_kl", "weight": {"schedule": "wsd", "peak": 0.9}},
    ]
    tree = tiny_config(
        trainer={"steps": 8, "checkpoint_steps": 1, "keep_checkpoints": 99, "log_steps": 3},
        schedule=wsd,
        loss=loss,
    )
    full = run(tree, tmp_path / "full")
    for step in (1, 3, 5, 7):
        assert_same_outcome(full, run(tree, rewound(full, tmp_path / f"part{step}", step), resume=True))


def test_a_lost_optimizer_state_would_be_noticed(tmp_path: Path, tiny_config: Make) -> None:
    """The comparison above can fail: resuming with another checkpoint's optimizer gives other bits."""
    tree = tiny_config(trainer={"steps": 6, "checkpoint_steps": 1, "keep_checkpoints": 99})
    full = run(tree, tmp_path / "full")
    part = rewound(full, tmp_path / "part", 4)
    checkpoints = full / "checkpoints"
    shutil.copy(
        checkpoints / "step-000002" / "optimizer.bin", part / "checkpoints" / "step-000004" / "optimizer.bin"
    )
    run(tree, part, resume=True)
    with pytest.raises(AssertionError):
        assert_same_outcome(full, part)


def test_the_number_of_workers_may_change_at_resume(tmp_path: Path, tiny_config: Make) -> None:
    """Readers have no state, so a run may go on with others, bit for bit."""
    tree = tiny_config(trainer={"steps": 6, "checkpoint_steps": 1, "keep_checkpoints": 99})
    full = run(tree, tmp_path / "full")
    part = rewound(full, tmp_path / "part", 3)
    run({**tree, "loader": {"workers": 2, "prefetch_steps": 3}}, part, resume=True)
    assert (full / "metrics.jsonl").read_bytes() == (part / "metrics.jsonl").read_bytes()


def command(config: Path, *arguments: str) -> list[str]:
    """The CLI in a process of its own."""
    return [sys.executable, "-m", "ddkmix", "train", str(config), *arguments]


def kill_when(process: subprocess.Popen[bytes], metrics: Path, lines: int, number: int) -> None:
    """Send a signal once the run has written so many lines."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and len(list(read_lines(metrics))) >= lines:
            process.send_signal(number)
            return
        time.sleep(0.002)
    pytest.fail(f"the run ended with {process.returncode} before it wrote {lines} lines")


@pytest.mark.parametrize("lines", [2, 9, 24])
def test_kill_9_in_the_middle_then_resume_gives_the_same_bits(
    tmp_path: Path, tiny_config: Make, lines: int
) -> None:
    """The real thing: SIGKILL before the first checkpoint, and within later intervals, then `--resume`."""
    sizes = {"steps": 40, "checkpoint_steps": 7}
    tree = tiny_config(trainer=sizes, mixture={"interval_steps": 10}, loader={"workers": 1})
    full = run(tree, tmp_path / "full")
    killed = tmp_path / "killed"
    config = tmp_path / "killed.yaml"
    config.write_text(yaml.safe_dump({**tree, "run_dir": str(killed)}))
    process = subprocess.Popen(command(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kill_when(process, killed / "metrics.jsonl", lines, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "student").exists()
    subprocess.run(command(config, "--resume"), check=True, capture_output=True)
    assert_same_outcome(full, killed)


def test_ctrl_c_writes_a_checkpoint_and_resume_goes_on_from_it(tmp_path: Path, tiny_config: Make) -> None:
    """SIGINT ends the run after the present step with exit code 130 and one line; nothing is lost."""
    tree = tiny_config(trainer={"steps": 40, "checkpoint_steps": 1000}, mixture={"interval_steps": 10})
    full = run(tree, tmp_path / "full")
    stopped = tmp_path / "stopped"
    config = tmp_path / "stopped.yaml"
    config.write_text(yaml.safe_dump({**tree, "run_dir": str(stopped)}))
    process = subprocess.Popen(command(config), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    kill_when(process, stopped / "metrics.jsonl", 5, signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    message = error.decode().strip().splitlines()
    assert len(message) == 1 and "--resume goes on" in message[0]
    (checkpoint,) = (stopped / "checkpoints").glob("step-*")
    done = len(list(read_lines(stopped / "metrics.jsonl")))
    assert checkpoint.name == f"step-{done:06d}"
    run(tree, stopped, resume=True)
    assert_same_outcome(full, stopped)


def test_a_signal_in_this_process_stops_after_the_step(tmp_path: Path, tiny_config: Make) -> None:
    """SIGTERM, which schedulers send, is treated like ctrl-C."""
    config = parse_config(tiny_config(trainer={"steps": 12, "checkpoint_steps": 99}), where="test")

    def stop(step: int, *_: object) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped after step 5 by a signal"):
        train(config, on_losses=stop)
    assert [p.name for p in (config.run_dir / "checkpoints").iterdir()] == ["step-000005"]


def test_resume_before_the_first_checkpoint_starts_over(tmp_path: Path, tiny_config: Make) -> None:
    """A run directory without a checkpoint is a run at step 0."""
    tree = tiny_config(trainer={"steps": 3})
    full = run(tree, tmp_path / "full")
    part = tmp_path / "part"
    shutil.copytree(full, part)
    shutil.rmtree(part / "checkpoints")
    shutil.rmtree(part / "student")
    assert_same_outcome(full, run(tree, part, resume=True))


def test_a_finished_run_may_be_resumed_and_stays_the_same(tmp_path: Path, tiny_config: Make) -> None:
    """Nothing is left to do, and nothing changes."""
    tree = tiny_config(trainer={"steps": 3})
    full = run(tree, tmp_path / "full")
    before = outcome(full)
    run(tree, full, resume=True)
    assert before == outcome(full)


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, tiny_config: Make) -> None:
    """A truncated file is one error that says what to delete."""
    tree = tiny_config(trainer={"steps": 3})
    full = run(tree, tmp_path / "full")
    path = full / "checkpoints" / "step-000003" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match="step-000003 cannot be read"):
        run(tree, full, resume=True)


def test_a_pickle_in_a_checkpoint_is_not_executed(tmp_path: Path, tiny_config: Make) -> None:
    """Files of Accelerate are loaded with weights_only: code in them is never run."""
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "executed"),))

    tree = tiny_config(trainer={"steps": 3})
    full = run(tree, tmp_path / "full")
    checkpoint = full / "checkpoints" / "step-000003"
    (checkpoint / "random_states_0.pkl").write_bytes(pickle.dumps(Evil()))
    run(tree, full, resume=True)  # not needed: the random state is in a safetensors file
    (checkpoint / "optimizer.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(RunError, match="cannot be read"):
        run(tree, full, resume=True)
    assert not (tmp_path / "executed").exists()


def test_a_missing_random_state_is_refused(tmp_path: Path, tiny_config: Make) -> None:
    """Going on with other random numbers would be a silent difference."""
    tree = tiny_config(trainer={"steps": 3})
    full = run(tree, tmp_path / "full")
    (full / "checkpoints" / "step-000003" / "random-rank0.safetensors").unlink()
    with pytest.raises(RunError, match="random-rank0"):
        run(tree, full, resume=True)

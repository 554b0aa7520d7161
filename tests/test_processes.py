"""Invariant 5 with real processes: the same config under `accelerate launch` on two gloo ranks."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ddkmix.config import parse_config
from ddkmix.records import read_lines
from ddkmix.setup import train
from tests.conftest import ConfigTree


def launch(config: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The README's command on two CPU processes.

    `--multi_gpu` is Accelerate's name for "start several processes"; without it, and without CUDA, it
    silently starts one whatever `--num_processes` says.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "-m", "ddkmix", "train", str(config), *arguments]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=300, env=environment)


def test_two_ranks_train_as_one(tmp_path: Path, tiny_config: Callable[..., ConfigTree]) -> None:
    """Same weights, same rows, and to float32 rounding the same losses at every step and evaluation; a run
    begun on two ranks goes on exactly as far on one."""
    tree = tiny_config(trainer={"steps": 6, "batch_rows": 6, "microbatch_rows": 2, "checkpoint_steps": 3})
    one = tmp_path / "one"
    train(parse_config({**tree, "run_dir": str(one)}, where="test"))
    two = tmp_path / "two"
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump({**tree, "run_dir": str(two)}))
    launch(config)
    for name in ("metrics.jsonl", "intervals.jsonl"):
        records = zip(read_lines(one / name), read_lines(two / name), strict=True)
        for expected, actual in records:
            assert expected.keys() == actual.keys()
            assert expected.get("served") == actual.get("served")
            flat = {k: v for k, v in expected.items() if isinstance(v, int | float)}
            assert {k: actual[k] for k in flat} == pytest.approx(flat, rel=5e-4, abs=1e-5)
    assert (two / "student" / "model.safetensors").exists()
    ranks = (two / "checkpoints" / "step-000006").glob("random-rank*.safetensors")
    assert ["random-rank0.safetensors", "random-rank1.safetensors"] == sorted(p.name for p in ranks)
    resumed = launch(config, "--resume")
    assert "student:" in resumed.stdout


def test_a_batch_smaller_than_the_world_is_refused(
    tmp_path: Path, tiny_config: Callable[..., ConfigTree]
) -> None:
    """Five rows on two ranks: one line that says the rule, before any model is loaded."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_config(trainer={"batch_rows": 5, "steps": 2})))
    result = launch(config, check=False)
    assert result.returncode != 0
    assert "batch_rows = 5 cannot be dealt evenly to 2 processes" in result.stderr
    assert not (tmp_path / "run").exists()

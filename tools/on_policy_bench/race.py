"""The race: systems take turns, a process for each measurement; one that fails does not stop the others."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from on_policy_bench.job import Job

HERE = Path(__file__).resolve().parent
OURS = {"gkd": "ddkmix-gkd", "minillm": "ddkmix-minillm"}
PEERS = {"gkd": ("trl-gkd", "trl-distillation"), "minillm": ("trl-minillm",)}
"""TRL's DistillationTrainer is what TRL itself advises for GKD with student samples alone."""
SYSTEMS = {name: key for key, ours in OURS.items() for name in (ours, *PEERS[key])}
"""Objective of each, in the order of their turns."""


def run(
    job: Job,
    systems: Sequence[str],
    rounds: int,
    *,
    threads: int,
    folders: Mapping[str, Path],
    timeout_s: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Every measurement, by system, and what went wrong.

    Args:
        job: its objective and folder are filled in for each process.
        systems: of `SYSTEMS`, in the order of their turns.
        rounds: turns of each.
        threads: of each process.
        folders: what a system's process imports TRL from.
        timeout_s: of a process.
        say: told what was measured.
    """
    found: dict[str, Any] = {"runs": {}, "errors": {}}
    for turn in range(rounds):
        for name in systems:
            if name in found["errors"]:
                continue
            own = replace(job, objective=SYSTEMS[name], folder=f"{job.folder}/{name}-{turn}")
            answer = _child(name, own, threads, folders.get(name), timeout_s)
            say(f"{turn + 1}/{rounds} {name:<17} {short(answer)}")
            if "error" in answer:
                found["errors"][name] = answer["error"]
            else:
                found["runs"].setdefault(name, []).append(answer)
    return found


def _child(name: str, job: Job, threads: int, folder: Path | None, timeout_s: float) -> dict[str, Any]:
    program = HERE / ("ours.py" if name in OURS.values() else "peers.py")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(folder or HERE.parents[1]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        done = subprocess.run(
            [sys.executable, str(program), name, job.to_json()],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {timeout_s:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode == 0 and lines:
        answer: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
        return answer
    return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}


def short(answer: Mapping[str, Any]) -> str:
    """One measurement in a line."""
    if "error" in answer:
        return str(answer["error"])
    return (
        f"{answer['median_step_s']:.2f} s a step, {answer['tokens_per_s']:.1f} tokens/s, "
        f"peak {answer['peak_mb']:.0f} MB"
    )

"""Runs that are opened and taken step by step, on one rank or several; as a program, a rank of several.

torchrun ... tests/rank_program.py tests/objectives/opened.py FOLDER CONFIG ...
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ddkmix.answering import open_prompts
from ddkmix.config import RunConfig, load_config
from ddkmix.preflight import check
from ddkmix.prepare import open_rows
from ddkmix.run import Run
from ddkmix.setup import _open, open_accelerator
from ddkmix.train_step import train_step

STILL = {"lr": 1e-12, "weight_decay": 0.0, "max_grad_norm": 0.0}
"""An optimizer that leaves the student where it is: gradients of several steps can be compared."""


def open_run(config: RunConfig) -> Run:
    """As `train` opens one, before the first measurement."""
    prepared = check(config)
    accelerator = open_accelerator(config)
    with accelerator.main_process_first():
        packed = open_rows(prepared, shown=False)
    run = _open(prepared, packed, open_prompts(prepared, packed), accelerator)
    run.objective_state = run.objective.init(1.0)
    return run


def observed(run: Run, steps: int) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Gradients of all trained parameters at each step and the buffer; tokens and metrics of each step."""
    found: dict[str, torch.Tensor] = {}
    records: list[dict[str, Any]] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        assert all(gradient is not None for gradient in gradients)
        found[f"gradients/{len(records)}"] = torch.cat([gradient.flatten() for gradient in gradients])

    handle = run.optimizer.optimizer.register_step_pre_hook(note)
    for step in range(steps):
        norm, tokens = train_step(run, next(run.mixture), step)
        metrics = {k: v for window in run.sums().values() for k, v in window.close(run.reduce).items()}
        records.append({"norm": norm, "tokens": tokens, **metrics})
    handle.remove()
    run.mixture.close()
    if run.answers is not None:
        found |= {name: torch.from_numpy(array) for name, array in run.answers.state().items()}
    return found, records


def of_rank(folder: Path, name: str, rank: int) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """What a rank has `observed`."""
    path = folder / f"{name}-{rank}"
    return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())


def main(folder: Path, configs: list[Path]) -> None:
    """Take the steps of some configs and write down what this rank sees."""
    for path in configs:
        config = load_config(path)
        run = open_run(config)
        tensors, records = observed(run, config.trainer.steps)
        out = folder / f"{path.stem}-{run.accelerator.process_index}"
        save_file(tensors, out.with_suffix(".safetensors"))
        out.with_suffix(".json").write_text(json.dumps(records))


def as_lists(arrays: dict[str, np.ndarray]) -> dict[str, list[int]]:
    """Comparable with ==."""
    return {name: array.tolist() for name, array in arrays.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])

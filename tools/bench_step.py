"""Overheads of a training step, measured side by side in one run. `make bench`; results: BENCHMARKS.md.

    step        ddkmix's whole step (data wait, planning, per-domain sums, recording) against the bare
                arithmetic on the same rows: teacher forward, student forward and backward with full
                logits, clip, AdamW. Goal: at most 1.05 x.
    data wait   share of the step that the loop waits for its rows. Goal: at most 1 %.
    evaluation  seconds for 500 rows per domain against 1,000 steps of 128 rows. Goal: at most 1 %.

Steps alternate between the two programs, so that a machine that slows down slows both; medians are quoted.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ddkmix import trainer
from ddkmix.checkpoint import claim_run
from ddkmix.config import RunConfig, load_config
from ddkmix.options import quiet_libraries
from ddkmix.preflight import check
from ddkmix.prepare import open_rows
from ddkmix.setup import _accelerator, _open, _optimizer
from ddkmix.tracking import progress_bar


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--steps", type=int, default=12, help="counted pairs of steps")
    parser.add_argument("--warmup", type=int, default=2, help="pairs not counted, first")
    arguments = parser.parse_args()
    quiet_libraries()
    folder = Path(tempfile.mkdtemp(prefix="bench-step-"))
    try:
        config = load_config(arguments.config, [f"run_dir={folder / 'run'}", "trainer.log_steps=1"])
        print(json.dumps(measure(config, arguments.steps, arguments.warmup), indent=1))
    finally:
        shutil.rmtree(folder)


def measure(config: RunConfig, steps: int, warmup: int) -> dict[str, Any]:
    """Alternate whole and bare steps on the same rows; then time the evaluation."""
    run = _prepare(config)
    bare = _bare_step(run)
    whole_s, bare_s, waits = [], [], []
    with progress_bar("bench", total=None, shown=False) as bar:
        for step in range(warmup + steps):
            started = time.perf_counter()
            batch = next(run.mixture)
            waited = time.perf_counter() - started
            norm, tokens = trainer.train_step(run, batch, step)
            trainer._record(run, bar, step + 1, norm, tokens, time.perf_counter() - started, waited)
            whole = time.perf_counter() - started
            plain = _seconds(lambda rows=batch: bare(rows))
            if step >= warmup:
                whole_s.append(whole)
                bare_s.append(plain)
                waits.append(waited / whole)
    evaluation_s = _seconds(lambda: trainer._measure(run, 0))
    rows = sum(len(held_out.places) for held_out in run.evaluator.held_out.values())
    batch_rows = config.trainer.batch_rows
    step_s = statistics.median(whole_s)
    published_eval_s = evaluation_s / rows * 500 * len(run.mixture.domains)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}",
        "rows_per_step": batch_rows,
        "tokens_per_row": config.pack.seq_len,
        "counted_pairs": steps,
        "whole_step_s": _spread(whole_s),
        "bare_step_s": _spread(bare_s),
        "whole_over_bare": _spread([w / b for w, b in zip(whole_s, bare_s, strict=True)]),
        "data_wait_share": _spread(waits),
        "evaluation_s": round(evaluation_s, 3),
        "evaluation_rows": rows,
        "evaluation_share_of_this_config": round(
            evaluation_s / (evaluation_s + config.mixture.interval_steps * step_s), 4
        ),
        "evaluation_share_as_published": round(
            published_eval_s / (published_eval_s + 1000 * step_s * 128 / batch_rows), 4
        ),
    }


def _prepare(config: RunConfig) -> trainer.Run:
    prepared = check(config)
    accelerator = _accelerator(config)
    run = _open(prepared, open_rows(prepared, shown=False), accelerator)
    claim_run(config)
    run.mixture.set_weights(dict.fromkeys(run.mixture.domains, 1.0))
    return run


def _bare_step(run: trainer.Run) -> Callable[[dict[str, torch.Tensor]], None]:
    """The same arithmetic as a short script would write it, on a copy of the student."""
    import copy

    config = run.config
    student = copy.deepcopy(run.accelerator.unwrap_model(run.student).student)
    optimizer = _optimizer(config, student)
    teacher = run.teacher.model
    low = config.trainer.mixed_precision == "bf16"
    device = run.accelerator.device

    def step(batch: dict[str, torch.Tensor]) -> None:
        ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)[:, 1:].reshape(-1)
        with torch.no_grad():
            theirs = teacher(input_ids=ids, use_cache=False).logits
        with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
            ours = student(input_ids=ids, use_cache=False).logits
        z, y = ours[:, :-1].flatten(0, 1).float(), theirs[:, :-1].flatten(0, 1).float()
        valid = labels != -100
        kl = F.kl_div(F.log_softmax(z, -1), F.log_softmax(y, -1), reduction="none", log_target=True)
        loss = F.cross_entropy(z, labels) + 0.2 * (kl.sum(-1) * valid).sum() / valid.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "min": round(min(values), 5),
        "median": round(statistics.median(values), 5),
        "max": round(max(values), 5),
    }


if __name__ == "__main__":
    main()

"""One measurement of one contestant, in a process of its own: `python -m loader_bench.child '{...}'`.

Prints one line of JSON. Rows per second: batches for some seconds, or for one epoch where the page cache was
emptied first, because a second pass would be warm. Data wait: the same with a training step of 20 ms (sleep).
"""

import json
import random
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from loader_bench import contestants
from loader_bench.corpus import Corpus

STEP_S = 0.02
_WARM_UP = 8


def main() -> None:
    """Run what the argument says."""
    job = json.loads(sys.argv[1])
    described = job["corpus"]
    corpus = Corpus(
        **{**described, "folder": Path(described["folder"]), "domains": tuple(described["domains"])}
    )
    contestant = contestants.load(job["contestant"])
    if job["task"] == "prepare":
        contestant.prepare(corpus, Path(job["root"]))
        result: dict[str, Any] = {"version": _version(contestant.PACKAGE)}
    else:
        started = time.perf_counter()
        stream = contestant.open_stream(
            corpus, job["root"], batch_rows=job["batch_rows"], workers=job["workers"]
        )
        check_batch(next(stream), job["batch_rows"], corpus.seq_len)
        first_s = time.perf_counter() - started
        limit = corpus.rows_per_domain * len(corpus.domains) if job["one_epoch"] else None
        measure = {"rows": rows_per_second, "wait": data_wait}[job["task"]]
        result = {"first_batch_s": first_s, **measure(stream, job["seconds"], job["batch_rows"], limit)}
        close = getattr(stream, "close", None)
        if close is not None:
            close()
    print("RESULT " + json.dumps(result), flush=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # ddkmix, which is imported from the checkout
        return "checkout"


def check_batch(batch: Any, batch_rows: int, seq_len: int) -> None:
    """Refuse a contestant that hands over something else than the others."""
    import torch

    for name in ("input_ids", "labels"):
        tensor = batch[name]
        assert tensor.dtype == torch.int64, f"{name} is {tensor.dtype}"
        assert tuple(tensor.shape) == (batch_rows, seq_len), f"{name} has shape {tuple(tensor.shape)}"
    assert batch["input_ids"].data_ptr() != batch["labels"].data_ptr(), "labels are not their own"


def rows_per_second(
    stream: Iterator[Any], seconds: float, batch_rows: int, limit: int | None
) -> dict[str, float]:
    """Batches as fast as they come, after a few that fill what is filled once (not where a pass counts)."""
    for _ in range(0 if limit else _WARM_UP):
        next(stream)
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds and (limit is None or count < limit):
        next(stream)
        count += batch_rows
    return {"rows_per_s": count / elapsed, "rows": count}


def data_wait(stream: Iterator[Any], seconds: float, batch_rows: int, limit: int | None) -> dict[str, float]:
    """How long `next` blocks a loop with a step of 20 ms; also right after a weight change."""
    waits, after = [], []
    change = getattr(stream, "set_weights", None)
    generator = random.Random(0)  # noqa: S311
    started, step = time.perf_counter(), 0
    while time.perf_counter() - started < seconds or len(waits) < 20:
        changed = change is not None and step % 10 == 9
        if changed:
            names = stream.domains  # type: ignore[attr-defined]
            change({name: generator.random() + 0.01 for name in names})
        begin = time.perf_counter()
        next(stream)
        wait = 1000 * (time.perf_counter() - begin)
        if step >= _WARM_UP:
            (after if changed else waits).append(wait)
        time.sleep(STEP_S)
        step += 1
    result = {"wait_median_ms": float(np.median(waits)), "wait_p99_ms": float(np.percentile(waits, 99))}
    if after:
        result["change_median_ms"] = float(np.median(after))
        result["change_p99_ms"] = float(np.percentile(after, 99))
    return result


if __name__ == "__main__":
    main()

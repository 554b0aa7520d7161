"""What only ddkmix can be asked: planning, growth with domains and shards, and a million rows.

    plan        one step of 1,024 rows over 20 domains. Goal: 0.3 ms.
    domains     cost of a row from 3 to 300 domains. Goal: flat.
    shards      cost of a row from 10 to 10,000 shards. Goal: flat.
    million     index bytes, opening and first batch for 1,000,000 rows.

Rows are short here (8 tokens): what is measured is the bookkeeping, not the copying.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ddkmix import DomainMixture
from ddkmix.planner import PlanSettings, initial_state, plan_step, quantise, with_weights
from loader_bench.packed import open_domains, write_domain

_SEQ_LEN = 8
_BATCH = 256
_SHARD_ROWS = 100


def measure(
    say: Callable[[str], None],
    *,
    million_rows: int = 1_000_000,
    domain_counts: tuple[int, ...] = (3, 30, 300),
    shard_counts: tuple[int, ...] = (10, 100, 1_000, 10_000),
    seconds: float = 1.5,
) -> dict[str, Any]:
    """All of it; less than a minute on an idle machine."""
    folder = Path(tempfile.mkdtemp(prefix="bench-loader-"))
    try:
        results: dict[str, Any] = {"plan": planning()}
        say(f"planning {results['plan']}")
        results["domains"] = {}
        for count in domain_counts:
            write(folder / f"d{count}", domains=count, shards=1, rows=_BATCH * 60 // count)
            results["domains"][count] = cost_per_row(folder / f"d{count}", count, seconds=seconds)
            say(f"{count} domains {results['domains'][count]}")
        results["shards"] = {}
        for count in shard_counts:
            write(folder / f"s{count}", domains=1, shards=count, rows=_SHARD_ROWS)
            results["shards"][count] = cost_per_row(folder / f"s{count}", 1, seconds=seconds)
            say(f"{count} shards {results['shards'][count]}")
            shutil.rmtree(folder / f"s{count}")
        results["million"] = start_up(folder / "million", million_rows)
        say(f"{million_rows} rows {results['million']}")
        return results
    finally:
        shutil.rmtree(folder)


def planning(*, domains: int = 20, batch_rows: int = 1024, steps: int = 300) -> dict[str, float]:
    """Milliseconds for a plan, with constant weights and with weights that change at every step."""
    names = tuple(f"domain{i:03d}" for i in range(domains))
    settings = PlanSettings(
        domains=names,
        batch_rows=batch_rows,
        num_rows=(10**6,) * domains,
        cap_rows=(None,) * domains,
    )
    generator = np.random.default_rng(0)
    found = {}
    for name, changes in (("constant", False), ("changing", True)):
        state = initial_state(settings, generator.dirichlet(np.ones(domains)))
        times = []
        for _ in range(steps):
            if changes:
                state = with_weights(state, quantise(generator.dirichlet(np.ones(domains))))
            started = time.perf_counter()
            _, state = plan_step(settings, state)
            times.append(1000 * (time.perf_counter() - started))
        found[f"{name}_median_ms"] = statistics.median(times)
        found[f"{name}_max_ms"] = max(times)
    return found


def write(folder: Path, *, domains: int, shards: int, rows: int) -> None:
    """Packed domains of short random rows, `rows` in each shard.

    One shard is written and linked under all names: a million members of tars would take minutes to write.
    """
    tokens = np.random.default_rng(0).integers(0, 49_152, (rows, _SEQ_LEN)).astype(np.uint16)
    [tar] = write_domain(folder, "original", tokens, shard_rows=rows)
    for i in range(domains):
        (folder / _name(i)).mkdir()
        for shard in range(shards):
            for path in tar.parent.iterdir():
                name = path.name.replace("000000", f"{shard:06d}")
                (folder / _name(i) / name).hardlink_to(path)
    shutil.rmtree(folder / "original")


def cost_per_row(folder: Path, domains: int, *, seconds: float) -> dict[str, float]:
    """Microseconds of a row, without workers, after a first epoch's worth of opening files."""
    mixture = DomainMixture(open_domains(folder, [_name(i) for i in range(domains)]), batch_rows=_BATCH)
    for _ in range(20):
        next(mixture)
    times = []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        begin = time.perf_counter()
        next(mixture)
        times.append(1e6 * (time.perf_counter() - begin) / _BATCH)
    mixture.close()
    return {"median_us": statistics.median(times), "mean_us": statistics.mean(times)}


def start_up(folder: Path, rows: int, *, domains: int = 8, shard_rows: int = 5_000) -> dict[str, float]:
    """Bytes of the index, and seconds until the first batch, indices read from disk."""
    write(folder, domains=domains, shards=-(-rows // domains // shard_rows), rows=shard_rows)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix != ".tar" and path.is_file())
    times: dict[str, list[float]] = {"open_s": [], "first_batch_s": []}
    for _ in range(3):
        started = time.perf_counter()
        mixture = DomainMixture(open_domains(folder, [_name(i) for i in range(domains)]), batch_rows=_BATCH)
        times["open_s"].append(time.perf_counter() - started)
        next(mixture)
        times["first_batch_s"].append(time.perf_counter() - started)
        mixture.close()
    return {
        "rows": rows,
        "index_bytes": size,
        "index_bytes_per_row": size / rows,
        **{name: statistics.median(values) for name, values in times.items()},
    }


def _name(i: int) -> str:
    return f"domain{i:03d}"

"""The tables of `BENCHMARKS.md`, from the JSON of a run."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from loader_bench.contestants import BASE


def markdown(results: dict[str, Any]) -> str:
    """Everything that was measured, ready to be pasted."""
    parts = [f"Machine: {results['machine']}. {results['date']}.", f"`{results['command']}`"]
    race = results.get("race")
    if race:
        parts += list(_race(race))
    if results.get("own"):
        parts += list(_own(results["own"]))
    return "\n\n".join(parts) + "\n"


def _race(race: dict[str, Any]) -> Iterator[str]:
    setup, corpus = race["setup"], race["corpus"]
    yield (
        f"{len(corpus['domains'])} domains of {corpus['rows_per_domain']:,} rows of {corpus['seq_len']} "
        f"tokens, shards of {corpus['shard_rows']:,} rows, batches of {setup['batch_rows']}; "
        f"{setup['rounds']} rounds of {setup['seconds']:g} s, in turn, a process each, one thread. "
        + ", ".join(f"{name} {version}" for name, version in race["versions"].items())
        + "."
    )
    for files in setup["files"]:
        table = _rows_table(race, files)
        if table:
            yield f"Rows per second, {_FILES[files]}: median (min-max), ratio to plain {BASE}"
            yield table
    if race["wait"]:
        yield "Data wait with a training step of 20 ms, ms: median / 99th percentile (warm files)"
        yield _wait_table(race)
    if race["errors"]:
        yield "Failed:\n\n" + "\n".join(f"- {key}: {error}" for key, error in race["errors"].items())


_FILES = {
    "warm": "local files in the page cache",
    "cold": "local files dropped from the page cache (posix_fadvise DONTNEED) each time, one pass",
    "http": "HTTP from a threaded server with ranges on the same machine",
}


def _rows_table(race: dict[str, Any], files: str) -> str:
    setup = race["setup"]
    lines = []
    for name in setup["contestants"]:
        cells = []
        for workers in setup["workers"]:
            rates = rates_of(race, name, files, workers)
            base = rates_of(race, BASE, files, workers)
            ratio = (
                f" **{statistics.median(rates) / statistics.median(base):.1f}x**" if rates and base else ""
            )
            cells.append(
                f"{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f}){ratio}"
                if rates
                else ""
            )
        if any(cells):
            lines.append([name, *cells])
    return table(["", *(f"{w} workers" for w in setup["workers"])], lines) if lines else ""


def rates_of(race: dict[str, Any], name: str, files: str, workers: int) -> list[float]:
    """Rows per second of every round."""
    return [r["rows_per_s"] for r in race["rows"].get(f"{name} {files} {workers}", [])]


def _wait_table(race: dict[str, Any]) -> str:
    setup = race["setup"]
    lines = []
    for name in setup["contestants"]:
        found = [_median_of(race["wait"].get(f"{name} warm {w}", [])) for w in setup["workers"]]
        for label, prefix in ((name, "wait"), (f"{name}, after a weight change", "change")):
            cells = [
                f"{r[f'{prefix}_median_ms']:.2f} / {r[f'{prefix}_p99_ms']:.1f}"
                if f"{prefix}_median_ms" in r
                else ""
                for r in found
            ]
            if any(cells):
                lines.append([label, *cells])
    return table(["", *(f"{w} workers" for w in setup["workers"])], lines)


def _median_of(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(r[key] for r in rounds) for key in (rounds[0] if rounds else ())}


def _own(own: dict[str, Any]) -> Iterator[str]:
    plan, million = own["plan"], own["million"]
    yield (
        f"Planning a step of 1,024 rows over 20 domains: median {plan['constant_median_ms']:.3f} ms "
        f"(max {plan['constant_max_ms']:.2f}); when weights change at every step "
        f"{plan['changing_median_ms']:.3f} ms (max {plan['changing_max_ms']:.2f}). Goal 0.3 ms."
    )
    yield table(
        ["a row's cost, rows of 8 tokens, 0 workers", "median, us"],
        [[f"{n} domains", f"{cost['median_us']:.2f}"] for n, cost in own["domains"].items()]
        + [[f"{int(n):,} shards", f"{cost['median_us']:.2f}"] for n, cost in own["shards"].items()],
    )
    yield (
        f"{million['rows']:,} rows in 8 domains: index {million['index_bytes'] / 1e6:.1f} MB on disk "
        f"({million['index_bytes_per_row']:.1f} bytes a row), opened in {million['open_s']:.2f} s, "
        f"first batch after {million['first_batch_s']:.2f} s."
    )


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text."""
    rule = ["---", *(["---:"] * (len(head) - 1))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))

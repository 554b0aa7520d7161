"""The distillation objective against its peers, in one run. Results: BENCHMARKS.md.

    time     median of rounds in which the contestants take turns, in one process per size
    memory   growth of the peak of resident memory in one pass, gradients included, a process each
    error    gradients against float64, relative to their norm

Forward and backward pass of CE + 0.2 KL(teacher || student) from hidden states and output weights. Goals:
peak extra memory at most a tenth of the naive loss's at 152k classes x 4,096 tokens and flat in tokens; time
at most that of the naive loss and of the best peer; gradients no less accurate than the naive loss's.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from bench_loader import machine, say  # noqa: E402
from loss_bench import environment  # noqa: E402

CHILD = Path(__file__).resolve().parent / "loss_bench" / "child.py"
NAMES = ("ddkmix", "naive", "liger", "trl", "torchtune")
DTYPES = ("float32", "bfloat16")
_WHOLE = {"naive": 30, "torchtune": 26}
"""Bytes that a contestant holds for each token and class, at most."""


@dataclass(frozen=True)
class Size:
    """One line of a table."""

    vocab: int
    tokens: int
    rounds: int = 0
    """0: not timed."""
    memory: tuple[str, ...] = ()
    """Contestants whose memory is measured."""


FULL = (
    Size(32_000, 512, 3),
    Size(32_000, 8192, 1, ("ddkmix", "naive")),
    Size(49_152, 2048, 3),
    Size(49_152, 8192, 0, ("ddkmix", "naive")),
    Size(151_936, 512, 3, ("ddkmix",)),
    Size(151_936, 4096, 2, NAMES),
    Size(151_936, 8192, 1, ("ddkmix", "naive")),
)
QUICK = (Size(2000, 128, 1, ("ddkmix",)),)
ERROR_SIZES = {False: (32_000, 512), True: (500, 64)}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print Markdown, write JSON."""
    options = _parser().parse_args(arguments)
    started = time.perf_counter()
    results: dict[str, Any] = {
        "command": "python tools/bench_loss.py "
        + shlex.join(sys.argv[1:] if arguments is None else arguments),
        "date": time.strftime("%Y-%m-%d"),
        "threads": options.threads,
    }
    names = list(NAMES if not options.only else options.only.split(","))
    folder = options.peers
    if folder is None and {"liger", "torchtune"} & set(names):
        folder = environment.make(options.cache / "site", say)
    sizes, dtypes = (QUICK, DTYPES[1:]) if options.quick else (FULL, DTYPES)
    chosen = [size for size in sizes if options.classes in (None, size.vocab)]
    chosen = [size for size in chosen if options.tokens in (None, size.tokens)]
    run = Runner(folder, options.threads, names, memory_gb())
    measures: dict[str, Callable[[Size, str], list[dict[str, Any]]]] = {
        "time": run.times,
        "memory": run.memory,
    }
    results |= {"machine": machine(), "time": [], "memory": [], "error": []}
    for part in options.parts.split(","):
        for dtype in dtypes:
            for size in chosen if part in measures else ():
                results[part] += measures[part](size, dtype)
                write(options.json, results, started)  # as they come: a run of an hour may be killed
            if part == "error":
                results[part].append(run.errors(*ERROR_SIZES[options.quick], dtype))
    write(options.json, results, started)
    print(markdown(results))


def write(path: Path | None, results: dict[str, Any], started: float) -> None:
    """Keep what has been measured so far."""
    results["minutes"] = (time.perf_counter() - started) / 60
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n")


@dataclass(frozen=True)
class Runner:
    """Starts measuring processes."""

    folder: Path | None
    threads: int
    names: list[str]
    memory_gb: float

    def times(self, size: Size, dtype: str) -> list[dict[str, Any]]:
        """Seconds of every contestant that fits, at one size."""
        if not size.rounds:
            return []
        names = [name for name in self.names if self._fits(name, size)]
        task = {"task": "time", "names": names, "rounds": size.rounds, **_where(size, dtype)}
        return [{**_where(size, dtype), **self._ask(task)}]

    def memory(self, size: Size, dtype: str) -> list[dict[str, Any]]:
        """Bytes of each contestant, a process each."""
        rows = []
        for name in size.memory:
            if name in self.names:
                row = {**_where(size, dtype), "name": name}
                fits = self._fits(name, size)
                asked = {"task": "memory", "name": name, **_where(size, dtype)}
                rows.append({**row, **(self._ask(asked) if fits else {"skipped": True})})
        return rows

    def errors(self, vocab: int, tokens: int, dtype: str) -> dict[str, Any]:
        """Of every contestant that computes the whole objective."""
        names = [name for name in self.names if name != "trl"]
        where = {"vocab": vocab, "tokens": tokens, "dtype": dtype}
        return {**where, **self._ask({"task": "error", "names": names, **where})}

    def _fits(self, name: str, size: Size) -> bool:
        needed = _WHOLE.get(name, 0) * size.vocab * size.tokens / 1e9
        if needed > 0.85 * self.memory_gb:
            where = f"{name} at {size.vocab} x {size.tokens}"
            say(f"{where} needs {needed:.0f} GB of {self.memory_gb:.0f}: skipped")
        return needed <= 0.85 * self.memory_gb

    def _ask(self, task: dict[str, Any]) -> dict[str, Any]:
        say(json.dumps(task))
        paths = [str(CHILD.parents[2]), *([str(self.folder)] if self.folder else [])]
        done = subprocess.run(
            [sys.executable, str(CHILD), json.dumps(task)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(self.threads)},
            check=False,
        )
        if done.returncode:
            say(done.stderr[-2000:])
            return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr else str(done.returncode)}
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer


def markdown(results: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        f"`{results['command']}`, {results['date']}, {results['threads']} threads, {results['machine']}",
        "",
    ]
    lines += [
        "| classes x tokens, type | "
        + " | ".join(f"{name}, s" for name in NAMES)
        + " | to naive | to best peer |"
    ]
    lines += ["|---|" + "---:|" * (len(NAMES) + 2)]
    for row in results["time"]:
        lines.append(_cells(row, [*_seconds(row)]))
    lines += ["", "| classes x tokens, type | loss | peak extra MB | to naive |", "|---|---|---:|---:|"]
    for row in results["memory"]:
        lines.append(_cells(row, [row["name"], *_megabytes(row, results["memory"])]))
    lines += [
        "",
        "| classes x tokens, type | loss | error of dL/dh | error of dL/dW |",
        "|---|---|---:|---:|",
    ]
    for row in results["error"]:
        for name, pair in row.get("errors", {}).items():
            lines.append(_cells(row, [name, *(f"{error:.2e}" for error in pair)]))
    failed = [row for part in ("time", "memory", "error") for row in results[part] if "failed" in row]
    lines += ["", *(f"failed: {json.dumps(row)}" for row in failed), f"{results['minutes']:.0f} minutes."]
    return "\n".join(lines)


def _seconds(row: dict[str, Any]) -> list[str]:
    medians = {name: statistics.median(seconds) for name, seconds in row.get("seconds", {}).items()}
    cells = [f"{medians[name]:.2f}" if name in medians else "-" for name in NAMES]
    peers = [medians[name] for name in medians if name not in ("ddkmix", "naive")]
    for other in (medians.get("naive"), min(peers, default=None)):
        cells.append(f"{medians['ddkmix'] / other:.2f}" if other and "ddkmix" in medians else "-")
    return cells


def _megabytes(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    if "bytes" not in row:
        return ["does not fit" if "skipped" in row else "failed", "-"]
    same = [
        r for r in rows if r["name"] == "naive" and all(r[k] == row[k] for k in ("vocab", "tokens", "dtype"))
    ]
    naive = same[0].get("bytes") if same else None
    return [f"{row['bytes'] / 1e6:.0f}", f"1/{naive / row['bytes']:.1f}" if naive else "-"]


def _cells(row: dict[str, Any], cells: list[str]) -> str:
    return f"| {row['vocab']:,} x {row['tokens']:,}, {row['dtype']} | " + " | ".join(cells) + " |"


def _where(size: Size, dtype: str) -> dict[str, Any]:
    return {"vocab": size.vocab, "tokens": size.tokens, "dtype": dtype}


def memory_gb() -> float:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one tiny size, to see that everything runs")
    parser.add_argument("--only", help=",".join(NAMES))
    parser.add_argument("--classes", type=int, help="only the sizes with so many classes")
    parser.add_argument("--tokens", type=int, help="only the sizes with so many tokens")
    parser.add_argument("--parts", default="time,memory,error", help="what to measure")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache", type=Path, default=Path(".cache/bench-loss"), help="for the peers")
    parser.add_argument(
        "--peers", type=Path, help="a folder that has them; default: one is made in the cache"
    )
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    return parser


if __name__ == "__main__":
    main()

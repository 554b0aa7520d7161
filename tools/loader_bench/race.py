"""The race: contestants take turns, each measurement in a process of its own.

Taking turns (round after round) is what makes ratios hold on a machine whose speed changes: all
contestants see the slow minutes. One that fails is reported with its error and does not stop the others.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from loader_bench import contestants
from loader_bench.corpus import Corpus
from loader_bench.server import serve

TOOLS = Path(__file__).resolve().parents[1]
_PREPARE_TIMEOUT_S = 900


@dataclass(frozen=True, kw_only=True, slots=True)
class Race:
    """What is run."""

    contestants: tuple[str, ...]
    workers: tuple[int, ...]
    files: tuple[str, ...]
    """Of "warm", "cold" and "http"."""
    rounds: int
    seconds: float
    """Of each measurement."""
    batch_rows: int
    python: str
    """The interpreter that has the contestants."""


def run(race: Race, corpus: Corpus, say: Callable[[str], None]) -> dict[str, Any]:
    """Every measurement, and what went wrong."""
    results: dict[str, Any] = {"versions": {}, "errors": {}, "rows": {}, "wait": {}, "setup": asdict(race)}
    ready = [name for name in race.contestants if _prepare(name, race, corpus, results, say)]
    with serve(corpus.folder / "formats") as url:
        for task, files, workers, name in _turns(race, ready):
            key = f"{name} {files} {workers}"
            if key in results["errors"]:
                continue
            if files == "http" and not contestants.load(name).HTTP:
                continue
            root = f"{url}/{name}" if files == "http" else str(corpus.format_folder(name))
            if files == "cold":
                forget(corpus.format_folder(name))
            job = {
                "task": task,
                "root": root,
                "batch_rows": race.batch_rows,
                "workers": workers,
                "seconds": race.seconds,
                "one_epoch": files == "cold",
            }
            result = _child(name, corpus, job, race.python, timeout_s=60 + 10 * race.seconds)
            say(f"{task:>4} {files:>4} {workers} workers {name:<22} {_short(result)}")
            if "error" in result:
                results["errors"][key] = result["error"]
            else:
                results[task].setdefault(key, []).append(result)
    return results


def _turns(race: Race, ready: Sequence[str]) -> Iterator[tuple[str, str, int, str]]:
    for _ in range(race.rounds):
        yield from product(("rows",), race.files, race.workers, ready)
    if "warm" in race.files:
        yield from product(("wait",), ("warm",), race.workers, ready)


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache (posix_fadvise DONTNEED; they must be on disk already)."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _prepare(
    name: str, race: Race, corpus: Corpus, results: dict[str, Any], say: Callable[[str], None]
) -> bool:
    folder = corpus.format_folder(name)
    done = folder.with_name(f".{name}.json")
    if not done.exists():
        say(f"converting for {name}")
        job = {"task": "prepare", "root": str(folder)}
        result = _child(name, corpus, job, race.python, timeout_s=_PREPARE_TIMEOUT_S)
        if "error" in result:
            results["errors"][name] = result["error"]
            say(f"{name}: {result['error']}")
            return False
        done.write_text(json.dumps(result))
    results["versions"][name] = json.loads(done.read_text())["version"]
    return True


def _child(
    name: str, corpus: Corpus, job: dict[str, Any], python: str, *, timeout_s: float
) -> dict[str, Any]:
    described = {**asdict(corpus), "folder": str(corpus.folder)}
    argument = json.dumps({**job, "contestant": name, "corpus": described})
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{TOOLS}:{TOOLS.parent}",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(corpus.folder / "hf"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        done = subprocess.run(
            [python, "-m", "loader_bench.child", argument],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {timeout_s:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if lines:
        found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
        return found
    return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}


def _short(result: dict[str, Any]) -> str:
    return str(result.get("error") or {k: round(v, 3) for k, v in result.items()})


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min and max."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def this_python() -> str:
    """The interpreter that runs this."""
    return sys.executable

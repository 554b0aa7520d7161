"""ddkmix's mixed stream against its peers, in one run. `make bench-loader`; results: BENCHMARKS.md.

    race    rows per second and data wait of every contestant, with several numbers of workers, on warm,
            cold and HTTP files. Goals: 5 x plain webdataset; ahead of every peer at every number of workers.
    own     planning time, growth with domains and shards, index size and start-up for a million rows.

Every contestant has one file below `loader_bench/contestants`, set up as its own documentation says. They
live in an environment of their own (`loader_bench/environment.py`) and take turns, a process each.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from loader_bench import contestants, environment, own, race, report  # noqa: E402
from loader_bench.corpus import TOKENIZER, make_corpus  # noqa: E402


def main(arguments: list[str] | None = None) -> None:
    """Measure, print Markdown, write JSON."""
    options = _parser().parse_args(arguments)
    results: dict[str, Any] = {
        "command": "python tools/bench_loader.py "
        + shlex.join(sys.argv[1:] if arguments is None else arguments),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if "race" in options.parts:
        corpus = make_corpus(
            options.cache,
            seq_len=options.seq_len,
            rows_per_domain=options.rows_per_domain,
            shard_rows=options.shard_rows,
            tokenizer=options.tokenizer,
        )
        plan = race.Race(
            contestants=tuple(options.contestants),
            workers=tuple(options.workers),
            files=tuple(options.files),
            rounds=options.rounds,
            seconds=options.seconds,
            batch_rows=options.batch_rows,
            python=str(options.python or environment.make(options.cache / "venv", say)),
        )
        described = {**asdict(corpus), "folder": corpus.folder.name}
        results["race"] = {**race.run(plan, corpus, say), "corpus": described}
        results["race"]["setup"]["python"] = ""
    if "own" in options.parts:
        results["own"] = own.measure(say)
    results = json.loads(json.dumps(results))  # the report reads what the file holds
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(report.markdown(results))


def machine() -> str:
    """Cores, memory and versions; no names."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} at the end"
    )


def say(line: str) -> None:
    """Progress; standard output is for the tables."""
    print(line, file=sys.stderr, flush=True)


def _names(allowed: list[str]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        wrong = [name for name in names if name not in allowed]
        if wrong:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: choose from {', '.join(allowed)}")
        return names

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = list(contestants.MODULES)
    add = parser.add_argument
    add("--parts", type=_names(["race", "own"]), default=["race", "own"], help="race,own")
    add("--contestants", type=_names(names), default=names, help=",".join(names))
    add("--workers", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2])
    add("--files", type=_names(["warm", "cold", "http"]), default=["warm", "cold", "http"])
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=2.0, help="of each measurement")
    add("--batch-rows", type=int, default=32)
    add("--seq-len", type=int, default=512)
    add("--rows-per-domain", type=int, default=8192)
    add("--shard-rows", type=int, default=1024)
    add("--tokenizer", type=Path, default=TOKENIZER)
    add("--cache", type=Path, default=Path(".cache/bench-loader"), help="for texts, formats and peers")
    add("--python", type=Path, help="an interpreter that has the peers; default: one is made in the cache")
    add("--json", type=Path, help="also write all numbers here")
    return parser


if __name__ == "__main__":
    main()

"""Hundreds of thousands of steps of the mixed stream, against an oracle that knows only what was promised.

    python tools/soak.py --steps 200000 --seed 0

Episodes of random length follow one another. In each, some ranks (several `DomainMixture` objects in this
process) with some reader processes serve one stream; weights change at random steps; reader processes are
killed; streams are closed and iterated again, or saved, thrown away and restored with another number of
workers and ranks. The oracle (`soak_oracle.py`) checks every row. At the end: exit code 1 and the violations.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import numpy as np  # noqa: E402
import soak_growth  # noqa: E402
from loader_bench.packed import open_domains, write_domain  # noqa: E402
from soak_oracle import Oracle, Violation  # noqa: E402

from ddkmix import DomainMixture  # noqa: E402
from ddkmix.errors import DataError  # noqa: E402

SIZES = {"long": 700, "middle": 230, "short": 61, "tiny": 5, "rare": 97}
"""Rows of each domain: epochs of very different length, none a multiple of a batch."""
BATCH_ROWS = 12
WORLD_SIZES = (1, 2, 3, 4, 6)
_SEQ_LEN = 16
_ATTEMPTS = 4
_BLOCK_ROWS = 64


@dataclass(slots=True)
class Soak:
    """A soak under way."""

    folder: Path
    seed: int
    oracle: Oracle
    chance: random.Random
    with_workers: float
    """Share of the episodes."""
    kills: float
    """Share of the steps."""
    ranks: list[DomainMixture] = field(default_factory=list)
    workers: int = 0
    events: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[int, int, int]] = field(default_factory=list)
    """(step, resident bytes, open descriptors)."""
    handler: Any = None
    """torch's SIGCHLD handler."""
    deferred: bool = False
    """Whether a child died outside of `_child_signals`."""


def main(arguments: list[str] | None = None) -> int:
    """Soak, print a report, say whether everything held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--with-workers", type=float, default=0.1, help="share of such episodes")
    parser.add_argument("--minutes", type=float, default=60, help="stop after this long, saying so")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        violations, report = soak(
            Path(folder),
            options.steps,
            options.seed,
            minutes=options.minutes,
            with_workers=options.with_workers,
        )
    print(json.dumps(report, indent=1))
    for violation in violations:
        print(f"VIOLATION {violation}", file=sys.stderr)
    if report["steps"] < options.steps and not violations:
        print(f"stopped after {report['steps']} of {options.steps} steps", file=sys.stderr)
    return 1 if violations or report["steps"] < options.steps else 0


def soak(
    folder: Path,
    steps: int,
    seed: int,
    *,
    minutes: float = 60,
    with_workers: float = 0.1,
    kills: float = 0.008,
    spoil: Callable[[int, list[dict[str, Any]]], list[dict[str, Any]]] = lambda step, batches: batches,
) -> tuple[list[str], dict[str, Any]]:
    """Serve that many steps; returns what was wrong and a report.

    Args:
        folder: for the rows.
        steps: steps to serve.
        seed: of the rows, their order and every event.
        minutes: give up after this long.
        with_workers: share of the episodes that have reader processes.
        kills: share of the steps before which a reader process is killed, where there are any.
        spoil: changes what the ranks received before the oracle sees it; tests lose and repeat rows here.
    """
    rows = write_rows(folder, seed)
    run = Soak(
        folder=folder,
        seed=seed,
        oracle=Oracle(rows, seed=seed, batch_rows=BATCH_ROWS, block_rows=_BLOCK_ROWS),
        chance=random.Random(seed),  # noqa: S311
        with_workers=with_workers,
        kills=kills,
    )
    started = time.monotonic()
    violations: list[str] = []
    try:
        _restart(run, None)
        while run.oracle.step < steps and time.monotonic() - started < 60 * minutes:
            _episode(run, min(steps - run.oracle.step, run.chance.randrange(1, 400)), steps, spoil)
    except Violation as violation:
        violations.append(f"step {run.oracle.step}: {violation}")
    finally:
        _close(run)
        if run.handler is not None:
            signal.signal(signal.SIGCHLD, run.handler)
    violations += soak_growth.violations(run.memory, steps)
    ends = soak_growth.ends(run.memory, steps)
    report = {
        "steps": run.oracle.step,
        "rows": run.oracle.step * BATCH_ROWS,
        "seconds": round(time.monotonic() - started, 1),
        "seed": seed,
        "events": dict(sorted(run.events.items())),
        "epochs": {name: round(run.oracle.served[name] / size, 1) for name, size in SIZES.items()},
        "largest deviation, rows": round(run.oracle.largest_deviation, 3),
        "bound H_N, rows": round(run.oracle.bound, 3),
        "resident MiB, warm and last": [round(m / 2**20) for _, m, _ in ends],
        "descriptors, warm and last": [f for _, _, f in ends],
        "violations": len(violations),
    }
    return violations, report


def write_rows(folder: Path, seed: int) -> dict[str, list[np.ndarray]]:
    """Rows of every domain, written; returned by domain, shard by shard. No two rows are alike."""
    written = {}
    for i, (domain, size) in enumerate(SIZES.items()):
        tokens = np.random.default_rng([seed, i]).integers(0, 60_000, (size, _SEQ_LEN)).astype(np.uint16)
        tokens[:, 0], tokens[:, 1] = i, np.arange(size)
        shard_rows = max(size // 5, 2)
        write_domain(folder, domain, tokens, shard_rows=shard_rows)
        written[domain] = [tokens[start : start + shard_rows] for start in range(0, size, shard_rows)]
    return written


def _episode(run: Soak, steps: int, total: int, spoil: Any) -> None:
    end = run.oracle.step + steps
    run.memory.append(soak_growth.sample(run.oracle.step))
    while run.oracle.step < end:
        draw = run.chance.random()
        if draw < 0.04:
            _change_weights(run)
        elif draw < 0.044:
            run.events["closed"] += 1
            for mixture in run.ranks:
                mixture.close()
        elif draw < 0.046:
            run.events["state reloaded"] += 1
            for mixture in run.ranks:
                mixture.load_state_dict(json.loads(json.dumps(mixture.state_dict())))
        if run.chance.random() < run.kills:
            _kill(run)
        _step(run, spoil)
    run.events["resumed"] += 1
    _restart(run, json.loads(json.dumps(run.ranks[0].state_dict())))


def _step(run: Soak, spoil: Any) -> None:
    batches = []
    for rank in range(len(run.ranks)):
        for _ in range(_ATTEMPTS):
            batch = _receive(run, rank)
            if batch is not None:
                batches.append(batch)
                break
        else:
            raise Violation(f"rank {rank}: no batch after {_ATTEMPTS} attempts")
    run.oracle.check(spoil(run.oracle.step, batches), [mixture.state.to_json() for mixture in run.ranks])


def _receive(run: Soak, rank: int) -> dict[str, Any] | None:
    """A rank's batch; None when a reader process was found dead, and the stream is ready to go on."""
    mixture = run.ranks[rank]
    before = mixture.state_dict() if run.workers else {}
    try:
        with _child_signals(run):
            batch = next(mixture)
    except Exception as error:
        if not run.workers or not _says_dead(error):
            raise Violation(f"rank {rank}: {type(error).__name__}: {error}") from None
        run.events[f"worker deaths reported as {type(error).__name__}"] += 1
        if mixture.state.step != run.oracle.step:
            # the signal handler of torch hit us after the batch was counted: only the saved state is right
            run.events["deaths between batch and loop"] += 1
            mixture.load_state_dict(before)
        if run.chance.random() < 0.5:  # as a user would: the same object, or a fresh one
            run.events["fresh object after a death"] += 1
            run.ranks[rank] = _fresh(run, rank, len(run.ranks), before)
            mixture.close()
        return None
    return {name: tensor.numpy().copy() for name, tensor in batch.items()}


def _says_dead(error: BaseException | None) -> bool:
    """Whether it is about a reader process: a signal handler may raise in anything, which may wrap it."""
    while error is not None:
        if isinstance(error, DataError | RuntimeError) and "worker" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _child_signals(run: Soak) -> Iterator[None]:
    """Let torch's SIGCHLD handler raise in this block only: in the oracle it would be our mistake.

    Blocking the signal would not do: another thread of the process may take it, and Python runs the
    handler here.
    """
    if not run.workers:
        yield
        return
    try:
        if run.handler is not None:
            signal.signal(signal.SIGCHLD, run.handler)
            if run.deferred:
                run.deferred = False
                signal.raise_signal(signal.SIGCHLD)
        yield
    finally:
        run.handler = signal.getsignal(signal.SIGCHLD)
        signal.signal(signal.SIGCHLD, lambda *_: setattr(run, "deferred", True))


def _change_weights(run: Soak) -> None:
    run.events["weight changes"] += 1
    kind = run.chance.random()
    if kind < 0.2:  # nearly all to one domain
        raw = dict.fromkeys(SIZES, 1e-06)
        raw[run.chance.choice(list(SIZES))] = 1.0
    elif kind < 0.4:  # some get nothing
        raw = {name: run.chance.choice([0.0, 1.0, 3.0]) for name in SIZES}
        raw["long"] += 0.5
    else:
        raw = {name: run.chance.expovariate(1.0) + 1e-9 for name in SIZES}
    total = sum(raw.values())
    for mixture in run.ranks:
        mixture.set_weights({name: value / total for name, value in raw.items()})
    run.oracle.set_weights(raw)


def _kill(run: Soak) -> None:
    """SIGKILL a reader process of this program, one that the DataLoader started and nobody else."""
    children = worker_pids()
    if run.workers and children:
        run.events["workers killed"] += 1
        os.kill(run.chance.choice(children), signal.SIGKILL)


def worker_pids() -> list[int]:
    """Living children of this process that are DataLoader workers (they were forked by it)."""
    import multiprocessing

    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def _restart(run: Soak, state: dict[str, Any] | None) -> None:
    """Throw the ranks away; others, of another number, go on from the state."""
    _close(run)
    run.workers = run.chance.choice([1, 1, 2]) if run.chance.random() < run.with_workers else 0
    sizes = WORLD_SIZES if not run.workers else (1, 2)
    world_size = run.chance.choices(sizes, weights=[1 / size for size in sizes])[0]
    run.events[f"episodes with {run.workers} workers"] += 1
    run.events[f"episodes with {world_size} ranks"] += 1
    run.ranks = [_fresh(run, rank, world_size, state) for rank in range(world_size)]


def _fresh(run: Soak, rank: int, world_size: int, state: dict[str, Any] | None) -> DomainMixture:
    mixture = DomainMixture(
        open_domains(run.folder, list(SIZES)),
        batch_rows=BATCH_ROWS,
        seed=run.seed,
        rank=rank,
        world_size=world_size,
        num_workers=run.workers,
        prefetch_steps=run.chance.choice([1, 2, 5]),
        block_rows=_BLOCK_ROWS,
    )
    if state is not None:
        mixture.load_state_dict(state)
    return mixture


def _close(run: Soak) -> None:
    for mixture in run.ranks:
        mixture.close()
    run.ranks = []


if __name__ == "__main__":
    raise SystemExit(main())

"""Invariants 3 to 6 with real gloo processes: the same global batches for 2, 3 and 4 ranks, and a resume of a
stream or a run on another number of ranks, workers and micro-batches.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddkmix.config import parse_config
from ddkmix.records import read_lines
from ddkmix.setup import train
from tests.conftest import REPO, ConfigTree

BATCH_ROWS, SEQ_LEN = 12, 16
CHANGES = {2: {"code": 1.0, "math": 0.0, "prose": 3.0}, 4: {"code": 1.0, "math": 1.0, "prose": 1.0}}

STREAM = """
import json, sys
import torch, torch.distributed as dist
from ddkmix import DomainMixture

options = json.loads(sys.argv[1])
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
mixture = DomainMixture.from_cards(
    options["cards"], tokenizer=options["tokenizer"], seq_len=options["seq_len"], cache_dir=options["cache"],
    batch_rows=options["batch_rows"], rank=rank, world_size=world_size, num_workers=options["workers"],
)
if options["state"]:
    mixture.load_state_dict(options["state"])
steps = []
for step in range(options["first"], options["last"]):
    if str(step) in options["changes"]:
        mixture.set_weights(options["changes"][str(step)])
    batch = next(mixture)
    everyone = [None] * world_size
    rows = [[int(d), row.tolist()] for d, row in zip(batch["domain_ids"], batch["input_ids"])]
    dist.all_gather_object(everyone, rows)
    steps.append(sorted(row for rows in everyone for row in rows))
hashes = [None] * world_size
dist.all_gather_object(hashes, mixture.state.fingerprint())
assert len(set(hashes)) == 1, hashes
if rank == 0:
    print(json.dumps({"steps": steps, "state": mixture.state_dict()}))
mixture.close()
dist.destroy_process_group()
"""


def torchrun(world_size: int, program: str, *arguments: str, check: bool = True) -> Any:
    """A program on so many gloo processes of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world_size)]
    command += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command.append(str(REPO / "tests" / "rank_program.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [*command, program, *arguments], capture_output=True, text=True, timeout=400, env=environment
    )
    if check and result.returncode:  # CalledProcessError would not show what the ranks said
        raise AssertionError(f"torchrun ended with {result.returncode}:\n{result.stderr[-8000:]}")
    return result


@pytest.fixture
def stream_of(tmp_path: Path, tiny_domains: Path, tokenizer_folder: Path) -> Callable[..., Any]:
    """A function that reads some steps of the tiny domains on real ranks."""
    program = tmp_path / "stream.py"
    program.write_text(STREAM)

    def read(world_size: int, first: int, last: int, *, workers: int = 0, state: Any = None) -> Any:
        options = {
            "cards": str(tiny_domains),
            "tokenizer": str(tokenizer_folder),
            "cache": str(tiny_domains / "cache"),
            "seq_len": SEQ_LEN,
            "batch_rows": BATCH_ROWS,
            "workers": workers,
            "first": first,
            "last": last,
            "state": state,
            "changes": {str(step): weights for step, weights in CHANGES.items()},
        }
        result = torchrun(world_size, str(program), json.dumps(options))
        return json.loads(result.stdout.splitlines()[-1])

    return read


def test_ranks_and_resumes_on_other_ranks_read_one_stream(stream_of: Callable[..., Any]) -> None:
    """One rank without interruption; then 2, 3 and 4 ranks, each going on where the ones before stopped, with
    other workers: the same rows at every step, weights changed twice on the way."""
    whole = stream_of(1, 0, 6)
    assert 6 == len(whole["steps"])
    assert [BATCH_ROWS] * 6 == [len(step) for step in whole["steps"]]
    found, state = [], None
    for world_size, first, last, workers in ((2, 0, 2, 1), (3, 2, 4, 0), (4, 4, 6, 1)):
        part = stream_of(world_size, first, last, workers=workers, state=state)
        found += part["steps"]
        state = part["state"]
    assert whole["steps"] == found
    assert whole["state"] == state


def test_a_run_goes_on_with_other_ranks_workers_and_micro_batches(
    tmp_path: Path, tiny_config: Callable[..., ConfigTree]
) -> None:
    """Three ranks, then four with one worker each and micro-batches of one row, then one rank: plans and
    weights of the run of one process, and its losses to float32 rounding."""
    tree = tiny_config(
        trainer={"steps": 9, "batch_rows": 12, "checkpoint_steps": 3}, mixture={"interval_steps": 3}
    )
    one, many = tmp_path / "one", tmp_path / "many"
    train(parse_config({**tree, "run_dir": str(one)}, where="test"))
    config = tmp_path / "many.yaml"
    config.write_text(yaml.safe_dump({**tree, "run_dir": str(many)}))
    stopped = stop_after(tmp_path, 3)
    torchrun(3, stopped, str(config), check=False)
    assert ["step-000003"] == sorted(p.name for p in (many / "checkpoints").iterdir())
    torchrun(
        4,
        stop_after(tmp_path, 6),
        str(config),
        "--resume",
        "loader.workers=1",
        "trainer.microbatch_rows=1",
        check=False,
    )
    assert ["step-000003", "step-000006"] == sorted(p.name for p in (many / "checkpoints").iterdir())
    subprocess.run(
        [sys.executable, "-m", "ddkmix", "train", str(config), "--resume", "trainer.microbatch_rows=5"],
        check=True,
        capture_output=True,
        timeout=300,
    )
    for name in ("metrics.jsonl", "intervals.jsonl"):
        for expected, actual in zip(read_lines(one / name), read_lines(many / name), strict=True):
            assert expected.get("served") == actual.get("served")
            flat = {k: v for k, v in expected.items() if isinstance(v, int | float)}
            assert {k: actual[k] for k in flat} == pytest.approx(flat, rel=1e-3, abs=1e-5)


STOPPING = """
import sys
from pathlib import Path
import ddkmix.trainer as trainer
from ddkmix.cli import main

config, *arguments = sys.argv[1:]
record = trainer.checkpoint


def checkpoint(run):
    record(run)
    if run.mixture.state.step == STEP:
        run.accelerator.wait_for_everyone()
        sys.exit(9)


trainer.checkpoint = checkpoint
main(["train", config, *arguments])
"""


def stop_after(folder: Path, step: int) -> str:
    """A program that trains and leaves without a word after the checkpoint of a step."""
    path = folder / f"stop_{step}.py"
    path.write_text(STOPPING.replace("STEP", str(step)))
    return str(path)


TAMPERED = """
import sys
from dataclasses import replace
import torch.distributed as dist
import ddkmix.trainer as trainer
from ddkmix.cli import main

train_step = trainer.train_step


def tampered(run, batch, step):
    result = train_step(run, batch, step)
    if step == 1 and run.accelerator.process_index == 1:
        state = run.mixture.state
        run.mixture._rewind(replace(state, served=(state.served[0] + 1, *state.served[1:])))
    return result


trainer.train_step = tampered
main(["train", *sys.argv[1:]])
"""


def test_a_rank_that_reads_other_rows_is_caught_at_the_next_update(
    tmp_path: Path, tiny_config: Callable[..., ConfigTree]
) -> None:
    """Rank 1 skips a row after step 2; the update at step 4 stops the run on every rank and says so."""
    program, config = tmp_path / "tampered.py", tmp_path / "config.yaml"
    program.write_text(TAMPERED)
    tree = tiny_config(trainer={"steps": 8, "batch_rows": 6, "checkpoint_steps": 100})
    config.write_text(yaml.safe_dump(tree))
    result = torchrun(2, str(program), str(config), check=False)
    assert result.returncode != 0
    assert "ranks hold different plans at step 4 (weight update): state hashes" in result.stderr
    assert [0] == [record["step"] for record in read_lines(tmp_path / "run" / "intervals.jsonl")]


Change = Callable[[ConfigTree], ConfigTree]


def cards_of(tree: ConfigTree, names: Sequence[str]) -> ConfigTree:
    """The config with only these of the tiny domains."""
    folder = Path(tree["domains"][0])
    return {**tree, "domains": [str(folder / f"{name}.yaml") for name in names]}


def rows_by_domain(run: Path, first: int, last: int) -> dict[str, list[int]]:
    """The j of every row that a run served in some steps."""
    from ddkmix.replay import Replay

    rows: dict[str, list[int]] = {}
    for row in Replay(run).rows(first, last):
        rows.setdefault(row.domain, []).append(row.j)
    return {name: sorted(numbers) for name, numbers in rows.items()}


def test_domains_may_come_and_go_at_a_resume(tmp_path: Path, tiny_config: Callable[..., ConfigTree]) -> None:
    """`prose` joins after step 4, `code` leaves after step 8: refused without --allow-changes, stated in
    changes.jsonl with it, and the domains that stay go on with their very next rows."""
    tree = tiny_config(mixture={"interval_steps": 3})
    run = tmp_path / "run"

    def go(names: Sequence[str], steps: int, **options: bool) -> None:
        whole = cards_of(tree, names)
        config = parse_config(
            {**whole, "trainer": {**whole["trainer"], "checkpoint_steps": 4, "steps": 12}}, where="test"
        )
        import ddkmix.trainer as trainer
        from ddkmix.errors import Interrupted

        original = trainer.train_step

        def stopping(parts: Any, batch: Any, step: int) -> Any:
            if step + 1 == steps:
                parts.stop_signal.append(2)
            return original(parts, batch, step)

        trainer.train_step = stopping
        try:
            train(config, **options)
        except Interrupted:
            pass
        finally:
            trainer.train_step = original

    go(["code", "math"], 4)
    with pytest.raises(Exception, match=r"domains was .* and is .* add --allow-changes") as info:
        go(["code", "math", "prose"], 8, resume=True)
    assert "\n" not in str(info.value)
    go(["code", "math", "prose"], 8, resume=True, allow_changes=True)
    go(["math", "prose"], 12, resume=True, allow_changes=True)
    changes = list(read_lines(run / "changes.jsonl"))
    assert [4, 8] == [record["step"] for record in changes]
    assert "domain 'prose' was added" in changes[0]["changes"]
    assert "domain 'code' was removed" in changes[1]["changes"]
    before, middle, after = (rows_by_domain(run, *steps) for steps in ((1, 4), (5, 8), (9, 12)))
    assert (["code", "math"], ["code", "math", "prose"], ["math", "prose"]) == (
        sorted(before),
        sorted(middle),
        sorted(after),
    )
    for name in ("code", "math", "prose"):
        served = [*before.get(name, []), *middle.get(name, []), *after.get(name, [])]
        assert list(range(len(served))) == served
    kept = sorted(path.name for path in run.glob("config-until-*"))
    assert ["config-until-step-000004.yaml", "config-until-step-000008.yaml"] == kept

"""One optimizer step: parts, micro-batches and normalisers on one rank and on two."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.config import RunConfig, dump_config
from ddkmix.losses import CrossEntropy, LossTerm
from ddkmix.objectives import Part
from ddkmix.predicted_tokens import predicted
from ddkmix.response_store.prompts import LeadingTokens
from ddkmix.train_step import _micro_batches, _units, parts_of
from tests.conftest import REPO, reset_accelerate
from tests.objectives.opened import STILL, observed, of_rank, open_run

MakeRun = Callable[..., RunConfig]

NLL = (LossTerm("cross_entropy", 1.0, CrossEntropy()),)
SHARES = {"name": "static", "weights": {"code": 0.5, "talk": 0.5}}
STEPS = 2


def part_of(rows: int, *, in_pairs: bool = False) -> Part:
    """Rows that are their own numbers."""
    labels = torch.arange(rows)[:, None].expand(rows, 3)
    return Part(name="x", batch={"labels": labels, "row": torch.arange(rows)}, what=(), in_pairs=in_pairs)


# --- micro-batches ---------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.integers(1, 40), st.none() | st.integers(1, 12), st.booleans())
def test_micro_batches_hold_every_row_once_and_pairs_whole(count: int, most: int | None, pairs: bool) -> None:
    """No more rows than asked for, but for a pair, which is never cut; of nearly equal size."""
    rows = 2 * count if pairs else count
    found = [micro["row"].tolist() for micro in _micro_batches(part_of(rows, in_pairs=pairs), most)]
    assert list(range(rows)) == sorted(row for micro in found for row in micro)
    sizes = [len(micro) for micro in found]
    assert max(sizes) <= max(most or rows, 2 if pairs else 1)
    assert max(sizes) - min(sizes) <= (2 if pairs else 1)
    if pairs:
        assert all(
            first % 2 == 0 and second == first + 1
            for micro in found
            for first, second in zip(micro[::2], micro[1::2], strict=True)
        )


def test_three_rows_at_a_time_are_one_pair() -> None:
    """An odd limit is rounded down: five pairs in micro-batches of at most three rows are five."""
    assert [2] * 5 == [len(micro["row"]) for micro in _micro_batches(part_of(10, in_pairs=True), 3)]


def test_parts_of_a_name_share_a_normaliser() -> None:
    """Predicted tokens, or pairs."""
    parts = [part_of(4), part_of(2), part_of(6, in_pairs=True)]
    assert 4 * 2 + 2 * 2 + 3 == int(_units(parts, "x"))
    assert 0 == int(_units(parts, "other"))


@pytest.mark.parametrize(
    ("objective", "loss"),
    [
        ({"name": "dpkd", "chosen_nll": 0.2}, [{"name": "cross_entropy", "weight": 0.5}]),
        ({"name": "minillm"}, []),
        ({"name": "distillm2"}, []),
        ({"name": "seqkd"}, [{"name": "forward_kl"}]),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_micro_batches_change_no_gradient(make_run: MakeRun, objective: dict[str, Any], loss: Any) -> None:
    """One, two or three rows at a time, or all: gradients and metrics to rounding, responses exactly."""
    runs = []
    for most in (None, 1, 3):
        config = make_run(
            f"rows-{most}", objective=objective, loss=loss, optimizer=STILL, trainer={"microbatch_rows": most}
        )
        runs.append(observed(open_run(config), 1))
        reset_accelerate()
    (first, records), *others = runs
    assert first["gradients/0"].abs().max() > 1e-3
    for tensors, other_records in others:
        assert first.keys() == tensors.keys()
        torch.testing.assert_close(tensors.pop("gradients/0"), first["gradients/0"], rtol=1e-3, atol=1e-6)
        assert all(torch.equal(value, first[name]) for name, value in tensors.items())
        assert other_records[0] == pytest.approx(records[0], rel=1e-4, abs=1e-6)


# --- normalisers -----------------------------------------------------------------------------------


def test_a_step_is_the_mean_over_pairs_and_the_mean_over_tokens(make_run: MakeRun) -> None:
    """The gradient is that of (DPKD's mean over pairs) + 0.5 (cross-entropy's mean over predicted tokens)."""
    run = open_run(
        make_run(objective={"name": "dpkd"}, loss=[{"name": "cross_entropy", "weight": 0.5}], optimizer=STILL)
    )
    parts = parts_of(run, next(run.mixture), 0)
    assert ["train", "pairs"] == [part.name for part in parts]
    anchor, pairs = parts
    model = run.accelerator.unwrap_model(run.student)
    expected, _ = model(
        pairs.batch["input_ids"],
        pairs.batch["labels"],
        2 / len(pairs.batch["labels"]),
        pairs.what,
        run.teacher.signal(pairs.batch),
    )
    tokens = int(predicted(anchor.batch["labels"]).sum())
    nats, _ = model(anchor.batch["input_ids"], anchor.batch["labels"], 1 / tokens, NLL)
    trained = [p for group in run.optimizer.param_groups for p in group["params"]]
    gradients = torch.autograd.grad(expected + 0.5 * nats, trained)
    run.mixture.close()
    reset_accelerate()
    again = open_run(
        make_run(objective={"name": "dpkd"}, loss=[{"name": "cross_entropy", "weight": 0.5}], optimizer=STILL)
    )
    tensors, records = observed(again, 1)
    truth = torch.cat([gradient.flatten() for gradient in gradients])
    torch.testing.assert_close(tensors["gradients/0"], truth, rtol=1e-3, atol=1e-6)
    assert len(pairs.batch["labels"]) // 2 == records[0]["pairs/pairs"]
    assert tokens == records[0]["train/tokens"]
    assert tokens + int(predicted(pairs.batch["labels"]).sum()) == records[0]["tokens"]


def test_a_step_reads_no_prompt_that_is_in_the_batch(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PLAD asks for prompts and for the data's responses, on new rollouts."""
    run = open_run(make_run(objective={"name": "plad_margin"}, loss=[]))
    batch = next(run.mixture)

    def reads(*_: Any) -> Any:
        raise AssertionError("a row was read")

    monkeypatch.setattr(LeadingTokens, "read", reads)
    monkeypatch.setattr(LeadingTokens, "response", reads)
    (pairs,) = parts_of(run, batch, 0)
    assert len(pairs.batch["labels"]) > 0
    run.mixture.close()


def test_distillation_asks_nobody_and_trains_on_the_rows_of_data(make_run: MakeRun) -> None:
    """Without `objective` a step is what it was: one part, the planner's rows, no window beside `train`."""
    run = open_run(make_run(loss=[{"name": "cross_entropy"}]))
    batch = next(run.mixture)
    (part,) = parts_of(run, batch, 0)
    assert run.answers is None
    assert {} == run.windows
    assert ["train"] == list(run.sums())
    assert part.batch is batch
    assert ("train", False) == (part.name, part.in_pairs)
    assert run.terms_at(0) == part.what
    run.mixture.close()


# --- two ranks -------------------------------------------------------------------------------------

MATCHED = [{"name": "hidden_match", "pairs": [[0, 1]]}, {"name": "cross_entropy", "weight": 0.5}]
ON_TWO_RANKS: dict[str, dict[str, Any]] = {
    "pairs": {
        "objective": {"name": "dpkd", "fresh": 0.5, "chosen_nll": 0.1},
        "loss": [{"name": "cross_entropy", "weight": 0.5}],
        "trainer": {"steps": 4, "microbatch_rows": 2},
    },
    # two rows a step, of text on one rank and of prompts on the other, which alone learns from them
    "text": {"objective": {"name": "dpkd"}, "loss": [], "trainer": {"batch_rows": 2}, "policy": SHARES},
    "sides": {"objective": {"name": "distillm2"}, "loss": [], "trainer": {"batch_rows": 2}, "policy": SHARES},
    "samples": {"objective": {"name": "minillm"}, "loss": [], "trainer": {"microbatch_rows": 1}},
    # `hidden_match` has parameters of its own, which pairs do not use
    "layers": {"objective": {"name": "dpkd"}, "loss": MATCHED},
    "replaced": {
        "objective": {"name": "seqkd"},
        "loss": MATCHED,
    },
}
"""Sections of runs that two ranks take like one."""


def configs_of(make_run: MakeRun) -> dict[str, RunConfig]:
    """Runs whose optimizer moves nothing."""
    return {
        name: make_run(
            name,
            **{
                "policy": {"name": "static"},
                **sections,
                "optimizer": STILL,
                "trainer": {"steps": STEPS, "batch_rows": 6, **sections.get("trainer", {})},
            },
        )
        for name, sections in ON_TWO_RANKS.items()
    }


def test_two_ranks_take_the_step_of_one(make_run: MakeRun, tmp_path: Path) -> None:
    """Gradients and metrics to rounding, tokens and the replay buffers of both ranks exactly, also where a
    rank has nothing to learn from; nobody waits for ever."""
    configs, paths = configs_of(make_run), []
    for name, config in configs.items():
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(dump_config(config)))
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    launch += [
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        str(REPO / "tests/rank_program.py"),
    ]
    program = [str(REPO / "tests/objectives/opened.py"), str(tmp_path), *map(str, paths)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *launch, *program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert 0 == done.returncode, done.stderr[-3000:]
    for name, config in configs.items():
        reset_accelerate()
        expected, records = observed(open_run(config), config.trainer.steps)
        for rank in (0, 1):
            tensors, found = of_rank(tmp_path, name, rank)
            assert expected.keys() == tensors.keys()
            for key, value in expected.items():
                tolerance = {"rtol": 2e-3, "atol": 1e-6} if key.startswith("gradients") else {}
                message = f"{name}, rank {rank}: {key}"
                torch.testing.assert_close(tensors[key], value, msg=message, **tolerance)
            for one, two in zip(records, found, strict=True):
                assert two == pytest.approx(one, rel=1e-3, abs=1e-5), (name, rank)

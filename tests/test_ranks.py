"""Which process this is, alone, by the launcher's word, and in real gloo groups of 2 and 3 processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch

from ddkmix import DomainMixture
from ddkmix.errors import ConfigError
from ddkmix.ranks import (
    current_rank,
    everyones,
    from_main,
    open_processes,
    sum_over_ranks,
    wait_for_everyone,
)
from tests.reference_loop import BATCH_ROWS, DATASETS, SEED, expected, weights_of


def set_ranks(patch: pytest.MonkeyPatch, rank: str | None, world_size: str | None) -> None:
    """What a launcher puts into the environment."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
        if value is None:
            patch.delenv(name, raising=False)
        else:
            patch.setenv(name, value)


@pytest.mark.parametrize(
    ("found", "rank", "world_size"),
    [
        ((0, 1), None, None),
        ((0, 1), "0", None),
        ((0, 1), None, "4"),
        ((0, 1), "0", "1"),
        ((3, 4), "3", "4"),
    ],
)
def test_the_environment_says_who_this_is(
    monkeypatch: pytest.MonkeyPatch, found: tuple[int, int], rank: str | None, world_size: str | None
) -> None:
    """Both variables, or this is the only process."""
    set_ranks(monkeypatch, rank, world_size)
    assert found == current_rank()


@pytest.mark.parametrize(
    ("rank", "world_size"), [("4", "4"), ("-1", "2"), ("one", "2"), ("0", ""), ("0", "0")]
)
def test_an_environment_that_makes_no_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch, rank: str, world_size: str
) -> None:
    """Rather than reading as the first of one."""
    set_ranks(monkeypatch, rank, world_size)
    with pytest.raises(ConfigError, match=f"RANK='{rank}', WORLD_SIZE='{world_size}' in the environment"):
        current_rank()


def test_one_process_agrees_with_itself() -> None:
    """Nothing is sent, nothing is copied."""
    tensor = torch.tensor([1.0, 2.0])
    assert tensor is sum_over_ranks(tensor)
    assert (5, [5]) == (from_main(5), everyones(5))


def test_ranks_whose_share_is_done_wait_for_days(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an hour, the default of gloo, would end a launch whose ranks have unequal shares."""
    monkeypatch.setattr("accelerate.PartialState", dict)
    for value in ("true", "false"):
        monkeypatch.setenv("ACCELERATE_USE_CPU", value)
        assert {"cpu": value == "true", "timeout": timedelta(days=7)} == open_processes()
    wait_for_everyone()  # alone


def test_a_mixture_reads_the_share_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the environment when the first batch is asked for, and no other afterwards."""
    set_ranks(monkeypatch, None, None)
    mixture = DomainMixture.from_datasets(DATASETS, batch_rows=BATCH_ROWS, seed=SEED, collate_fn=list)
    set_ranks(monkeypatch, "1", "3")
    script: Any = [[]] * 4
    wanted = expected(script, rank=1, world_size=3)[::2]
    assert wanted[:2] == [next(mixture), next(mixture)]
    set_ranks(monkeypatch, None, None)
    assert wanted[2:] == [next(mixture), next(mixture)]


def test_a_batch_that_cannot_be_dealt_is_refused_when_the_ranks_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At once where the environment tells, else with the first batch."""
    set_ranks(monkeypatch, None, None)
    mixture = DomainMixture.from_datasets(DATASETS, batch_rows=BATCH_ROWS, collate_fn=list)
    set_ranks(monkeypatch, "0", "5")
    with pytest.raises(ConfigError, match="cannot be dealt evenly to 5 processes"):
        next(mixture)
    with pytest.raises(ConfigError, match="cannot be dealt evenly to 5 processes"):
        DomainMixture.from_datasets(DATASETS, batch_rows=BATCH_ROWS, collate_fn=list)


# --- real processes ---------------------------------------------------------------------------------

START = """
import json, os, sys
import numpy as np
import torch, torch.distributed as dist
from torch import nn
from ddkmix import *
from ddkmix.errors import *
from ddkmix.ranks import *
from tests.reference_loop import *

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
options = json.loads(sys.argv[1])


def report(value):
    everyone = everyones(value)
    if rank == 0:
        print(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()

"""
Ranks = Callable[..., list[Any]]


@pytest.fixture
def on_ranks(tmp_path: Path) -> Ranks:
    """A function that runs a program on some gloo processes and returns what each of them reports."""

    def run(world_size: int, program: str, **options: Any) -> list[Any]:
        path = tmp_path / "program.py"
        path.write_text(START + program)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world_size)]
        command += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        root = str(Path(__file__).parents[1])
        result = subprocess.run(
            [*command, str(path), json.dumps(options)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        )
        assert 0 == result.returncode, result.stderr
        return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]

    return run


READING = """
del os.environ["RANK"], os.environ["WORLD_SIZE"]  # only the process group knows
own = {"batch_rows": 12, "seed": SEED}
mixture = DomainMixture.from_datasets(DATASETS, collate_fn=list, num_workers=rank % 2, **own)
sampler = MixtureBatchSampler(INDICES, **own)
loader = mixture.loader(steps=5)
os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
dist.init_process_group("gloo")
found = []
for step, (batch, indices) in enumerate(zip(loader, sampler)):
    assert items_in(batch) == indices
    found.append(indices)
    if step == 1:
        mixture.set_weights(weights_of(2))
        sampler.set_weights(weights_of(2))
mixture.close()
report([found, from_main(rank + 5), float(sum_over_ranks(torch.tensor(rank + 1.0)))])
"""


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_of_a_group_that_starts_later_share_the_batches_of_one(
    on_ranks: Ranks, world_size: int
) -> None:
    """Mixture and sampler are made before the group: the ranks' rows together are those of one process."""
    found = on_ranks(world_size, READING)
    wanted = [sorted(step) for step in expected([[], [2], [], [], []])[::2]]
    steps = zip(*(steps for steps, _, _ in found), strict=True)
    assert wanted == [sorted(chain.from_iterable(parts)) for parts in steps]
    assert [[5, sum(range(1, world_size + 1))]] * world_size == [rest for _, *rest in found]


REWEIGHTING = """
dist.init_process_group("gloo")


class OnlyMainCounts:
    domains = tuple(COUNTS)

    def measure(self, model):
        return DomainLosses.from_means({name: 1.0 + i * (rank == 0) for i, name in enumerate(COUNTS)})


mixture = DomainMixture.from_datasets(DATASETS, batch_rows=12, seed=SEED, collate_fn=list)
reweighter = Reweighter(mixture, OnlyMainCounts(), {"name": "ddk", "signal": "loss_gap"}, interval_steps=2)
loader, found = mixture.loader(steps=6), []
reweighter.step(None, 0)
for done, batch in enumerate(loader, start=1):
    reweighter.step(None, done)
state = json.dumps(reweighter.state_dict(), sort_keys=True)
weights = mixture.weights
problems = []
for bad in range(world_size):  # one rank's losses are no numbers
    losses = DomainLosses.from_means({name: float("nan") if rank == bad else 1.0 for name in COUNTS})
    try:
        reweighter.update(losses)
        problems.append("none")
    except NumericsError as error:
        problems.append(str(error)[:40])
if rank == world_size - 1:  # it takes a step alone
    next(mixture)
try:
    reweighter.update(DomainLosses.from_means(dict.fromkeys(COUNTS, 1.0)))
    problems.append("none")
except RunError as error:
    problems.append(str(error)[:27])
report([state, weights, problems])
"""


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_follows_the_losses_of_rank_0(on_ranks: Ranks, world_size: int) -> None:
    """Weights and saved state are the same on all; so are errors; a rank that diverged is caught on all."""
    found = on_ranks(world_size, REWEIGHTING)
    assert [found[0]] * world_size == found
    _, weights, problems = found[0]
    assert weights["prose"] > weights["math"] > weights["code"]
    assert ["held-out student_loss is not finite: {'c"[:40], *["none"] * (world_size - 1)] == problems[:-1]
    assert "ranks hold different plans " == problems[-1]


MEASURING = """
import copy
dist.init_process_group("gloo")


class Student(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(50, 8), nn.BatchNorm1d(8)  # a buffer that DDP broadcasts
        self.head = nn.Linear(8, 50)

    def forward(self, ids):
        Student.calls += 1
        return self.head(self.norm(self.embed(ids).transpose(1, 2)).transpose(1, 2))


generator = np.random.default_rng(0)
sizes = {"code": options["rows"], "math": 7}
held_out = {
    name: [{"input_ids": generator.integers(0, 50, 5 + i % 3).tolist()} for i in range(count)]
    for name, count in sizes.items()
}
model = nn.parallel.DistributedDataParallel(Student(), broadcast_buffers=True)
for _ in range(2):
    model(torch.zeros(2, 3, dtype=torch.int64)).sum().backward()
Student.calls = 0
evaluator = GapEvaluator(held_out, teacher=model.module, batch_rows=2)
losses = evaluator.measure(model)
calls = Student.calls
other = copy.deepcopy(model.module)
other.head.weight.data.mul_(2)
asked = {"teacher": other, "measures": ["excess_loss", "forward_kl"], "batch_rows": 2}
measured = GapEvaluator(held_out, **asked).measure(model)
del os.environ["RANK"]
alone, alone_asked = GapEvaluator(held_out, batch_rows=2), GapEvaluator(held_out, **asked)
from ddkmix import gap_evaluator
gap_evaluator.current_rank, gap_evaluator.sum_over_ranks = (lambda: (0, 1)), (lambda tensor: tensor)
single = alone.measure(model.module)
student, gap = losses.student_loss.tolist(), losses.loss_gap.tolist()
both = [
    [*one.excess_loss.tolist(), *one.forward_kl.tolist()]
    for one in (measured, alone_asked.measure(model.module))
]
report([calls, student, gap, single.student_loss.tolist(), model.training, both])
"""


@pytest.mark.parametrize(("world_size", "rows"), [(2, 1), (3, 4)])
def test_ranks_measure_together_what_one_measures(on_ranks: Ranks, world_size: int, rows: int) -> None:
    """A model wrapped by DDP, with a buffer that is broadcast at every call: every rank calls it equally
    often, also where a domain has fewer rows than ranks, and all have the losses of one process."""
    found = on_ranks(world_size, MEASURING, rows=rows)
    calls = sum(ceil(ceil(count / world_size) / 2) for count in (rows, 7))
    for own, student, gap, single, training, (measured, measured_alone) in found:
        assert found[0][5][0] == measured
        assert measured_alone == pytest.approx(measured, rel=1e-5)
        assert min(measured) > 0
        assert (2 * calls, True) == (own, training)
        assert found[0][1] == student
        assert single == pytest.approx(student, rel=1e-6)
        assert [0.0, 0.0] == pytest.approx(gap, abs=1e-6)


def test_the_weights_of_the_reference_are_named() -> None:
    """The programs above speak of the same domains."""
    assert {"code", "math", "prose"} == set(weights_of(0))

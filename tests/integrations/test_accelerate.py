"""A loop with Accelerate, and what Accelerate does to loaders (research notes, mixers.md section 3).

No adapter is needed: `accelerator.prepare` hands our loader back as it is, and
`register_for_checkpointing` takes a `Reweighter`. The traps are shown with Accelerate's own classes, so
that a change of theirs is noticed.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from torch.utils.data import DataLoader, WeightedRandomSampler

from ddkmix import DomainMixture, MixtureBatchSampler
from ddkmix.errors import RunError
from tests.integrations.conftest import STEPS, Parts, Rows, dealt, rows_of
from tests.test_elastic import torchrun

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Loop:
    """A training loop as users of Accelerate write it."""

    def __init__(self, parts: Parts, accumulation: int) -> None:
        self.accelerator = Accelerator(gradient_accumulation_steps=accumulation)
        self.reweighter = parts.reweighter
        optimizer = torch.optim.SGD(parts.student.parameters(), lr=1e-2)
        loader = parts.mixture.loader(steps=STEPS, microbatches=accumulation, device=self.accelerator.device)
        self.student, self.optimizer, self.loader = self.accelerator.prepare(parts.student, optimizer, loader)
        assert self.loader is loader
        self.accelerator.register_for_checkpointing(parts.reweighter)

    def run(self, *, until: int = STEPS) -> Rows:
        """The rows of each step."""
        found: Rows = []
        done, window = self.reweighter.mixture.state.step, []
        self.reweighter.step(self.student, done)
        for batch in self.loader:
            with self.accelerator.accumulate(self.student):
                window.append(rows_of(batch["input_ids"]))
                self.accelerator.backward(self.student(**batch).loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                found.append(dealt(window))
                done, window = done + 1, []
                self.reweighter.step(self.student, done)
                if done == until:
                    break
        return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_rows_are_those_of_our_own_trainer(
    trainer_rows: Rows, parts: Callable[..., Parts], workers: int, accumulation: int
) -> None:
    """At every step; the weights that are set after step s are whole at step s + 1."""
    assert trainer_rows == Loop(parts(num_workers=workers), accumulation).run()


@pytest.mark.parametrize("stop", [3, 4])
def test_save_state_and_load_state_go_on_exactly(
    trainer_rows: Rows, parts: Callable[..., Parts], tmp_path: Path, stop: int
) -> None:
    """Accelerate's own way, between and at measurements, with other workers afterwards.

    (Accumulation stays: Accelerate restores its own count of micro-batches, which would split a step in two.)
    """
    first = Loop(parts(num_workers=2), 3)
    found = first.run(until=stop)
    first.accelerator.save_state(str(tmp_path))
    second = Loop(parts(), 3)
    second.accelerator.load_state(str(tmp_path))
    assert trainer_rows == found + second.run()
    parameters = [loop.student.state_dict().values() for loop in (first, second)]
    assert not all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))  # the second went on


def test_a_loader_that_is_read_ahead_is_refused(parts: Callable[..., Parts]) -> None:
    """A DataLoaderShard holds one batch back, so weights would come one step late: one line says so."""
    made = parts()
    ahead = DataLoaderShard(_Rows(made.mixture), batch_size=None)
    batches = iter(ahead)
    made.reweighter.step(made.student, 0)
    next(batches)
    with pytest.raises(Exception, match=r"finished 1 optimizer steps and the mixture has handed out .* 2: "):
        made.reweighter.step(made.student, 1)


class _Rows(torch.utils.data.IterableDataset[Any]):
    """What a user might wrap a mixture into."""

    def __init__(self, mixture: DomainMixture) -> None:
        self.mixture = mixture

    def __iter__(self) -> Any:
        return iter(self.mixture.loader(steps=STEPS))


# --- traps ------------------------------------------------------------------------------------------

DOMAINS = {"code": list(range(10)), "math": list(range(10, 30))}


def test_a_rank_aware_batch_sampler_is_halved_by_accelerate_and_ours_notices() -> None:
    """BatchSamplerShard takes every n-th batch of what is one rank's share; our documentation warns."""
    samplers = [MixtureBatchSampler(DOMAINS, batch_rows=6, rank=r, world_size=2, steps=4) for r in (0, 1)]
    served = {i for sampler in samplers for batch in sampler for i in batch}
    again = [MixtureBatchSampler(DOMAINS, batch_rows=6, rank=r, world_size=2, steps=4) for r in (0, 1)]
    sharded = [
        BatchSamplerShard(sampler, num_processes=2, process_index=rank, even_batches=False)
        for rank, sampler in enumerate(again)
    ]
    kept = {i for shard in sharded for batch in shard for i in batch}
    assert 24 == len(served)
    assert 12 == len(kept)
    assert "BatchSamplerShard" in (MixtureBatchSampler.__doc__ or "")
    loader = DataLoader(range(30), batch_sampler=sharded[0])
    with pytest.raises(RunError, match="has another batch_sampler"):
        next(again[0].follow(loader))


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_that_change_in_an_epoch_have_an_effect(workers: int) -> None:
    """torch draws all indices of a WeightedRandomSampler at once; ours follows at the next step."""
    weights = torch.tensor([1.0] * 10 + [0.0] * 20)
    theirs = WeightedRandomSampler(weights, 60, generator=torch.Generator().manual_seed(0))
    drawn = []
    for i, item in enumerate(DataLoader(range(30), batch_size=6, sampler=theirs)):
        drawn += item.tolist()
        if i == 0:
            weights[:10], weights[10:] = 0.0, 1.0
            theirs.weights = weights.double()
    assert max(drawn) < 10  # nothing has changed
    ours = MixtureBatchSampler(DOMAINS, batch_rows=6, weights={"code": 1.0, "math": 0.0}, steps=10)
    followed = []
    for i, item in enumerate(ours.follow(DataLoader(range(30), batch_sampler=ours, num_workers=workers))):
        followed.append(item.tolist())
        if i == 0:
            ours.set_weights({"code": 0.0, "math": 1.0})
    assert 10 == len(followed)
    assert max(followed[0]) < 10
    assert min(min(batch) for batch in followed[1:]) >= 10


def test_a_resume_reads_none_of_the_rows_before_it() -> None:
    """torchdata's StatefulDataLoader fast-forwards through a stream; a state of ours is a place."""
    before = Counting(list(range(30)))
    mixture = DomainMixture.from_datasets({"code": before}, batch_rows=5)
    for _ in range(40):
        next(mixture)
    after = Counting(list(range(30)))
    resumed = DomainMixture.from_datasets({"code": after}, batch_rows=5)
    opened = after.reads
    resumed.load_state_dict(mixture.state_dict())
    assert opened == after.reads
    assert next(mixture).tolist() == next(resumed).tolist()
    assert opened + 5 == after.reads


class Counting(list[int]):
    """A dataset that counts how often it is read."""

    reads = 0

    def __getitem__(self, i: Any) -> Any:
        self.reads += 1
        return super().__getitem__(i)


PROCESSES = """
import json, sys
import torch
from accelerate import Accelerator
from ddkmix import DomainMixture, Reweighter
from tests.integrations.policies import Rotating

folder, workers, resume, until = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume", int(sys.argv[4])
data = {name: [{"x": float(i)} for i in range(at, at + n)] for name, at, n in (("a", 0, 9), ("b", 100, 17))}
mixture = DomainMixture.from_datasets(data, batch_rows=8, num_workers=workers, seed=3)
accelerator = Accelerator(gradient_accumulation_steps=2)
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
loader = mixture.loader(steps=until, microbatches=2, device=accelerator.device)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)


class Evaluator:
    def measure(self, model):
        from ddkmix import DomainLosses
        return DomainLosses.from_means({"a": 2.0 + accelerator.process_index, "b": 1.0})  # ranks need not
        agree


reweighter = Reweighter(mixture, Evaluator(), Rotating(), interval_steps=2)
accelerator.register_for_checkpointing(reweighter)
if resume:
    accelerator.load_state(folder)
done, steps, window = mixture.state.step, [], []
reweighter.step(model, done)
for batch in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(batch["x"].float()[:, None]).sum())
        optimizer.step()
        optimizer.zero_grad()
    window += accelerator.gather(batch["x"]).tolist()
    if accelerator.sync_gradients:
        done += 1
        steps.append(sorted(window))
        window = []
        reweighter.step(model, done)
accelerator.save_state(folder)
if accelerator.is_main_process:
    print(json.dumps(steps))
mixture.close()
accelerator.end_training()
"""


def test_two_processes_share_every_batch_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row once over both ranks (default loaders of Accelerate lose or repeat half of a stream), and
    each rank's checkpoint is its own (they share one file, in which stateful loaders overwrite each
    other)."""
    program = tmp_path / "program.py"
    program.write_text(PROCESSES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))

    def steps(world_size: int, folder: str, workers: int, mode: str, until: int) -> Any:
        done = torchrun(world_size, str(program), str(tmp_path / folder), str(workers), mode, str(until))
        return json.loads(done.stdout.splitlines()[-1])

    alone = steps(1, "alone", 0, "start", 6)
    assert [8] * 6 == [len(step) for step in alone]
    assert len(set(alone[0]) | set(alone[1])) > 8  # rows change from step to step
    found = steps(2, "two", 1, "start", 3)
    assert alone == found + steps(2, "two", 0, "resume", 6)

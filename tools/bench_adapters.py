"""What a mixture costs in other people's loops: each framework's own loader against ours, on the same rows.

    python tools/bench_adapters.py [--steps 12] [--rounds 3] [--only trainer,lightning]

Both sides of a pair run in one process, by turns, with the same model and batches. A step is from one
optimizer step to the next; its gap is the time from the end of an optimizer step to the beginning of the
next forward pass, which is all that a loader and a callback can cost (readers in worker processes also
take cores from the model, which the whole step shows). Goal: gap of ours minus gap of theirs at most 2 %
of a step.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from ddkmix import DomainMixture, Reweighter

REPO = Path(__file__).resolve().parents[1]
TEACHER = str(REPO / "models" / "smollm2-135m-instruct")
BATCH_ROWS, SEQ_LEN, GOAL = 8, 128, 0.02


@dataclass
class Clock:
    """Times of the optimizer steps of a run and of the gaps between them, in seconds."""

    steps: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    _last: float | None = None
    _waiting: bool = False

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Listen to both."""
        model.register_forward_pre_hook(self._forward)
        optimizer.register_step_post_hook(self._stepped)

    def _forward(self, *_: Any) -> None:
        if self._waiting and self._last is not None:
            self.gaps.append(time.perf_counter() - self._last)
        self._waiting = False

    def _stepped(self, *_: Any) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.steps.append(now - self._last)
        self._last, self._waiting = now, True


def student() -> nn.Module:
    """Two layers of the teacher's architecture."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TEACHER, num_hidden_layers=2))


def mixture(workers: int) -> DomainMixture:
    """The quickstart's domains."""
    return DomainMixture.from_cards(
        str(REPO / "domains"),
        tokenizer=TEACHER,
        separator="<|endoftext|>",
        seq_len=SEQ_LEN,
        batch_rows=BATCH_ROWS,
        num_workers=workers,
        cache_dir=REPO / ".cache" / "ddkmix",
    )


def own_rows(steps: int) -> list[dict[str, torch.Tensor]]:
    """The same rows in the same order, in memory: the least that a loader can do."""
    rows = []
    source = mixture(0)
    for batch in source.loader(steps=steps):
        pairs = zip(batch["input_ids"], batch["labels"], strict=True)
        rows += [{"input_ids": ids, "labels": labels} for ids, labels in pairs]
    source.close()
    return rows


@dataclass(frozen=True)
class Side:
    """What a run is given: rows in memory, or a mixture whose reweighter measures at step 0 only."""

    rows: Sequence[dict[str, torch.Tensor]] | None
    reweighter: Reweighter | None
    workers: int
    steps: int

    def loader(self) -> Any:
        """The framework's usual loader, or ours."""
        if self.reweighter is not None:
            return self.reweighter.mixture.loader(steps=self.steps)
        assert self.rows is not None
        return DataLoader(self.rows, batch_size=BATCH_ROWS, num_workers=self.workers)

    def follow(self, model: nn.Module, done: int) -> None:
        """What a loop with a mixture does after every step."""
        if self.reweighter is not None:
            self.reweighter.step(model, done)


def plain(side: Side, clock: Clock) -> None:
    """PyTorch."""
    model = student()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    side.follow(model, 0)
    clock.watch(model, optimizer)
    for done, batch in enumerate(side.loader(), start=1):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        side.follow(model, done)


def accelerate(side: Side, clock: Clock) -> None:
    """Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    model = student()
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=1e-4), side.loader()
    )
    side.follow(model, 0)
    clock.watch(model, optimizer.optimizer)
    for done, batch in enumerate(loader, start=1):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        side.follow(model, done)


def trainer(side: Side, clock: Clock) -> None:
    """transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    from ddkmix.integrations.transformers import MixtureTrainer

    model = student()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=side.steps,
            per_device_train_batch_size=BATCH_ROWS,
            dataloader_num_workers=side.workers,
            train_sampling_strategy="sequential" if side.reweighter is None else "random",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        common: Any = {"model": model, "args": arguments, "optimizers": (optimizer, None)}
        if side.reweighter is None:
            run: Any = Trainer(**common, train_dataset=side.rows)
        else:
            run = MixtureTrainer(
                **common,
                train_dataset=side.reweighter.mixture,
                evaluator=NoLosses(side.reweighter.mixture),
                interval_steps=10**9,
            )
        clock.watch(model, optimizer)
        run.train()


def lightning(side: Side, clock: Clock) -> None:
    """Lightning."""
    import lightning as pl

    from ddkmix.integrations.lightning import MixtureCallback, MixtureDataModule

    class Student(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = student()

        def training_step(self, batch: Any, _: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4)
            clock.watch(self.model, optimizer)
            return optimizer

    quiet: Any = {
        "max_steps": side.steps,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if side.reweighter is None:
        pl.Trainer(**quiet).fit(Student(), side.loader())
    else:
        pl.Trainer(**quiet, callbacks=[MixtureCallback(side.reweighter)]).fit(
            Student(), MixtureDataModule(side.reweighter.mixture)
        )


def composer(side: Side, clock: Clock) -> None:
    """MosaicML Composer."""
    sys.path.insert(0, str(REPO))  # see there for what Composer lacks on a machine without image libraries
    from tests.integrations.composer_here import import_composer

    import_composer()
    from composer import Trainer
    from composer.models import HuggingFaceModel

    from ddkmix.integrations.composer import MixtureCallback, MixtureLoader

    model = student()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if side.reweighter is None:
        callbacks, loader = [], side.loader()
    else:
        callbacks = [MixtureCallback(side.reweighter)]
        loader = MixtureLoader(side.reweighter.mixture)
    run = Trainer(
        model=HuggingFaceModel(model),
        optimizers=optimizer,
        max_duration=f"{side.steps}ba",
        device="cpu",
        progress_bar=False,
        train_dataloader=loader,
        callbacks=callbacks,
    )
    clock.watch(model, optimizer)
    run.fit()
    run.close()


class NoLosses:
    """An evaluator that costs nothing, so that only the adapter is timed."""

    def __init__(self, mixture: DomainMixture) -> None:
        self.domains = mixture.domains

    def measure(self, model: Any) -> Any:
        """The same losses for all."""
        from ddkmix import DomainLosses

        return DomainLosses.from_means(dict.fromkeys(self.domains, 1.0))


FRAMEWORKS: dict[str, Callable[[Side, Clock], None]] = {
    "plain": plain,
    "accelerate": accelerate,
    "trainer": trainer,
    "lightning": lightning,
    "composer": composer,
}


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """What frameworks print has no place in a table."""
    logging.disable(logging.WARNING)
    void = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(void), contextlib.redirect_stderr(void):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def measure(name: str, workers: int, steps: int, rounds: int) -> dict[str, Any]:
    """One row of the table: medians over all steps of all rounds, sides taking turns."""
    rows = own_rows(steps)
    clocks = {"theirs": Clock(), "ours": Clock()}
    for turn in range(rounds):
        for which in ("theirs", "ours") if turn % 2 == 0 else ("ours", "theirs"):
            clock = Clock()
            with silence():
                if which == "theirs":
                    FRAMEWORKS[name](Side(rows, None, workers, steps), clock)
                else:
                    made = mixture(workers)
                    reweighter = Reweighter(made, NoLosses(made), "static", interval_steps=10**9)
                    FRAMEWORKS[name](Side(None, reweighter, workers, steps), clock)
                    made.close()
            # the first steps start workers and fill caches
            clocks[which].steps += clock.steps[2:]
            clocks[which].gaps += clock.gaps[2:]
    medians = {
        f"{which}_{what}_ms": 1e3 * statistics.median(getattr(clock, what + "s"))
        for which, clock in clocks.items()
        for what in ("step", "gap")
    }
    overhead = (medians["ours_gap_ms"] - medians["theirs_gap_ms"]) / medians["theirs_step_ms"]
    return {"framework": name, "workers": workers, **medians, "overhead": overhead}


def main() -> int:
    """Print the table; exit 1 where the goal is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", default="0,2")
    parser.add_argument("--only", default=",".join(FRAMEWORKS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    print(f"{'framework':<12} workers  step theirs    ours     gap theirs    ours   overhead of a step")
    for name in options.only.split(","):
        for workers in map(int, options.workers.split(",")):
            row = measure(name, workers, options.steps, options.rounds)
            found.append(row)
            print(
                f"{name:<12} {workers:>7}  {row['theirs_step_ms']:8.0f} ms {row['ours_step_ms']:7.0f}  "
                f"{row['theirs_gap_ms']:10.2f} ms {row['ours_gap_ms']:7.2f}   {100 * row['overhead']:6.2f} %",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(row["overhead"] > GOAL for row in found))


if __name__ == "__main__":
    sys.exit(main())

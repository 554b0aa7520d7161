"""A LightningModule that notes the rows of every optimizer step, and Trainers that are quick and quiet."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from ddkmix.integrations.lightning import MixtureCallback, MixtureDataModule
from tests.integrations.conftest import STEPS, Parts, Rows, dealt, rows_of

QUIET = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*The last model of the previous:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]
"""Lightning's remarks on runs like these, and its own use of what torch deprecates."""


class Language(nn.Module):
    """Logits of the next token from the present one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(320, 4), nn.Linear(4, 320)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, 320)."""
        return self.head(self.embedding(input_ids))


class Student(LightningModule):
    """Notes (optimizer steps done, rows) of each micro-batch; fails at batch `fails_at` of an epoch."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Language()
        self.fails_at = fails_at
        self.seen: list[tuple[int, Rows]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The next token's cross-entropy."""
        self.seen.append((self.trainer.global_step, rows_of(batch["input_ids"])))
        if batch_idx == self.fails_at:
            raise ZeroDivisionError
        logits = self.model(batch["input_ids"])[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """With state, which a resume must restore too."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def rows(self, microbatches: int, first: int = 0) -> Rows:
        """The rows of each step from `first` on."""
        steps = sorted({step for step, _ in self.seen})
        assert list(range(first, first + len(steps))) == steps
        groups = [[rows for done, rows in self.seen if done == step] for step in steps]
        assert {microbatches} == set(map(len, groups))
        return [dealt(group) for group in groups]


class Saves(Callback):
    """Saves a checkpoint in one hook, at one batch."""

    def __init__(self, path: Path, hook: str, batch: int) -> None:
        self.path, self.batch = path, batch
        setattr(self, hook, self._save)

    def _save(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


def trainer_of(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """A Trainer for the CPU without files or bars."""
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "default_root_dir": folder,
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **options})


def fit(
    folder: Path,
    parts: Parts,
    *callbacks: Callback,
    microbatches: int = 1,
    fails_at: int | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Student:
    """Train as a user would."""
    student = Student(fails_at)
    mixture = MixtureCallback(parts.reweighter)
    trainer = trainer_of(folder, mixture, *callbacks, accumulate_grad_batches=microbatches, **options)
    trainer.fit(student, MixtureDataModule(parts.mixture), ckpt_path=ckpt_path)
    return student

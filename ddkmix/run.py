"""The parts of a run in one object, which everything that happens in a step is a function of."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ddkmix.answers import Answers
from ddkmix.config import RunConfig
from ddkmix.evaluator import Evaluator, TeacherNats
from ddkmix.loader import DomainMixture
from ddkmix.losses import LossTerm, terms_at
from ddkmix.metrics import LossWindow
from ddkmix.objectives import Objective
from ddkmix.online_step import NoModules, OnlineStep
from ddkmix.reweighting import Reweighter
from ddkmix.row_weights import RowWeights
from ddkmix.teacher import SignalSource
from ddkmix.tracking import JsonLines
from ddkmix.types import DomainLosses


@dataclass(kw_only=True, slots=True, eq=False)
class Run:
    """The parts of a run; `setup.train` makes them."""

    config: RunConfig
    accelerator: Any
    mixture: DomainMixture
    reweighter: Reweighter
    terms: tuple[LossTerm, ...]
    objective: Objective
    student: torch.nn.Module
    """The DistillationModel, as Accelerate wrapped it."""
    optimizer: Any
    teacher: SignalSource
    teacher_keys: dict[str, str]
    """Fingerprint of each domain's teacher."""
    reads_places: bool
    """Whether the teacher wants to know where the rows of a batch lie."""
    teacher_nats: TeacherNats
    """Its held-out losses, or the references in their place."""
    measures: frozenset[str]
    """What is measured beside the losses."""
    evaluator: Evaluator
    window: LossWindow
    """Of `loss`."""
    windows: dict[str, LossWindow]
    """Of the objective's other parts, by name, and of the student's responses (`rollouts`)."""
    answers: Answers | None = None
    """Where the objective wants other responses than the data's."""
    objective_state: dict[str, Any] | None = None
    """What the objective remembers of validations; None before the first."""
    total_tokens: int = 0
    measure_now: bool = False
    """Whether to measure and set weights before the next step, whatever the interval."""
    row_sizes: tuple[float, ...] | None = None
    """Mean tokens of a row of each domain, where weights are shares of tokens."""
    last_interval: dict[str, Any] | None = None
    """The last record of intervals.jsonl, on the main rank."""
    row_weights: RowWeights | None = None
    """What weighs the rows of a step; None where all weigh alike."""
    online: OnlineStep | NoModules = field(default_factory=NoModules)
    """The training of the teacher's modules, if it has any."""
    on_losses: Callable[[int, DomainLosses, dict[str, float]], None] = lambda *_: None
    """Called with (step, losses, weights in force) at every evaluation, on the main rank."""
    stop_signal: list[int] = field(default_factory=list)
    """Signals that asked the run to stop."""

    @property
    def main(self) -> bool:
        """Whether this rank writes files."""
        return bool(self.accelerator.is_main_process)

    def log(self, file: str) -> JsonLines:
        """One of the run's files of JSON lines."""
        return JsonLines(self.config.run_dir / file)

    def terms_at(self, step: int) -> tuple[LossTerm, ...]:
        """The objective of a step, counted from 0."""
        return terms_at(self.terms, step, self.config.trainer.steps, self.config.schedule)

    def sums(self) -> dict[str, LossWindow]:
        """All sums between two lines of the log, by name, in the same order on every rank."""
        return {"train": self.window, **self.windows}

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks."""
        return self.accelerator.reduce(tensor, reduction="sum")

"""The training of a teacher's modules, beside that of the student and in the same steps (OKD, reconstructed).

A micro-batch: the teacher's signal, the student's forward and backward pass, and then `learn`: the modules'
objective on the states that both have left behind, so that neither model reads the batch again. A step:
gradients are summed over micro-batches and ranks, clipped, and taken by an AdamW of their own under the
run's learning rate schedule. Every rank has the same modules and takes the same step.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddkmix.config import OnlineModules, RunConfig
from ddkmix.distillation import DistillationModel
from ddkmix.errors import NumericsError, RunError
from ddkmix.losses import CrossEntropy, ForwardKL, LossTerm
from ddkmix.metrics import LossWindow
from ddkmix.online_teacher import OnlineTeacher, as_loaded, save_modules
from ddkmix.predicted_tokens import predicted
from ddkmix.teacher import SignalSource

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over ranks."""

_PREFIX = "teacher/"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class NoModules:
    """In the place of an `OnlineStep` where the teacher stays as it is: nothing to do."""

    def learn(self, micro: Mapping[str, Tensor], share: float) -> None:
        """Nothing."""

    def step(self, multiplier: float, reduce: Reduce) -> None:
        """Nothing."""

    def metrics(self, reduce: Reduce) -> dict[str, float | int]:
        """None."""
        return {}

    def unadapted(self, teacher: SignalSource) -> SignalSource:
        """The teacher."""
        return teacher

    def arrays(self, reduce: Reduce) -> dict[str, np.ndarray]:
        """None."""
        return {}

    def load(self, arrays: Mapping[str, np.ndarray], *, of: Path, sums: bool) -> None:
        """Nothing."""

    def save(self, path: Path) -> None:
        """Nothing."""


class OnlineStep:
    """The modules of a teacher, their optimizer, and their losses since the last line of the log."""

    def __init__(
        self, teacher: OnlineTeacher, student: DistillationModel, config: RunConfig, domains: Sequence[str]
    ) -> None:
        """`student` is told to keep its states; `domains` in the order of `domain_ids`."""
        assert config.teacher.online is not None
        student.keeps_states = True
        self._teacher, self._student = teacher, student
        self._settings: OnlineModules = config.teacher.online
        self._terms = (
            LossTerm("cross_entropy", self._settings.ce_weight, CrossEntropy()),
            LossTerm("forward_kl", self._settings.kl_weight, ForwardKL(temperature=1.0)),
        )
        self._chunk_tokens = config.trainer.logits_chunk_tokens
        self._memory_mb = config.trainer.logits_memory_mb
        student_options = config.optimizer
        self._optimizer = torch.optim.AdamW(
            teacher.parameters(),
            lr=self._settings.lr,
            betas=(student_options.beta1, student_options.beta2),
            eps=student_options.eps,
            weight_decay=self._settings.weight_decay,
            fused=True,
        )
        device = teacher.parameters()[0].device
        self._window = LossWindow([term.name for term in self._terms], domains, device)
        self._grad_norm = 0.0

    def learn(self, micro: Mapping[str, Tensor], share: float) -> None:
        """Add the gradient of a micro-batch whose signal was asked for and whose student pass is over.

        Args:
            micro: `labels` (B, T) and `domain_ids` (B,) of that micro-batch.
            share: of every predicted token in the sum over all micro-batches and ranks.
        """
        objective, values = self._teacher.objective(
            micro["labels"],
            share,
            self._student.said(),
            self._terms,
            chunk_tokens=self._chunk_tokens,
            memory_mb=self._memory_mb,
        )
        objective.backward()  # type: ignore[no-untyped-call]
        row_of = predicted(micro["labels"]).nonzero()[:, 0]
        weights = [term.weight for term in self._terms]
        self._window.add(values, micro["domain_ids"][row_of], weights)

    def step(self, multiplier: float, reduce: Reduce) -> None:
        """One optimizer step with what was added since the last one.

        Args:
            multiplier: of the learning rate, as the schedule has it at this step.
            reduce: all ranks call this together.

        Raises:
            NumericsError: the gradient is not finite; the modules are as before.
        """
        parts = self._teacher.parameters()
        flat = reduce(torch.cat([_gradient_of(part).flatten() for part in parts]))  # one message for all
        for part, gradient in zip(parts, torch.split(flat, [part.numel() for part in parts]), strict=True):
            part.grad = gradient.view_as(part)
        limit = self._settings.max_grad_norm or float("inf")
        self._grad_norm = float(nn.utils.clip_grad_norm_(parts, limit))
        if not np.isfinite(self._grad_norm):
            raise NumericsError(
                f"the gradient norm of the teacher's modules is {self._grad_norm}; neither teacher nor "
                "student took the step. Lower teacher.online.lr or max_grad_norm, in another run_dir."
            )
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.lr * multiplier
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def metrics(self, reduce: Reduce) -> dict[str, float | int]:
        """For a line of the log: means since the last one over all ranks, nats per token, and the last step's
        gradient norm and learning rate. `teacher/forward_kl` is KL(student || teacher)."""
        record = {
            key.replace("train/", _PREFIX, 1): value
            for key, value in self._window.close(reduce).items()
            if key != "train/tokens"
        }
        rate: float = self._optimizer.param_groups[0]["lr"]
        return {**record, "teacher/grad_norm": self._grad_norm, "teacher/lr": rate}

    def unadapted(self, teacher: SignalSource) -> SignalSource:
        """The teacher as it was loaded, which gaps and divergences of all evaluations are to."""
        return as_loaded(teacher)

    def arrays(self, reduce: Reduce) -> dict[str, np.ndarray]:
        """What a checkpoint needs, by names that begin with `teacher/`; all ranks call this together."""
        found = {f"{_PREFIX}modules/{name}": value for name, value in self._teacher.state().items()}
        for name, state in zip(self._teacher.state(), self._moments(), strict=True):
            found |= {f"{_PREFIX}{key}/{name}": state[key] for key in _MOMENTS if key in state}
            if "step" in state:  # the same for all of them
                found[f"{_PREFIX}step"] = state["step"].reshape(1)
        found[f"{_PREFIX}window"] = torch.tensor(self._window.to_json(reduce), dtype=torch.float64)
        return {name: value.detach().cpu().numpy().copy() for name, value in found.items()}

    def load(self, arrays: Mapping[str, np.ndarray], *, of: Path, sums: bool) -> None:
        """Take up what `arrays` gave.

        Args:
            arrays: those of a checkpoint, which may hold others too.
            of: the checkpoint, for messages.
            sums: whether this rank takes up the losses since the last line of the log: the main one does,
                where the domains are the same.

        Raises:
            RunError: some are missing, or are those of other modules.
        """
        names = list(self._teacher.state())
        own = {name: torch.from_numpy(value) for name, value in arrays.items() if name.startswith(_PREFIX)}
        try:
            state = {name: own[f"{_PREFIX}modules/{name}"] for name in names}
            moments: dict[int, dict[str, Tensor]] = {}
            if f"{_PREFIX}step" in own:  # there was a first step
                moments = {
                    i: {key: own[f"{_PREFIX}{key}/{name}"] for key in _MOMENTS}
                    for i, name in enumerate(names)
                }
            for moment in moments.values():
                moment["step"] = own[f"{_PREFIX}step"][0].clone()
            window = own[f"{_PREFIX}window"].tolist()
        except KeyError as error:
            raise RunError(
                f"checkpoint {of} has no array {error} of the teacher's modules; delete that folder and "
                "resume from an older one."
            ) from None
        self._teacher.load_state(state)
        groups: list[Any] = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if sums:
            self._window.load_json(window, is_main=True)

    def save(self, path: Path) -> None:
        """Write the modules, for `ddkmix.online_teacher.load_modules`."""
        save_modules(self._teacher, self._settings, path)

    def _moments(self) -> list[dict[str, Tensor]]:
        """AdamW's state of each parameter; empty before the first step."""
        return [dict(self._optimizer.state.get(part, {})) for part in self._teacher.parameters()]


def open_online(
    config: RunConfig, teacher: SignalSource, student: DistillationModel, domains: Sequence[str]
) -> OnlineStep | NoModules:
    """The training of a teacher's modules, if it has some.

    Args:
        config: the run.
        teacher: of the run.
        student: the model to train, before Accelerate wraps it.
        domains: in the order of `domain_ids`.
    """
    if not isinstance(teacher, OnlineTeacher):
        return NoModules()
    return OnlineStep(teacher, student, config, domains)


def _gradient_of(part: nn.Parameter) -> Tensor:
    return torch.zeros_like(part) if part.grad is None else part.grad

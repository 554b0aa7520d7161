"""The loop. Start here: measure -> update the weights -> plan -> train -> record -> checkpoint.

Everything else in this file serves `run_loop`. Nothing is normalised anywhere but in `_train_step`, and
weights travel in one direction: the policy returns them and the `Reweighter` hands them to the mixture.
"""

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddkmix.checkpoint import latest_checkpoint, save_checkpoint
from ddkmix.config import RunConfig
from ddkmix.distillation import predicted
from ddkmix.errors import Interrupted, NumericsError, RowError
from ddkmix.evaluator import Evaluator, TeacherNats, TokenNats, WithDivergence
from ddkmix.loader import DomainMixture
from ddkmix.losses import CrossEntropy, ForwardKL, LossTerm, terms_at
from ddkmix.metrics import LossWindow
from ddkmix.projection import Projection, news, project
from ddkmix.reweighting import Reweighter, check_agreement
from ddkmix.schedule import lr_multiplier
from ddkmix.teacher import SignalSource
from ddkmix.trackers import evaluation_metrics
from ddkmix.tracking import Bar, JsonLines, read_lines, weights_note
from ddkmix.types import DomainLosses

_NATS = (LossTerm("cross_entropy", 1.0, CrossEntropy()),)
_NATS_AND_KL = (*_NATS, LossTerm("forward_kl", 1.0, ForwardKL(temperature=1.0)))


@dataclass(kw_only=True, slots=True, eq=False)
class Run:
    """The parts of a run; `setup.train` makes them."""

    config: RunConfig
    accelerator: Any
    mixture: DomainMixture
    reweighter: Reweighter
    terms: tuple[LossTerm, ...]
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
    total_tokens: int = 0
    measure_now: bool = False
    """Whether to measure and set weights before the next step, whatever the interval."""
    row_sizes: tuple[float, ...] | None = None
    """Mean tokens of a row of each domain, where weights are shares of tokens."""
    last_interval: dict[str, Any] | None = None
    """The last record of intervals.jsonl, on the main rank."""
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

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks."""
        return self.accelerator.reduce(tensor, reduction="sum")


def run_loop(run: Run, bar: Bar) -> DomainLosses:
    """Train from the mixture's step to the last one; returns the losses at the end.

    Raises:
        NumericsError: a loss or gradient is not finite; parameters are as before that step.
        RunError: a checkpoint cannot be written, ranks disagree, or a signal asked to stop.
    """
    config, steps = run.config, run.config.trainer.steps
    for step in range(run.mixture.state.step, steps):
        if step % config.mixture.interval_steps == 0 or run.measure_now:
            _reweight(run, bar, step, _measure(run, step))
        waited = time.perf_counter()
        batch = next(run.mixture, None)
        waited = time.perf_counter() - waited
        if batch is None:  # every domain that has a weight is at its max_epochs
            break
        if run.reads_places:
            batch["row_places"] = torch.from_numpy(run.mixture.row_places)
        _note_substitutions(run, step + 1)
        started = time.perf_counter()
        grad_norm, num_tokens = _train_step(run, batch, step)
        run.total_tokens += num_tokens
        done = step + 1
        if done % config.trainer.log_steps == 0 or done == steps:
            seconds = waited + time.perf_counter() - started
            _record(run, bar, done, grad_norm, num_tokens, seconds, waited)
        stopping = bool(run.stop_signal)
        if done % config.trainer.checkpoint_steps == 0 or done == steps or stopping:
            checkpoint(run)
        if stopping:
            raise Interrupted(f"stopped after step {done} by a signal; checkpoint written, --resume goes on.")
    losses = _measure(run, run.mixture.state.step)
    _write_interval(run, run.mixture.state.step, losses)
    return losses


def checkpoint(run: Run) -> Path:
    """Write everything needed to go on exactly."""
    check_agreement(run.mixture, "checkpoint")
    state = {
        "step": run.mixture.state.step,
        "mixture": run.mixture.state_dict(),
        "policy": run.reweighter.policy_state,
        "teachers": run.teacher_keys,
        "total_tokens": run.total_tokens,
        "window": run.window.to_json(run.reduce),
    }
    keep = run.config.trainer.keep_checkpoints
    return save_checkpoint(run.accelerator, run.config.run_dir, state, keep=keep)


def token_nats(model: torch.nn.Module) -> TokenNats:
    """A DistillationModel as the function that the evaluator measures."""

    @torch.no_grad()
    def nats(input_ids: Tensor, labels: Tensor) -> Tensor:
        values: Tensor = model(input_ids, labels, 1.0, _NATS)[1][0]
        return values

    return nats


def with_divergence(model: torch.nn.Module, teacher: SignalSource, domains: Sequence[str]) -> WithDivergence:
    """A DistillationModel beside a live teacher; `domains` in the order of the teacher's `domain_ids`."""

    @torch.no_grad()
    def values(domain: str, input_ids: Tensor, labels: Tensor) -> Tensor:
        numbers = torch.full((len(labels),), list(domains).index(domain), device=labels.device)
        said = teacher.signal({"input_ids": input_ids, "labels": labels, "domain_ids": numbers})
        found: Tensor = model(input_ids, labels, 1.0, _NATS_AND_KL, said)[1]
        return found

    return WithDivergence(values)


def _measure(run: Run, step: int) -> DomainLosses:
    """Held-out losses of the student as it is now."""
    started = time.perf_counter()
    run.student.eval()
    student: TokenNats | WithDivergence = token_nats(run.student)
    if "forward_kl" in run.measures:
        student = with_divergence(run.student, run.teacher, run.mixture.domains)
    losses = run.evaluator.measure(student, run.teacher_nats)
    run.student.train()
    if run.main:
        run.log("timings.jsonl").append({"step": step, "evaluation_s": time.perf_counter() - started})
    return losses


def _reweight(run: Run, bar: Bar, step: int, losses: DomainLosses) -> None:
    """Ask the policy, and have every rank follow the same integers from this step on."""
    run.measure_now = False
    run.reweighter.update(losses)
    before = run.last_interval
    _write_interval(run, step, losses)
    if run.main:
        steps, state = run.config.trainer.steps, run.mixture.state
        for line in news(run.mixture.settings, state, steps, _projection(run), before):
            bar.warn(line)


def _note_substitutions(run: Run, step: int) -> None:
    """Write down the damaged rows of a batch; their number over all ranks and resumes has a limit."""
    if not run.mixture.substitutions:
        return
    log = run.log("substitutions.jsonl")
    for record in run.mixture.substitutions:
        log.append({"step": step, **asdict(record)})
    run.mixture.substitutions.clear()
    count, most = sum(1 for _ in read_lines(log.path)), run.config.loader.max_substitutes
    if count > most:
        raise RowError(
            f"step {step}: {count} damaged rows by now, and loader.max_substitutes allows {most}; "
            f"{log.path} names them. Mend the shards or raise the limit, then resume."
        )


def _train_step(run: Run, batch: dict[str, Tensor], step: int) -> tuple[float, int]:
    """One optimizer step; returns the gradient norm and the number of predicted tokens of all ranks."""
    device, trainer = run.accelerator.device, run.config.trainer
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    # one collective: the normaliser of the whole window, and whether any rank was told to stop
    counts = torch.stack(
        [predicted(batch["labels"]).sum(), torch.tensor(len(run.stop_signal), device=device)]
    )
    num_tokens, stops = run.reduce(counts).tolist()
    if stops and not run.stop_signal:
        run.stop_signal.append(signal.SIGTERM)
    rows = len(batch["labels"])
    parts = -(-rows // (trainer.microbatch_rows or rows))
    terms = run.terms_at(step)
    for part in range(parts):
        micro = {name: tensor[part::parts] for name, tensor in batch.items()}
        with nullcontext() if part == parts - 1 else run.accelerator.no_sync(run.student):
            _backward(run, micro, terms, num_tokens)
    limit = run.config.optimizer.max_grad_norm or float("inf")
    grad_norm = float(run.accelerator.clip_grad_norm_(run.student.parameters(), limit))
    if not torch.isfinite(torch.tensor(grad_norm)):
        _refuse(run, step, grad_norm, batch)
    multiplier = lr_multiplier(run.config.schedule, step, trainer.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = run.config.optimizer.lr * multiplier
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return grad_norm, int(num_tokens)


def _backward(run: Run, micro: dict[str, Tensor], terms: tuple[LossTerm, ...], num_tokens: int) -> None:
    """Forward and backward of one micro-batch."""
    teacher = None
    if any(term.loss.needs_teacher for term in terms):
        teacher = run.teacher.signal(micro)
    # the sum over ranks is what is wanted, and DDP takes the mean
    share = run.accelerator.num_processes / max(num_tokens, 1)
    objective, values = run.student(micro["input_ids"], micro["labels"], share, terms, teacher)
    run.accelerator.backward(objective)
    row_of = predicted(micro["labels"]).nonzero()[:, 0]
    run.window.add(values, micro["domain_ids"][row_of], [term.weight for term in terms])


def _refuse(run: Run, step: int, grad_norm: float, batch: dict[str, Tensor]) -> None:
    losses = run.window.close(run.reduce)
    bad = {k: v for k, v in losses.items() if v != v}
    last = latest_checkpoint(run.config.run_dir)
    names = [run.mixture.domains[i] for i in sorted(set(batch["domain_ids"].tolist()))]
    raise NumericsError(
        f"step {step + 1}: the gradient norm is {grad_norm} (losses that are not numbers: {bad or 'none'}; "
        f"domains of the batch: {names}). The step was not taken. Lower optimizer.lr or max_grad_norm; "
        f"{f'{last.name} can be resumed' if last else 'no checkpoint was written yet'}."
    )


def _record(
    run: Run, bar: Bar, step: int, grad_norm: float, num_tokens: int, seconds: float, waited: float
) -> None:
    metrics = run.window.close(run.reduce)
    weights, epochs = run.mixture.weights, run.mixture.epochs
    record = {
        "step": step,
        **metrics,
        "train/grad_norm": grad_norm,
        "train/lr": run.optimizer.param_groups[0]["lr"],
        "train/total_tokens": run.total_tokens,
        **{f"loss/weight/{term.name}": term.weight for term in run.terms_at(step - 1)},
        **{f"mixture/weight/{name}": weight for name, weight in weights.items()},
        **{f"mixture/epochs/{name}": epoch for name, epoch in epochs.items()},
    }
    speed = {"perf/tokens_per_s": num_tokens / seconds, "perf/data_wait_s": waited}
    run.accelerator.log({**record, **speed}, step=step)
    if run.main:
        run.log("metrics.jsonl").append(record)
        run.log("timings.jsonl").append({"step": step, "step_s": seconds, **speed})
        note = (
            f"loss {metrics['train/objective']:.3f}  {num_tokens / seconds:.0f} tok/s  "
            f"wait {100 * waited / seconds:.1f}%  {weights_note(weights)}"
        )
        bar.update(step, note=note)


def _write_interval(run: Run, step: int, losses: DomainLosses) -> None:
    weights = run.mixture.weights
    run.accelerator.log(evaluation_metrics(losses, weights, run.mixture.served), step=step)
    if not run.main:
        return
    run.last_interval = {
        "step": step,
        "weights": weights,
        "served": run.mixture.served,
        "epochs": run.mixture.epochs,
        "projected": _projection(run).capped(),
        "losses": losses.to_json(),
        "natural": dict(zip(run.mixture.domains, run.mixture.natural_weights.tolist(), strict=True)),
        "policy": run.reweighter.policy_state,
        "planner": run.mixture.state.to_json(),  # after the change: the steps that follow replay from it
    }
    run.log("intervals.jsonl").append(run.last_interval)
    run.on_losses(step, losses, weights)


def _projection(run: Run) -> Projection:
    """Where the weights now in force lead."""
    return project(run.mixture.settings, run.mixture.state, run.config.trainer.steps, run.row_sizes)

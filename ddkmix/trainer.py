"""The loop. Start here: measure -> update the weights -> plan -> train -> record -> checkpoint.

Everything else in this file serves `run_loop`; `train_step` is the arithmetic of a step. Weights travel in
one direction: the policy returns them and the `Reweighter` hands them to the mixture.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ddkmix.checkpoint import save_checkpoint
from ddkmix.errors import Interrupted, RowError
from ddkmix.evaluator import TokenNats, WithDivergence
from ddkmix.losses import CrossEntropy, ForwardKL, LossTerm
from ddkmix.projection import Projection, news, project
from ddkmix.records import read_lines
from ddkmix.reweighting import check_agreement
from ddkmix.run import Run
from ddkmix.run_changes import settings_of
from ddkmix.teacher import SignalSource
from ddkmix.trackers import evaluation_metrics
from ddkmix.tracking import Bar, weights_note
from ddkmix.train_step import train_step
from ddkmix.types import DomainLosses

_NATS = (LossTerm("cross_entropy", 1.0, CrossEntropy()),)
_NATS_AND_KL = (*_NATS, LossTerm("forward_kl", 1.0, ForwardKL(temperature=1.0)))


def run_loop(run: Run, bar: Bar) -> DomainLosses:
    """Train from the mixture's step to the last one; returns the losses at the end.

    Raises:
        NumericsError: a loss or gradient is not finite; parameters are as before that step.
        RunError: a checkpoint cannot be written, ranks disagree, or a signal asked to stop.
    """
    config, steps = run.config, run.config.trainer.steps
    for step in range(run.mixture.state.step, steps):
        due = step % config.mixture.interval_steps == 0 or run.measure_now
        if due or (run.answers is not None and run.objective_state is None):
            losses = _measure(run, step)
            _validate(run, losses)
            if due:
                _reweight(run, bar, step, losses)
        waited = time.perf_counter()
        batch = next(run.mixture, None)
        waited = time.perf_counter() - waited
        if batch is None:  # every domain that has a weight is at its max_epochs
            break
        if run.reads_places:
            batch["row_places"] = torch.from_numpy(run.mixture.row_places)
        _note_substitutions(run, step + 1)
        started = time.perf_counter()
        grad_norm, num_tokens = train_step(run, batch, step)
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
        "settings": settings_of(run.config),
        "window": run.window.to_json(run.reduce),
    }
    if run.row_weights is not None:
        state["selection"] = run.row_weights.state
    if run.answers is not None:
        windows = {name: window.to_json(run.reduce) for name, window in run.windows.items()}
        state["objective"] = {"state": run.objective_state, "windows": windows}
    said = {} if run.answers is None else run.answers.state()
    arrays = {**run.online.arrays(run.reduce), **said} or None
    keep = run.config.trainer.keep_checkpoints
    return save_checkpoint(run.accelerator, run.config.run_dir, state, keep=keep, arrays=arrays)


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
        student = with_divergence(run.student, run.online.unadapted(run.teacher), run.mixture.domains)
    losses = run.evaluator.measure(student, run.teacher_nats)
    run.student.train()
    if run.main:
        run.log("timings.jsonl").append({"step": step, "evaluation_s": time.perf_counter() - started})
    return losses


def _validate(run: Run, losses: DomainLosses) -> None:
    """Tell the objective how well held-out responses are predicted; all text where there are no prompts."""
    names = losses.domains
    tokens = losses.num_tokens * [run.answers is None or name in run.answers.prompts for name in names]
    loss = float((losses.student_loss * tokens).sum() / tokens.sum())
    before = run.objective_state
    run.objective_state = run.objective.init(loss) if before is None else run.objective.update(before, loss)


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


def _record(
    run: Run, bar: Bar, step: int, grad_norm: float, num_tokens: int, seconds: float, waited: float
) -> None:
    metrics = {k: v for window in run.sums().values() for k, v in window.close(run.reduce).items()}
    metrics.pop("rollouts/objective", None)  # responses are counted, not trained on, under that name
    weights, epochs = run.mixture.weights, run.mixture.epochs
    record = {
        "step": step,
        **metrics,
        "train/grad_norm": grad_norm,
        "train/lr": run.optimizer.param_groups[0]["lr"],
        "train/total_tokens": run.total_tokens,
        **run.online.metrics(run.reduce),
        **(run.row_weights.metrics() if run.row_weights else {}),
        **_on_policy(run),
        **{f"loss/weight/{term.name}": term.weight for term in run.terms_at(step - 1)},
        **{f"mixture/weight/{name}": weight for name, weight in weights.items()},
        **{f"mixture/epochs/{name}": epoch for name, epoch in epochs.items()},
    }
    speed = {"perf/tokens_per_s": num_tokens / seconds, "perf/data_wait_s": waited}
    run.accelerator.log({**record, **speed}, step=step)
    if run.main:
        run.log("metrics.jsonl").append(record)
        run.log("timings.jsonl").append({"step": step, "step_s": seconds, **speed})
        shown = sum(value for name, value in metrics.items() if name.endswith("/objective"))
        note = (
            f"loss {shown:.3f}  {num_tokens / seconds:.0f} tok/s  "
            f"wait {100 * waited / seconds:.1f}%  {weights_note(weights)}"
        )
        bar.update(step, note=note)


def _on_policy(run: Run) -> dict[str, float]:
    """Numbers that the objective goes by."""
    if run.answers is None:
        return {}
    numbers = {k: v for k, v in (run.objective_state or {}).items() if isinstance(v, float)}
    stored = {"rollouts/stored": float(len(run.answers.buffer))}
    return {**stored, **{f"objective/{name}": value for name, value in numbers.items()}}


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

"""From a checked config to the parts of a run: what `train` does before the first step."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ddkmix.answering import Asked, open_answers, open_prompts
from ddkmix.answers import ROLLOUT_VALUES
from ddkmix.checkpoint import claim_run, find_run, load_arrays, load_checkpoint
from ddkmix.config import RunConfig, dump_config
from ddkmix.distillation import DistillationModel
from ddkmix.errors import ConfigError
from ddkmix.matching import Matching, consistency_of, hidden_match_of
from ddkmix.metrics import LossWindow
from ddkmix.models import build_student, save_student
from ddkmix.objective_checks import check_processes
from ddkmix.online_step import open_online
from ddkmix.pack import PackedDomain
from ddkmix.preflight import Prepared, check
from ddkmix.prepare import open_mixture, open_rows
from ddkmix.provenance import DataBlock, describe, record_data
from ddkmix.restoring import restore, restore_answers, same_domains
from ddkmix.reweighting import Reweighter
from ddkmix.row_weights import row_weights_of
from ddkmix.run import Run
from ddkmix.run_changes import changes_since, config_changes
from ddkmix.selected import record_kept
from ddkmix.selecting import select_rows
from ddkmix.signals import noting_signals
from ddkmix.teacher import LiveTeacher, SignalSource
from ddkmix.teaching import held_out_rows, open_evaluator, open_teaching
from ddkmix.trackers import check_taken, run_options, settings_of
from ddkmix.tracking import progress_bar
from ddkmix.trainer import run_loop, token_nats
from ddkmix.types import DomainLosses


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    on_losses: Callable[[int, DomainLosses, dict[str, float]], None] = lambda *_: None,
) -> DomainLosses:
    """A whole run: check, pack, measure, train, save the student to `config.run_dir`.

    Args:
        config: the run.
        resume: go on from the newest checkpoint of `config.run_dir`.
        allow_changes: resume although domains, their data, mixture, policy or batch_rows have changed.
        on_losses: called on the main rank with (step, losses, weights in force) at every evaluation; losses
            in nats per token, weights by domain.

    Returns:
        The held-out losses at the end, nats per token.

    Raises:
        ConfigError: the config does not fit its domains or its models.
        DataError: a card, a shard or too many rows are wrong, or a store cannot be reached.
        ModelError: a model or a tokenizer cannot be used as asked.
        NumericsError: a loss or a gradient is not finite.
        RunError: `config.run_dir` cannot be written or resumed, or (`Interrupted`) a signal asked to stop.
    """
    prepared = check(config)
    accelerator = open_accelerator(config)
    check_processes(prepared.objective, config, accelerator.distributed_type)
    found, changes = None, []
    if accelerator.is_main_process:
        found = find_run(config, resume=resume, allow_changes=allow_changes)
        changes = config_changes(config)
    checkpoint, changes = _from_main(accelerator, (found, changes))
    with accelerator.main_process_first():
        packed = open_rows(prepared, shown=accelerator.is_main_process)
    asked = open_prompts(prepared, packed)  # before models are loaded and rows measured
    packed, kept = select_rows(prepared, packed, accelerator.device, shown=accelerator.is_main_process)
    run = _open(prepared, packed, asked, accelerator)
    run.on_losses = on_losses
    if checkpoint is not None:
        changes = _take_up(run, checkpoint, changes, allow_changes=allow_changes)
    if run.main:
        _claim(run, _describe(run, prepared, packed), changes)
        record_kept(config.run_dir, kept)
    _open_trackers(run)
    total = config.trainer.steps
    with progress_bar("train", total=total, shown=run.main) as bar, noting_signals(run.stop_signal):
        bar.update(run.mixture.state.step)
        losses = run_loop(run, bar)
    run.mixture.close()
    if run.main:
        _save(run, prepared)
    # Waiting lets go of the interpreter's lock, so that gloo's threads can free the tensors of the last
    # collective. Freed with DDP's reducer they would wait for that lock, and its holder for them: ranks hung.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return losses


def _take_up(run: Run, checkpoint: Path, changes: list[str], *, allow_changes: bool) -> list[str]:
    """Go on from a checkpoint; all that has changed since."""
    state, arrays = load_checkpoint(run.accelerator, checkpoint), load_arrays(checkpoint)
    changes = [*changes, *(text for text in changes_since(state, run.config) if text not in changes)]
    run.online.load(arrays, of=checkpoint, sums=same_domains(run, state) and run.main)
    changes = [*changes, *restore(run, state, changes, allow_changes=allow_changes)]
    return [*changes, *restore_answers(run, state, arrays, afresh=bool(changes))]


def open_accelerator(config: RunConfig) -> Any:
    """Accelerate's view of the processes, with the seed set everywhere."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    set_seed(config.seed)
    accelerator = Accelerator(
        mixed_precision=config.trainer.mixed_precision,
        log_with=list(config.tracking.trackers) or None,
        project_dir=str(config.run_dir),
    )
    check_taken(config.tracking.trackers, accelerator.log_with)
    return accelerator


def _from_main(accelerator: Any, value: Any) -> Any:
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value], from_process=0)[0]


def _open(prepared: Prepared, packed: dict[str, PackedDomain], asked: Asked | None, accelerator: Any) -> Run:
    config = prepared.config
    mixture = open_mixture(
        config, packed, rank=accelerator.process_index, world_size=accelerator.num_processes
    )
    evaluator = open_evaluator(config, held_out_rows(config, packed), accelerator.device)
    train_rows = {name: domain.train for name, domain in packed.items()}
    teaching = open_teaching(prepared, train_rows, evaluator, mixture.domains)
    student = build_student(config.student, config.teacher, seed=config.seed)
    if config.trainer.gradient_checkpointing:
        enable: Any = getattr(student, "activation_checkpointing_enable", None)  # since transformers 5
        enable = enable or student.gradient_checkpointing_enable
        enable()
    model = distillation_model(prepared, student, teaching.source)
    online = open_online(config, teaching.source, model, mixture.domains)
    model, optimizer = accelerator.prepare(model, _optimizer(config, model))
    answers = None
    if asked is not None:
        answers = open_answers(prepared, packed, asked, student, teaching.source, accelerator)
    return Run(
        config=config,
        accelerator=accelerator,
        mixture=mixture,
        reweighter=Reweighter(mixture, None, prepared.policy, interval_steps=config.mixture.interval_steps),
        terms=prepared.terms,
        objective=prepared.objective,
        student=model,
        optimizer=optimizer,
        teacher=teaching.source,
        reads_places=teaching.reads_places,
        teacher_keys={domain: prepared.gap_fingerprint(domain) for domain in mixture.domains},
        teacher_nats=teaching.nats,
        measures=prepared.measures,
        evaluator=evaluator,
        **_windows(prepared, mixture.domains, accelerator.device),
        answers=answers,
        online=online,
        row_weights=row_weights_of(
            prepared.selection,
            mixture.domains,
            student=model,
            nats=token_nats(model),
            teacher=teaching.source,
            microbatch_rows=config.trainer.microbatch_rows,
            chunk_tokens=config.trainer.logits_chunk_tokens,
        ),
    )


def _windows(prepared: Prepared, domains: Sequence[str], device: torch.device) -> dict[str, Any]:
    """The sums of what is recorded."""
    terms, others = [term.name for term in prepared.terms], {}
    for name, values in prepared.objective.windows().items():
        unit = "pairs" if name == "pairs" else "tokens"
        others[name] = LossWindow(values, domains, device, name=name, unit=unit)
    if "student_responses" in prepared.objective.needs:
        window = LossWindow(ROLLOUT_VALUES, domains, device, name="rollouts", unit="responses")
        others["rollouts"] = window
    return {"window": LossWindow(terms, domains, device), "windows": others}


def _describe(run: Run, prepared: Prepared, packed: dict[str, PackedDomain]) -> DataBlock:
    """The data of the steps to come."""
    rows = {name: domain.train for name, domain in packed.items()}
    state = run.mixture.state
    return describe(
        run.config, rows, run.mixture.settings, prepared.tokenizer, from_step=state.step, planner=state
    )


def distillation_model(
    prepared: Prepared, model: torch.nn.Module, teacher: SignalSource | None = None
) -> DistillationModel:
    """The student with its objective; with the projections of hidden states where there is a teacher."""
    loss, matching = hidden_match_of(prepared.terms), None
    if loss is not None and teacher is not None:
        if not isinstance(teacher, LiveTeacher):  # one of another tokenizer: its tokens are others
            raise ConfigError(
                "loss hidden_match compares hidden states token by token, and the teacher has another "
                "tokenizer than the student; leave the loss out."
            )
        matching = Matching(loss, model, teacher.model, seed=prepared.config.seed)
    return DistillationModel(
        model,
        vocab_size=prepared.vocab_size,
        chunk_tokens=prepared.config.trainer.logits_chunk_tokens,
        memory_mb=prepared.config.trainer.logits_memory_mb,
        separator_id=prepared.separator_id,
        matching=matching,
        consistency=None if teacher is None else consistency_of(prepared.terms),
    )


def _optimizer(config: RunConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW; norms and biases (parameters with fewer than two axes) do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in parameters if p.ndim >= 2],
            "weight_decay": config.optimizer.weight_decay,
        },
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    options = config.optimizer
    return torch.optim.AdamW(
        groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps, fused=True
    )


def _claim(run: Run, block: DataBlock, changes: list[str]) -> None:
    """Write down what runs from here on, and take back what was logged of the steps to come."""
    run_dir, start = run.config.run_dir, run.mixture.state.step
    claim_run(run.config, changed_at=start if config_changes(run.config) else None)
    record_data(run_dir, block)
    run.row_sizes = block.row_sizes
    for name, first in (
        ("metrics.jsonl", start + 1),
        ("timings.jsonl", start + 1),
        ("substitutions.jsonl", start + 1),
        ("intervals.jsonl", start),
        ("changes.jsonl", start),
    ):
        run.log(name).rewind(first)
    run.last_interval = run.log("intervals.jsonl").last()
    if changes:
        run.log("changes.jsonl").append({"step": start, "changes": changes})
        for change in changes:
            print(f"ddkmix: resumed at step {start}: {change}", file=sys.stderr)


def _open_trackers(run: Run) -> None:
    """Tell them the config; only the main rank's trackers are anybody."""
    tracking = run.config.tracking
    if not tracking.trackers:
        return
    options = run_options(run.config.run_dir) if run.main else {}
    settings = settings_of(dump_config(run.config))
    run.accelerator.init_trackers(tracking.project, config=settings, init_kwargs=options)


def _save(run: Run, prepared: Prepared) -> None:
    """Write RUN/student under a hidden name and rename it when whole; what the teacher has learned before."""
    import shutil

    run.online.save(run.config.run_dir / "teacher_modules.safetensors")
    final = run.config.run_dir / "student"
    partial = final.with_name(f".student-{os.getpid()}")
    student = run.accelerator.unwrap_model(run.student).student
    save_student(student, prepared.tokenizer, partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)

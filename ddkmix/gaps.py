"""The gaps of a config's student as it is: what `ddkmix gaps` measures. Nothing is trained."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ddkmix.config import RunConfig
from ddkmix.held_out import HeldOut
from ddkmix.hub import read_model_config
from ddkmix.models import build_student
from ddkmix.policies import WeightPolicy
from ddkmix.policies.guards import unguarded
from ddkmix.preflight import Prepared, check
from ddkmix.prepare import open_rows, pack_rows, storage_of
from ddkmix.same_text import RowTexts, SameText, TextReader, left_out_notes, read_both
from ddkmix.setup import distillation_model, open_accelerator
from ddkmix.teaching import (
    held_out_rows,
    open_evaluator,
    open_reader,
    open_teachers,
    teacher_nats,
    teacher_of_all,
)
from ddkmix.trainer import token_nats, with_divergence
from ddkmix.types import DomainLosses

__all__ = ["measure_gaps"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MeasuredGaps:
    """What was measured, and what a reader of the numbers must know."""

    losses: DomainLosses
    """Nats per token."""
    policy: WeightPolicy
    """The one that the config names, without its guards."""
    references: tuple[str, ...]
    """Models whose losses on the cards stand in the place of a teacher's; empty where a teacher was read."""
    same_text: bool
    """The two models have tokenizers of their own and are compared on the same bytes of text."""
    notes: tuple[str, ...]
    """A sentence each."""


def measure_gaps(config: RunConfig) -> tuple[DomainLosses, WeightPolicy]:
    """Held-out losses of a config's student, as it is built or loaded, beside its teacher's.

    Models with different tokenizers are compared on the same bytes of text (see `same_text`); losses are then
    nats per token of the student, the teacher's too. With `evaluation.reference: cards` no teacher is read,
    and a teacher with another tokenizer changes no row.

    Args:
        config: the run; nothing is trained.

    Returns:
        The losses, nats per token, and the policy that the config names, without its guards.

    Raises:
        ConfigError: the config does not fit its domains or its models.
        DataError: a card, a shard or a held-out row is wrong, or a store cannot be reached.
        ModelError: a model or a tokenizer cannot be used as asked.
    """
    found = measure_and_tell(config)
    return found.losses, found.policy


def measure_and_tell(config: RunConfig) -> MeasuredGaps:
    """The same with what a report says of the numbers; see `measure_gaps`."""
    prepared = check(config, only_gaps=True)
    accelerator = open_accelerator(config)
    same_text = prepared.teacher_tokenizer is not None
    losses, notes = (_gaps_of_text if same_text else _gaps_of_rows)(prepared, accelerator)
    references = tuple(sorted({loss.model for loss in (prepared.references or {}).values()}))
    if references:
        notes.append(f"Teacher: the reference losses on the domains' cards, of {', '.join(references)}.")
    return MeasuredGaps(
        losses=losses,
        policy=unguarded(prepared.policy),
        references=references,
        same_text=same_text,
        notes=tuple(notes),
    )


def _gaps_of_rows(prepared: Prepared, accelerator: Any) -> tuple[DomainLosses, list[str]]:
    """Of models that read the same rows."""
    config = prepared.config
    with accelerator.main_process_first():
        packed = open_rows(prepared, shown=accelerator.is_main_process)
    evaluator = open_evaluator(config, held_out_rows(config, packed), accelerator.device)
    teachers = {} if prepared.references is not None else open_teachers(prepared, accelerator.device)
    nats = teacher_nats(prepared, evaluator, teachers)
    model = _student_to_measure(prepared, accelerator)
    if "forward_kl" not in prepared.measures:
        return evaluator.measure(token_nats(model), nats), []
    source = teacher_of_all(prepared, teachers, list(packed))
    return evaluator.measure(with_divergence(model, source, list(packed)), nats), []


def _gaps_of_text(prepared: Prepared, accelerator: Any) -> tuple[DomainLosses, list[str]]:
    """Of models with different tokenizers: each reads the same text in its own tokens."""
    config = prepared.config
    with accelerator.main_process_first():
        packed = pack_rows(config, prepared.domains, prepared.packer, shown=accelerator.is_main_process)
    rows = held_out_rows(config, packed)
    same = _same_text(prepared, rows)
    notes = [
        "Student and teacher have different tokenizers and are compared on the same bytes of text: b/B of "
        "both, and nats per token of the student, the teacher's too.",
        *left_out_notes(same, rows),
    ]
    if accelerator.is_main_process:
        for note in notes:
            print(f"ddkmix: {note[0].lower()}{note[1:]}", file=sys.stderr)
    evaluator = open_evaluator(config, same.student, accelerator.device)
    theirs = open_evaluator(config, same.teacher, accelerator.device)
    nats = teacher_nats(prepared, theirs, open_reader(prepared, accelerator.device))
    return evaluator.measure(token_nats(_student_to_measure(prepared, accelerator)), nats), notes


def _same_text(prepared: Prepared, rows: Mapping[str, HeldOut]) -> SameText:
    config, theirs = prepared.config, prepared.teacher_tokenizer
    assert theirs is not None
    student, teacher = config.student, config.teacher
    assert student.model is not None
    own = {**read_model_config(student.model, student.revision), **student.overrides}
    other = read_model_config(teacher.model, teacher.revision)
    return read_both(
        rows,
        RowTexts(prepared.packer),
        TextReader(prepared.tokenizer, own.get("max_position_embeddings")),
        TextReader(theirs, other.get("max_position_embeddings")),
        storage=storage_of(config),
    )


def _student_to_measure(prepared: Prepared, accelerator: Any) -> torch.nn.Module:
    config = prepared.config
    student = build_student(config.student, config.teacher, seed=config.seed).eval()
    model: torch.nn.Module = accelerator.prepare_model(
        distillation_model(prepared, student), evaluation_mode=True
    )
    return model

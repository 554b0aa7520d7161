"""From the teachers that a checked config names to signals and held-out losses."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float

from ddkmix.cross_vocabulary import CrossVocabularyTeacher
from ddkmix.distillation import predicted
from ddkmix.evaluator import Evaluator, NatsCache, TokenNats
from ddkmix.fingerprint import hash_json
from ddkmix.models import load_teacher
from ddkmix.preflight import Prepared
from ddkmix.teacher import DomainTeachers, EnsembleTeacher, LiveTeacher, SignalSource, label_nats
from ddkmix.teachers import DEFAULT
from ddkmix.tokenizer import TokenizerCard

OneTeacher = LiveTeacher | EnsembleTeacher | CrossVocabularyTeacher
"""What a domain can have."""

_CHUNK_TOKENS = 256
"""Held-out tokens whose logits exist at one time, where the config leaves that open."""


def open_teachers(prepared: Prepared, device: torch.device) -> dict[str, OneTeacher]:
    """The teachers in use, by name, loaded onto a device; a model in several of them is loaded once."""
    teachers = prepared.teachers
    if prepared.teacher_tokenizer is not None:
        return {DEFAULT: _other_vocabulary(prepared, prepared.teacher_tokenizer, device)}
    models = {
        name: LiveTeacher(
            load_teacher(config).to(device),
            vocab_size=prepared.vocab_size,
            separator_id=prepared.separator_id,
        )
        for name, config in teachers.models.items()
    }
    opened: dict[str, OneTeacher] = {}
    for name, shares in teachers.members.items():
        members = [models[member] for member in shares]
        alone = len(members) == 1
        opened[name] = members[0] if alone else EnsembleTeacher(members, tuple(shares.values()))
    return opened


def teacher_cache(prepared: Prepared, domain: str, device: torch.device) -> NatsCache:
    """Where held-out losses of a domain's teacher are kept: keyed by what it says and where it computes."""
    key = hash_json([prepared.teacher_fingerprint(domain), device.type])
    return NatsCache(prepared.config.cache_dir / "teacher_nats", key)


def teacher_sums(
    prepared: Prepared, evaluator: Evaluator, teachers: Mapping[str, OneTeacher]
) -> dict[str, Float[np.ndarray, " R"]]:
    """Held-out row sums of each domain's teacher, measured once per teacher and data and kept on disk."""
    sums: dict[str, Float[np.ndarray, " R"]] = {}
    for name, teacher in teachers.items():
        domains = prepared.teachers.domains_of(name)
        own = replace(evaluator, held_out={domain: evaluator.held_out[domain] for domain in domains})
        nats = _teacher_nats(teacher, prepared.config.trainer.logits_chunk_tokens or _CHUNK_TOKENS)
        sums.update(own.sums(nats, teacher_cache(prepared, domains[0], evaluator.device)))
    return sums


def teacher_of_all(
    prepared: Prepared, teachers: Mapping[str, OneTeacher], domains: Sequence[str]
) -> SignalSource:
    """One teacher for the batches of all domains."""
    names = list(teachers)
    if len(names) == 1:
        return teachers[names[0]]
    of_domain = [names.index(prepared.teachers.of_domain[domain]) for domain in domains]
    return DomainTeachers(list(teachers.values()), of_domain)


def _other_vocabulary(
    prepared: Prepared, tokenizer: TokenizerCard, device: torch.device
) -> CrossVocabularyTeacher:
    """The teacher of a student with another tokenizer."""
    return CrossVocabularyTeacher(
        load_teacher(prepared.config.teacher).to(device),
        student=prepared.tokenizer,
        teacher=tokenizer,
        document_boundaries=prepared.separator_id is not None,
    )


def _teacher_nats(teacher: OneTeacher, chunk_tokens: int) -> TokenNats:
    """A teacher as the function that the evaluator measures."""

    def nats(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if isinstance(teacher, CrossVocabularyTeacher):
            return teacher.nats(input_ids, labels, chunk_tokens=chunk_tokens)
        where = predicted(labels)
        said = teacher.signal({"input_ids": input_ids}).at((slice(None), slice(None, -1))).at(where)
        return label_nats(said, labels[:, 1:][where], chunk_tokens=chunk_tokens)

    return nats

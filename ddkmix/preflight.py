"""Every check that needs no model: what `lint` runs alone, and `train` before anything expensive."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddkmix.card import ReferenceLoss
from ddkmix.common_tokenizer import (
    check_prompts,
    check_student_tokenizer,
    find_packer,
    read_gap_tokenizers,
    read_tokenizers,
)
from ddkmix.config import RunConfig
from ddkmix.domains import Domain, load_domains
from ddkmix.errors import ConfigError, ModelError
from ddkmix.fingerprint import hash_json
from ddkmix.hub import check_layers, common_vocab, read_model_config
from ddkmix.losses import LossTerm, build_terms, check_terms, check_weights
from ddkmix.losses.hidden_consistency import HiddenConsistency
from ddkmix.losses.hidden_match import HiddenMatch, check_layers_exist
from ddkmix.measures import check_measures, needs_of
from ddkmix.objective_checks import check_objective
from ddkmix.objectives import MiniLLMObjective, Objective, build_objective
from ddkmix.policies import Guarded, WeightPolicy, build_policy, guarded, next_state
from ddkmix.policies.guards import unguarded
from ddkmix.policies.protocol import at_interval
from ddkmix.references import wanted_references
from ddkmix.selection import Selection
from ddkmix.selection.checks import check_selection
from ddkmix.teachers import DEFAULT, Teachers, check_online, find_teachers
from ddkmix.tokenizer import TokenizerCard, check_separator, stop_ids, tokenizer_fingerprint
from ddkmix.trackers import check_trackers
from ddkmix.types import DomainLosses

_TRIED_UPDATES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A config whose parts have been found and agree."""

    config: RunConfig
    domains: tuple[Domain, ...]
    tokenizer: TokenizerCard
    """Of the student, and of the rows."""
    packer: TokenizerCard
    """Of the rows, where only gaps between two tokenizers are measured: either of them."""
    teacher_tokenizer: TokenizerCard | None
    """Where the teacher has another one."""
    policy: WeightPolicy
    """With its guards."""
    terms: tuple[LossTerm, ...]
    objective: Objective
    teachers: Teachers
    vocab_size: int | None
    """Classes that teachers and student share, where their padding differs."""
    measures: frozenset[str]
    """What is measured beside the losses."""
    references: Mapping[str, ReferenceLoss] | None
    """What gaps are to, by domain, where it is not the teacher."""
    selection: Selection | None
    """Which rows teach; None where all do."""

    @property
    def separator_id(self) -> int | None:
        """The token that keeps the documents of a row apart; None where they see each other."""
        return self.tokenizer.separator_id if self.config.trainer.document_boundaries else None

    def teacher_fingerprint(self, domain: str) -> str:
        """Changes with whatever changes the probabilities that a domain's teacher gives to a row's tokens.

        Models, data types, shares in an ensemble, classes that are cut, and whether documents see each other;
        not with the tokenizer or the rows.

        Raises:
            ModelError: a model has no safetensors.
        """
        own = self.teachers.fingerprint(self.teachers.of_domain[domain], self.config.cache_dir)
        theirs = self.teacher_tokenizer
        other = [] if theirs is None else [theirs.fingerprint, theirs.separator_id]
        return hash_json([own, self.vocab_size, self.separator_id, *other])

    def gap_fingerprint(self, domain: str) -> str:
        """Changes with what the student's losses in a domain are compared with."""
        own = self.teacher_fingerprint(domain)
        return own if self.references is None else hash_json([own, self.references[domain].model_dump()])


def check(config: RunConfig, *, only_gaps: bool = False) -> Prepared:
    """Find and check everything that a config names, without loading a model.

    Args:
        config: the run.
        only_gaps: nothing is to be trained, so that two tokenizers are no obstacle, and what policy and
            objective need is nobody's business; nor is a teacher with another tokenizer, where gaps are to
            references.

    Raises:
        DdkmixError: the first thing that is wrong.
    """
    domains = load_domains(config.domains, config.storage)
    policy = guarded(at_interval(build_policy(config.policy), config.mixture.interval_steps), config.guards)
    _try_policy(policy, config, tuple(domain.name for domain in domains))
    objective = build_objective(config.objective.model_dump())
    terms = build_terms(config.loss, may_be_empty=objective.stands_alone)
    check_weights(terms, config.trainer.steps, config.schedule)
    _check_loop(config)
    teacher = read_model_config(config.teacher.model, config.teacher.revision)
    read = read_gap_tokenizers if only_gaps else read_tokenizers
    tokenizer, teacher_tokenizer = read(config, terms)
    unread = only_gaps and teacher_tokenizer is not None and config.evaluation.reference == "cards"
    teacher_tokenizer = None if unread else teacher_tokenizer
    measures = frozenset(config.evaluation.measures) | (frozenset() if only_gaps else needs_of(policy))
    live = only_gaps or config.signal.source == "live"
    check_measures(measures, config, live=live, one_tokenizer=teacher_tokenizer is None)
    if config.trainer.document_boundaries:
        for own in filter(None, (tokenizer, teacher_tokenizer)):
            check_separator(own)
    two = [tokenizer, teacher_tokenizer] if only_gaps and teacher_tokenizer is not None else []
    packer = find_packer(config, domains, two or [tokenizer])
    teachers = find_teachers(config, domains)
    _check_signal(config, terms)
    student = student_config(config, teacher)
    _check_matching(config, terms, teachers, student)
    check_student_tokenizer(config, tokenizer)
    check_prompts(domains, tokenizer, teacher_tokenizer)
    _check_kind(config, None if only_gaps else terms, teachers, teacher_tokenizer, objective, domains)
    models = {**({} if unread else _teacher_configs(teachers, teacher, tokenizer)), "student": student}
    if not two:  # else texts are cut where they are too long for one of the models
        _check_positions(config, models, answers=bool(objective.needs) and not only_gaps)
    sizes = {name: model["vocab_size"] for name, model in models.items() if model.get("vocab_size")}
    if teacher_tokenizer is not None:
        common_vocab({"teacher": sizes.pop("teacher")}, teacher_tokenizer.vocab_size)
    return Prepared(
        config=config,
        domains=domains,
        tokenizer=tokenizer,
        packer=packer,
        teacher_tokenizer=teacher_tokenizer,
        policy=policy,
        terms=terms,
        objective=objective,
        teachers=teachers,
        vocab_size=_num_classes(common_vocab(sizes, tokenizer.vocab_size), tokenizer, objective),
        measures=measures,
        references=_references(config, domains, tokenizer),
        selection=check_selection(config, tokenizer, teacher_tokenizer),
    )


def _num_classes(common: int | None, tokenizer: TokenizerCard, objective: Objective) -> int | None:
    """Classes of all heads that count; of a policy gradient those that are drawn, which padding is not."""
    own = tokenizer.vocab_size if isinstance(objective, MiniLLMObjective) else None
    return min(filter(None, (common, own)), default=None)


def dummy_losses(domains: tuple[str, ...], gap: float = 1.0, intervals: int = 1) -> DomainLosses:
    """Losses with the same gap everywhere: what a policy can be tried on before there are real ones."""
    ones = np.ones(len(domains))
    counts = np.full(len(domains), 1000)  # of tokens, and of rows in an interval
    return DomainLosses(
        domains=domains,
        student_loss=2.0 * ones + gap,
        teacher_loss=2.0 * ones,
        student_error=0.01 * ones,
        gap_error=0.01 * ones,
        num_tokens=counts,
        num_bytes=4 * counts,
        excess_loss=max(gap, 0.0) * ones,
        forward_kl=abs(gap) * ones,
        rows_served=intervals * counts,
    )


def _try_policy(policy: WeightPolicy, config: RunConfig, domains: tuple[str, ...]) -> None:
    if isinstance(policy, Guarded) and policy.reads_errors and config.evaluation.rows < 2:
        raise ConfigError(
            f"evaluation.rows = {config.evaluation.rows} gives no standard error of a gap, which "
            f"guards.evidence = {config.guards.evidence:g} needs; measure more rows, or set it to 0."
        )
    uniform = np.full(len(domains), 1.0 / len(domains))
    state = next_state(policy, None, dummy_losses(domains), uniform)
    next_state(policy, state, dummy_losses(domains, intervals=2), uniform)
    inner = unguarded(policy)
    state = next_state(inner, None, dummy_losses(domains), uniform)
    for interval in range(2, 2 + _TRIED_UPDATES):  # laws are fitted from four or five measurements on
        losses = dummy_losses(domains, gap=1.0 / interval, intervals=interval)
        state = next_state(inner, state, losses, uniform)


def _check_signal(config: RunConfig, terms: Sequence[LossTerm]) -> None:
    """The losses are defined for the kind of signal that there will be."""
    live, kept = config.signal.source == "live", config.capture.keep
    if live or kept == "hidden":
        kinds = ["dense"]
    else:
        kinds = ["drawn" if kept in ("drawn", "top_k_drawn") else config.signal.tail]
        kinds += ["dense"] * (config.signal.missing == "live")
    for kind in kinds:
        check_terms(terms, kind)


def _check_matching(
    config: RunConfig, terms: Sequence[LossTerm], teachers: Teachers, student: dict[str, Any]
) -> None:
    """Hidden states are those of one live model, and the layers that are compared exist."""
    kept = config.student.layers if config.student.init == "prune" else None
    own = len(kept) if kept else student.get("num_hidden_layers")
    for term in terms:
        if isinstance(term.loss, HiddenConsistency) and own is not None:
            check_layers_exist("student", term.loss.layers, own)
        if not isinstance(term.loss, HiddenMatch):
            continue
        if config.signal.source != "live" or [len(shares) for shares in teachers.members.values()] != [1]:
            raise ConfigError(
                "loss hidden_match compares hidden states with those of one model, and a store holds none; "
                "set signal.source to live and let one teacher teach all domains, or leave the loss out."
            )
        (model,) = teachers.models.values()
        theirs = read_model_config(model.model, model.revision).get("num_hidden_layers")
        if own is not None and theirs is not None:
            check_layers_exist("student", term.loss.student_layers, own)
            check_layers_exist("teacher", term.loss.teacher_layers, theirs)


def _check_loop(config: RunConfig) -> None:
    check_trackers(config.tracking.trackers)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rows = config.trainer.batch_rows
    if rows % world_size:
        raise ConfigError(
            f"trainer.batch_rows = {rows} cannot be dealt evenly to {world_size} processes; use a multiple "
            f"of {world_size}."
        )


def _references(
    config: RunConfig, domains: tuple[Domain, ...], tokenizer: TokenizerCard
) -> Mapping[str, ReferenceLoss] | None:
    if config.evaluation.reference == "teacher":
        return None
    return wanted_references(domains, tokenizer.fingerprint)


def _check_kind(
    config: RunConfig,
    terms: Sequence[LossTerm] | None,
    teachers: Teachers,
    other: TokenizerCard | None,
    objective: Objective,
    domains: Sequence[Domain],
) -> None:
    """What objectives and modules, of a training only, and another vocabulary ask of the teachers."""
    if terms is not None:
        check_objective(
            objective, config, terms=terms, one_tokenizer=other is None, teachers=teachers, domains=domains
        )
        asked = any(term.loss.needs_teacher for term in terms)
        check_online(config, teachers, one_tokenizer=other is None, asked=asked)
    if other is not None and list(teachers.models) != [DEFAULT]:
        raise ConfigError(
            f"teachers {', '.join(teachers.models)} and student {config.student.model} have different "
            "tokenizers; with another vocabulary only the one `teacher` can be used."
        )


def _teacher_configs(
    teachers: Teachers, default: dict[str, Any], tokenizer: TokenizerCard
) -> dict[str, dict[str, Any]]:
    """The configs of the models in use; those beside `teacher` must read the same tokens."""
    configs = {"teacher": default} if DEFAULT in teachers.models else {}
    for name, model in teachers.models.items():
        if name == DEFAULT:
            continue
        own = tokenizer_fingerprint(model.model, model.revision)
        if own != tokenizer.fingerprint:
            raise ModelError(
                f"teachers.{name} {model.model} and teacher {tokenizer.name} have different tokenizers "
                f"({own[:12]} and {tokenizer.fingerprint[:12]}); the rows are packed once, for "
                "all teachers. Use teachers that share a tokenizer."
            )
        configs[f"teachers.{name}"] = read_model_config(model.model, model.revision)
    return configs


def _check_positions(config: RunConfig, models: Mapping[str, dict[str, Any]], *, answers: bool) -> None:
    """Rows fit into every model; so does a response to some prompt, where models answer."""
    response = config.generate.max_new_tokens if answers else 0
    if answers:
        stop_ids(config.teacher.model, config.generate.stop, config.teacher.revision)
    for who, model in models.items():
        longest = model.get("max_position_embeddings")
        if longest is not None and response >= longest:
            raise ConfigError(
                f"generate.max_new_tokens = {response} with the {longest} positions of the {who} leaves none "
                "for a prompt; set it lower."
            )
        if longest is not None and config.pack.seq_len > longest:
            raise ConfigError(
                f"pack.seq_len = {config.pack.seq_len}; the {who} has {longest} positions, use at most that."
            )


def student_config(config: RunConfig, teacher: dict[str, Any]) -> dict[str, Any]:
    """The student's config.json, given the teacher's."""
    student = config.student
    if student.init == "prune":
        assert student.layers is not None
        check_layers(student.layers, teacher["num_hidden_layers"])
        return teacher
    if student.model is None:
        return {**teacher, **student.overrides}
    return {**read_model_config(student.model, student.revision), **student.overrides}

"""From the teachers that a checked config names, live or captured, to signals and held-out losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ddkmix.config import OnlineModules, RunConfig
from ddkmix.cross_vocabulary import CrossVocabularyTeacher
from ddkmix.errors import DataError
from ddkmix.evaluator import Evaluator, TeacherNats, TokenNats
from ddkmix.fingerprint import hash_json
from ddkmix.held_out import HeldOut, HeldOutRows, select_rows
from ddkmix.index import DomainRows
from ddkmix.logits_store.reader import LogitsStore
from ddkmix.matching import hidden_match_of
from ddkmix.models import load_teacher
from ddkmix.nats_cache import NatsCache
from ddkmix.online_teacher import OnlineTeacher
from ddkmix.pack import PackedDomain
from ddkmix.predicted_tokens import signal_nats
from ddkmix.preflight import Prepared
from ddkmix.prepare import storage_of, store_cards, stores_folder
from ddkmix.ranks import current_rank, sum_over_ranks
from ddkmix.references import reference_sums
from ddkmix.stored_teacher import StoredTeacher
from ddkmix.teacher import CHUNK_TOKENS, DomainTeachers, EnsembleTeacher, LiveTeacher, SignalSource
from ddkmix.teachers import DEFAULT
from ddkmix.tokenizer import TokenizerCard

OneTeacher = LiveTeacher | EnsembleTeacher | CrossVocabularyTeacher
"""What a domain can have."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Teaching:
    """Who teaches a run."""

    source: SignalSource
    nats: TeacherNats
    """What each domain's teacher loses on held-out rows, or the references in its place."""
    reads_places: bool
    """Whether batches must say where their rows lie."""


def open_teaching(
    prepared: Prepared, rows: Mapping[str, DomainRows], evaluator: Evaluator, domains: Sequence[str]
) -> Teaching:
    """Open what a config's `signal` names; models are loaded only if something is asked of them.

    Args:
        prepared: the checked config.
        rows: the train rows of each domain.
        evaluator: of its held-out rows.
        domains: in the order of `domain_ids`.

    Raises:
        DataError: the store does not fit the run, is damaged, or lacks shards.
        ModelError: a model cannot be used as asked.
    """
    if prepared.config.signal.source == "live":
        teachers = open_teachers(prepared, evaluator.device)
        nats = teacher_nats(prepared, evaluator, teachers)  # first: gaps are to the teacher as it was loaded
        if prepared.config.teacher.online is not None:
            teachers = {DEFAULT: _with_modules(prepared, teachers[DEFAULT], prepared.config.teacher.online)}
        source = teacher_of_all(prepared, teachers, domains)
        return Teaching(source=source, nats=nats, reads_places=False)
    store = open_store(prepared, rows)
    wants_live = bool(store.missing())
    known = _known(prepared, evaluator, {name: store.folder(name) for name in rows})
    teachers = open_teachers(prepared, evaluator.device) if wants_live or known is None else {}
    stored = StoredTeacher(
        store,
        domains,
        device=evaluator.device,
        fallback=teacher_of_all(prepared, teachers, domains) if wants_live else None,
    )
    nats = teacher_nats(prepared, evaluator, teachers) if known is None else known
    return Teaching(source=stored, nats=nats, reads_places=True)


def _known(prepared: Prepared, evaluator: Evaluator, stores: Mapping[str, Path]) -> TeacherNats | None:
    """What nobody has to measure: references, or what stores or the cache have kept."""
    if prepared.references is not None:
        return teacher_nats(prepared, evaluator, {})
    tokens = _wants_tokens(prepared)
    stored = None if tokens else known_nats(prepared, evaluator, stores=stores)
    return known_nats(prepared, evaluator, tokens=tokens) if stored is None else stored


def open_store(prepared: Prepared, rows: Mapping[str, DomainRows]) -> LogitsStore:
    """The logits store of a config's teacher, tokenizer and rows.

    Raises:
        DataError: there is none, it is of something else, or it lacks shards that `signal.missing` wants.
    """
    config = prepared.config
    store = LogitsStore.open(stores_folder(config), store_cards(prepared), rows, tail=config.signal.tail)
    if config.signal.missing == "error" and (missing := store.missing()):
        counts = ", ".join(
            f"{count} of {len(rows[name].shards)} in {name}" for name, count in missing.items()
        )
        raise DataError(
            f"the logits store in {stores_folder(config)} lacks shards: {counts}. Run `ddkmix capture` with "
            "this config, or set signal.missing to live."
        )
    return store


def open_teachers(prepared: Prepared, device: torch.device) -> Mapping[str, OneTeacher]:
    """The teachers in use, by name, loaded onto a device."""
    if prepared.teacher_tokenizer is not None:
        return {DEFAULT: _other_vocabulary(prepared, prepared.teacher_tokenizer, device)}
    return open_models(prepared, device)


def open_reader(prepared: Prepared, device: torch.device) -> dict[str, LiveTeacher]:
    """The teacher for texts in its own tokens."""
    own = prepared.teacher_tokenizer
    assert own is not None
    apart = prepared.config.trainer.document_boundaries
    model = load_teacher(prepared.config.teacher).to(device)
    return {DEFAULT: LiveTeacher(model, separator_id=own.separator_id if apart else None)}


def open_models(prepared: Prepared, device: torch.device) -> dict[str, LiveTeacher | EnsembleTeacher]:
    """Teachers that read the rows' own tokens; a model in several of them is loaded once."""
    teachers, matched = prepared.teachers, hidden_match_of(prepared.terms)
    layers = () if matched is None else matched.teacher_layers
    models = {
        name: LiveTeacher(
            load_teacher(config).to(device),
            vocab_size=prepared.vocab_size,
            separator_id=prepared.separator_id,
            layers=layers,
        )
        for name, config in teachers.models.items()
    }
    opened: dict[str, LiveTeacher | EnsembleTeacher] = {}
    for name, shares in teachers.members.items():
        members = [models[member] for member in shares]
        alone = len(members) == 1
        opened[name] = members[0] if alone else EnsembleTeacher(members, tuple(shares.values()))
    return opened


def _with_modules(prepared: Prepared, teacher: OneTeacher, online: OnlineModules) -> OnlineTeacher:
    """The same model with modules to be trained."""
    assert isinstance(teacher, LiveTeacher), "preflight lets no other have modules"
    matched = hidden_match_of(prepared.terms)
    return OnlineTeacher(
        teacher.model,
        vocab_size=prepared.vocab_size,
        separator_id=prepared.separator_id,
        layers=() if matched is None else matched.teacher_layers,
        targets=online.targets,
        rank=online.rank,
        alpha=online.alpha,
        seed=prepared.config.seed,
    )


def open_evaluator(config: RunConfig, held_out: Mapping[str, HeldOutRows], device: torch.device) -> Evaluator:
    """The evaluator of any held-out rows, split over the processes."""
    rank, world_size = current_rank()
    return Evaluator(
        held_out=held_out,
        batch_rows=config.evaluation.batch_rows,
        device=device,
        rank=rank,
        world_size=world_size,
        reduce=sum_over_ranks,
        storage=storage_of(config),
    )


def held_out_rows(config: RunConfig, packed: Mapping[str, PackedDomain]) -> dict[str, HeldOut]:
    """The rows of each domain that a config measures on.

    Raises:
        DataError: those of a domain have no token to predict.
    """
    return {name: select_rows(domain.held_out, config.evaluation.rows) for name, domain in packed.items()}


def held_out_cache(store: Path) -> NatsCache:
    """Where a store keeps its teacher's losses of held-out rows: gaps need no teacher then."""
    return NatsCache(store / "teacher_nats", "held_out")


def teacher_cache(prepared: Prepared, domain: str, device: torch.device) -> NatsCache:
    """Where held-out losses of a domain's teacher are kept: keyed by what it says and where it computes."""
    key = hash_json([prepared.teacher_fingerprint(domain), device.type])
    return NatsCache(prepared.config.cache_dir / "teacher_nats", key)


def teacher_nats(prepared: Prepared, evaluator: Evaluator, teachers: Mapping[str, OneTeacher]) -> TeacherNats:
    """Held-out losses of each domain's teacher, or the references that stand in their place."""
    if prepared.references is not None:
        return TeacherNats(sums=reference_sums(evaluator.held_out, prepared.references))
    return measured_nats(prepared, evaluator, teachers)


def measured_nats(
    prepared: Prepared, evaluator: Evaluator, teachers: Mapping[str, OneTeacher]
) -> TeacherNats:
    """Held-out losses of each domain's teacher, measured once per teacher and data and kept on disk."""
    chunk_tokens = prepared.config.trainer.logits_chunk_tokens or CHUNK_TOKENS
    measured = [
        own.frozen(nats_of(teachers[name], chunk_tokens), cache, tokens=_wants_tokens(prepared))
        for name, own, cache in _groups(prepared, evaluator)
    ]
    return _together(measured)


def known_nats(
    prepared: Prepared,
    evaluator: Evaluator,
    *,
    stores: Mapping[str, Path] | None = None,
    tokens: bool = False,
) -> TeacherNats | None:
    """The same from the disk; None, on all ranks, if one of them lacks some.

    Args:
        prepared: the checked config.
        evaluator: of the held-out rows.
        stores: look in these logits stores, of each domain's teacher, in the place of the cache.
        tokens: with the losses of single tokens, which stores do not keep.
    """
    groups = _groups(prepared, evaluator, stores)
    found = [own.cached(cache, tokens=tokens) for _, own, cache in groups]
    kept = [one for one in found if one is not None]
    return _together(kept) if len(kept) == len(found) else None


def _groups(
    prepared: Prepared, evaluator: Evaluator, stores: Mapping[str, Path] | None = None
) -> list[tuple[str, Evaluator, NatsCache]]:
    """Each teacher, the held-out rows of its domains, and where its losses on them are kept."""
    groups = []
    for name in prepared.teachers.members:
        domains = prepared.teachers.domains_of(name)
        own = replace(evaluator, held_out={domain: evaluator.held_out[domain] for domain in domains})
        if stores is None:
            cache = teacher_cache(prepared, domains[0], evaluator.device)
        else:  # a teacher has one store, for all its domains
            cache = held_out_cache(stores[domains[0]])
        groups.append((name, own, cache))
    return groups


def _wants_tokens(prepared: Prepared) -> bool:
    return "excess_loss" in prepared.measures


def _together(parts: Sequence[TeacherNats]) -> TeacherNats:
    """What several teachers lose, each on the rows of its own domains."""
    sums = {domain: one for part in parts for domain, one in part.sums.items()}
    tokens = {domain: one for part in parts for domain, one in (part.tokens or {}).items()}
    return TeacherNats(sums=sums, tokens=tokens or None)


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


def nats_of(teacher: OneTeacher, chunk_tokens: int) -> TokenNats:
    """A teacher as the function that the evaluator measures."""

    def nats(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if isinstance(teacher, CrossVocabularyTeacher):
            return teacher.nats(input_ids, labels, chunk_tokens=chunk_tokens)
        return signal_nats(teacher.signal({"input_ids": input_ids}), labels, chunk_tokens=chunk_tokens)

    return nats

"""From a checked config and packed rows to who answers prompts in a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ddkmix.answers import Answers
from ddkmix.errors import ConfigError, DataError
from ddkmix.generation.decode import Beside, Decoder
from ddkmix.generation.replay_buffer import ReplayBuffer
from ddkmix.generation.sampling import Sampling
from ddkmix.objectives import MiniLLMObjective
from ddkmix.pack import PackedDomain
from ddkmix.preflight import Prepared
from ddkmix.prepare import storage_of
from ddkmix.responders import By, check_models, check_prompts, response_cards, responses_folder
from ddkmix.response_store.card import ResponseCard
from ddkmix.response_store.prompts import LeadingTokens, leading_prompts
from ddkmix.response_store.reader import ResponseStore
from ddkmix.teacher import LiveTeacher, SignalSource


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Asked:
    """The prompts of a run, and the stored responses to them."""

    prompts: Mapping[str, LeadingTokens]
    cards: Mapping[str, ResponseCard]
    """Of what the teachers have answered, or the student would: what ends a response, and how long it is."""
    store: ResponseStore | None


def open_prompts(prepared: Prepared, packed: Mapping[str, PackedDomain]) -> Asked | None:
    """What an objective asks about; no model is loaded. None where it asks nothing.

    Raises:
        ConfigError: no domain has prompts, or a prompt leaves no room for a response.
        DataError: a prompt is empty, or responses are missing.
    """
    config, needs = prepared.config, prepared.objective.needs
    if not needs:
        return None
    found = {name: leading_prompts(domain.train, storage_of(config)) for name, domain in packed.items()}
    prompts = {name: own for name, own in found.items() if own is not None}
    if not prompts:
        raise ConfigError(
            f"objective {config.objective.name} learns from responses, and none of the domains "
            f"{', '.join(packed)} has prompts; add one whose card has `prompt_response`."
        )
    # only one model can answer, but several may comment on the student's responses
    answering: By = "teacher" if "teacher_responses" in needs else "student"
    check_models(prepared, answering)
    ends = {name: own.rows.end_of_turn_id for name, own in prompts.items()}
    cards = response_cards(prepared, answering, ends)
    for name, own in prompts.items():
        check_prompts(prepared, "student", own, cards[name])
        check_prompts(prepared, "teacher", own, cards[name])
    store = _open_store(prepared, cards, prompts) if answering == "teacher" else None
    return Asked(prompts=prompts, cards=cards, store=store)


def _open_store(
    prepared: Prepared, cards: Mapping[str, ResponseCard], prompts: Mapping[str, LeadingTokens]
) -> ResponseStore:
    folder = responses_folder(prepared.config)
    store = ResponseStore.open(folder, cards, prompts)
    if missing := store.missing():
        counts = ", ".join(f"{n} of {len(prompts[name].shards)} in {name}" for name, n in missing.items())
        raise DataError(
            f"the responses in {folder} lack shards: {counts}. Run `ddkmix generate CONFIG --by teacher` "
            "with this config."
        )
    return store


def open_answers(
    prepared: Prepared,
    packed: Mapping[str, PackedDomain],
    asked: Asked,
    student: nn.Module,
    teacher: SignalSource,
    accelerator: Any,
) -> Answers:
    """Who answers in a run.

    Args:
        prepared: the checked config.
        packed: its rows.
        asked: its prompts.
        student: the model that is trained, not wrapped, on the run's device.
        teacher: which is asked about responses.
        accelerator: that of the run.

    Raises:
        ModelError: the student cannot decode, or its rows depend on each other.
    """
    config, names = prepared.config, tuple(packed)
    # a chat ends with its turn and plain fields with their text: either ends the student's responses anywhere
    stop_ids = tuple(sorted({stop for card in asked.cards.values() for stop in card.stop_ids}))
    decoder = None
    if "student_responses" in prepared.objective.needs:
        every = [own.num_tokens(i) for own in asked.prompts.values() for i in range(len(own.shards))]
        longest = max(int(lengths.max(initial=0)) for lengths in every)
        decoder = _decoder(prepared, asked, stop_ids, student, teacher, longest)
        with accelerator.autocast():
            decoder.prove()  # the first response may be hours away
    padding = {name: packed[name].train.padding_id for name in asked.prompts}
    return Answers(
        domains=names,
        prompts=asked.prompts,
        silent={name: frozenset((*stop_ids, padding[name])) for name in padding},
        store=asked.store,
        decoder=decoder,
        buffer=ReplayBuffer(config.rollouts.buffer_rows, seed=config.seed),
        seed=config.seed,
        stop_ids=frozenset(stop_ids),
        padding_id=next(iter(padding.values())),
        precision=accelerator.autocast,
    )


def _decoder(
    prepared: Prepared,
    asked: Asked,
    stop_ids: tuple[int, ...],
    student: nn.Module,
    teacher: SignalSource,
    longest: int,
) -> Decoder:
    config, objective, beside = prepared.config, prepared.objective, None
    drawn, max_new_tokens = config.rollouts, config.generate.max_new_tokens
    classes = min(card.num_classes for card in asked.cards.values())
    if isinstance(objective, MiniLLMObjective) and objective.teacher_share:
        assert isinstance(teacher, LiveTeacher)  # checked with the config
        beside = Beside(model=teacher.model, share=objective.teacher_share)
    return Decoder(
        student,
        sampling=Sampling(temperature=drawn.temperature, top_k=drawn.top_k, top_p=drawn.top_p),
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        num_classes=min(classes, prepared.vocab_size or classes),
        block_rows=drawn.block_rows,
        beside=beside,
        tokens=longest + max_new_tokens,
        section="rollouts",
    )

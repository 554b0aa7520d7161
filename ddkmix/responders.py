"""Who answers prompts: the teacher of a domain or the student, as a card, as limits, and as a decoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from ddkmix.config import RunConfig
from ddkmix.errors import ConfigError, DataError
from ddkmix.fingerprint import hash_json
from ddkmix.generation.decode import Decoder
from ddkmix.generation.sampling import Sampling
from ddkmix.hub import model_fingerprint, read_model_config
from ddkmix.models import build_student, load_teacher
from ddkmix.preflight import Prepared, student_config
from ddkmix.response_store.card import ResponseCard
from ddkmix.response_store.prompts import PromptRows
from ddkmix.tokenizer import stop_ids

By = Literal["teacher", "student"]


def responses_folder(config: RunConfig) -> Path:
    """Where stores of responses lie."""
    return config.generate.folder or config.cache_dir / "responses"


def response_cards(prepared: Prepared, by: By, ends: Mapping[str, int | None]) -> dict[str, ResponseCard]:
    """What the stores of responses of a checked config are made of, for each domain.

    Unless the config says what ends a response, the tokenizer's end-of-sequence token does, and the token
    that ends those of the domain's data: a student that was trained on them ends its own with it.

    Args:
        prepared: the checked config.
        by: who answers.
        ends: the token that ends a response in each domain's rows, where there is one.

    Raises:
        ConfigError: `generate.stop` names no token.
        ModelError: a model's files cannot be had.
    """
    config, settings = prepared.config, prepared.config.generate
    stop = stop_ids(config.teacher.model, settings.stop, config.teacher.revision)
    cards = {}
    for domain, end in ends.items():
        teacher = prepared.teachers.of_domain[domain]
        theirs = prepared.teachers.models[teacher].model if by == "teacher" else None
        sizes = (_config_of(prepared, by, domain).get("vocab_size"), prepared.tokenizer.vocab_size)
        cards[domain] = ResponseCard(
            by=by,
            name=theirs or config.student.model or "student",
            model=_fingerprint(prepared, by, teacher),
            tokenizer=prepared.tokenizer.fingerprint,
            num_classes=min(size for size in sizes if size),
            stop_ids=stop if settings.stop or end is None else tuple(sorted({*stop, end})),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=settings.seed,
            block_rows=settings.block_rows,
        )
    return cards


def check_models(prepared: Prepared, by: By) -> None:
    """One model answers each domain, in the tokens of its rows.

    Raises:
        ConfigError: it does not.
    """
    if prepared.teacher_tokenizer is not None:
        raise ConfigError(
            "student and teacher have different tokenizers; prompts are stored in the tokens of one, and "
            "nobody could answer for the other. Generate with models that share a tokenizer."
        )
    ensembles = [name for name, members in prepared.teachers.members.items() if len(members) > 1]
    if by == "teacher" and ensembles:
        raise ConfigError(
            f"the teacher {ensembles[0]!r} is an ensemble, which has no responses of its own; let one model "
            "teach its domains."
        )


def check_prompts(prepared: Prepared, by: By, prompts: PromptRows, card: ResponseCard) -> None:
    """Every prompt has a token, and leaves room for its response.

    Raises:
        DataError: one has none.
        ConfigError: one leaves no room.
    """
    longest = _config_of(prepared, by, prompts.domain).get("max_position_embeddings")
    for number, shard in enumerate(prompts.shards):
        lengths = prompts.num_tokens(number)
        if len(empty := np.flatnonzero(lengths == 0)):
            raise DataError(
                f"{prompts.domain}/{shard.name}#{empty[0]}: the prompt is empty, as are {len(empty)} of "
                f"{shard.num_rows} in this shard; leave such documents out of the domain."
            )
        most = int(lengths.max(initial=0))
        if longest is not None and most + card.max_new_tokens > longest:
            raise ConfigError(
                f"{prompts.domain}/{shard.name}#{int(lengths.argmax())}: a prompt of {most} tokens and "
                f"generate.max_new_tokens = {card.max_new_tokens} are more than the {longest} positions of "
                f"the {by}; set it to at most {max(longest - most, 0)}, or pack shorter rows."
            )


def _config_of(prepared: Prepared, by: By, domain: str) -> dict[str, Any]:
    """config.json of the model that answers a domain; of an ensemble, which only comments, the one with the
    fewest positions."""
    config = prepared.config
    if by == "student":
        return student_config(config, read_model_config(config.teacher.model, config.teacher.revision))
    members = prepared.teachers.members[prepared.teachers.of_domain[domain]]
    models = [prepared.teachers.models[name] for name in members]
    configs = [read_model_config(model.model, model.revision) for model in models]
    return min(configs, key=lambda found: found.get("max_position_embeddings") or float("inf"))


def _fingerprint(prepared: Prepared, by: By, teacher: str) -> str:
    """Changes with the parameters of who answers and their type, whatever their folder is called."""
    config, cache_dir = prepared.config, prepared.config.cache_dir
    if by == "teacher":
        return prepared.teachers.fingerprint(teacher, cache_dir)
    own, base = config.student, config.teacher
    if own.init == "load":
        assert own.model is not None
        return hash_json([model_fingerprint(own.model, own.revision, cache_dir), "float32"])
    if own.init == "prune":
        return hash_json([model_fingerprint(base.model, base.revision, cache_dir), own.layers, "float32"])
    name, revision = (own.model, own.revision) if own.model else (base.model, base.revision)
    return hash_json([read_model_config(name, revision), own.overrides, config.seed])


def load_responder(prepared: Prepared, by: By, name: str) -> nn.Module:
    """The model of a teacher's name, or the student.

    Raises:
        ModelError: it cannot be loaded.
    """
    if by == "teacher":
        return load_teacher(prepared.teachers.models[name])
    config = prepared.config
    return build_student(config.student, config.teacher, seed=config.seed)


def decoder_of(model: nn.Module, card: ResponseCard, *, tokens: int | None = None) -> Decoder:
    """The decoder that gives the responses of a card, if the model is its own; `tokens` as in `Decoder`."""
    return Decoder(
        model,
        sampling=Sampling(temperature=card.temperature, top_k=card.top_k, top_p=card.top_p),
        max_new_tokens=card.max_new_tokens,
        stop_ids=card.stop_ids,
        num_classes=card.num_classes,
        block_rows=card.block_rows,
        tokens=tokens,
    )

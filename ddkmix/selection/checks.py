"""What a selection needs of a run, checked before any model is loaded."""

from ddkmix.config import RunConfig, Teacher
from ddkmix.errors import ConfigError
from ddkmix.hub import common_vocab, read_model_config
from ddkmix.selection import Selection, build_selection
from ddkmix.selection.confidence import ConfidenceSelection
from ddkmix.tokenizer import TokenizerCard, tokenizer_fingerprint


def check_selection(
    config: RunConfig, tokenizer: TokenizerCard, teacher_tokenizer: TokenizerCard | None
) -> Selection | None:
    """The selection of a run, if it can follow it; None where it has none.

    Args:
        config: the run.
        tokenizer: of the rows.
        teacher_tokenizer: where the teacher has another one.

    Raises:
        ConfigError: the name or a parameter is wrong, or it weighs tokens of two vocabularies, or its
            reference is the teacher or too short.
        ModelError: the files of its reference cannot be had, or it has no class for some token.
    """
    selection = build_selection(config.selection)
    if isinstance(selection, ConfidenceSelection):
        if config.objective.name != "distill":
            raise ConfigError(
                f"selection.name = 'confidence' weighs rows of data, and objective {config.objective.name} "
                "puts other responses in their place; use 'difference', or objective distill."
            )
        if teacher_tokenizer is not None:
            raise ConfigError(
                "selection.name = 'confidence' weighs a row by what teacher and student think of the same "
                f"tokens, and teacher {config.teacher.model} has another tokenizer; use 'difference', or "
                "leave the selection out."
            )
    elif selection is not None and selection.reference is not None:
        _check_reference(selection.reference, config, tokenizer)
    return selection


def _check_reference(reference: Teacher, config: RunConfig, tokenizer: TokenizerCard) -> None:
    if (reference.model, reference.revision) == (config.teacher.model, config.teacher.revision):
        raise ConfigError(
            f"selection.reference.model = {reference.model!r} is the teacher itself, which differs from "
            "itself in no row; give a smaller model, or leave it out for the untrained student."
        )
    model = read_model_config(reference.model, reference.revision)
    own = tokenizer_fingerprint(reference.model, reference.revision)
    if own != tokenizer.fingerprint:
        raise ConfigError(
            f"selection.reference.model = {reference.model!r} has another tokenizer than the rows "
            f"({own[:12]} and {tokenizer.fingerprint[:12]}); give one that shares it, or leave it out for "
            "the untrained student."
        )
    if model.get("vocab_size"):
        common_vocab({"selection.reference": model["vocab_size"]}, tokenizer.vocab_size)
    longest = model.get("max_position_embeddings")
    if longest is not None and config.pack.seq_len > longest:
        raise ConfigError(
            f"pack.seq_len = {config.pack.seq_len}; selection.reference {reference.model} has {longest} "
            "positions, use at most that."
        )

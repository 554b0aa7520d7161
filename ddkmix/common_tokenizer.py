"""Whose tokens the rows are made of, and whether teacher and student read text alike. No torch.

Rows are packed with the teacher's tokenizer, which the student shares; with the student's where the objective
can compare two vocabularies; with either, rather one whose tokens are bytes, where only gaps are measured.
"""

from collections.abc import Sequence

from ddkmix.alignment import is_byte_level, token_bytes
from ddkmix.config import RunConfig
from ddkmix.domains import Domain
from ddkmix.errors import ConfigError, DataError, ModelError
from ddkmix.index import DomainRows
from ddkmix.losses import LossTerm
from ddkmix.pack import read_packed
from ddkmix.prompts import find_format
from ddkmix.storage.location import is_remote
from ddkmix.tokenizer import TokenizerCard, read_tokenizer, tokenizer_fingerprint


def read_tokenizers(
    config: RunConfig, terms: Sequence[LossTerm]
) -> tuple[TokenizerCard, TokenizerCard | None]:
    """The tokenizer that packs the rows, and the teacher's where that is another one.

    Rows are packed with the teacher's, which the student shares; with the student's where the objective can
    compare two vocabularies and the student's model has a tokenizer of its own.

    Raises:
        ModelError: a tokenizer cannot be used.
        ConfigError: a loss needs one vocabulary and there are two.
    """
    teacher, student = config.teacher, config.student
    across = [term.name for term in terms if _is_across(term)]
    if across and student.init != "prune" and student.model is not None:
        own = read_tokenizer(student.model, revision=student.revision, separator=config.pack.separator)
        theirs = read_tokenizer(teacher.model, revision=teacher.revision)
        if own.fingerprint != theirs.fingerprint:
            for term in terms:
                if term.loss.needs_teacher and not _is_across(term):
                    raise ConfigError(
                        f"loss {term.name} compares distributions over one vocabulary, and student "
                        f"{student.model} and teacher {teacher.model} have different tokenizers; use only "
                        f"{', '.join(across)} and losses without a teacher."
                    )
            token_bytes(own.path)
            return own, theirs
    return read_tokenizer(teacher.model, revision=teacher.revision, separator=config.pack.separator), None


def read_gap_tokenizers(
    config: RunConfig, terms: Sequence[LossTerm]
) -> tuple[TokenizerCard, TokenizerCard | None]:
    """The student's tokenizer, and the teacher's where that is another one; neither has to be byte-level.

    A student that is made here reads as the teacher does, unless its losses compare two vocabularies.

    Raises:
        ModelError: a tokenizer cannot be used.
        ConfigError: the separator is not a token.
    """
    student, teacher = config.student, config.teacher
    brings_own = student.init == "load" or (student.init == "config" and any(map(_is_across, terms)))
    if brings_own and student.model is not None:
        own = tokenizer_fingerprint(student.model, student.revision)
        if own != tokenizer_fingerprint(teacher.model, teacher.revision):
            return (
                read_tokenizer(student.model, revision=student.revision, separator=config.pack.separator),
                read_tokenizer(teacher.model, revision=teacher.revision),
            )
    return read_tokenizer(teacher.model, revision=teacher.revision, separator=config.pack.separator), None


def find_packer(
    config: RunConfig, domains: tuple[Domain, ...], tokenizers: Sequence[TokenizerCard]
) -> TokenizerCard:
    """The tokenizer of the local packed rows; where there are none, rather one whose tokens are bytes.

    What lies on stores is looked at when the run begins, or with `lint --remote`.

    Raises:
        DataError: packed rows cannot be read, or are of none of these tokenizers.
    """
    local = [domain for domain in domains if domain.rows is not None and not is_remote(domain.rows)]
    candidates = list(tokenizers)
    if len(candidates) > 1:
        candidates.sort(key=lambda card: not is_byte_level(card.path))
    for packer in candidates:
        try:
            read_packed(
                local,
                packer,
                seq_len=config.pack.seq_len,
                cache_dir=config.cache_dir,
                storage=config.storage,
            )
            return packer
        except DataError:
            if packer is candidates[-1]:
                raise
    raise AssertionError("there is a tokenizer")


def check_student_tokenizer(config: RunConfig, tokenizer: TokenizerCard) -> None:
    """Refuse a student that is loaded and reads other tokens than the rows have.

    Raises:
        ModelError: it does.
    """
    if config.student.init != "load":
        return
    assert config.student.model is not None
    own = tokenizer_fingerprint(config.student.model, config.student.revision)
    if own != tokenizer.fingerprint:
        raise ModelError(
            f"student {config.student.model} and teacher {config.teacher.model} have different tokenizers "
            f"({own[:12]} and {tokenizer.fingerprint[:12]}); their losses per token cannot be "
            "compared and a token id means different text. Use a student with the teacher's tokenizer, or "
            "the losses uld or gold, which compare two vocabularies."
        )


def check_prompts(
    domains: Sequence[Domain], tokenizer: TokenizerCard, teacher_tokenizer: TokenizerCard | None
) -> None:
    """Check that the tokenizer of the rows can write what prompt domains hold; nothing is read of them.

    Raises:
        ModelError: it has no chat template that can write messages.
        ConfigError: nobody says which token ends a turn.
        DataError: the teacher has another tokenizer, and would be asked in a way of its own.
    """
    for domain in domains:
        if domain.prompt_response is None:
            continue
        if teacher_tokenizer is not None:
            raise _two_tokenizers(domain.name)
        find_format(domain.prompt_response, tokenizer, where=str(domain.card))


def refuse_prompts(rows: DomainRows) -> None:
    """Refuse packed prompts and responses where two models read the rows, each in its own tokens.

    Raises:
        DataError: the rows are such.
    """
    if rows.are_prompts:
        raise _two_tokenizers(rows.domain)


def _two_tokenizers(domain: str) -> DataError:
    return DataError(
        f"domain {domain!r} holds prompts and responses, which are written as one tokenizer's models expect "
        "them, and student and teacher have different tokenizers; use models that share one, or leave the "
        "domain out."
    )


def _is_across(term: LossTerm) -> bool:
    return "cross" in getattr(term.loss, "accepts", ())

"""Losses that somebody has measured in the place of a teacher: from the cards, or given by hand."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from ddkmix.card import ReferenceLoss
from ddkmix.domains import Domain
from ddkmix.errors import ConfigError, DataError
from ddkmix.tokenizer import tokenizer_fingerprint
from ddkmix.types import LN_2


@runtime_checkable
class CountedRows(Protocol):
    """What a reference needs to know of held-out rows; nothing that loads torch."""

    @property
    def domain(self) -> str:
        """The domain's name."""
        ...

    @property
    def num_tokens(self) -> Int[np.ndarray, " R"]:
        """Predicted tokens of each row."""
        ...

    @property
    def num_bytes(self) -> Int[np.ndarray, " R"]:
        """Bytes of text that they cover; 0 where unknown."""
        ...


def card_references(domains: Sequence[Domain], tokenizer: str) -> dict[str, ReferenceLoss] | None:
    """The reference loss of every domain's card; None where no card has one.

    Args:
        domains: their cards.
        tokenizer: fingerprint of the rows' tokenizer, for losses per token.

    Raises:
        DataError: some cards have one and others do not, or one is per token of another tokenizer.
        ModelError: a tokenizer that a card names cannot be had.
    """
    found = {domain.name: domain.reference_loss for domain in domains if domain.reference_loss is not None}
    without = [str(domain.card) for domain in domains if domain.reference_loss is None]
    if not found:
        return None
    if without:
        raise DataError(
            f"{without[0]} has no reference_loss, and {len(found)} of {len(domains)} cards have one; gaps to "
            "a reference and losses without one cannot be compared. Give every card one, or use a teacher."
        )
    for domain in domains:
        loss = domain.reference_loss
        if loss is not None and loss.tokenizer and tokenizer_fingerprint(loss.tokenizer) != tokenizer:
            raise DataError(
                f"{domain.card}: reference_loss.nats_per_token is per token of {loss.tokenizer}, and the "
                "rows are packed with another tokenizer; give bits_per_byte."
            )
    return found


def wanted_references(domains: Sequence[Domain], tokenizer: str) -> dict[str, ReferenceLoss]:
    """The same where `evaluation.reference` is `cards`.

    Raises:
        DataError: see `card_references`.
        ConfigError: no card has a reference loss.
        ModelError: a tokenizer that a card names cannot be had.
    """
    found = card_references(domains, tokenizer)
    if found is None:
        raise ConfigError(
            "evaluation.reference = 'cards', and no card has a reference_loss; add {model: ..., "
            "bits_per_byte: ...} to each of them, or name a teacher."
        )
    return found


def reference_sums(
    held_out: Mapping[str, CountedRows], references: Mapping[str, float | ReferenceLoss]
) -> dict[str, Float[np.ndarray, " R"]]:
    """What the reference would lose on each row if it lost the same at every byte, or every token: nats.

    Args:
        held_out: the rows.
        references: for each domain a card's loss, or nats per token.

    Raises:
        DataError: a loss is per byte, and nobody has counted the bytes of the rows.
    """
    return {name: _sums(rows, references[name]) for name, rows in held_out.items()}


def _sums(rows: CountedRows, loss: float | ReferenceLoss) -> Float[np.ndarray, " R"]:
    per_token = loss.nats_per_token if isinstance(loss, ReferenceLoss) else loss
    sums: Float[np.ndarray, " R"]
    if per_token is not None:
        sums = float(per_token) * rows.num_tokens
        return sums
    assert isinstance(loss, ReferenceLoss)
    if not rows.num_bytes.sum():
        raise DataError(
            f"domain {rows.domain!r}: its reference loss is per byte of text, and nobody has counted the "
            "bytes of its held-out rows; give nats_per_token, or pack the documents with ddkmix."
        )
    per_byte = loss.nats_per_byte if loss.nats_per_byte is not None else LN_2 * (loss.bits_per_byte or 0.0)
    sums = per_byte * rows.num_bytes
    return sums

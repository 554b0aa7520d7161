"""One row's record: columns of small numbers, one after the other, without padding or pointers.

    counts        1 or 2 bytes a token    entries that stand for themselves; not with `drawn`
    drawn counts  1 byte a token          entries that were drawn; only with `drawn` and `top_k_drawn`
    teacher nats  2 bytes a token         half precision
    entropy       2 bytes a token         fixed point on [0, log V]
    mass outside  2 bytes a token         see `quantise`; not with `drawn`, where it is 1
    log Z         2 bytes a token         fixed point, for each temperature
    ids           2 or 3 bytes an entry   a plane of the low 16 bits, then one of the high 8 bits
    log p         1 or 2 bytes an entry   see `quantise`
    draws         1 byte a drawn entry

Entries are in the order of tokens; of one token first those that stand for themselves, likeliest first. The
number of tokens is that of the row's predictions, which its shard's index knows.

On reading, log-probabilities of entries that stand for themselves are shifted, all of one token by the same
amount, so that their mass and the mass outside make exactly 1. The shift is a mean of their rounding errors;
an entry may so be off by twice the stated error, but the mass, which the bucket for the rest depends on,
by none.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from ddkmix.errors import RowError
from ddkmix.logits_store.card import Kept
from ddkmix.logits_store.quantise import (
    decode_between,
    decode_log_probs,
    decode_mass,
    encode_between,
    encode_log_probs,
    encode_mass,
    log_z_range,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordFormat:
    """What decides how a record is laid out."""

    num_classes: int
    """Of the teacher's distributions."""
    kept: Kept
    temperatures: tuple[float, ...] = ()

    @property
    def id_bytes(self) -> int:
        """Bytes of a class."""
        return 2 if self.num_classes <= 1 << 16 else 3

    @property
    def count_type(self) -> str:
        """numpy type of the number of entries that stand for themselves."""
        return "<u1" if (self.kept.k or 0) <= 255 else "<u2"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenColumns:
    """What is kept of n tokens with E entries, D of which were drawn."""

    counts: Int[np.ndarray, " n"]
    """Entries of each token that stand for themselves."""
    drawn_counts: Int[np.ndarray, " n"]
    """Entries of each token that were drawn."""
    teacher_nats: Float[np.ndarray, " n"]
    entropy: Float[np.ndarray, " n"]
    outside: Float[np.ndarray, " n"]
    """1 - the mass of the entries that stand for themselves."""
    log_z: Mapping[float, Float[np.ndarray, " n"]]
    """For each temperature."""
    ids: Int[np.ndarray, " E"]
    log_probs: Float[np.ndarray, " E"]
    draws: Int[np.ndarray, " D"]


def encode(columns: TokenColumns, layout: RecordFormat) -> bytes:
    """The record of a row."""
    kept, parts = layout.kept, []
    if kept.has_exact:
        parts.append(columns.counts.astype(layout.count_type).tobytes())
    if kept.draws is not None:
        parts.append(columns.drawn_counts.astype(np.uint8).tobytes())
    parts.append(columns.teacher_nats.astype("<f2").tobytes())
    parts.append(encode_between(columns.entropy, math.log(layout.num_classes)).tobytes())
    if kept.has_exact:
        parts.append(encode_mass(columns.outside).tobytes())
    for temperature in layout.temperatures:
        values = columns.log_z[temperature]
        parts.append(encode_between(values, log_z_range(temperature, layout.num_classes)).tobytes())
    parts.append((columns.ids & 0xFFFF).astype("<u2").tobytes())
    if layout.id_bytes == 3:
        parts.append((columns.ids >> 16).astype(np.uint8).tobytes())
    assert kept.log_prob_bytes is not None
    parts.append(encode_log_probs(columns.log_probs, kept.log_prob_bytes).tobytes())
    if kept.draws is not None:
        parts.append(columns.draws.astype(np.uint8).tobytes())
    return b"".join(parts)


def decode(data: bytes | memoryview, num_tokens: int, layout: RecordFormat) -> TokenColumns:
    """What `encode` stored, with log-probabilities scaled to the stored mass.

    Raises:
        RowError: the bytes are no record of that many tokens; the message says only what is wrong.
    """
    kept, n = layout.kept, num_tokens
    take = _Cursor(data)
    zeros = np.zeros(n, dtype=np.int64)
    counts = take.array(layout.count_type, n).astype(np.int64) if kept.has_exact else zeros
    drawn_counts = take.array("<u1", n).astype(np.int64) if kept.draws is not None else zeros
    teacher_nats = take.array("<f2", n).astype(np.float32)
    entropy = decode_between(take.array("<u1", 2 * n), math.log(layout.num_classes))
    outside = decode_mass(take.array("<u1", 2 * n)) if kept.has_exact else np.ones(n)
    log_z = {
        temperature: decode_between(take.array("<u1", 2 * n), log_z_range(temperature, layout.num_classes))
        for temperature in layout.temperatures
    }
    num_entries, num_drawn = int(counts.sum() + drawn_counts.sum()), int(drawn_counts.sum())
    ids = take.array("<u2", num_entries).astype(np.int64)
    if layout.id_bytes == 3:
        ids |= take.array("<u1", num_entries).astype(np.int64) << 16
    assert kept.log_prob_bytes is not None
    coded = take.array("<u1", num_entries * kept.log_prob_bytes)
    log_probs = decode_log_probs(coded, kept.log_prob_bytes)
    draws = take.array("<u1", num_drawn).astype(np.int64)
    take.end()
    if num_entries and int(ids.max()) >= layout.num_classes:
        raise RowError(f"class {int(ids.max())} of {layout.num_classes}")
    if kept.has_exact:
        log_probs = _scaled(log_probs, counts, drawn_counts, outside)
    return TokenColumns(
        counts=counts,
        drawn_counts=drawn_counts,
        teacher_nats=teacher_nats,
        entropy=entropy,
        outside=outside,
        log_z=log_z,
        ids=ids,
        log_probs=log_probs,
        draws=draws,
    )


def _scaled(
    log_probs: Float[np.ndarray, " E"],
    counts: Int[np.ndarray, " n"],
    drawn_counts: Int[np.ndarray, " n"],
    outside: Float[np.ndarray, " n"],
) -> Float[np.ndarray, " E"]:
    """Shift the entries that stand for themselves so that their mass is 1 - outside."""
    sizes = counts + drawn_counts
    token = np.repeat(np.arange(len(counts)), sizes)
    place = np.arange(len(token)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    exact = place < counts[token]
    mass = np.bincount(token, weights=np.where(exact, np.exp(log_probs), 0.0), minlength=len(counts))
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.log1p(-outside) - np.log(mass)
    # nothing is kept, or less than is counted
    shift = np.where(np.isfinite(shift), shift, 0.0)
    return np.where(exact, log_probs + shift[token], log_probs).astype(np.float32)


class _Cursor:
    """Takes arrays from the front of some bytes."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at = data, 0

    def array(self, dtype: str, count: int) -> np.ndarray:
        size = count * np.dtype(dtype).itemsize
        if self._at + size > len(self._data):
            raise RowError(f"{len(self._data)} bytes where more are needed")
        found = np.frombuffer(self._data, dtype=dtype, count=count, offset=self._at)
        self._at += size
        return found

    def end(self) -> None:
        if self._at != len(self._data):
            raise RowError(f"{len(self._data)} bytes where {self._at} are needed")

"""Measure every train row under teacher and reference model, once, and decide which rows are kept.

A file of `<cache_dir>/row_nats/` is one shard under one model, so that a kill costs a shard. Ranks take
blocks of rows in turn: a block is the same rows in one forward pass whoever takes it, and the sums, with them
the rows that are kept, are the same for any number of ranks.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from ddkmix.evaluator import TokenNats
from ddkmix.fingerprint import hash_json
from ddkmix.held_out import HeldOut
from ddkmix.index import DomainRows
from ddkmix.models import build_student, load_teacher
from ddkmix.nats_cache import NatsCache
from ddkmix.pack import PackedDomain
from ddkmix.predicted_tokens import predicted
from ddkmix.preflight import Prepared
from ddkmix.prepare import storage_of
from ddkmix.ranks import current_rank, from_main, sum_over_ranks
from ddkmix.selected import (
    Kept,
    decide,
    describe,
    predicted_tokens,
    read_kept,
    reference_fingerprint,
    with_kept,
    write_kept,
)
from ddkmix.selection import DifferenceSelection
from ddkmix.teacher import CHUNK_TOKENS, LiveTeacher
from ddkmix.teaching import nats_of, open_teachers
from ddkmix.tracking import progress_bar


def select_rows(
    prepared: Prepared, packed: Mapping[str, PackedDomain], device: torch.device, *, shown: bool
) -> tuple[dict[str, PackedDomain], dict[str, Kept]]:
    """The domains with the train rows that the run's selection keeps; what is not known yet is measured.

    Args:
        prepared: the checked config.
        packed: its packed rows.
        device: where models compute.
        shown: whether there are a progress bar and a line about what was kept.

    Returns:
        The domains, and what was kept of each; nothing where rows are not selected before training.

    Raises:
        DataError: rows cannot be read, or those of a domain predict no token.
        ModelError: a model cannot be loaded.
        NumericsError: a loss is not finite.
    """
    selection = prepared.selection
    if not isinstance(selection, DifferenceSelection):
        return dict(packed), {}
    rank, _ = current_rank()
    rows = {name: domain.train for name, domain in packed.items()}
    own = {name: read_kept(prepared, selection, one) for name, one in rows.items()} if rank == 0 else None
    kept = {name: found for name, found in (from_main(own) or {}).items() if found is not None}
    missing = {name: one for name, one in rows.items() if name not in kept}
    if missing:
        # an untrained student's layers are drawn before they are loaded: not out of the run's random numbers
        with torch.random.fork_rng(devices=[]):
            sums = _measured(prepared, selection, missing, device, shown=shown)
        for name, one in missing.items():
            kept[name] = decide(selection, one, *sums[name])
            if rank == 0:
                write_kept(prepared, selection, one, kept[name])
    if shown:
        print(f"ddkmix: {describe(kept)}", file=sys.stderr)
    return with_kept(packed, kept), kept


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measuring:
    """How rows are measured, and where their sums are kept."""

    prepared: Prepared
    device: torch.device
    bar: Any
    total: int
    done: list[int]

    def cache(self, model: str) -> NatsCache:
        """Keyed by what the model says and where it computes."""
        key = hash_json([model, self.device.type])
        return NatsCache(self.prepared.config.cache_dir / "row_nats", key)

    def note(self, rows: int) -> None:
        """So many rows more are known."""
        self.done[0] += rows
        self.bar.update(self.done[0])


_Sums = Float[np.ndarray, " R"]


def _measured(
    prepared: Prepared,
    selection: DifferenceSelection,
    rows: Mapping[str, DomainRows],
    device: torch.device,
    *,
    shown: bool,
) -> dict[str, tuple[_Sums, _Sums]]:
    """Nats of every row of some domains under reference and teacher; one of them in memory at a time."""
    total = 2 * sum(len(one.places.offsets) for one in rows.values())
    with progress_bar("select", total=total, shown=shown) as bar:
        measuring = _Measuring(prepared=prepared, device=device, bar=bar, total=total, done=[0])
        teacher = _of_teachers(measuring, rows)
        reference = _of_reference(measuring, selection, rows)
    return {name: (reference[name], teacher[name]) for name in rows}


def _of_teachers(measuring: _Measuring, rows: Mapping[str, DomainRows]) -> dict[str, _Sums]:
    prepared = measuring.prepared
    chunk = prepared.config.trainer.logits_chunk_tokens or CHUNK_TOKENS
    opened = cache(lambda: open_teachers(prepared, measuring.device))

    def nats(name: str) -> TokenNats:
        return nats_of(opened()[prepared.teachers.of_domain[name]], chunk)

    return {
        name: _row_nats(
            measuring, one, measuring.cache(prepared.teacher_fingerprint(name)), partial(nats, name)
        )
        for name, one in rows.items()
    }


def _of_reference(
    measuring: _Measuring, selection: DifferenceSelection, rows: Mapping[str, DomainRows]
) -> dict[str, _Sums]:
    prepared = measuring.prepared
    chunk = prepared.config.trainer.logits_chunk_tokens or CHUNK_TOKENS

    @cache
    def nats() -> TokenNats:
        return nats_of(_open_reference(prepared, selection, measuring.device), chunk)

    kept_at = measuring.cache(reference_fingerprint(prepared, selection))
    return {name: _row_nats(measuring, one, kept_at, nats) for name, one in rows.items()}


def _open_reference(prepared: Prepared, selection: DifferenceSelection, device: torch.device) -> LiveTeacher:
    """The small model: the one that is named, or the student before its first step."""
    config = prepared.config
    if selection.reference is not None:
        model = load_teacher(selection.reference)
        return LiveTeacher(model.to(device), separator_id=prepared.separator_id)
    model = build_student(config.student, config.teacher, seed=config.seed).eval().requires_grad_(False)
    return LiveTeacher(model.to(device), vocab_size=prepared.vocab_size, separator_id=prepared.separator_id)


def _row_nats(
    measuring: _Measuring, rows: DomainRows, kept_at: NatsCache, model: Callable[[], TokenNats]
) -> _Sums:
    """Nats summed over the predicted tokens of each row; 0 where there are none. Shard by shard."""
    rank, _ = current_rank()
    sums = np.zeros(len(rows.places.offsets))
    for number, start in enumerate(rows.places.starts.tolist()):
        one = _shard(rows, number)
        if one.places:
            # all ranks measure or none does: a rank that sees the file late must not wait alone
            found = from_main(kept_at.load(one) if rank == 0 else None)
            if found is None:
                found = _measure(measuring, one, model())
                if rank == 0:
                    kept_at.save(one, found)
            sums[start + np.array([row for _, row in one.places])] = found
        measuring.note(rows.shards[number].num_rows)
    return sums


def _shard(rows: DomainRows, number: int) -> HeldOut:
    """The rows of one shard that predict something; what they are known by depends on no other shard."""
    shard = rows.shards[number]
    prompts = None if shard.num_prompt_tokens is None else shard.num_prompt_tokens.tolist()
    alone = replace(rows, shards=(shard,), kept=None, fingerprint=hash_json([shard.sha256, prompts]))
    counts = predicted_tokens(alone)
    numbers = np.flatnonzero(counts)
    return HeldOut(
        rows=alone,
        places=tuple((0, row) for row in numbers.tolist()),
        num_tokens=counts[numbers],
        num_bytes=shard.num_bytes[numbers],
    )


def _measure(measuring: _Measuring, one: HeldOut, token_nats: TokenNats) -> _Sums:
    """A model's nats of each row, the blocks of rows dealt to the ranks."""
    config, (rank, world_size) = measuring.prepared.config, current_rank()
    size, count = config.evaluation.batch_rows, len(one.places)
    sums = torch.zeros(count, dtype=torch.float64)
    rows = one.open(storage_of(config))
    try:
        for start in range(rank * size, count, world_size * size):
            chosen = range(start, min(start + size, count))
            input_ids, labels = rows.read(chosen)
            nats = token_nats(input_ids.to(measuring.device), labels.to(measuring.device)).double().cpu()
            row_of = predicted(labels).nonzero()[:, 0]
            sums.index_add_(0, start + row_of, nats)
    finally:
        rows.close()
    found: _Sums = sum_over_ranks(sums.to(measuring.device)).cpu().numpy()
    return found

"""Is the store what the teacher said? Every record is read back, and a few rows are asked again.

A damaged record is one whose checksum or layout is wrong. The rows that are asked again show what checksums
cannot: records of another model, or of rows in another order. Numbers may differ by the rounding of the
records, and by that of another machine's matrix products.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from ddkmix.batch import TruncatedSignal
from ddkmix.capture import Capturing, Job, Teacher, open_capturing
from ddkmix.config import RunConfig
from ddkmix.errors import DataError, RowError
from ddkmix.logits_store.card import find_store
from ddkmix.logits_store.reader import LogitsStore
from ddkmix.losses.reference import dense_logits
from ddkmix.pack import Part
from ddkmix.prepare import storage_of, stores_folder
from ddkmix.rows import RowReader, byte_reader
from ddkmix.teaching import open_models
from ddkmix.tracking import progress_bar

_LARGEST_DIFFERENCE = 0.1
"""Nats. Rounding gives a tenth of it; another model or row gives several."""
_CHUNK_TOKENS = 256


@dataclass(kw_only=True, slots=True)
class DomainCheck:
    """What was found in a domain."""

    rows: int = 0
    missing: int = 0
    """Shards that are not captured."""
    asked: int = 0
    """Rows that the teacher was asked about again."""
    difference: float | None = None
    """Mean over their tokens of sum_v p(v) |stored - recomputed log p(v)|, nats; of hidden states, of
    |stored - recomputed loss|."""
    damaged: list[str] = field(default_factory=list)
    """What is wrong, a line for each record or sidecar."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What was found."""

    domains: Mapping[str, DomainCheck]

    def raise_if_damaged(self) -> None:
        """Raises DataError if anything is wrong."""
        found = [line for one in self.domains.values() for line in one.damaged]
        if found:
            raise DataError(f"{len(found)} records or sidecars are damaged; {'; '.join(found[:5])}")


def verify_store(config: RunConfig, *, part: Part | None = None, ask_rows: int = 2) -> Verified:
    """Check what is captured of a config's train rows.

    Args:
        config: the run.
        part: check this share of the shards only.
        ask_rows: rows of each domain that the teacher is asked about again, spread over its shards.

    Raises:
        DataError: there is no store for this run, or its rows cannot be read.
        ModelError: a teacher cannot be used as asked.
    """
    job = open_capturing(config)
    folder = stores_folder(config)
    store = LogitsStore({name: find_store(folder, card) for name, card in job.cards.items()}, job.rows)
    jobs = [one for i, one in enumerate(job.jobs()) if part is None or part.takes(i)]
    found = {name: DomainCheck() for name in job.rows}
    with progress_bar("verify", total=sum(one.num_rows for one in jobs), shown=True) as bar:
        done = 0
        for one in jobs:
            _read_all(store, one, found[one.domain])
            done += one.num_rows
            bar.update(done, note=one.domain)
    teachers = open_models(job.prepared, job.device) if ask_rows else {}
    for name, check in found.items():
        captured = [one for one in jobs if one.domain == name and store.has(name, one.shard)]
        teacher = teachers.get(job.prepared.teachers.of_domain[name])
        if teacher is not None and captured and not check.damaged:
            _ask_again(job, store, captured, teacher, check, ask_rows)
    return Verified(domains=found)


def _read_all(store: LogitsStore, one: Job, check: DomainCheck) -> None:
    if not store.has(one.domain, one.shard):
        check.missing += 1
        return
    try:
        num_rows = store.sidecar(one.domain, one.shard).num_rows
    except DataError as error:
        check.damaged.append(str(error))
        return
    for row in range(num_rows):
        try:
            place = one.domain, one.shard, row
            _ = store.hidden(place) if store.kept.is_hidden else store.columns(place)
        except RowError as error:
            check.damaged.append(str(error))
        check.rows += 1


def _ask_again(
    job: Capturing,
    store: LogitsStore,
    captured: list[Job],
    teacher: Teacher,
    check: DomainCheck,
    ask_rows: int,
) -> None:
    rows = job.rows[captured[0].domain]
    reader = RowReader(rows, remote=byte_reader(storage_of(job.prepared.config)))
    sums = tokens = 0.0
    try:
        for i in range(ask_rows):
            one = captured[i * len(captured) // ask_rows]
            row = i * one.num_rows // ask_rows
            said, labels = job.recorder(one, teacher).said(reader, np.array([row]))
            for start in range(0, len(labels), _CHUNK_TOKENS):
                part = slice(start, start + _CHUNK_TOKENS)
                log_p = dense_logits(said.at(part)).log_softmax(-1).cpu()
                sums += _difference(store, (one.domain, one.shard, row), part, log_p, labels[part].cpu())
            tokens += len(labels)
            check.asked += 1
    finally:
        reader.close()
    check.difference = sums / tokens if tokens else None
    if check.difference is not None and not check.difference <= _LARGEST_DIFFERENCE:
        check.damaged.append(
            f"domain {captured[0].domain!r}: records and teacher differ by {check.difference:.3g} nats; they "
            f"are of another model or other rows. Delete {captured[0].path.parent} and capture again"
        )


def _difference(
    store: LogitsStore, place: tuple[str, int, int], part: slice, log_p: torch.Tensor, labels: torch.Tensor
) -> float:
    """Summed over tokens: between stored and recomputed log-probabilities, by how likely they are."""
    nats = -log_p.gather(1, labels[:, None])[:, 0]
    if store.kept.is_hidden:
        return float((torch.from_numpy(store.hidden(place)[1])[part] - nats).abs().sum())
    said = store.read([place])
    assert isinstance(said, TruncatedSignal)
    signal = said.at(0).at(part)
    stored = signal.log_probs[: len(labels)]
    now = log_p.gather(1, signal.ids[: len(labels)])
    weight = torch.where(stored > -torch.inf, now.exp(), 0.0)
    share = weight.sum(1, keepdim=True).clamp(min=1e-9)
    return float((weight / share * (stored.clamp(min=-1e4) - now.clamp(min=-1e4)).abs()).sum())

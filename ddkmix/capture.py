"""Capturing: the teacher reads every train row once, and what it says goes to the logits store.

Shards are dealt to ranks; each is one file that one process writes, row by row (`logits_store.sidecar`), so a
capture that was killed goes on where it stopped, and ends with the bytes of one that was not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ddkmix.config import RunConfig
from ddkmix.errors import DataError
from ddkmix.evaluator import Evaluator, TeacherNats
from ddkmix.held_out import HeldOut
from ddkmix.index import DomainRows
from ddkmix.logits_store.card import StoreCard, read_card, serving_store, write_card
from ddkmix.logits_store.hidden import save_head
from ddkmix.logits_store.sidecar import SidecarWriter, sidecar_of, sidecar_path
from ddkmix.logits_store.totals import Totals, total, totals_of_facts
from ddkmix.pack import PackedDomain, Part
from ddkmix.preflight import Prepared, check
from ddkmix.prepare import open_rows, storage_of, store_cards, stores_folder
from ddkmix.ranks import current_rank, from_main, open_processes, wait_for_everyone
from ddkmix.recording import Recorder, head_of_teacher
from ddkmix.teacher import EnsembleTeacher, LiveTeacher
from ddkmix.teaching import (
    held_out_cache,
    held_out_rows,
    known_nats,
    measured_nats,
    open_evaluator,
    open_models,
)
from ddkmix.tracking import progress_bar

Teacher = LiveTeacher | EnsembleTeacher


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A shard to capture."""

    domain: str
    shard: int
    path: Path
    """Its sidecar."""
    num_rows: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Capturing:
    """What all shards of a capture have in common."""

    prepared: Prepared
    rows: Mapping[str, DomainRows]
    """Train rows."""
    held_out: Mapping[str, HeldOut]
    cards: Mapping[str, StoreCard]
    """Of each domain's store."""
    rank: int
    world_size: int
    device: torch.device

    def folder(self, domain: str) -> Path:
        """The store of a domain's teacher."""
        return stores_folder(self.prepared.config) / self.cards[domain].key

    def recorder(self, one: Job, teacher: Teacher) -> Recorder:
        """Makes the records of a shard."""
        return Recorder(
            self.rows[one.domain],
            one.shard,
            self.cards[one.domain],
            teacher,
            device=self.device,
            batch_rows=self.prepared.config.capture.batch_rows,
            storage=storage_of(self.prepared.config),
        )

    def evaluator(self) -> Evaluator:
        """Of the held-out rows."""
        return open_evaluator(self.prepared.config, self.held_out, self.device)

    def teachers_losses(self) -> TeacherNats | None:
        """Held-out row sums of every domain's teacher, nats; None if a store lacks some."""
        stores = {name: self.folder(name) for name in self.cards}
        return known_nats(self.prepared, self.evaluator(), stores=stores)

    def jobs(self) -> list[Job]:
        """Every shard, captured or not."""
        return [
            Job(
                domain=name,
                shard=i,
                path=sidecar_path(self.folder(name), name, shard),
                num_rows=shard.num_rows,
            )
            for name, rows in self.rows.items()
            for i, shard in enumerate(rows.shards)
        ]


def capture(config: RunConfig, *, part: Part | None = None) -> dict[str, Totals] | None:
    """Capture what a config's teachers say about its train rows, and measure them on the held-out ones.

    Args:
        config: the run; its student is not looked at.
        part: capture this share of the shards only.

    Returns:
        What each domain's sidecars hold, of the shards that are captured; None on ranks other than the main.

    Raises:
        ConfigError: more classes are to be kept than there are, or the config does not fit its domains.
        DataError: rows or the store cannot be read or written.
        ModelError: a teacher cannot be used as asked.
        NumericsError: a teacher's logits are not finite.
    """
    job = open_capturing(config)
    every = job.jobs()
    parts = [one for i, one in enumerate(every) if part is None or part.takes(i)]
    todo: list[Job] = from_main([one for one in parts if not _is_whole(job, one)])
    measured = part is None or part.number == 1
    if todo or (measured and job.teachers_losses() is None):
        teachers = open_models(job.prepared, job.device)
        _prepare_stores(job, teachers)
        _run(job, teachers, todo)
        if measured:
            _measure(job, teachers)
    wait_for_everyone()  # nobody reports before all are done
    return report(job) if job.rank == 0 else None


def open_capturing(config: RunConfig) -> Capturing:
    """Check a config, pack its rows, and say what its stores are.

    Raises:
        DdkmixError: the first thing that is wrong; no model is loaded.
    """
    prepared = check(config)
    folder = stores_folder(config)
    cards = {name: _existing(folder, card) for name, card in store_cards(prepared).items()}
    processes = open_processes()
    rank, world_size = current_rank()
    with processes.main_process_first():
        packed: dict[str, PackedDomain] = open_rows(prepared, shown=processes.is_main_process)
    return Capturing(
        prepared=prepared,
        rows={name: domain.train for name, domain in packed.items()},
        held_out=held_out_rows(config, packed),
        cards=cards,
        rank=rank,
        world_size=world_size,
        device=processes.device,
    )


def _existing(folder: Path, wanted: StoreCard) -> StoreCard:
    """The card of a store that serves the run already, if only because it has more temperatures."""
    found = serving_store(folder, wanted)
    return wanted if found is None else read_card(found)[0]


def report(job: Capturing) -> dict[str, Totals]:
    """What the sidecars of each domain hold, from their own facts.

    Raises:
        DataError: one is damaged.
    """
    found: dict[str, Totals] = {}
    for one in job.jobs():
        if one.path.exists():
            facts = sidecar_of(one.path, job.rows[one.domain].shards[one.shard]).facts
            try:
                found[one.domain] = found.get(one.domain, Totals()) + totals_of_facts(facts)
            except (KeyError, ValueError):
                raise DataError(f"{one.path} lacks its totals; delete it and capture again.") from None
    return found


def deal(jobs: Sequence[Job], ranks: int) -> list[list[Job]]:
    """Shards for each rank: the largest first, each to the rank that has the fewest rows."""
    hands: list[list[Job]] = [[] for _ in range(ranks)]
    for one in sorted(jobs, key=lambda one: -one.num_rows):
        min(hands, key=lambda hand: sum(other.num_rows for other in hand)).append(one)
    return hands


def _is_whole(job: Capturing, one: Job) -> bool:
    """Captured; a file that was cut or is of other rows is captured again."""
    try:
        sidecar_of(one.path, job.rows[one.domain].shards[one.shard])
    except DataError:
        return False
    return True


def _prepare_stores(job: Capturing, teachers: Mapping[str, Teacher]) -> None:
    if job.rank == 0:
        for domain, card in job.cards.items():
            teacher = teachers[job.prepared.teachers.of_domain[domain]]
            head = head_of_teacher(teacher, card.vocab_size)
            write_card(job.folder(domain), card, num_classes=len(head.weight[: head.vocab_size]))
            if card.kept.is_hidden:
                save_head(job.folder(domain), head)
    wait_for_everyone()


def _run(job: Capturing, teachers: Mapping[str, Teacher], todo: Sequence[Job]) -> None:
    mine = deal(todo, job.world_size)[job.rank]
    done, rows = 0, sum(one.num_rows for one in mine)
    with progress_bar("capture", total=rows, shown=job.rank == 0) as bar:
        for one in mine:
            teacher = teachers[job.prepared.teachers.of_domain[one.domain]]

            def show(row: int, before: int = done, name: str = f"{one.domain} {one.path.stem}") -> None:
                bar.update(before + row, note=name)

            capture_shard(job, one, teacher, on_rows=show)
            done += one.num_rows


def capture_shard(
    job: Capturing, one: Job, teacher: Teacher, *, on_rows: Callable[[int], None] = lambda rows: None
) -> None:
    """Write the sidecar of a shard, or go on with it.

    Args:
        job: what it is a part of.
        one: the shard.
        teacher: of its domain.
        on_rows: called with the rows done so far, after each batch.

    Raises:
        DataError: a row cannot be read, or the sidecar not written.
        NumericsError: the teacher's logits are not finite.
    """
    shard = job.rows[one.domain].shards[one.shard]
    recorder = job.recorder(one, teacher)
    with SidecarWriter(one.path) as writer:
        sums = [recorder.totals(row, record) for row, record in enumerate(writer.records())]
        for row, record in recorder.records(writer.num_rows):
            writer.append(record)
            sums.append(recorder.totals(row, record))
            on_rows(row + 1)
        facts = {"store": job.cards[one.domain].key, "domain": one.domain, "shard": shard.sha256}
        writer.finish({**facts, **total(sums).to_facts()})


def _measure(job: Capturing, teachers: Mapping[str, Teacher]) -> None:
    evaluator = job.evaluator()
    sums = measured_nats(job.prepared, evaluator, teachers).sums
    if job.rank == 0:
        for name, held_out in evaluator.held_out.items():
            held_out_cache(job.folder(name)).save(held_out, sums[name])

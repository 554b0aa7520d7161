"""Generating: the teacher or the student answers the prompt of every train row, once; the responses are
stored.

Shards are dealt to ranks as those of a capture; each is one file that one process writes, row by row, so that
a stage that was killed goes on where it stopped. A response does not depend on what is decoded beside it
(`generation.decode`): files have the same bytes however often the stage was stopped, on any number of ranks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ddkmix.capture import Job, deal
from ddkmix.config import RunConfig
from ddkmix.errors import ConfigError, DataError, ModelError
from ddkmix.generation.decode import Decoder, Prompt
from ddkmix.index import DomainRows
from ddkmix.logits_store.sidecar import GENERATE, SidecarWriter
from ddkmix.pack import Part
from ddkmix.preflight import Prepared, check
from ddkmix.prepare import open_rows, storage_of
from ddkmix.ranks import current_rank, from_main, open_processes, wait_for_everyone
from ddkmix.responders import (
    By,
    check_models,
    check_prompts,
    decoder_of,
    load_responder,
    response_cards,
    responses_folder,
)
from ddkmix.response_store.card import ResponseCard, write_card
from ddkmix.response_store.prompts import PromptRows, leading_prompts
from ddkmix.response_store.reader import (
    Response,
    ResponseTotals,
    decode,
    encode,
    open_responses,
    prompts_key,
    response_path,
    totals_of,
    totals_of_file,
)
from ddkmix.tracking import progress_bar

PromptsOf = Callable[[DomainRows], PromptRows | None]
"""The prompts of a domain's rows; None of a domain of plain text, which nobody answers."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Generating:
    """What all shards have in common."""

    prepared: Prepared
    by: By
    prompts: Mapping[str, PromptRows]
    cards: Mapping[str, ResponseCard]
    """Of each domain's store."""
    silent: Mapping[str, frozenset[int]]
    """Tokens that say nothing, in each domain."""
    rank: int
    world_size: int
    device: torch.device

    @property
    def left_out(self) -> tuple[str, ...]:
        """Domains without prompts."""
        return tuple(one.name for one in self.prepared.domains if one.name not in self.prompts)

    def folder(self, domain: str) -> Path:
        """The store of the domain's model."""
        return responses_folder(self.prepared.config) / self.cards[domain].key

    def jobs(self) -> list[Job]:
        """Every shard, answered or not."""
        return [
            Job(
                domain=name,
                shard=i,
                path=response_path(self.folder(name), own, i),
                num_rows=shard.num_rows,
            )
            for name, own in self.prompts.items()
            for i, shard in enumerate(own.shards)
        ]


def generate(
    config: RunConfig, by: By, *, prompts_of: PromptsOf | None = None, part: Part | None = None
) -> dict[str, ResponseTotals] | None:
    """Let the teachers or the student of a config answer the prompts of its train rows.

    Args:
        config: the run; nothing is trained, the student is the one that a training would begin with.
        by: who answers.
        prompts_of: the prompts of a domain's rows; those that its rows were packed with when None.
        part: answer this share of the shards only.

    Returns:
        What each domain's files hold, of the shards that are answered; None on ranks other than the main.

    Raises:
        ConfigError: prompts and responses do not fit into the model, or the config does not fit its domains.
        DataError: a prompt is empty, or rows or the store cannot be read or written.
        ModelError: a model cannot be used as asked, or says nothing to any prompt.
        NumericsError: a model's logits are not finite.
    """
    return answer(open_generating(config, by, prompts_of), part=part)


def answer(job: Generating, *, part: Part | None = None) -> dict[str, ResponseTotals] | None:
    """Make the responses that a job lacks; see `generate`."""
    every = job.jobs()
    parts = [one for i, one in enumerate(every) if part is None or part.takes(i)]
    todo: list[Job] = from_main([one for one in parts if not _is_whole(job, one)])
    if todo:
        if job.rank == 0:
            for name, card in job.cards.items():
                write_card(job.folder(name), card)
        _run(job, todo)
    wait_for_everyone()  # nobody reports before all are done
    return report(job) if job.rank == 0 else None


def open_generating(config: RunConfig, by: By, prompts_of: PromptsOf | None = None) -> Generating:
    """Check a config and its prompts, and say what its stores are; no model is loaded.

    Raises:
        DdkmixError: the first thing that is wrong.
    """
    prepared = check(config)
    check_models(prepared, by)
    processes = open_processes()
    rank, world_size = current_rank()
    with processes.main_process_first():
        packed = open_rows(prepared, shown=processes.is_main_process)
        find = prompts_of or partial(leading_prompts, storage=storage_of(config))
        found = {name: find(domain.train) for name, domain in packed.items()}
        prompts = {name: own for name, own in found.items() if own is not None}
        cards = response_cards(prepared, by, {name: packed[name].train.end_of_turn_id for name in prompts})
    if not prompts:
        raise ConfigError(f"none of the domains {', '.join(packed)} has prompts; add one whose documents do.")
    for name, own in prompts.items():
        check_prompts(prepared, by, own, cards[name])
    return Generating(
        prepared=prepared,
        by=by,
        prompts=prompts,
        cards=cards,
        silent={n: frozenset((*cards[n].stop_ids, packed[n].train.padding_id)) for n in prompts},
        rank=rank,
        world_size=world_size,
        device=processes.device,
    )


def report(job: Generating) -> dict[str, ResponseTotals]:
    """What the files of each domain hold.

    Raises:
        DataError: one is damaged.
        ModelError: not one response says anything.
    """
    found: dict[str, ResponseTotals] = {}
    for one in job.jobs():
        if one.path.exists():
            own = totals_of_file(open_responses(job.folder(one.domain), job.prompts[one.domain], one.shard))
            found[one.domain] = found.get(one.domain, ResponseTotals()) + own
    together = sum(found.values(), ResponseTotals())
    if together.rows and together.empty == together.rows:
        raise ModelError(
            f"the {job.by} says nothing: all {together.rows} responses are nothing but tokens that end or "
            "pad a text; look at its template and at generate.stop, or train it first."
        )
    return found


def _is_whole(job: Generating, one: Job) -> bool:
    """Answered; a file that was cut or is of other rows is made again."""
    try:
        open_responses(job.folder(one.domain), job.prompts[one.domain], one.shard)
    except DataError:
        return False
    return True


def _run(job: Generating, todo: Sequence[Job]) -> None:
    mine = deal(todo, job.world_size)[job.rank]
    models: dict[str, nn.Module] = {}
    decoders: dict[str, Decoder] = {}  # by store: what ends a response may differ where the model does not
    done, rows = 0, sum(one.num_rows for one in mine)
    with progress_bar("generate", total=rows, shown=job.rank == 0) as bar:
        for one in mine:
            name = job.by if job.by == "student" else job.prepared.teachers.of_domain[one.domain]
            card = job.cards[one.domain]
            if card.key not in decoders:
                if name not in models:
                    models[name] = load_responder(job.prepared, job.by, name).to(job.device)
                decoders[card.key] = decoder_of(models[name], card)

            def show(row: int, before: int = done, name: str = f"{one.domain} {one.path.stem}") -> None:
                bar.update(before + row, note=name)

            generate_shard(job, one, decoders[card.key], on_rows=show)
            done += one.num_rows


def generate_shard(
    job: Generating, one: Job, decoder: Decoder, *, on_rows: Callable[[int], None] = lambda rows: None
) -> None:
    """Write the responses to a shard, or go on with them.

    Args:
        job: what it is a part of.
        one: the shard.
        decoder: of the domain's model and card.
        on_rows: called with the rows done so far, after each.

    Raises:
        DataError: a row cannot be read, or the file not written.
        ModelError, NumericsError: see `Decoder.responses`.
    """
    prompts, card = job.prompts[one.domain], job.cards[one.domain]
    shard = prompts.shards[one.shard]
    with SidecarWriter(one.path, GENERATE) as writer:
        for row, response in _responses(job, one, decoder, writer.num_rows):
            writer.append(encode(response, shard.dtype))
            on_rows(row + 1)
        totals = totals_of(_decoded(writer, card, shard.dtype), job.silent[one.domain])
        facts = {"store": card.key, "domain": one.domain, "shard": shard.sha256}
        writer.finish({**facts, "prompts": prompts_key(prompts, one.shard), **totals.to_facts()})


def _responses(job: Generating, one: Job, decoder: Decoder, first: int) -> Iterator[tuple[int, np.ndarray]]:
    """(row, response) of every row from `first` on."""
    prompts, card = job.prompts[one.domain], job.cards[one.domain]
    shard, size = prompts.shards[one.shard], job.prepared.config.generate.batch_rows
    for start in range(first, shard.num_rows, size):
        rows = range(start, min(start + size, shard.num_rows))
        asked = [
            Prompt(
                ids=ids,
                key=(card.seed, card.model, shard.sha256, row),
                name=f"{one.domain}/{shard.name}#{row}",
            )
            for row, ids in zip(rows, prompts.read(one.shard, rows), strict=True)
        ]
        yield from zip(rows, decoder.responses(asked), strict=True)


def _decoded(writer: SidecarWriter, card: ResponseCard, dtype: str) -> Iterator[Response]:
    return (decode(record, card, dtype) for record in writer.records())

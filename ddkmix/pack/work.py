"""Which shards are still to be packed, who packs them, and doing it in parallel.

There is no coordinator: any number of processes on any number of machines may work in one folder. What is
done is what has an index; a part (`3/16`) is every 16th shard of a list that all of them agree on; and two
that pack one shard write the same bytes, each under its own temporary name.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ddkmix.domains import SPLITS, Domain, Split
from ddkmix.errors import ConfigError, DataError
from ddkmix.fingerprint import hash_json, remove_abandoned
from ddkmix.pack.digests import read_digests
from ddkmix.pack.marks import Fetching, Marks
from ddkmix.pack.shard import RowSettings, ShardJob, pack_shard, read_held_out
from ddkmix.prompts import PromptFormat, find_format
from ddkmix.row_layout import Strategy
from ddkmix.tokenizer import TokenizerCard

FORMAT = 4
"""Changes when packing the same documents would give other rows."""
PROMPTS_FORMAT = 1
"""The same of prompts and responses alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The share of the work that one of several jobs takes."""

    number: int
    """From 1."""
    of: int

    def takes(self, index: int) -> bool:
        """Whether the shard with this index, counted from 0 over all domains, is this part's."""
        return index % self.of == self.number - 1


def parse_part(text: str) -> Part:
    """The part that `3/16` means.

    Raises:
        ConfigError: it means none.
    """
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--part {text}: must be NUMBER/OF with NUMBER from 1 to OF, for example 3/16.")
    return Part(number=int(match[1]), of=int(match[2]))


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingPlan:
    """All the work of one domain."""

    domain: Domain
    folder: Path
    """Its rows go to `train/` and `held_out/` in here."""
    fingerprint: str
    """Changes with the documents, the tokenizer and the packing, and with nothing else."""
    jobs: tuple[ShardJob, ...]
    prompts: PromptFormat | None = None
    """Where documents are prompts and responses."""

    @property
    def shard_names(self) -> dict[Split, list[str]]:
        """The row shards of each split, in the card's order."""
        names: dict[Split, list[str]] = {split: [] for split in SPLITS}
        for job in self.jobs:
            for split, rows in job.outputs.items():
                names[split].append(rows.name)
        return names


def plan_packing(
    domain: Domain,
    marks: Marks,
    tokenizer: TokenizerCard,
    *,
    seq_len: int,
    strategy: Strategy,
    cache_dir: Path,
    fetching: Fetching,
) -> PackingPlan:
    """The work of a domain whose shards are known.

    Raises:
        ConfigError: it holds prompts, and nobody says which token ends a turn.
        ModelError: it holds chat messages, and the tokenizer has no template that can write them.
    """
    prompts = None
    if domain.prompt_response is not None:
        prompts = find_format(domain.prompt_response, tokenizer, where=str(domain.card))
    settings = RowSettings(
        text_field=domain.text_field,
        tokenizer=tokenizer.path,
        separator_id=tokenizer.separator_id,
        seq_len=seq_len,
        strategy=strategy,
        dtype="<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4",
        share_of_train=domain.share_of_train,
        prompts=prompts,
    )
    content: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    for split, shard in domain.shards():
        content[split].append([shard.name, marks[shard]])
    fingerprint = hash_json(
        {
            "format": FORMAT,
            "domain": domain.name,
            "tokenizer": tokenizer.fingerprint,
            "separator_id": tokenizer.separator_id,
            "seq_len": seq_len,
            **_content(settings),
            "share_of_train": domain.share_of_train,
            "shards": content,
        }
    )
    folder = cache_dir / "rows" / f"{domain.name}-{fingerprint[:16]}"
    held_out = tuple(folder / "held_out" / shard.name for shard in domain.held_out)
    jobs = tuple(
        ShardJob(
            documents=shard,
            mark=marks[shard],
            split=split,
            folder=folder,
            settings=settings,
            fetching=fetching,
            held_out=held_out if split == "train" else (),
        )
        for split, shard in domain.shards()
    )
    return PackingPlan(domain=domain, folder=folder, fingerprint=fingerprint, jobs=jobs, prompts=prompts)


def _content(settings: RowSettings) -> dict[str, Any]:
    """What documents are and how they become rows, as the fingerprint has it."""
    if settings.prompts is None:
        return {"text_field": settings.text_field, "strategy": settings.strategy}
    return {"prompts": settings.prompts.to_json(), "prompts_format": PROMPTS_FORMAT}


def run_packing(
    plans: Sequence[PackingPlan],
    *,
    part: Part | None,
    processes: int,
    on_shard: Callable[[int, int], None],
) -> None:
    """Pack what is missing, or this part's share of it.

    Raises:
        DataError: a shard cannot be read, or rows cannot be written.
    """
    for plan in plans:
        for folder in (plan.folder, *plan.folder.glob("*/"), *plan.folder.glob(".digests/*/")):
            remove_abandoned(folder)
    jobs = [job for plan in plans for job in plan.jobs]
    mine = [job for i, job in enumerate(jobs) if (part is None or part.takes(i)) and not job.done]
    on_shard(0, len(mine))
    if not mine:
        return
    needed = {rows for job in mine for rows in job.held_out if read_digests(rows) is None}
    with _Workers(processes or os.cpu_count() or 1, len(mine)) as workers:
        for _ in workers.run(read_held_out, [job for job in jobs if _rows_of(job) in needed]):
            pass
        for done, _ in enumerate(workers.run(pack_shard, mine), start=1):
            on_shard(done, len(mine))


def _rows_of(job: ShardJob) -> Path | None:
    return job.outputs["held_out"] if job.split == "held_out" else None


class _Workers:
    """Processes that do jobs; none are started where one job, or one process, is all there is."""

    def __init__(self, processes: int, most_jobs: int) -> None:
        self._processes = min(processes, most_jobs)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Workers":
        if self._processes > 1:
            # spawn: the caller may hold threads (tokenizers, torch) that a forked child would inherit broken
            self._pool = ProcessPoolExecutor(self._processes, mp_context=get_context("spawn"))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, function: Callable[[ShardJob], None], jobs: Sequence[ShardJob]) -> Iterator[None]:
        """Do all jobs; yields after each.

        Raises:
            DataError: what the first failing job raised.
        """
        if self._pool is None:
            for job in jobs:
                function(job)
                yield
            return
        for future in as_completed([self._pool.submit(function, job) for job in jobs]):
            try:
                future.result()
            except BrokenProcessPool:
                raise DataError(
                    "a packing process ended; often it ran out of memory: use fewer pack.processes or "
                    "smaller shards, then pack again to go on."
                ) from None
            yield

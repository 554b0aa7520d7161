"""Documents -> token rows: each shard of documents becomes one WebDataset tar of rows and its index.

    doc doc doc ...  ->  ids <sep> ids <sep> ids ...  ->  row | row | row | row + padding

Documents are packed *within one shard of one domain* (`row_layout` has the strategies), so a row belongs to
one domain and its name does not depend on any mixture. A prompt with its response is a row of its own
(`ddkmix.prompts`). The end of a row may be padding; no token is dropped. Train documents that also stand in
the held-out split are dropped (exact duplicates). Every shard is written under a temporary name and renamed
when whole, and its bytes depend on nothing but its documents and the settings: an interrupted run goes on
where it stopped, and any number of jobs may share the work.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddkmix.config import Storage
from ddkmix.domains import SPLITS, Domain, Split
from ddkmix.errors import DataError
from ddkmix.index import read_index
from ddkmix.pack.digests import count_repeated
from ddkmix.pack.facts import add_reports, split_report
from ddkmix.pack.manifest import (
    MANIFEST,
    Manifest,
    PackedShard,
    describe_shard,
    parse_manifest,
    write_manifest,
)
from ddkmix.pack.marks import check_remote_shards, fetching_of, find_marks, with_parts
from ddkmix.pack.opening import PackedDomain, check_rows, open_packed, read_manifest
from ddkmix.pack.publish import publish
from ddkmix.pack.work import PackingPlan, Part, parse_part, plan_packing, run_packing
from ddkmix.row_layout import Strategy
from ddkmix.storage.location import shown
from ddkmix.tokenizer import TokenizerCard

__all__ = [
    "PackedDomain",
    "Part",
    "check_remote_shards",
    "fetching_of",
    "missing_shards",
    "open_packed",
    "pack_domains",
    "pack_report",
    "packed_folders",
    "parse_part",
    "plan_all",
    "publish",
    "read_manifest",
    "read_packed",
]


def plan_all(
    domains: Sequence[Domain],
    tokenizer: TokenizerCard,
    *,
    seq_len: int,
    cache_dir: Path,
    strategy: Strategy = "concatenate",
    storage: Storage | None = None,
) -> list[PackingPlan]:
    """The work for every domain that has documents; nothing is packed.

    Raises:
        DataError: a shard is missing or empty, or two have the same content.
        StorageError: a store cannot be asked.
    """
    fetching = fetching_of(cache_dir, storage or Storage())
    whole = with_parts([domain for domain in domains if domain.rows is None])
    marks = find_marks(whole, cache_dir, fetching)
    return [
        plan_packing(
            domain,
            marks,
            tokenizer,
            seq_len=seq_len,
            strategy=strategy,
            cache_dir=cache_dir,
            fetching=fetching,
        )
        for domain in whole
    ]


def packed_folders(
    domains: Sequence[Domain],
    tokenizer: TokenizerCard,
    seq_len: int,
    cache_dir: Path,
    strategy: Strategy = "concatenate",
) -> dict[str, tuple[Path, str]]:
    """Per domain with documents: the folder that its rows have or will have, and their fingerprint.

    Raises:
        DataError: see `plan_all`.
    """
    plans = plan_all(domains, tokenizer, seq_len=seq_len, cache_dir=cache_dir, strategy=strategy)
    return {plan.domain.name: (plan.folder, plan.fingerprint) for plan in plans}


def pack_domains(
    domains: Sequence[Domain],
    tokenizer: TokenizerCard,
    *,
    seq_len: int,
    cache_dir: Path,
    strategy: Strategy = "concatenate",
    processes: int = 0,
    storage: Storage | None = None,
    part: Part | None = None,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, PackedDomain]:
    """Pack what the cache lacks and open all of it; of domains that name packed rows, check and open them.

    Args:
        domains: what to pack.
        tokenizer: how text becomes ids.
        seq_len: tokens in a row.
        cache_dir: rows go to `<cache_dir>/rows/<domain>-<fingerprint>/`.
        strategy: how documents become rows, see `row_layout`.
        processes: parallel processes; 0 means one per core.
        storage: how remote files are read; the default settings when None.
        part: pack this share of the shards only, and open the domains that are complete then.
        on_shard: called with (shards done, shards to do) as shards are completed.

    Raises:
        DataError: a shard cannot be read, a split has no rows, or packed rows do not fit the run.
        StorageError: a store cannot be asked.
    """
    storage = storage or Storage()
    manifests = read_packed(domains, tokenizer, seq_len=seq_len, cache_dir=cache_dir, storage=storage)
    plans = plan_all(
        domains, tokenizer, seq_len=seq_len, cache_dir=cache_dir, strategy=strategy, storage=storage
    )
    run_packing(plans, part=part, processes=processes, on_shard=on_shard)
    folders: dict[str, str] = {}
    for plan in plans:
        if all(job.done for job in plan.jobs):
            manifests[plan.domain.name] = _finish(plan, tokenizer, seq_len, strategy)
            folders[plan.domain.name] = str(plan.folder)
    return {
        domain.name: open_packed(
            domain.rows or folders[domain.name],
            manifest=manifests[domain.name],
            cache_dir=cache_dir,
            storage=storage,
            domain=domain.name,
            max_epochs=domain.max_epochs,
            prior=domain.prior,
        )
        for domain in domains
        if domain.name in manifests
    }


def missing_shards(plans: Sequence[PackingPlan]) -> dict[str, tuple[int, int]]:
    """Per domain that is not complete: (shards still to be packed, shards)."""
    counts = {plan.domain.name: (sum(not job.done for job in plan.jobs), len(plan.jobs)) for plan in plans}
    return {name: count for name, count in counts.items() if count[0]}


def pack_report(packed: Mapping[str, PackedDomain]) -> dict[str, Any]:
    """Per domain and split: documents, those cut and those dropped (by reason), rows, tokens, padding, bytes
    per token; and the sum over all domains as `total`."""
    report: dict[str, Any] = {}
    for name, domain in packed.items():
        assert domain.manifest is not None
        report[name] = {split: dict(domain.manifest.report[split]) for split in SPLITS}
    report["total"] = {split: add_reports(domain[split] for domain in report.values()) for split in SPLITS}
    return report


def read_packed(
    domains: Sequence[Domain],
    tokenizer: TokenizerCard,
    *,
    seq_len: int,
    cache_dir: Path,
    storage: Storage,
) -> dict[str, Manifest]:
    """The rows.json of the domains that name packed rows, checked against the run.

    Raises:
        DataError: one is missing or damaged, does not fit, or two have the same rows.
        StorageError: a store cannot be asked.
    """
    manifests: dict[str, Manifest] = {}
    owners: dict[str, str] = {}
    for domain in domains:
        if domain.rows is None:
            continue
        manifest = read_manifest(domain.rows, cache_dir=cache_dir, storage=storage)
        check_rows(manifest, tokenizer, seq_len, f"{domain.card}: rows {shown(domain.rows)}")
        manifests[domain.name] = manifest
        for split in SPLITS:
            for shard in manifest.splits[split]:
                place = f"{domain.name}/{split}/{shard.name}"
                if shard.rows and owners.setdefault(shard.sha256, place) != place:
                    raise DataError(
                        f"{place} has the same rows as {owners[shard.sha256]}; a shard belongs to one split "
                        "of one domain."
                    )
    return manifests


def _finish(plan: PackingPlan, tokenizer: TokenizerCard, seq_len: int, strategy: Strategy) -> Manifest:
    """Write the domain's rows.json, now that its last shard is there."""
    head = Manifest(
        domain=plan.domain.name,
        fingerprint=plan.fingerprint,
        tokenizer=tokenizer.fingerprint,
        separator=tokenizer.separator,
        separator_id=tokenizer.separator_id,
        seq_len=seq_len,
        strategy=strategy if plan.prompts is None else "prompts",
        end_of_turn=None if plan.prompts is None else plan.prompts.end_of_turn,
        end_of_turn_id=None if plan.prompts is None else plan.prompts.end_of_turn_id,
        license=plan.domain.license,
        sources=tuple(source.model_dump() for source in plan.domain.sources),
        splits={},
        report={},
    )
    old = _manifest_of(plan.folder)
    if old is not None and replace(old, splits={}, report={}) == head:
        return old
    splits: dict[Split, tuple[PackedShard, ...]] = {}
    report: dict[Split, dict[str, Any]] = {}
    for split, names in plan.shard_names.items():
        paths = [plan.folder / split / name for name in names]
        indices = [read_index(path) for path in paths]
        splits[split] = tuple(describe_shard(index, f"{split}/{index.name}") for index in indices)
        report[split] = split_report(indices, count_repeated(paths))
    manifest = replace(head, splits=splits, report=report)
    write_manifest(plan.folder, manifest)
    return manifest


def _manifest_of(folder: Path) -> Manifest | None:
    try:
        return parse_manifest((folder / MANIFEST).read_bytes(), str(folder / MANIFEST))
    except (OSError, DataError):  # none yet, or damaged: it is written again from the shards
        return None

"""Documents -> token rows: each shard of documents becomes one WebDataset tar of rows and its index.

    doc doc doc ...  ->  ids <sep> ids <sep> ids ...  ->  row | row | row | row + padding

Documents are packed *within one shard of one domain* (`row_layout` has the strategies), so a row belongs to
one domain and its name does not depend on any mixture. Rows are padded at their end, never dropped. Train
documents that also stand in the held-out split are dropped (exact duplicates). Every shard is written under
a temporary name and renamed when whole: an interrupted run goes on where it stopped.
"""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from ddkmix.documents import digest, read_documents
from ddkmix.domains import Domain
from ddkmix.errors import DataError
from ddkmix.fingerprint import FileDigests, hash_file, hash_json, replacing
from ddkmix.index import (
    DomainRows,
    ShardIndex,
    index_path,
    read_index,
    row_checksums,
    write_index,
)
from ddkmix.row_layout import Strategy
from ddkmix.token_stream import TokenStream
from ddkmix.tokenizer import TokenizerCard

FORMAT = 2
"""Changes when packing the same documents would give other rows."""
_BATCH_DOCUMENTS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedDomain:
    """Both splits of one domain."""

    train: DomainRows
    held_out: DomainRows


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One shard to pack, as a worker process needs it."""

    documents: Path
    rows: Path
    text_field: str
    tokenizer: Path
    separator_id: int
    seq_len: int
    strategy: Strategy
    dtype: str
    held_out: frozenset[bytes]
    """Digests of the documents that a train shard must not contain."""


def packed_folders(
    domains: Sequence[Domain],
    tokenizer: TokenizerCard,
    seq_len: int,
    cache_dir: Path,
    strategy: Strategy = "concatenate",
) -> dict[str, tuple[Path, str]]:
    """Per domain: the folder that its rows have or will have, and their fingerprint.

    Raises:
        DataError: a shard is missing or empty, or two have the same content.
    """
    digests = FileDigests(cache_dir)
    seen: dict[str, Path] = {}
    folders = {}
    for domain in domains:
        content = {}
        for split, shards in (("train", domain.train), ("held_out", domain.held_out)):
            content[split] = [[path.name, digests.of(path)] for path in shards]
            for path, (_, sha256) in zip(shards, content[split], strict=True):
                if sha256 in seen:
                    raise DataError(
                        f"{path} has the same content as {seen[sha256]}; a shard belongs to one split of "
                        "one domain. Remove one of them from its card."
                    )
                seen[sha256] = path
        fingerprint = hash_json(
            {
                "format": FORMAT,
                "domain": domain.name,
                "text_field": domain.text_field,
                "tokenizer": tokenizer.fingerprint,
                "separator_id": tokenizer.separator_id,
                "seq_len": seq_len,
                "strategy": strategy,
                "shards": content,
            }
        )
        folders[domain.name] = (
            cache_dir / "rows" / f"{domain.name}-{fingerprint[:16]}",
            fingerprint,
        )
    digests.save()
    return folders


def open_packed(domain: Domain, folder: Path, fingerprint: str, padding_id: int) -> PackedDomain:
    """The packed rows of a domain.

    Raises:
        DataError: a packed shard is damaged, or a split has no rows.
    """
    splits = {}
    for split, shards in (("train", domain.train), ("held_out", domain.held_out)):
        splits[split] = DomainRows(
            domain=domain.name,
            shards=tuple(read_index(folder / path.name) for path in shards),
            fingerprint=hash_json([fingerprint, split]),
            padding_id=padding_id,
            max_epochs=domain.max_epochs,
            prior=domain.prior,
        )
        if splits[split].num_rows == 0:
            raise DataError(f"domain {domain.name!r}: its {split} shards hold no text; add documents.")
    return PackedDomain(**splits)


def pack_domains(
    domains: Sequence[Domain],
    tokenizer: TokenizerCard,
    *,
    seq_len: int,
    cache_dir: Path,
    strategy: Strategy = "concatenate",
    processes: int = 0,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, PackedDomain]:
    """Pack what the cache lacks and open all of it.

    Args:
        domains: what to pack.
        tokenizer: how text becomes ids.
        seq_len: tokens in a row.
        cache_dir: rows go to `<cache_dir>/rows/<domain>-<fingerprint>/`.
        strategy: how documents become rows, see `row_layout`.
        processes: parallel processes; 0 means one per core.
        on_shard: called with (shards done, shards to do) as shards are completed.

    Raises:
        DataError: a shard cannot be read, or a split has no rows.
    """
    folders = packed_folders(domains, tokenizer, seq_len, cache_dir, strategy)
    jobs = [job for d in domains for job in _jobs(d, tokenizer, seq_len, strategy, folders[d.name][0])]
    on_shard(0, len(jobs))
    for done, _ in enumerate(_run(jobs, processes or os.cpu_count() or 1), start=1):
        on_shard(done, len(jobs))
    return {
        domain.name: open_packed(domain, *folders[domain.name], tokenizer.separator_id) for domain in domains
    }


def pack_report(packed: dict[str, PackedDomain]) -> dict[str, Any]:
    """Per domain and split: documents, those cut and those dropped (by reason), rows, tokens, padding, bytes
    per token."""
    report: dict[str, Any] = {}
    for name, domain in packed.items():
        report[name] = {}
        for split, rows in (("train", domain.train), ("held_out", domain.held_out)):
            totals: Counter[str] = Counter()
            dropped: Counter[str] = Counter()
            for shard in rows.shards:
                totals.update({k: v for k, v in shard.report.items() if k != "dropped"})
                dropped.update(shard.report["dropped"])
            report[name][split] = {
                **totals,
                "dropped": dict(dropped),
                "rows": rows.num_rows,
                "padding_share": round(totals["padding"] / max(totals["padding"] + totals["tokens"], 1), 6),
                "bytes_per_token": round(totals["bytes"] / max(totals["tokens"], 1), 3),
            }
    return report


def _jobs(
    domain: Domain, tokenizer: TokenizerCard, seq_len: int, strategy: Strategy, folder: Path
) -> Iterator[_Job]:
    missing = {
        split: [path for path in shards if not index_path(folder / path.name).exists()]
        for split, shards in (("train", domain.train), ("held_out", domain.held_out))
    }
    if len({path.name for path in (*domain.train, *domain.held_out)}) < len(
        (*domain.train, *domain.held_out)
    ):
        raise DataError(f"{domain.card}: two shards have one file name; row names need them to differ.")
    held_out: frozenset[bytes] = frozenset()
    if missing["train"]:
        held_out = frozenset(
            digest(text) for path in domain.held_out for text in read_documents(path, domain.text_field)
        )
    for split, paths in missing.items():
        for path in paths:
            yield _Job(
                documents=path,
                rows=folder / path.name,
                text_field=domain.text_field,
                tokenizer=tokenizer.path,
                separator_id=tokenizer.separator_id,
                seq_len=seq_len,
                strategy=strategy,
                dtype="<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4",
                held_out=held_out if split == "train" else frozenset(),
            )


def _run(jobs: Sequence[_Job], processes: int) -> Iterator[None]:
    if len(jobs) <= 1 or processes == 1:
        for job in jobs:
            pack_shard(job)
            yield
        return
    # spawn: the caller may hold threads (tokenizers, torch) that a forked child would inherit broken
    pool = ProcessPoolExecutor(min(processes, len(jobs)), mp_context=get_context("spawn"))
    try:
        for future in as_completed([pool.submit(pack_shard, job) for job in jobs]):
            future.result()
            yield
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def pack_shard(job: _Job) -> None:
    """Pack one shard of documents: rows first, the index that vouches for them last."""
    stream = TokenStream(job.tokenizer, separator_id=job.separator_id, seq_len=job.seq_len)
    dropped: Counter[str] = Counter()
    batch: list[str] = []
    for text in read_documents(job.documents, job.text_field):
        if not text.strip():
            dropped["empty"] += 1
        elif job.held_out and digest(text) in job.held_out:
            dropped["duplicate of held-out"] += 1
        else:
            batch.append(text)
        if len(batch) == _BATCH_DOCUMENTS:
            stream.add(batch)
            batch = []
    stream.add(batch)
    packed = stream.rows(job.strategy)
    rows = packed.tokens.astype(job.dtype)
    report = {
        "documents": packed.num_documents,
        "truncated": packed.num_truncated,
        "separators": packed.num_separators,
        "tokens": int(packed.num_tokens.sum()),
        "padding": packed.num_padding,
        "bytes": stream.num_bytes,
        "dropped": dict(dropped),
    }
    try:
        offsets = _write_tar(job.rows, rows)
        write_index(
            ShardIndex(
                location=str(job.rows),
                size=job.rows.stat().st_size,
                sha256=hash_file(job.rows),
                offsets=offsets,
                num_tokens=packed.num_tokens,
                num_bytes=packed.num_bytes,
                crc32=row_checksums(rows, packed.num_tokens),
                seq_len=job.seq_len,
                dtype=job.dtype,
                report=report,
            )
        )
    except OSError as error:
        raise DataError(
            f"{job.rows} cannot be written ({error.strerror}); free space or move cache_dir."
        ) from None


def _write_tar(path: Path, rows: UInt[np.ndarray, "R T"]) -> Int[np.ndarray, " R"]:
    """Write rows as `000017.npy` members; returns the byte offset of each row's first token.

    The standard library writes the tar because importing webdataset imports torch, which would cost
    every worker process seconds; tests read the result with webdataset.
    """
    offsets = np.zeros(len(rows), dtype=np.int64)
    with (
        replacing(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for i, row in enumerate(rows):
            data = io.BytesIO()
            np.save(data, row, allow_pickle=False)
            member = tarfile.TarInfo(f"{i:06d}.npy")
            member.size = len(data.getvalue())
            header = tarfile.BLOCKSIZE + member.size - row.nbytes
            offsets[i] = tar.offset + header
            data.seek(0)
            tar.addfile(member, data)
    return offsets

"""What the bytes of a shard are known by, without reading them where somebody vouches for them.

A shard is known by the digest that its card or list promises (checked when it is read); else a local file by
its SHA-256, and a remote one by what its store states (size and a strong mark), or by the SHA-256 of its
bytes, downloaded for that, where the store states nothing. Rows are cached under the marks of their
documents, so that an edited shard is never taken for the old one.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ddkmix.config import Storage
from ddkmix.document_shards import DocumentShard, parts_of_dataset
from ddkmix.documents import HubSplit, count_shards, hub_fingerprint, pin_revision
from ddkmix.domains import Domain
from ddkmix.errors import DataError
from ddkmix.fingerprint import FileDigests, hash_json
from ddkmix.pack.scratch import scratch_folder
from ddkmix.storage.location import scheme_of
from ddkmix.storage.remote import download, stat

_REQUESTS = 32
_SHA256, _MD5, _STATED, _DATASET = "sha256:", "md5:", "stated:", "dataset:"
_MARKS_ARE_DIGESTS = ("s3", "gs", "hf")
"""Stores whose marks tell content; a web server's ETag may be a size and a time."""

T = TypeVar("T")
R = TypeVar("R")
Marks = Mapping[DocumentShard, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetching:
    """Where and how remote shards of documents are copied."""

    folder: Path
    """Temporary copies go to folders in it."""
    storage: Storage


def fetching_of(cache_dir: Path, storage: Storage) -> Fetching:
    """Temporary copies lie beside the shards that a run spools."""
    return Fetching(folder=(storage.folder or cache_dir) / "incoming", storage=storage)


def with_parts(domains: Sequence[Domain]) -> tuple[Domain, ...]:
    """Data sets that are known by name only -> their parts, at the commit that their revision names now.

    Raises:
        DataError: there is no such data set, or the Hub cannot be reached.
    """
    pinned: dict[HubSplit, tuple[HubSplit, int]] = {}

    def parts(shards: Iterable[DocumentShard]) -> tuple[DocumentShard, ...]:
        result: list[DocumentShard] = []
        for shard in shards:
            if shard.dataset is None:
                result.append(shard)
                continue
            if shard.dataset not in pinned:
                split = pin_revision(shard.dataset)
                pinned[shard.dataset] = split, shard.of or count_shards(split)
            result += parts_of_dataset(*pinned[shard.dataset])
        return tuple(result)

    return tuple(
        replace(domain, train=parts(domain.train), held_out=parts(domain.held_out)) for domain in domains
    )


def find_marks(domains: Sequence[Domain], cache_dir: Path, fetching: Fetching) -> Marks:
    """The mark of every shard of documents.

    Raises:
        DataError: a shard is missing or empty, or two have the same content.
        StorageError: a store cannot be asked.
    """
    shards = [shard for domain in domains for _, shard in domain.shards()]
    digests = FileDigests(cache_dir)
    datasets = {shard.dataset: "" for shard in shards if shard.dataset is not None}
    for split in datasets:
        datasets[split] = hub_fingerprint(split, digests)

    def mark(shard: DocumentShard) -> str:
        if shard.dataset is not None:
            return _DATASET + hash_json([datasets[shard.dataset], shard.index, shard.of])
        if shard.sha256 is not None:
            return _SHA256 + shard.sha256
        if shard.md5 is not None:
            return _MD5 + shard.md5
        if not shard.remote:
            return _SHA256 + digests.of(Path(shard.location))
        return _remote_mark(shard, fetching)

    unread = [shard for shard in shards if not shard.remote]
    remote = [shard for shard in shards if shard.remote]
    marks = dict(zip(unread, _in_threads(mark, unread, os.cpu_count() or 1), strict=True))
    digests.save()
    marks.update(zip(remote, _in_threads(mark, remote, _REQUESTS), strict=True))
    _check_distinct(shards, marks)
    return marks


def check_unchanged(shard: DocumentShard, mark: str, sha256: str, storage: Storage) -> None:
    """Check that a remote shard that has just been copied is still what it was planned as.

    Raises:
        DataError: it has changed.
    """
    if mark.startswith(_STATED):
        same = mark == _stated(shard, storage)
    else:
        same = not mark.startswith(_SHA256) or mark == _SHA256 + sha256
    if not same:
        raise DataError(f"{shard} was changed while it was packed; pack again.")


def _in_threads(function: Callable[[T], R], values: Sequence[T], threads: int) -> list[R]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, values))


def _remote_mark(shard: DocumentShard, fetching: Fetching) -> str:
    stated = _stated(shard, fetching.storage)
    if stated is not None:
        return stated
    with scratch_folder(fetching.folder) as folder:
        return _SHA256 + download(shard.location, folder / "documents", fetching.storage).sha256


def _stated(shard: DocumentShard, storage: Storage) -> str | None:
    found = stat(shard.location, storage)
    if found.size == 0:
        raise DataError(f"{shard} is empty (0 bytes); write it again.")
    if found.size is None or found.mark is None:
        return None
    return f"{_STATED}{found.size}:{found.mark}"


def _check_distinct(shards: Sequence[DocumentShard], marks: Marks) -> None:
    seen: dict[str, DocumentShard] = {}
    for shard in shards:
        if marks[shard].startswith(_STATED) and scheme_of(shard.location) not in _MARKS_ARE_DIGESTS:
            continue
        other = seen.setdefault(marks[shard], shard)
        if other is not shard:
            raise DataError(
                f"{shard} has the same content as {other}; a shard belongs to one split of one domain. "
                "Remove one of them from its card."
            )


def check_remote_shards(domains: Sequence[Domain], fetching: Fetching) -> None:
    """Ask the stores for every remote shard, without reading any.

    Raises:
        DataError: a shard is empty, or a data set does not exist.
        StorageError: a shard does not exist, or a store cannot be asked.
    """
    whole = with_parts(domains)
    remote = [shard for domain in whole for _, shard in domain.shards() if shard.remote]
    _in_threads(lambda shard: _stated(shard, fetching.storage), remote, _REQUESTS)

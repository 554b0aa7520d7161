"""Opening packed rows: a folder of this machine, or one on a store, whose small files are copied once.

Of a remote folder rows.json is read at every start (a folder may be packed anew), and each shard's index is
copied to `<cache_dir>/remote/<fingerprint>/` once and verified; the rows stay where they are.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddkmix.config import Storage
from ddkmix.domains import SPLITS
from ddkmix.errors import DataError
from ddkmix.fingerprint import hash_file, hash_json
from ddkmix.index import DomainRows, ShardIndex, index_path, read_index, read_sidecar
from ddkmix.pack.manifest import MANIFEST, Manifest, PackedShard, parse_manifest
from ddkmix.pack.scratch import scratch_folder
from ddkmix.storage.location import is_remote, join, shown
from ddkmix.storage.remote import download
from ddkmix.tokenizer import TokenizerCard

_REQUESTS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedDomain:
    """Both splits of one domain."""

    train: DomainRows
    held_out: DomainRows
    location: str = ""
    """Path or URL of their folder."""
    manifest: Manifest | None = None
    """Its rows.json."""


def read_manifest(location: str, *, cache_dir: Path, storage: Storage) -> Manifest:
    """The rows.json of a packed folder.

    Raises:
        DataError: there is none, or it is damaged.
        StorageError: the store cannot be asked.
    """
    place = join(location, MANIFEST)
    if is_remote(location):
        with scratch_folder(cache_dir / "incoming") as scratch:
            download(place, scratch / MANIFEST, storage)
            return parse_manifest((scratch / MANIFEST).read_bytes(), shown(place))
    try:
        data = Path(place).read_bytes()
    except OSError as error:
        raise DataError(
            f"{place} cannot be read ({error.strerror}); name a folder that `ddkmix pack` or `ddkmix index` "
            "has finished."
        ) from None
    return parse_manifest(data, place)


def open_packed(
    location: str,
    *,
    cache_dir: Path,
    storage: Storage | None = None,
    manifest: Manifest | None = None,
    domain: str | None = None,
    max_epochs: float | None = None,
    prior: float | None = None,
) -> PackedDomain:
    """The packed rows in a folder, which may be remote.

    Args:
        location: path or URL of the folder.
        cache_dir: copies of the indices of remote shards go to `<cache_dir>/remote/`.
        storage: how remote files are read; the default settings when None.
        manifest: what `read_manifest` gave, if it has been read.
        domain: what the rows are called after; the domain that they were packed as when None.
        max_epochs: the card's limit.
        prior: the card's prior.

    Raises:
        DataError: rows.json, an index or a shard is missing or damaged, or a split has no rows.
        StorageError: the store cannot be asked.
    """
    storage = storage or Storage()
    manifest = manifest or read_manifest(location, cache_dir=cache_dir, storage=storage)
    splits = {}
    for split in SPLITS:
        shards = manifest.splits[split]
        if is_remote(location):
            folder = cache_dir / "remote" / hash_json([manifest.fingerprint, split])[:16]
            indices = _remote_indices(location, shards, folder, storage)
        else:
            indices = [_local_index(Path(location), shard) for shard in shards]
        splits[split] = DomainRows(
            domain=domain or manifest.domain,
            shards=tuple(indices),
            fingerprint=hash_json([manifest.fingerprint, split]),
            padding_id=manifest.separator_id,
            max_epochs=max_epochs,
            prior=prior,
            end_of_turn_id=manifest.end_of_turn_id,
        )
        if splits[split].num_rows == 0:
            left_out = _left_out(manifest.report[split])
            raise DataError(
                f"domain {domain or manifest.domain!r}: its {split} shards hold no text{left_out}; add "
                "documents."
            )
    return PackedDomain(
        train=splits["train"], held_out=splits["held_out"], location=location, manifest=manifest
    )


def _left_out(report: Mapping[str, Any]) -> str:
    """Why nothing is there, if something was."""
    dropped = report.get("dropped")
    if not dropped:
        return ""
    return f" (left out: {', '.join(f'{count} {reason}' for reason, count in dropped.items())})"


def check_rows(manifest: Manifest, tokenizer: TokenizerCard, seq_len: int, where: str) -> None:
    """Check that packed rows fit a run.

    Args:
        manifest: of the rows.
        tokenizer: of the run.
        seq_len: of the run.
        where: what messages call the rows.

    Raises:
        DataError: they were packed with another tokenizer, separator or row length.
    """
    if manifest.tokenizer != tokenizer.fingerprint:
        raise DataError(
            f"{where} was packed with the tokenizer {manifest.tokenizer[:12]} and {tokenizer.name} is "
            f"{tokenizer.fingerprint[:12]}; a token id means different text. Pack the documents again."
        )
    if manifest.separator_id != tokenizer.separator_id:
        raise DataError(
            f"{where} has the separator {manifest.separator!r} and the run {tokenizer.separator!r}; set "
            "pack.separator to the one of the rows, or pack the documents again."
        )
    if manifest.seq_len != seq_len:
        raise DataError(
            f"{where} has rows of {manifest.seq_len} tokens and pack.seq_len = {seq_len}; set it to "
            f"{manifest.seq_len}, or pack the documents again."
        )


def _local_index(folder: Path, shard: PackedShard) -> ShardIndex:
    index = read_index(folder / shard.path)
    if index.sha256 != shard.sha256:
        raise DataError(
            f"{folder / shard.path} is not the shard that {folder / MANIFEST} lists; delete the folder to "
            "pack again, or copy it again."
        )
    return index


def _remote_indices(
    location: str, shards: tuple[PackedShard, ...], folder: Path, storage: Storage
) -> list[ShardIndex]:
    def fetch(shard: PackedShard) -> ShardIndex:
        sidecar = index_path(folder / shard.path)
        if not (sidecar.is_file() and hash_file(sidecar) == shard.index_sha256):
            download(join(location, f"{shard.path}.index.npz"), sidecar, storage, sha256=shard.index_sha256)
        index = read_sidecar(sidecar, join(location, shard.path))
        if (index.size, index.sha256) != (shard.size, shard.sha256):
            raise DataError(
                f"{shown(join(location, MANIFEST))} and the index of {shard.name} disagree; pack again."
            )
        return index

    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(fetch, shards))

"""ddkmix's own row files, written and opened the way `ddkmix pack` does it.

The only file here that knows how ddkmix stores rows: everything else asks it.
"""

import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddkmix.fingerprint import hash_file
from ddkmix.index import (
    DomainRows,
    ShardIndex,
    index_path,
    read_index,
    read_sidecar,
    row_checksums,
    write_index,
)
from ddkmix.pack.shard import write_tar


def write_domain(folder: Path, domain: str, rows: np.ndarray, *, shard_rows: int) -> list[Path]:
    """Write rows (R, T) as shards of `shard_rows` rows below `folder/domain`; returns the tars."""
    paths = []
    for start in range(0, len(rows), shard_rows):
        part = rows[start : start + shard_rows]
        path = folder / domain / f"train-{start // shard_rows:06d}.tar"
        full = np.full(len(part), rows.shape[1], dtype=np.int64)
        offsets = write_tar(path, part)
        index = ShardIndex(
            location=str(path),
            size=path.stat().st_size,
            sha256=hash_file(path),
            offsets=offsets,
            crc32=row_checksums(part, full),
            num_tokens=full,
            num_bytes=full,
            seq_len=rows.shape[1],
            dtype=part.dtype.str,
            report={
                "documents": len(part),
                "tokens": int(full.sum()),
                "bytes": int(full.sum()),
                "dropped": {},
            },
        )
        write_index(index)
        paths.append(path)
    return paths


def open_domains(folder: Path, domains: Sequence[str]) -> dict[str, DomainRows]:
    """The rows that `write_domain` wrote, by domain."""
    return {
        domain: DomainRows(
            domain=domain,
            shards=tuple(read_index(path) for path in sorted((folder / domain).glob("*.tar"))),
            fingerprint=domain,
        )
        for domain in domains
    }


def open_remote_domains(root: str, domains: Sequence[str], shards: int) -> dict[str, DomainRows]:
    """The same rows at a URL: the indices are fetched, the rows stay where they are."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            domain: DomainRows(
                domain=domain,
                shards=tuple(_remote_index(root, domain, i, Path(folder)) for i in range(shards)),
                fingerprint=domain,
            )
            for domain in domains
        }


def _remote_index(root: str, domain: str, shard: int, folder: Path) -> ShardIndex:
    location = f"{root}/{domain}/train-{shard:06d}.tar"
    sidecar = folder / index_path(Path(location)).name
    with urllib.request.urlopen(f"{root}/{domain}/{sidecar.name}") as answer:  # noqa: S310
        sidecar.write_bytes(answer.read())
    return read_sidecar(sidecar, location)

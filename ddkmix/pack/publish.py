"""Copying packed folders to where others read them: `<out>/<domain>/rows.json` and everything it lists."""

import os
import shutil
from pathlib import Path

from ddkmix.domains import SPLITS
from ddkmix.errors import ConfigError, DataError
from ddkmix.fingerprint import hash_file, replacing
from ddkmix.index import index_path
from ddkmix.pack.manifest import MANIFEST, Manifest, PackedShard, parse_manifest, write_manifest
from ddkmix.storage.location import is_remote, shown


def publish(folder: Path, manifest: Manifest, out: str, name: str) -> Path:
    """Copy one domain's packed rows to `<out>/<name>/`; what is there already is left, rows.json comes last.

    Returns:
        The folder that a card can name under `rows`.

    Raises:
        ConfigError: `out` is remote.
        DataError: other rows are there already, or it cannot be written.
    """
    if is_remote(out):
        raise ConfigError(
            f"--out {shown(out)}: give a local folder and upload it with the tool of your store (aws s3 "
            "sync, gcloud storage rsync, hf upload, rsync)."
        )
    target = Path(out) / name
    if (target / MANIFEST).exists():
        old = parse_manifest((target / MANIFEST).read_bytes(), str(target / MANIFEST))
        if old.fingerprint != manifest.fingerprint:
            raise DataError(
                f"{target} holds other rows ({old.fingerprint[:12]} instead of {manifest.fingerprint[:12]}); "
                "choose another folder or delete it."
            )
    try:
        for split in SPLITS:
            for shard in manifest.splits[split]:
                _copy_shard(folder, target, shard)
    except OSError as error:
        raise DataError(
            f"{target} cannot be written ({error.strerror}); free space or choose another."
        ) from None
    write_manifest(target, manifest)
    return target


def _copy_shard(folder: Path, target: Path, shard: PackedShard) -> None:
    files = ((Path(shard.path), shard.sha256), (index_path(Path(shard.path)), shard.index_sha256))
    for relative, sha256 in files:
        source, copy = folder / relative, target / relative
        if copy.exists() and copy.stat().st_size == source.stat().st_size and hash_file(copy) == sha256:
            continue
        with source.open("rb") as reader, replacing(copy) as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
        if hash_file(copy) != sha256:
            os.unlink(copy)  # noqa: PTH108
            raise DataError(f"{source} is damaged; delete its folder to pack again.")

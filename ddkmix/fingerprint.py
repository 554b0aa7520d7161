"""Fingerprints of files and settings, so that caches are keyed by content and never by place.

Hashing a terabyte at every start would be slow, and trusting size and time alone would let an edited
shard pass for the old one. So a digest is computed once and remembered beside the file's size and
modification time (as git's index does).
"""

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ddkmix.errors import DataError

_CHUNK_BYTES = 1 << 20


def hash_json(value: Any) -> str:
    """SHA-256 (hex, 64 digits) of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 (hex, 64 digits) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class FileDigests:
    """SHA-256 of files, remembered in `<cache_dir>/digests.json` by path, size and modification time."""

    def __init__(self, cache_dir: Path) -> None:
        self._path = cache_dir / "digests.json"
        self._known = _read_memory(self._path)

    def of(self, path: Path) -> str:
        """The digest of one file.

        Raises:
            DataError: the file does not exist or is empty.
        """
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise DataError(f"{path}: file not found; a fingerprint needs it to exist.") from None
        if stat.st_size == 0:
            raise DataError(f"{path}: the file is empty (0 bytes); remove it or write it again.")
        key, mark = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        if self._known.get(key, [])[:2] != mark:
            self._known[key] = [*mark, hash_file(path)]
        digest: str = self._known[key][2]
        return digest

    def save(self) -> None:
        """Write the memory to disk; several processes may do so at once, the last one wins.

        Raises:
            DataError: the cache folder cannot be written.
        """
        try:
            write_atomically(self._path, json.dumps(self._known))
        except OSError as error:
            raise DataError(
                f"{self._path} cannot be written ({error.strerror}); free space or move cache_dir."
            ) from None


def _read_memory(path: Path) -> dict[str, list[Any]]:
    """Remembered digests; only a cache, so what is damaged costs a recomputation and nothing else."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {
        key: entry
        for key, entry in known.items()
        if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], str)
    }


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write aside; it takes the place of `path` when the block ends, whole and on disk.

    A reader sees the old file or the new one. After an exception the old one stays and nothing is left. Any
    number of processes, on any number of machines, may write one path at once; the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, descriptor = _open_aside(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)  # while the file is open: closing it gives up the lock that keeps it
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Delete what killed writers left in a folder; files that somebody is writing stay.

    A writer holds a lock on its file, and a lock ends with its process: unlike a process id in the name, it
    cannot be confused with that of another machine or container that shares the folder. Where the file
    system has no locks, nothing can be known and nothing is deleted.
    """
    for path in folder.glob(".*.tmp"):
        try:
            with path.open("r+b") as file:  # NFS locks only what may be written
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:
            continue


def _open_aside(path: Path) -> tuple[Path, int]:
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # a file system without locks: then nobody can take the file for abandoned
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():  # else `remove_abandoned` came between creation and lock
            return temporary, descriptor
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old text or the new one, whole."""
    with replacing(path) as file:
        file.write(text.encode())

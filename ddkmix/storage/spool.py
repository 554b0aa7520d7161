"""Whole shards in a folder of this machine, shared by all its processes, and never more than a limit.

    <key>.shard   a shard that has arrived, checked; its lock is shared by those who use it (*pins*), its
                  modification time is when it was last used
    <key>.lock    held while somebody downloads the shard; holds the bytes that this will take
    <key>.part    a download under way
    cache.lock    held while room is made

The key is the content's: SHA-256 where it is known, else location, size and the store's mark. All locks are
the kernel's, so what a killed process held is free at once: no counter to be left too high, no barrier file.
Keep the folder on a local disk: on a network disk the limit and the locks would be shared between machines.
"""

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep, time_ns

from ddkmix.config import Storage
from ddkmix.errors import StorageError
from ddkmix.fingerprint import hash_json
from ddkmix.storage import locks
from ddkmix.storage.faults import BACKOFF_S, Stopped
from ddkmix.storage.location import shown
from ddkmix.storage.locks import Lock
from ddkmix.storage.remote import download, stat

_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class StoredShard:
    """A whole file on a store."""

    location: str
    size: int
    """Bytes."""
    sha256: str | None = None


class Full(StorageError):
    """What is in use leaves no room for a shard."""


class Pin:
    """A spooled shard in use: it is not evicted until `close`, or until this process ends."""

    def __init__(self, shard: StoredShard, lock: Lock) -> None:
        self.shard, self._lock = shard, lock

    @property
    def path(self) -> Path:
        """The local copy."""
        return self._lock.path

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the shard.

        Raises:
            StorageError: the shard ends before, or the disk fails.
        """
        assert self._lock.is_open
        try:
            data = os.pread(self._lock.descriptor, length, offset)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read ({error.strerror}).") from None
        if len(data) != length:
            raise StorageError(
                f"{shown(self.shard.location)}: {len(data)} of {length} bytes at offset {offset} of its copy "
                f"{self.path}, which has {self.shard.size} bytes; delete the copy."
            )
        return data

    def close(self) -> None:
        """Let the shard be evicted."""
        self._lock.close()

    def __enter__(self) -> "Pin":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SpoolCache:
    """The folder. Any number of processes may use it at once, under the same limit."""

    def __init__(
        self, folder: Path, max_bytes: int, settings: Storage, *, backoff_s: float = BACKOFF_S
    ) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._settings, self._backoff_s = settings, backoff_s
        self._marks: dict[StoredShard, str | None] = {}

    def pin(self, shard: StoredShard, *, ahead: bool = False, stop: threading.Event | None = None) -> Pin:
        """The local copy of a shard, downloaded if it is not here; one process does so, others wait.

        Args:
            ahead: nobody waits for the shard yet. Then what is pinned fills at most half of the folder, so
                that readers of all processes find room, and there is no waiting for room.
            stop: set it from another thread to give up.

        Raises:
            StorageError: it cannot be had.
            Full: there is no room, and waiting `timeout_s` for others to let go of theirs did not help.
            Stopped: `stop` was set.
        """
        if shard.size > self.max_bytes:
            raise Full(
                f"storage.max_gb = {self.max_bytes / 1e9:g}: {shown(shard.location)} alone has {shard.size} "
                f"bytes; raise storage.max_gb above {shard.size / 1e9:.3g}."
            )
        key = self._key(shard)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self._pin_if_here(key, shard) or self._pin_new(key, shard, ahead, stop)
        except OSError as error:
            raise StorageError(
                f"storage.folder {self.folder} cannot be used ({error.strerror}); choose another."
            ) from None

    def holds(self, shard: StoredShard) -> bool:
        """Whether a whole copy is here now."""
        if shard.sha256 is None and shard not in self._marks:
            return False  # nobody of this process has asked for it yet, and the store is not asked from here
        try:
            return self._path(self._key(shard)).stat().st_size == shard.size
        except OSError:
            return False

    def discard(self, shard: StoredShard) -> None:
        """Forget a copy whose content turned out to be damaged; the next use downloads it again."""
        self._path(self._key(shard)).unlink(missing_ok=True)

    def _key(self, shard: StoredShard) -> str:
        if shard.sha256 is not None:
            return shard.sha256
        if shard not in self._marks:
            self._marks[shard] = stat(shard.location, self._settings, backoff_s=self._backoff_s).mark
        return hash_json([shard.location, shard.size, self._marks[shard]])

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.shard"

    def _pin_if_here(self, key: str, shard: StoredShard) -> Pin | None:
        lock = locks.shared(self._path(key))
        if lock is None:
            return None
        if os.fstat(lock.descriptor).st_size != shard.size:  # cut by somebody else; never by us
            lock.close()
            return None
        os.utime(lock.descriptor, ns=(time_ns(), time_ns()))
        return Pin(shard, lock)

    def _pin_new(self, key: str, shard: StoredShard, ahead: bool, stop: threading.Event | None) -> Pin:
        with locks.exclusive(self.folder / f"{key}.lock", stop=stop) as reservation:
            try:
                pin = self._pin_if_here(key, shard)
                if pin is not None:
                    return pin
                os.ftruncate(reservation.descriptor, 0)  # what a killed process reserved is not reserved now
                self._sweep(key)
                self._path(key).unlink(missing_ok=True)
                self._reserve(shard, reservation, ahead, stop)
                part = self.folder / f"{key}.part"
                download(
                    shard.location,
                    part,
                    self._settings,
                    size=shard.size,
                    sha256=shard.sha256,
                    backoff_s=self._backoff_s,
                    stop=stop,
                )
                return self._publish(shard, part, self._path(key), reservation)
            finally:
                self._sweep(key)
                reservation.path.unlink(missing_ok=True)

    def _publish(self, shard: StoredShard, part: Path, path: Path, reservation: Lock) -> Pin:
        """Give a download its name; it is pinned before, or another process could evict it at once."""
        lock = locks.shared(part)
        assert lock is not None
        with locks.exclusive(self.folder / "cache.lock"):  # or it would be counted twice
            lock.path = part.rename(path)
            os.ftruncate(reservation.descriptor, 0)
        return Pin(shard, lock)

    def _sweep(self, key: str) -> None:
        """Remove what a broken-off download left; the caller holds the shard's lock."""
        for path in self.folder.glob(f"*{key}.part*"):
            path.unlink(missing_ok=True)

    def _reserve(
        self, shard: StoredShard, reservation: Lock, ahead: bool, stop: threading.Event | None
    ) -> None:
        """Make room for a shard and write down that it is taken."""
        give_up = monotonic() + (0.0 if ahead else self._settings.timeout_s)
        while True:
            with locks.exclusive(self.folder / "cache.lock", stop=stop):
                in_use = self._make_room(shard.size, self.max_bytes // 2 if ahead else self.max_bytes)
                if in_use is None:
                    os.pwrite(reservation.descriptor, str(shard.size).encode(), 0)
                    return
            if monotonic() >= give_up:
                raise Full(
                    f"storage.max_gb = {self.max_bytes / 1e9:g}: {shown(shard.location)} needs {shard.size} "
                    f"bytes in {self.folder}, where {in_use} of {self.max_bytes} are in use; raise "
                    "storage.max_gb or use fewer processes."
                )
            if stop is not None and stop.is_set():
                raise Stopped
            sleep(_POLL_S)

    def _make_room(self, size: int, most_in_use: int) -> int | None:
        """Evict, oldest use first, until `size` more bytes fit; None, or the bytes in use if they do not.

        The caller holds cache.lock, so nothing is added meanwhile; pins may come and go.
        """
        reserved = self._reserved()
        copies = sorted(self._copies())
        total, in_use = reserved + sum(size for _, size, _ in copies), reserved
        free: list[tuple[Path, int]] = []
        for _, copy_size, path in copies:
            lock = locks.exclusive_if_free(path)
            if lock is None:
                in_use += copy_size
            else:
                free.append((path, copy_size))
                lock.close()
        if in_use + size > most_in_use:
            return in_use
        for path, copy_size in free:
            if total + size <= self.max_bytes:
                break
            lock = locks.exclusive_if_free(path)
            if lock is not None:
                path.unlink()
                lock.close()
                total -= copy_size
        return None if total + size <= self.max_bytes else in_use

    def _copies(self) -> Iterable[tuple[int, int, Path]]:
        """(last use, bytes, path) of every shard that is here."""
        for path in self.folder.glob("*.shard"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            yield status.st_mtime_ns, status.st_size, path

    def _reserved(self) -> int:
        """Bytes that downloads under way will take; what dead processes left is removed."""
        total = 0
        for path in self.folder.glob("*.lock"):
            if path.name == "cache.lock":
                continue
            dead = locks.exclusive_if_free(path)
            if dead is None:
                try:
                    total += int(path.read_bytes() or b"0")
                except FileNotFoundError:
                    continue
            else:
                self._sweep(path.stem)
                path.unlink(missing_ok=True)
                dead.close()
        return total

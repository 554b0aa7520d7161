"""Locks on files that the kernel releases when their holder dies, however it dies (flock).

A lock belongs to an open file, and a forked child has copies of its parent's open files. So a lock is given
back by unlocking, not by closing alone, and a child closes its copies at once, without unlocking.
"""

import fcntl
import os
import threading
from pathlib import Path
from time import sleep

from ddkmix.storage.faults import Stopped

_POLL_S = 0.02
_held: set[int] = set()
"""Descriptors of the locks of this process."""


class Lock:
    """A file that is open and locked, until `close`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor, self._process = path, descriptor, os.getpid()
        _held.add(descriptor)

    @property
    def is_open(self) -> bool:
        """Whether it still holds, in this process."""
        return self.descriptor >= 0 and self._process == os.getpid()

    def close(self) -> None:
        """Give it back; harmless in a forked child, which does not have it."""
        if self.is_open:
            _held.discard(self.descriptor)
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            os.close(self.descriptor)
        self.descriptor = -1

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def shared(path: Path) -> Lock | None:
    """Lock an existing file together with other readers; None if there is none (or no longer).

    Waits for whoever has it alone.
    """
    return _lock(path, os.O_RDONLY, fcntl.LOCK_SH)


def exclusive(path: Path, *, stop: threading.Event | None = None) -> Lock:
    """Lock a file alone, made if it is not there; waits for as long as somebody else has it.

    Raises:
        Stopped: `stop` was set.
    """
    while True:
        lock = _lock(path, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is not None:
            return lock
        if stop is not None and stop.is_set():
            raise Stopped
        sleep(_POLL_S)


def exclusive_if_free(path: Path) -> Lock | None:
    """Lock an existing file alone, or None if anybody has it or it is gone."""
    return _lock(path, os.O_RDONLY, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock(path: Path, flags: int, kind: int) -> Lock | None:
    while True:
        try:
            descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, kind)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
        lock = Lock(path, descriptor)
        if _is_still_there(path, descriptor):
            return lock
        lock.close()  # unlinked between opening and locking: the lock is on a file that nobody will find


def _is_still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _after_fork() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)

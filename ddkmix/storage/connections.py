"""One connection pool per store and process.

fsspec's event loop lives in a thread, so it does not survive a fork, and DataLoader workers may be forked
after their parent has used it. Three things go wrong then, and all of them look like a hang: the child waits
for a loop that nobody runs; the child garbage-collects the parent's sessions, which unregisters sockets from
the *parent's* epoll; a lock was held at the moment of the fork. So a child keeps what it inherited alive and
untouched, and connects anew.
"""

import atexit
import os
import sys
import threading
from typing import Any

from ddkmix.config import Storage
from ddkmix.storage.location import scheme_of

_CLOSE_S = 1.0

_lock = threading.Lock()
_connected: dict[tuple[str, float], Any] = {}
_inherited: list[Any] = []
"""The parent's connections in a forked child: never used, closed or collected."""


def file_system(location: str, settings: Storage) -> Any:
    """The file system that speaks a location's scheme, connected in this process.

    An `fsspec.AbstractFileSystem`; Any, as fsspec has no types and its asynchronous methods are private.
    """
    scheme = scheme_of(location)
    key = ("http" if scheme == "https" else scheme, settings.timeout_s)
    with _lock:
        if key not in _connected:
            _connected[key] = _connect(*key)
        return _connected[key]


def _connect(scheme: str, timeout_s: float) -> Any:
    """Retries are ours alone, so that they are counted once; the user's fsspec config stays in force."""
    if scheme == "http":
        from ddkmix.storage.web import Web

        return Web(timeout_s)
    import fsspec

    if scheme == "s3":
        config = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        limits = {
            "connect_timeout": timeout_s,
            "read_timeout": timeout_s,
            "retries": {"total_max_attempts": 1},
        }
        s3 = fsspec.filesystem("s3", config_kwargs={**config, **limits}, skip_instance_cache=True)
        s3.retries = 1
        return s3
    if scheme == "gs":
        return fsspec.filesystem("gs", timeout=timeout_s, skip_instance_cache=True)
    if scheme == "hf":
        from huggingface_hub import HfFileSystem

        return HfFileSystem(skip_instance_cache=True)
    assert scheme == "file", scheme
    return fsspec.filesystem("file", skip_instance_cache=True)


def disconnect() -> None:
    """Close every connection of this process; the next request connects again."""
    with _lock:
        systems = list(_connected.values())
        _connected.clear()
    for system in systems:
        close = getattr(system, "close", None)
        if close is not None:
            close(_CLOSE_S)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _inherited.extend(_connected.values())
    _connected.clear()
    if "fsspec.asyn" in sys.modules:
        sys.modules["fsspec.asyn"].reset_lock()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(disconnect)

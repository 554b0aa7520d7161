"""One try of a download: the bytes of a whole file, appended to what earlier tries received.

Three kinds of source: a web server (one stream, resumed with a ranged read), a store with ranged reads
(parts, several at once), and the output of a command. A try goes on where the last one broke off only if the
file is provably the same: its digest is known beforehand, or the store states a strong mark for it.
"""

import hashlib
import os
import select
import signal
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from time import monotonic
from typing import IO, Any, BinaryIO

from ddkmix.config import Storage
from ddkmix.storage.connections import file_system
from ddkmix.storage.coroutines import run
from ddkmix.storage.faults import Fault, Stopped, local_error
from ddkmix.storage.location import scheme_of, without_secrets

_PART = 16 << 20
_PARTS_AT_ONCE = 4
_PIECE = 1 << 20
_TICK_S = 0.1


@dataclass(kw_only=True, slots=True)
class Partial:
    """What was received of a file so far."""

    file: BinaryIO
    name: os.PathLike[str]
    digest_known: bool
    received: int = 0
    total: int | None = None
    """Bytes of the whole file, as the store says."""
    mark: str | None = None
    """Strong identity of the content, as the store says."""
    end_is_marked: bool = False
    """Whether a stream that ends early is told from one that is whole."""
    digest: Any = field(default_factory=hashlib.sha256)

    @property
    def can_go_on(self) -> bool:
        """Whether appending to what is here is safe."""
        return self.digest_known or self.mark is not None

    def write(self, data: bytes) -> None:
        """Append; raises Fault if the disk fails."""
        try:
            self.file.write(data)
        except OSError as error:
            raise local_error(error, self.name) from None
        self.digest.update(data)
        self.received += len(data)

    def restart(self) -> None:
        """Forget everything."""
        self.file.seek(0)
        self.file.truncate()
        self.received, self.total, self.mark, self.end_is_marked = 0, None, None, False
        self.digest = hashlib.sha256()


def receive(location: str, partial: Partial, settings: Storage, stop: threading.Event | None) -> None:
    """One try.

    Raises:
        Fault: it broke off.
        Stopped: `stop` was set.
    """
    scheme = scheme_of(location)
    if scheme == "pipe":
        _receive_output(location.removeprefix("pipe:"), partial, settings, stop)
    elif scheme in ("http", "https"):
        file_system(location, settings).stream(location, partial, stop)
    else:
        _receive_parts(location, partial, settings, stop)


# --- a store with ranged reads ----------------------------------------------------------------------


def describe(location: str, settings: Storage, stop: threading.Event | None = None) -> tuple[int, str | None]:
    """(size, mark) of a file on a store with ranged reads, never from a cached listing."""
    system = file_system(location, settings)
    path = system._strip_protocol(location)
    system.invalidate_cache()
    if system.async_impl:
        info = run(system, system._info(path), stop)
    else:
        info = system.info(path, **({"expand_info": True} if scheme_of(location) == "hf" else {}))
    if info["type"] != "file":
        raise Fault("it is a folder", again=False, missing=True)
    return int(info["size"]), _mark(info)


def _mark(info: dict[str, Any]) -> str | None:
    """The strongest identity of the content that a store states."""
    large = info.get("lfs")
    sha256 = large.get("sha256") if isinstance(large, dict) else getattr(large, "sha256", None)
    candidates = [sha256, *(info.get(key) for key in ("xet_hash", "blob_id", "md5Hash", "ETag", "etag"))]
    return next((str(mark) for mark in candidates if mark and not str(mark).startswith("W/")), None)


def _receive_parts(location: str, partial: Partial, settings: Storage, stop: threading.Event | None) -> None:
    size, mark = describe(location, settings, stop)
    if not partial.can_go_on or (size, mark) != (partial.total, partial.mark):
        partial.restart()
    partial.total, partial.mark, partial.end_is_marked = size, mark, True
    while partial.received < size:
        if stop is not None and stop.is_set():
            raise Stopped
        starts = range(partial.received, min(size, partial.received + _PARTS_AT_ONCE * _PART), _PART)
        wanted = [(location, start, min(_PART, size - start)) for start in starts]
        for (_, _, length), data in zip(wanted, cat_ranges(wanted, settings, stop), strict=True):
            if isinstance(data, BaseException):
                raise data
            if len(data) != length:
                raise Fault(f"{len(data)} of {length} bytes came", again=True)
            partial.write(data)
    if not partial.digest_known and describe(location, settings, stop) != (size, mark):
        partial.restart()
        raise Fault("the file changed while it was read", again=True)


def cat_ranges(
    requests: list[tuple[str, int, int]], settings: Storage, stop: threading.Event | None = None
) -> list[bytes | BaseException]:
    """(location, offset, length) of one store's files -> bytes, or what went wrong with each, all at once."""
    system = file_system(requests[0][0], settings)
    paths = [system._strip_protocol(location) for location, _, _ in requests]
    starts = [offset for _, offset, _ in requests]
    ends = [offset + length for _, offset, length in requests]
    if system.async_impl:
        answers: list[bytes | BaseException] = run(
            system, system._cat_ranges(paths, starts, ends, on_error="return"), stop
        )
        return answers
    # A cache would read megabytes ahead of a row of a few kilobytes.
    return system.cat_ranges(paths, starts, ends, on_error="return", cache_type="none")


# --- the output of a command ------------------------------------------------------------------------


def _receive_output(command: str, partial: Partial, settings: Storage, stop: threading.Event | None) -> None:
    """The card's author wrote the command and the user allowed it (`storage.allow_pipe`)."""
    partial.restart()
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            _drain(process.stdout, partial, settings.timeout_s, stop)
            status = process.wait(settings.timeout_s)
        except subprocess.TimeoutExpired:
            raise Fault(f"the command did not end within {settings.timeout_s:g} s", again=True) from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()
        if status != 0:
            raise Fault(_complaint(status, complaints), again=status not in (126, 127))
    if partial.received == 0:
        raise Fault("the command ended well but wrote nothing", again=False, hint="correct the command")
    partial.total, partial.end_is_marked = partial.received, True


def _drain(output: IO[bytes], partial: Partial, timeout_s: float, stop: threading.Event | None) -> None:
    last = monotonic()
    while True:
        if select.select([output], [], [], _TICK_S)[0]:
            data = os.read(output.fileno(), _PIECE)
            if not data:
                return
            partial.write(data)
            last = monotonic()
        elif stop is not None and stop.is_set():
            raise Stopped
        elif monotonic() - last > timeout_s:
            raise Fault(f"the command wrote nothing for {timeout_s:g} s", again=True)


def _complaint(status: int, complaints: IO[bytes]) -> str:
    complaints.seek(0)
    lines = complaints.read(1 << 16).decode(errors="replace").strip().splitlines()
    said = f" and said: {without_secrets(lines[-1])[:200]}" if lines else ""
    how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
    return f"the command {how}{said}"

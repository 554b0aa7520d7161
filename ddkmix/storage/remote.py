"""Asking stores: what a file is, some of its bytes, all of it. Answers are checked, failures retried.

Nothing that a network can do passes for data: an answer of another length, of another range, cut short, or of
a file that changed meanwhile is a failure of the store and raises `StorageError`.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ddkmix.config import Storage
from ddkmix.errors import StorageError
from ddkmix.fingerprint import replacing
from ddkmix.storage.connections import file_system
from ddkmix.storage.coroutines import run
from ddkmix.storage.faults import BACKOFF_S, Fault, Missing, fault_of, local_error, with_retries
from ddkmix.storage.location import check_location, scheme_of, shown
from ddkmix.storage.streams import Partial, cat_ranges, describe, receive

Range = tuple[str, int, int]
"""(location, offset, length) in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stat:
    """What a store says about a file."""

    size: int | None
    """Bytes; None where it does not say (a command, some web servers)."""
    mark: str | None
    """Changes when the content does (a digest, a strong ETag); None where the store has no such thing."""
    ranges: bool
    """Whether parts of the file can be read; tried, not taken from a header."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Downloaded:
    """A file that has arrived whole."""

    size: int
    sha256: str


def stat(location: str, settings: Storage, *, backoff_s: float = BACKOFF_S) -> Stat:
    """Ask a store about a file. A `pipe:` command is not run: nothing is known about its output.

    Raises:
        StorageError: the file does not exist, or the store cannot be asked.
    """
    scheme = _checked(location, settings)
    if scheme == "pipe":
        return Stat(size=None, mark=None, ranges=False)

    def ask() -> Stat:
        if scheme in ("http", "https"):
            web = file_system(location, settings)
            size, mark, ranges = run(web, web.probe(location))
        else:
            (size, mark), ranges = describe(location, settings), True
        return Stat(size=size, mark=mark, ranges=ranges)

    return with_retries(ask, location, settings, backoff_s=backoff_s)


def exists(location: str, settings: Storage, *, backoff_s: float = BACKOFF_S) -> bool:
    """Whether a file is there; a `pipe:` command is taken to be.

    Raises:
        StorageError: the store cannot be asked, or refuses.
    """
    try:
        stat(location, settings, backoff_s=backoff_s)
    except Missing:
        return False
    return True


def list_files(pattern: str, settings: Storage, *, backoff_s: float = BACKOFF_S) -> list[str]:
    """Locations that match a pattern with `*` on a store that lists its files, sorted.

    Raises:
        StorageError: the store cannot be asked, or lists nothing (web servers, commands).
    """
    scheme = _checked(pattern, settings)
    if scheme in ("http", "https", "pipe"):
        raise StorageError(
            f"{shown(pattern)}: web servers and commands do not list their files; name every shard, or a "
            "numbered range with braces ({000..127})."
        )
    system = file_system(pattern, settings)

    def ask() -> list[str]:
        system.invalidate_cache()
        return [f"{scheme}://{path}" for path in system.glob(system._strip_protocol(pattern))]

    return sorted(with_retries(ask, pattern, settings, backoff_s=backoff_s))


def read_ranges(requests: Sequence[Range], settings: Storage, *, backoff_s: float = BACKOFF_S) -> list[bytes]:
    """The bytes of parts of files, in the order of the requests; all are under way at the same time.

    Only what failed is asked for again.

    Raises:
        StorageError: a part cannot be had, whole and as asked for.
    """
    answers: dict[int, bytes] = {i: b"" for i, (_, _, length) in enumerate(requests) if length == 0}
    for location in {location for location, _, _ in requests}:
        if _checked(location, settings) == "pipe":
            raise StorageError(f"{shown(location)} is a stream; parts of it cannot be read. Spool it.")

    def ask() -> None:
        open_requests = [i for i in range(len(requests)) if i not in answers]
        faults: list[Fault] = []
        for _, indices in groupby(
            sorted(open_requests, key=lambda i: scheme_of(requests[i][0])),
            key=lambda i: scheme_of(requests[i][0]),
        ):
            faults += _ask_one_system(requests, list(indices), answers, settings)
        if faults:
            raise next((fault for fault in faults if not fault.again), faults[0])

    if requests:
        with_retries(ask, requests[0][0], settings, backoff_s=backoff_s)
    return [answers[i] for i in range(len(requests))]


def _ask_one_system(
    requests: Sequence[Range], indices: list[int], answers: dict[int, bytes], settings: Storage
) -> list[Fault]:
    """Fill in the answers that came, and return the faults of the others."""
    faults = []
    for i, answer in zip(indices, cat_ranges([requests[i] for i in indices], settings), strict=True):
        location, offset, length = requests[i]
        if isinstance(answer, BaseException):
            fault = fault_of(answer)
            if fault is None:
                raise answer
        elif len(answer) != length:
            fault = Fault(f"{len(answer)} of {length} bytes came at offset {offset}", again=True)
        else:
            answers[i] = bytes(answer)
            continue
        fault.location = location
        faults.append(fault)
    return faults


def download(
    location: str,
    target: Path,
    settings: Storage,
    *,
    size: int | None = None,
    sha256: str | None = None,
    backoff_s: float = BACKOFF_S,
    stop: threading.Event | None = None,
) -> Downloaded:
    """Copy a whole file to this machine. `target` appears when the file is whole and on disk, not before.

    A transfer that broke off goes on where it was, if the file is provably still the same.

    Args:
        size: bytes that it must have, if known.
        sha256: digest that it must have, if known.
        stop: set it from another thread to give up.

    Raises:
        StorageError: it cannot be had, or is not the file that was expected.
        Stopped: `stop` was set.
    """
    _checked(location, settings)
    try:
        with replacing(target) as file:
            partial = Partial(file=file, name=target, digest_known=sha256 is not None)

            def one_try() -> Downloaded:
                receive(location, partial, settings, stop)
                return _arrived(partial, size, sha256)

            return with_retries(one_try, location, settings, backoff_s=backoff_s, stop=stop)
    except OSError as error:
        raise StorageError(f"{local_error(error, target)}; free space, or choose another folder.") from None


def _arrived(partial: Partial, size: int | None, sha256: str | None) -> Downloaded:
    """Check a transfer that ended well.

    Raises:
        Fault: it is not whole, or not the file that was expected.
    """
    try:
        partial.file.flush()
    except OSError as error:
        raise local_error(error, partial.name) from None
    received, found = partial.received, partial.digest.hexdigest()
    if size is not None and received != size:
        short = partial.total is None and received < size
        partial.restart()
        raise Fault(
            f"it has {received} bytes instead of {size}",
            again=short,
            hint="the file on the store was changed",
        )
    if sha256 is not None and found != sha256:
        partial.restart()  # damage on the way is as likely as another file: one more try tells
        raise Fault(f"its SHA-256 is {found} instead of {sha256}", again=True, hint="was the file changed?")
    if size is None and sha256 is None and not partial.end_is_marked:
        raise Fault(
            "the server does not say how long the file is; a cut transfer could not be told from a whole one",
            again=False,
            hint="use a server that sends Content-Length",
        )
    return Downloaded(size=received, sha256=found)


def _checked(location: str, settings: Storage) -> str:
    """The scheme of a location that can be asked for."""
    check_location(location, settings, "storage")
    scheme = scheme_of(location)
    if scheme == "":
        raise StorageError(f"{location} is a local path; open it, or write file://{location} to spool it.")
    return scheme

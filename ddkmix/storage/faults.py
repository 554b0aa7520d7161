"""What can go wrong with a request, told apart: try again, or say so at once.

Every library has its own exceptions for the same few things. `fault_of` reads them; `with_retries` tries
again what may pass (resets, timeouts, 408, 429, 5xx, short answers) with exponential back-off, and turns
what does not pass into a `StorageError` of one line.
"""

import errno
import logging
import os
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from time import time
from typing import Any, TypeVar

from ddkmix.config import Storage
from ddkmix.errors import DdkmixError, StorageError
from ddkmix.storage.location import shown, without_secrets

T = TypeVar("T")
BACKOFF_S = 1.0
"""Wait before the second attempt; doubled before each further one."""
_LONGEST_WAIT = 60
"""In units of the back-off."""
_LONGEST_RETRY_AFTER_S = 300.0
_TRANSIENT_STATUS = {408, 425, 429}
_OUR_MISTAKES = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NameError,
    NotImplementedError,
    TypeError,
)
_PASSING_ERRNOS = {
    errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ETIMEDOUT, errno.ESTALE,
    errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EBUSY, errno.EAGAIN, errno.EIO,
    getattr(errno, "EREMOTEIO", errno.EIO),
}  # fmt: skip
_PASSING_NAMES = re.compile(
    r"Timeout|Connection|Connector|Disconnected|Payload|Incomplete|ClientOSError|ProxyError|ReadError"
    r"|RemoteProtocol|HTTPClientError|ResponseParserError|TransferEncoding|Chunked"
)
"""Exceptions of aiohttp, botocore, httpx, requests and google that pass, by the names of their classes."""
_LASTING_NAMES = re.compile(r"Certificate|SSL|InvalidURL|Credential|Auth|InvalidProxy|TooManyRedirects")

logger = logging.getLogger(__name__)


class Fault(Exception):
    """A request failed. `again`: it may pass. Never leaves this package."""

    def __init__(
        self, reason: str, *, again: bool, missing: bool = False, hint: str = "", wait_s: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.reason, self.again, self.missing, self.hint, self.wait_s = reason, again, missing, hint, wait_s
        self.location: str | None = None
        """Set where one batch of requests goes to several locations."""


class Missing(StorageError):
    """The store answers that there is no such file."""


class Stopped(Exception):
    """Somebody asked to stop in the middle; not an error."""


def status_fault(status: int, retry_after: str | None = None) -> Fault:
    """The fault that an HTTP status means."""
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
    reason = f"{status} {phrase}".strip()
    if status in (404, 410):
        return Fault(reason, again=False, missing=True)
    if status in (401, 403, 407):
        return Fault(f"access refused ({reason})", again=False, hint="check the credentials")
    if status == 416:
        return Fault(f"{reason}: the file is shorter than expected", again=False, hint="was it changed?")
    again = status in _TRANSIENT_STATUS or status >= 500
    return Fault(reason, again=again, wait_s=_seconds(retry_after))


def _seconds(retry_after: str | None) -> float:
    """The header Retry-After: seconds or a date."""
    if not retry_after:
        return 0.0
    try:
        wait = float(retry_after) if retry_after.strip().isdigit() else _until(retry_after)
    except (ValueError, TypeError):
        return 0.0
    return min(max(wait, 0.0), _LONGEST_RETRY_AFTER_S)


def _until(date: str) -> float:
    return parsedate_to_datetime(date).timestamp() - time()


def fault_of(error: BaseException) -> Fault | None:
    """The fault that a library's exception means; None for what looks like a mistake in a program."""
    if isinstance(error, Fault):
        return error
    for cause in _causes(error):
        status = _status(cause)
        if status is not None and status >= 400:
            fault = status_fault(status)
            if fault.again or fault.missing or fault.hint:
                return fault
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return Fault("no such file", again=False, missing=True)
    if isinstance(error, PermissionError):
        return Fault(f"access refused ({_text(error)})", again=False, hint="check the credentials")
    if isinstance(error, _OUR_MISTAKES):
        return None
    return Fault(_text(error), again=_passes(error), hint=_hint(error))


def _passes(error: BaseException) -> bool:
    names = " ".join(cls.__name__ for cls in type(error).__mro__ if cls not in (Exception, OSError))
    if isinstance(error, ssl.SSLCertVerificationError) or _LASTING_NAMES.search(type(error).__name__):
        return False
    if isinstance(error, TimeoutError | ConnectionError | EOFError) or _PASSING_NAMES.search(names):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNOS


def _hint(error: BaseException) -> str:
    if "Credential" in type(error).__name__ or "Forbidden" in str(error):
        return "check the credentials (FSSPEC_S3_ANON=true or FSSPEC_GS_TOKEN=anon for public files)"
    return ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it was raised from, at most ten deep."""
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status in an exception of aiohttp (`status`), gcsfs (`code`), botocore, httpx (`response`)."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        candidates = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    else:
        candidates = [getattr(error, "status", None), getattr(error, "code", None)]
        candidates.append(getattr(response, "status_code", None))
    for candidate in candidates:
        if isinstance(candidate, int) or (isinstance(candidate, str) and candidate.isdigit()):
            return int(candidate)
    return None


def _text(error: BaseException) -> str:
    """What an exception says, on one line and without URLs' secrets."""
    if isinstance(error, OSError) and error.strerror and not error.args[2:]:
        text = str(error.strerror)
    else:
        text = str(error)
    text = without_secrets(text)[:200]
    name = type(error).__name__
    return text if isinstance(error, OSError) and text else f"{name}: {text}" if text else name


def with_retries(
    attempt: Callable[[], T],
    location: str,
    settings: Storage,
    *,
    backoff_s: float = BACKOFF_S,
    stop: threading.Event | None = None,
) -> T:
    """Call `attempt` until it returns, at most `settings.attempts` times.

    Raises:
        StorageError: it failed for good, or too often.
        Stopped: `stop` was set.
    """
    import tenacity

    tries = 0

    def one_try() -> T:
        nonlocal tries
        tries += 1
        try:
            if stop is not None and stop.is_set():
                raise Stopped
            return attempt()
        except (DdkmixError, Stopped):
            raise
        except Exception as error:
            fault = fault_of(error)
            if fault is None:
                raise
            raise fault from error

    def wait(state: tenacity.RetryCallState) -> float:
        fault = state.outcome.exception() if state.outcome else None
        asked = fault.wait_s if isinstance(fault, Fault) else 0.0
        return max(asked, backoff(state))

    def tell(state: tenacity.RetryCallState) -> None:
        fault = state.outcome.exception() if state.outcome else None
        place = shown(getattr(fault, "location", None) or location)
        logger.warning("%s: %s; attempt %d of %d failed", place, fault, tries, settings.attempts)

    backoff = tenacity.wait_exponential(
        multiplier=backoff_s, max=_LONGEST_WAIT * backoff_s
    ) + tenacity.wait_random(0, backoff_s)
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(settings.attempts),
        wait=wait,
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, Fault) and error.again),
        before_sleep=tell,
        sleep=tenacity.sleep_using_event(stop) if stop is not None else tenacity.nap.sleep,
        reraise=True,
    )
    try:
        return retrying(one_try)
    except Fault as fault:
        raise storage_error(fault, fault.location or location, tries) from None


def storage_error(fault: Fault, location: str, tries: int = 1) -> StorageError:
    """The one line that a user sees."""
    place = shown(location)
    if fault.missing:
        return Missing(f"{place} does not exist ({fault.reason}); check its name and where it should lie.")
    if not fault.again:
        return StorageError(f"{place} cannot be read: {fault.reason}; {fault.hint or 'check the location'}.")
    times = "1 attempt" if tries == 1 else f"{tries} attempts"
    hint = fault.hint or "check the store and the network, or raise storage.attempts or storage.timeout_s"
    return StorageError(f"{place} cannot be read: {times} failed, the last with: {fault.reason}; {hint}.")


def local_error(error: OSError, path: os.PathLike[str]) -> Fault:
    """A disk of this machine failed, not the store."""
    return Fault(
        f"{path} cannot be written ({error.strerror})",
        again=False,
        hint="free space, lower storage.max_gb or move storage.folder",
    )

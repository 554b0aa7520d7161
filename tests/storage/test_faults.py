"""What passes and what does not, and how long to wait."""

import asyncio
import errno
import ssl
import threading
import time
from email.utils import formatdate
from types import SimpleNamespace

import aiohttp
import pytest
from botocore import exceptions as boto
from fsspec.exceptions import FSTimeoutError

from ddkmix.config import Storage
from ddkmix.errors import StorageError
from ddkmix.storage.faults import Fault, Missing, Stopped, fault_of, status_fault, storage_error, with_retries
from tests.storage.conftest import FAST

PLACE = "https://host/a.tar"


class HttpError(Exception):
    """As gcsfs has it."""

    def __init__(self, code: int | str) -> None:
        super().__init__(f"said {code}")
        self.code = code


class HubError(OSError):
    """As huggingface_hub has it."""

    def __init__(self, status: int) -> None:
        super().__init__("long\nmessage")
        self.response = SimpleNamespace(status_code=status)


def from_boto(code: str, status: int) -> Exception:
    """As s3fs raises it."""
    from s3fs.errors import translate_boto_error

    response = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(boto.ClientError(response, "GetObject"))


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        asyncio.TimeoutError(),  # noqa: UP041
        FSTimeoutError(),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        OSError(errno.ENETUNREACH, "unreachable"),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError("short"),
        aiohttp.ClientOSError(errno.EPIPE, "pipe"),
        aiohttp.SocketTimeoutError(),
        boto.EndpointConnectionError(endpoint_url="x"),
        boto.ReadTimeoutError(endpoint_url="x"),
        boto.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        from_boto("SlowDown", 503),
        from_boto("InternalError", 500),
        HttpError(503),
        HttpError("429"),
        HubError(502),
        Fault("short", again=True),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_passes(error: Exception) -> None:
    """Networks and busy servers, in every library's words."""
    fault = fault_of(error)
    assert fault is not None
    assert fault.again


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "denied"),
        FileNotFoundError("x"),
        IsADirectoryError("x"),
        OSError(errno.ENOSPC, "full"),
        ssl.SSLCertVerificationError("expired"),
        aiohttp.InvalidURL("x"),
        boto.NoCredentialsError(),
        from_boto("AccessDenied", 403),
        from_boto("NoSuchKey", 404),
        from_boto("InvalidRange", 416),
        HttpError(403),
        HubError(404),
        HubError(401),
        ValueError("odd"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_does_not_pass(error: Exception) -> None:
    """Refusals, absence, certificates, and what nobody knows."""
    fault = fault_of(error)
    assert fault is not None
    assert not fault.again


@pytest.mark.parametrize(
    "error", [FileNotFoundError("x"), from_boto("NoSuchBucket", 404), HubError(404), HttpError(410)]
)
def test_absence(error: Exception) -> None:
    """Its own error, so that asking whether a file exists has an answer."""
    fault = fault_of(error)
    assert fault is not None
    assert fault.missing
    assert isinstance(storage_error(fault, PLACE), Missing)


@pytest.mark.parametrize("error", [AssertionError(), TypeError(), NameError(), KeyError(1)])
def test_our_own_mistakes_are_not_faults_of_a_store(error: Exception) -> None:
    """They keep their traceback."""
    assert fault_of(error) is None
    with pytest.raises(type(error)):
        with_retries(raiser(error), PLACE, Storage(), backoff_s=FAST)


def raiser(*errors: Exception):  # type: ignore[no-untyped-def]
    """A function that raises these, one a call, and then returns the number of calls."""
    calls = iter(errors)
    count = 0

    def attempt() -> int:
        nonlocal count
        count += 1
        error = next(calls, None)
        if error is not None:
            raise error
        return count

    return attempt


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_attempts_are_counted(attempts: int) -> None:
    """All but one may fail."""
    settings = Storage(attempts=attempts)
    errors = [ConnectionResetError(errno.ECONNRESET, "reset by peer")] * attempts
    assert attempts == with_retries(raiser(*errors[1:]), PLACE, settings, backoff_s=FAST)
    with pytest.raises(StorageError) as info:
        with_retries(raiser(*errors), PLACE, settings, backoff_s=FAST)
    times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    assert (
        f"{PLACE} cannot be read: {times} failed, the last with: reset by peer; check the store and the "
        "network, or raise storage.attempts or storage.timeout_s."
    ) == str(info.value)


def test_each_failure_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A run that crawls says why."""
    with_retries(raiser(TimeoutError(), TimeoutError()), PLACE, Storage(attempts=3), backoff_s=FAST)
    assert [f"{PLACE}: TimeoutError; attempt {n} of 3 failed" for n in (1, 2)] == [
        record.getMessage() for record in caplog.records
    ]


def test_waits_double_and_jitter() -> None:
    """1, 2, 4 units and up to one more each, at random: clients that failed together do not come back so."""
    totals = []
    for _ in range(3):
        start = time.monotonic()
        with_retries(raiser(*[TimeoutError()] * 3), PLACE, Storage(attempts=4), backoff_s=0.02)
        totals.append(time.monotonic() - start)
    assert 0.14 <= min(totals)
    assert len({round(total, 4) for total in totals}) > 1


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [(None, 0, 0), ("7", 7, 7), ("-7", 0, 0), ("soon", 0, 0), ("999999", 300, 300), ("7.5", 0, 0)],
)
def test_retry_after(header: str | None, least: float, most: float) -> None:
    """Seconds, but not for ever; nonsense is ignored."""
    assert least <= status_fault(503, header).wait_s <= most


def test_retry_after_a_date() -> None:
    """The other form of the header."""
    assert 8 < status_fault(429, formatdate(time.time() + 10, usegmt=True)).wait_s <= 10
    assert 0 == status_fault(429, formatdate(time.time() - 10, usegmt=True)).wait_s


def test_stopping_ends_the_waiting() -> None:
    """Somebody who sets `stop` does not wait for the back-off."""
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    start = time.monotonic()
    with pytest.raises(Stopped):
        with_retries(raiser(*[TimeoutError()] * 9), PLACE, Storage(attempts=9), backoff_s=60.0, stop=stop)
    assert time.monotonic() - start < 5


def test_every_status_is_one_or_the_other() -> None:
    """408, 425, 429 and what is the server's own trouble pass."""
    passing = [status for status in range(400, 600) if status_fault(status).again]
    assert [408, 425, 429, *range(500, 600)] == passing

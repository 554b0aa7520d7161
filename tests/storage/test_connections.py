"""Connections of a process: one a store, closed in the end, and never those of a parent."""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable

import pytest

from ddkmix.config import Storage
from ddkmix.storage.connections import disconnect, file_system
from ddkmix.storage.coroutines import run
from ddkmix.storage.faults import Stopped
from ddkmix.storage.remote import read_ranges
from tests.storage import servers
from tests.storage.conftest import FAST, put_s3
from tests.storage.servers import WebServer

CONTENT = random.Random(0).randbytes(100_000)


def in_child(work: Callable[[], bool], seconds: float = 120.0) -> bool:
    """What `work` returns in a forked child; False if it raises or hangs (a busy machine is slow)."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def test_one_connection_serves_many_requests(web: WebServer, settings: Storage) -> None:
    """http and https share a file system; other timeouts have their own."""
    url = web.put("a.tar", CONTENT)
    assert file_system(url, settings) is file_system("https://other/b", settings)
    assert file_system(url, settings) is not file_system(url, Storage(timeout_s=7))


@pytest.mark.parametrize("kind", ["web", "s3"])
def test_a_fork_does_not_inherit_connections(
    kind: str, request: pytest.FixtureRequest, settings: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    """Parent and child read at the same time, after the parent has used the store and while it uses it.

    In an interpreter of its own: a fork inherits whatever locks the threads of other tests' libraries hold.
    """
    if os.environ.get("DDKMIX_ALONE") != "1":
        name = f"{__file__}::test_a_fork_does_not_inherit_connections[{kind}]"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name]
        alone = subprocess.run(
            command, env={**os.environ, "DDKMIX_ALONE": "1"}, capture_output=True, text=True, check=False
        )
        assert 0 == alone.returncode, alone.stdout[-3000:]
        return
    if kind == "web":
        location = request.getfixturevalue("web").put("a.tar", CONTENT)
    else:
        location = put_s3(f"{request.getfixturevalue('s3')}/a.tar", CONTENT)

    def works() -> bool:
        ranges = [(location, i * 100, 100) for i in range(4)]
        expected = [CONTENT[i * 100 : i * 100 + 100] for i in range(4)]
        return expected == read_ranges(ranges, settings, backoff_s=FAST)

    assert works()
    stop, wrong = threading.Event(), []

    def keep_reading() -> None:
        while not stop.is_set():
            if not works():
                wrong.append(1)

    reader = threading.Thread(target=keep_reading)
    reader.start()
    try:
        assert in_child(lambda: works() and in_child(works))
        assert in_child(lambda: gc.collect() >= 0 and works())  # of the parent's sessions, were they garbage
    finally:
        stop.set()
        reader.join()
    assert works()
    retried = [record.getMessage() for record in caplog.records if record.name.startswith("ddkmix")]
    assert ([], []) == (wrong, retried)


def test_the_fork_test_notices_a_connection_that_is_used_by_both(web: WebServer, settings: Storage) -> None:
    """Sabotage: a child that gets its parent's file system fails."""
    url = web.put("a.tar", CONTENT)
    system = file_system(url, settings)
    read_ranges([(url, 0, 10)], settings)

    def uses_the_parents() -> bool:
        from ddkmix.storage import connections

        connections._connected["http", settings.timeout_s] = system
        return [CONTENT[:10]] == read_ranges(
            [(url, 0, 10)], Storage(attempts=1, timeout_s=settings.timeout_s)
        )

    assert not in_child(uses_the_parents, seconds=5)


def test_nothing_stays_open(web: WebServer, settings: Storage) -> None:
    """After `disconnect`, no session is garbage-collected unclosed; the next request connects again."""
    url = web.put("a.tar", CONTENT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert [CONTENT[:10]] == read_ranges([(url, 0, 10)], settings)
            disconnect()
            gc.collect()
    assert [] == [str(warning.message) for warning in caught]


@pytest.mark.parametrize("store", ["web", "s3"])
def test_a_program_ends_without_a_word(store: str, request: pytest.FixtureRequest) -> None:
    """Nobody has to disconnect: the end of the process does it, with every warning shown."""
    server = request.getfixturevalue(store)
    location = server.put("a.tar", CONTENT) if store == "web" else put_s3(f"{server}/a.tar", CONTENT)
    code = (
        "from ddkmix.config import Storage\nfrom ddkmix.storage.remote import read_ranges\n"
        f"assert len(read_ranges([({location!r}, 0, 10)], Storage())[0]) == 10"
    )
    command = [sys.executable, "-W", "always::ResourceWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (0, "", "") == (done.returncode, done.stdout, done.stderr)


def test_a_request_can_be_stopped(web: WebServer) -> None:
    """At once, not after the timeout."""
    settings = Storage(timeout_s=60)
    url = web.put("a.tar", CONTENT, servers.silent(30.0))
    system = file_system(url, settings)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    start = time.monotonic()
    with pytest.raises(Stopped):
        run(system, system.probe(url), stop)
    assert time.monotonic() - start < 15

"""Locks that live and die with their process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ddkmix.storage import locks
from ddkmix.storage.faults import Stopped
from tests.storage.test_connections import in_child


def test_readers_share_and_a_writer_does_not(tmp_path: Path) -> None:
    """Two shared locks go together; an exclusive one waits until both are gone."""
    path = tmp_path / "a"
    path.touch()
    with locks.shared(path) as one:  # type: ignore[union-attr]
        two = locks.shared(path)
        assert two is not None
        one.close()
        assert locks.exclusive_if_free(path) is None
        two.close()
    alone = locks.exclusive_if_free(path)
    assert alone is not None
    assert locks.exclusive_if_free(path) is None
    alone.close()


def test_only_exclusive_makes_the_file(tmp_path: Path) -> None:
    """There is nothing to share or to evict where there is no file."""
    assert locks.shared(tmp_path / "a") is None
    assert locks.exclusive_if_free(tmp_path / "a") is None
    assert [] == list(tmp_path.iterdir())
    locks.exclusive(tmp_path / "a").close()
    assert ["a"] == [path.name for path in tmp_path.iterdir()]


def test_waiting_for_a_lock(tmp_path: Path) -> None:
    """Until it is given back, or until somebody says stop."""
    path = tmp_path / "a"
    first = locks.exclusive(path)
    threading.Timer(0.2, first.close).start()
    start = time.monotonic()
    with locks.exclusive(path):
        assert time.monotonic() - start >= 0.15
        stop = threading.Event()
        threading.Timer(0.1, stop.set).start()
        with pytest.raises(Stopped):
            locks.exclusive(path, stop=stop)


def test_a_lock_on_a_deleted_file_is_not_a_lock(tmp_path: Path) -> None:
    """Who waited for a file that was deleted meanwhile gets the new one, not the old one's ghost."""
    path = tmp_path / "a"
    first = locks.exclusive(path)
    got: list[locks.Lock] = []
    waiting = threading.Thread(target=lambda: got.append(locks.exclusive(path)))
    waiting.start()
    time.sleep(0.05)
    path.unlink()
    first.close()
    waiting.join()
    assert os.fstat(got[0].descriptor).st_ino == path.stat().st_ino
    assert locks.exclusive_if_free(path) is None
    got[0].close()


def test_who_waits_to_share_a_file_that_is_evicted_finds_none(tmp_path: Path) -> None:
    """The evictor holds it alone, deletes it and lets go: there is nothing to share any more."""
    path = tmp_path / "a"
    evictor = locks.exclusive(path)
    got: list[locks.Lock | None] = []
    waiting = threading.Thread(target=lambda: got.append(locks.shared(path)))
    waiting.start()
    time.sleep(0.2)
    path.unlink()
    evictor.close()
    waiting.join()
    assert [None] == got


def test_locks_of_a_killed_parent_do_not_live_on_in_its_workers(tmp_path: Path) -> None:
    """They were forked while it held them, and are still there."""
    path = tmp_path / "a"
    code = (
        "import os, time; from pathlib import Path; from ddkmix.storage import locks\n"
        f"lock = locks.exclusive(Path({str(path)!r}))\n"
        "child = os.fork()\n"
        "if child == 0:\n    time.sleep(60)\n    os._exit(0)\n"
        "print(child, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        try:
            process.kill()
            process.wait()
            time.sleep(0.1)
            lock = locks.exclusive_if_free(path)
            assert lock is not None
            lock.close()
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    """kill -9, and the lock is free at once."""
    path = tmp_path / "a"
    code = (
        "import sys, time; from pathlib import Path; from ddkmix.storage import locks\n"
        f"lock = locks.exclusive(Path({str(path)!r})); print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "locked\n" == process.stdout.readline()
        assert locks.exclusive_if_free(path) is None
        process.kill()
        process.wait()
    lock = locks.exclusive_if_free(path)
    assert lock is not None
    lock.close()


def test_a_forked_child_does_not_have_its_parents_locks(tmp_path: Path) -> None:
    """It cannot give them back, does not keep them alive, and reuses no descriptor by accident."""
    path = tmp_path / "a"
    lock = locks.exclusive(path)

    def child() -> bool:
        closed = not lock.is_open
        lock.close()
        own = locks.exclusive(tmp_path / "b")
        lock.__del__()
        return closed and own.is_open and locks.exclusive_if_free(path) is None

    assert in_child(child)
    assert locks.exclusive_if_free(path) is None
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go)
        os.read(ready, 1)  # lives on, with whatever it inherited
        os._exit(0)
    lock.close()
    free = locks.exclusive_if_free(path)
    assert free is not None
    free.close()
    os.close(go)
    os.waitpid(pid, 0)
    os.close(ready)


def test_a_lock_that_is_forgotten_is_given_back(tmp_path: Path) -> None:
    """An exception may lose it."""
    path = tmp_path / "a"
    lock = locks.exclusive(path)
    del lock
    free = locks.exclusive_if_free(path)
    assert free is not None
    free.close()

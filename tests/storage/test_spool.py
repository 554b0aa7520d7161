"""Whole shards on this machine: one download, a limit that holds, pins that hold, and nothing left behind."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ddkmix.config import Storage
from ddkmix.errors import StorageError
from ddkmix.storage.faults import Stopped
from ddkmix.storage.spool import Full, Pin, SpoolCache, StoredShard
from tests.storage import servers
from tests.storage.conftest import FAST
from tests.storage.servers import WebServer

SIZE = 1000
IMPATIENT = Storage(attempts=3, timeout_s=0.1)


def content_of(i: int, size: int = SIZE) -> bytes:
    """The bytes of shard i."""
    return random.Random(i).randbytes(size)


def put(
    web: WebServer, i: int, *faults: servers.Fault | None, size: int = SIZE, digest: bool = True
) -> StoredShard:
    """Serve shard i."""
    content = content_of(i, size)
    url = web.put(f"{i}.tar", content, *faults)
    return StoredShard(url, size, hashlib.sha256(content).hexdigest() if digest else None)


def cache_in(folder: Path, shards: float = 100, settings: Storage = IMPATIENT) -> SpoolCache:
    """A cache with room for so many shards."""
    return SpoolCache(folder, int(shards * SIZE), settings, backoff_s=FAST)


def names(folder: Path) -> set[str]:
    """Endings of what is in the folder: all that may be left are shards and the one lock."""
    return {path.name if path.suffix == ".lock" else path.suffix for path in folder.iterdir()}


def use(cache: SpoolCache, shard: StoredShard) -> bytes:
    """Pin, read everything, let go."""
    with cache.pin(shard) as pin:
        return pin.read(0, shard.size)


# --- one shard --------------------------------------------------------------------------------------


@pytest.mark.parametrize("digest", [True, False])
def test_a_shard_is_downloaded_once(web: WebServer, tmp_path: Path, digest: bool) -> None:
    """The second use, also by another cache object, reads the copy; nothing else stays in the folder."""
    shard = put(web, 0, digest=digest)
    assert [content_of(0)] * 3 == [use(cache_in(tmp_path / "c"), shard) for _ in range(3)]
    assert 1 == web.ranges_asked("0.tar").count(None)
    assert {"cache.lock", ".shard"} == names(tmp_path / "c")


def test_the_same_content_elsewhere_is_the_same_copy(web: WebServer, tmp_path: Path) -> None:
    """By its digest; without one, the place is a part of the name."""
    one, cache = put(web, 0), cache_in(tmp_path)
    other = StoredShard(web.put("mirror.tar", content_of(0)), SIZE, one.sha256)
    assert use(cache, one) == use(cache, other)
    assert [] == web.ranges_asked("mirror.tar")
    use(cache, StoredShard(other.location, SIZE, None))
    assert ["bytes=0-0", None] == web.ranges_asked("mirror.tar")


def test_without_a_digest_the_stores_mark_tells_versions_apart(web: WebServer, tmp_path: Path) -> None:
    """The file was replaced by one of the same size: a new process gets the new bytes."""
    shard = put(web, 0, digest=False)
    assert content_of(0) == use(cache_in(tmp_path), shard)
    web.put("0.tar", content_of(1))
    assert content_of(1) == use(cache_in(tmp_path), shard)


def test_parts_of_a_shard(web: WebServer, tmp_path: Path) -> None:
    """By position; behind the end is an error, not fewer bytes."""
    with cache_in(tmp_path).pin(put(web, 0)) as pin:
        assert content_of(0)[7:20] == pin.read(7, 13)
        with pytest.raises(StorageError, match="10 of 20 bytes at offset 990"):
            pin.read(990, 20)


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE + 1])
def test_a_damaged_copy_is_downloaded_again(web: WebServer, tmp_path: Path, size: int) -> None:
    """Somebody cut it, or a disk did."""
    shard, cache = put(web, 0), cache_in(tmp_path)
    use(cache, shard)
    os.truncate(next(tmp_path.glob("*.shard")), size)
    assert not cache.holds(shard)
    assert content_of(0) == use(cache, shard)
    assert cache.holds(shard)


def test_a_copy_can_be_discarded(web: WebServer, tmp_path: Path) -> None:
    """Who finds that its bytes are damaged asks for them again."""
    shard, cache = put(web, 0), cache_in(tmp_path)
    use(cache, shard)
    path = next(tmp_path.glob("*.shard"))
    path.write_bytes(bytes(SIZE))
    assert bytes(SIZE) == use(cache, shard)
    cache.discard(shard)
    cache.discard(shard)
    assert content_of(0) == use(cache, shard)


def test_what_arrives_is_checked(web: WebServer, tmp_path: Path) -> None:
    """Size and digest; a failure leaves nothing, and the next try may do better."""
    shard = put(web, 0, *[servers.corrupted] * 3)
    with pytest.raises(StorageError, match="SHA-256"):
        use(cache_in(tmp_path), shard)
    assert {"cache.lock"} == names(tmp_path)
    with pytest.raises(StorageError, match="it has 1000 bytes instead of 999"):
        use(cache_in(tmp_path), StoredShard(shard.location, 999, None))
    assert content_of(0) == use(cache_in(tmp_path), shard)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """One line with the setting."""
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"storage\.folder .*file/c cannot be used \(Not a directory\)"):
        cache_in(tmp_path / "file" / "c").pin(StoredShard("http://h/a", 1, "0" * 64))


def test_waiting_can_be_stopped(web: WebServer, tmp_path: Path) -> None:
    """In the middle of a download, and while another process downloads."""
    go, stop = threading.Event(), threading.Event()
    shard, cache = put(web, 0, servers.hang(go, 100)), cache_in(tmp_path, settings=Storage(timeout_s=30))
    outcomes: list[type] = []

    def try_it() -> None:
        try:
            cache.pin(shard, stop=stop)
        except Stopped:
            outcomes.append(Stopped)

    threads = [threading.Thread(target=try_it) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    stop.set()
    for thread in threads:
        thread.join(5)
    go.set()
    assert [Stopped, Stopped] == outcomes
    assert {"cache.lock"} >= names(tmp_path)


# --- the limit --------------------------------------------------------------------------------------


def test_the_oldest_use_is_evicted_first(web: WebServer, tmp_path: Path) -> None:
    """Room for three of four; reading one makes it young."""
    shards, cache = [put(web, i) for i in range(4)], cache_in(tmp_path, 3)
    for i in (0, 1, 2, 0, 3):
        use(cache, shards[i])
    assert [True, False, True, True] == [cache.holds(shard) for shard in shards]


def test_pinned_shards_stay(web: WebServer, tmp_path: Path) -> None:
    """However old; when they are let go of, they go."""
    shards, cache = [put(web, i) for i in range(4)], cache_in(tmp_path, 2)
    with cache.pin(shards[0]):
        for shard in shards[1:]:
            use(cache, shard)
        assert [True, False, False, True] == [cache.holds(shard) for shard in shards]
    use(cache, shards[1])
    assert [False, True, False, True] == [cache.holds(shard) for shard in shards]


def test_no_room_is_one_line(web: WebServer, tmp_path: Path) -> None:
    """It names the need, the limit and what is in use."""
    shards, cache = [put(web, i) for i in range(2)], cache_in(tmp_path, 1.5)
    with cache.pin(shards[0]), pytest.raises(Full) as info:
        cache.pin(shards[1])
    assert (
        f"storage.max_gb = 1.5e-06: {shards[1].location} needs 1000 bytes in {tmp_path}, where 1000 of 1500 "
        "are in use; raise storage.max_gb or use fewer processes."
    ) == str(info.value)
    assert content_of(1) == use(cache, shards[1])


def test_a_shard_larger_than_the_limit_is_one_line(web: WebServer, tmp_path: Path) -> None:
    """Said at once: nothing that is evicted could help."""
    with pytest.raises(Full) as info:
        cache_in(tmp_path, 0.5).pin(put(web, 0))
    assert "storage.max_gb = 5e-07: " in str(info.value)
    assert "alone has 1000 bytes; raise storage.max_gb above 1e-06." in str(info.value)
    assert [] == web.asked


def test_room_that_others_will_free_is_waited_for(web: WebServer, tmp_path: Path) -> None:
    """A reader holds a pin for a moment only."""
    shards = [put(web, i) for i in range(2)]
    cache = cache_in(tmp_path, 1, settings=Storage(timeout_s=10))
    pin = cache.pin(shards[0])
    threading.Timer(0.2, pin.close).start()
    assert content_of(1) == use(cache, shards[1])


def test_what_is_fetched_ahead_leaves_half_the_room(web: WebServer, tmp_path: Path) -> None:
    """Two of four; then no more ahead, and at once, while readers still find room."""
    shards, cache = [put(web, i) for i in range(4)], cache_in(tmp_path, 4, settings=Storage(timeout_s=10))
    pins = [cache.pin(shard, ahead=True) for shard in shards[:2]]
    start = time.monotonic()
    with pytest.raises(Full):
        cache.pin(shards[2], ahead=True)
    assert time.monotonic() - start < 5
    assert content_of(3) == use(cache, shards[3])
    for pin in pins:
        pin.close()


def test_downloads_under_way_take_room(web: WebServer, tmp_path: Path) -> None:
    """Two processes may not both fill the last place."""
    go = threading.Event()
    slow, other = put(web, 0, servers.hang(go, 100)), put(web, 1)
    cache = cache_in(tmp_path, 1.5, settings=Storage(timeout_s=20))
    thread = threading.Thread(target=lambda: cache.pin(slow).close())
    thread.start()
    while not web.ranges_asked("0.tar"):
        time.sleep(0.01)
    with pytest.raises(Full, match="where 1000 of 1500 are in use"):
        cache_in(tmp_path, 1.5).pin(other)
    go.set()
    thread.join()
    assert content_of(1) == use(cache_in(tmp_path, 1.5), other)


def test_an_evicted_shard_is_still_whole_for_who_reads_it(web: WebServer, tmp_path: Path) -> None:
    """Even a folder that somebody deletes does not break a reader."""
    shard = put(web, 0)
    with cache_in(tmp_path).pin(shard) as pin:
        for path in tmp_path.iterdir():
            path.unlink()
        assert content_of(0) == pin.read(0, SIZE)
    assert content_of(0) == use(cache_in(tmp_path), shard)


# --- many processes ---------------------------------------------------------------------------------


def spawn(
    folder: Path, shards: list[StoredShard], *, room: float = 100, then: str = ""
) -> subprocess.Popen[str]:
    """A process that uses shards in order and prints the sum of their first bytes."""
    code = f"""
import sys
from pathlib import Path
from ddkmix.config import Storage
from ddkmix.storage.spool import SpoolCache, StoredShard
settings = Storage(attempts=3, timeout_s=30.0)
cache = SpoolCache(Path({str(folder)!r}), {int(room * SIZE)}, settings, backoff_s=0.01)
print("ready", flush=True)
sys.stdin.readline()
total = 0
for location, size, sha256 in {[(s.location, s.size, s.sha256) for s in shards]!r}:
    with cache.pin(StoredShard(location, size, sha256)) as pin:
        total += sum(pin.read(0, size))
        {then or "pass"}
print(total)
"""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Let all go at once; what each printed, after checking that it ended well."""
    for process in processes:
        assert process.stdout is not None
        assert "ready\n" == process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert 0 == process.returncode, err
        outputs.append(out.strip())
    return outputs


def test_four_processes_download_a_shard_once(web: WebServer, tmp_path: Path) -> None:
    """All get it, and the server saw one request."""
    shard = put(web, 0, servers.slow(0.3, pieces=3))
    expected = str(sum(content_of(0)))
    assert [expected] * 4 == finish([spawn(tmp_path, [shard]) for _ in range(4)])
    assert [None] == web.ranges_asked("0.tar")
    assert {"cache.lock", ".shard"} == names(tmp_path)


def test_eviction_never_breaks_a_reader(web: WebServer, tmp_path: Path) -> None:
    """Three processes use six shards in their own orders, with room for two, and are right every time."""
    shards = [put(web, i) for i in range(6)]
    orders = [random.Random(i).choices(shards, k=40) for i in range(3)]
    expected = [str(sum(sum(content_of(shards.index(shard))) for shard in order)) for order in orders]
    assert expected == finish([spawn(tmp_path, order, room=2.5) for order in orders])
    assert len(list(tmp_path.glob("*.shard"))) <= 2
    assert {"cache.lock", ".shard"} == names(tmp_path)


def test_who_is_killed_in_mid_download_leaves_no_trace(web: WebServer, tmp_path: Path) -> None:
    """kill -9: the next process cleans up and downloads the shard, at once."""
    go = threading.Event()
    shard = put(web, 0, servers.hang(go, 500))
    process = spawn(tmp_path, [shard])
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.readline()
    process.stdin.write("go\n")
    process.stdin.flush()
    give_up = time.monotonic() + 30
    while not list(tmp_path.glob(".*.tmp")) and time.monotonic() < give_up:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    left = names(tmp_path)
    assert ".tmp" in left
    go.set()
    assert content_of(0) == use(cache_in(tmp_path, 1), shard)
    assert {"cache.lock", ".shard"} == names(tmp_path)


def test_what_others_left_is_removed_on_the_way(web: WebServer, tmp_path: Path) -> None:
    """Leftovers of a shard that nobody wants any more take no room for ever."""
    (tmp_path / "dead.lock").write_text("1000")
    (tmp_path / "dead.part").write_bytes(bytes(500))
    (tmp_path / ".dead.part.77.tmp").write_bytes(bytes(500))
    assert content_of(0) == use(cache_in(tmp_path, 1), put(web, 0))
    assert {"cache.lock", ".shard"} == names(tmp_path)


def test_pins_of_a_killed_process_vanish(web: WebServer, tmp_path: Path) -> None:
    """And while it lived, they held."""
    mine, its = put(web, 0), put(web, 1)
    process = spawn(tmp_path, [its], room=1, then="print('pinned', flush=True); sys.stdin.readline()")
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.readline()
    process.stdin.write("go\n")
    process.stdin.flush()
    assert "pinned\n" == process.stdout.readline()
    with pytest.raises(Full):
        cache_in(tmp_path, 1).pin(mine)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert content_of(0) == use(cache_in(tmp_path, 1), mine)


# --- bookkeeping ------------------------------------------------------------------------------------


class Books:
    """What a cache must do, beside what it does."""

    def __init__(self, folder: Path, web: WebServer, sizes: list[int], limit: int) -> None:
        self.shards = [put(web, 100 + i, size=size) for i, size in enumerate(sizes)]
        self.cache = SpoolCache(folder, limit, Storage(timeout_s=0.01), backoff_s=FAST)
        self.folder, self.limit = folder, limit
        self.pins: list[tuple[int, Pin]] = []

    def pin(self, i: int, *, keep: bool, ahead: bool) -> None:
        """Use a shard, and keep it or not; refused exactly if what is pinned leaves no room."""
        pinned = {j for j, _ in self.pins}
        used = sum(self.shards[j].size for j in pinned)
        here, size = self.cache.holds(self.shards[i]), self.shards[i].size
        room = self.limit // 2 if ahead else self.limit
        refused = size > self.limit or (not here and used + size > room)
        try:
            pin = self.cache.pin(self.shards[i], ahead=ahead)
        except Full:
            assert refused
            return
        assert not refused
        assert content_of(100 + i, size) == pin.read(0, size)
        if keep:
            self.pins.append((i, pin))
        else:
            pin.close()

    def release(self, i: int) -> None:
        """Let go of the oldest pin."""
        if self.pins:
            self.pins.pop(i % len(self.pins))[1].close()

    def check(self) -> None:
        """Below the limit, and all that is pinned is there."""
        here = sum(path.stat().st_size for path in self.folder.glob("*.shard"))
        assert here <= self.limit
        for i, pin in self.pins:
            assert self.cache.holds(self.shards[i])
            assert content_of(100 + i, self.shards[i].size) == pin.read(0, self.shards[i].size)


@pytest.fixture(scope="module")
def one_web() -> Iterator[WebServer]:
    """One server for all examples."""
    with servers.web_server() as server:
        yield server


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["use", "keep", "ahead", "release"]), st.integers(0, 4)),
    min_size=1,
    max_size=12,
)


def play(
    folder: Path, web: WebServer, sizes: list[int], limit: int, operations: list[tuple[str, int]]
) -> None:
    """Keep the books after each operation."""
    books = Books(folder, web, sizes, limit)
    try:
        for operation, i in operations:
            if operation == "release":
                books.release(i)
            else:
                books.pin(i, keep=operation != "use", ahead=operation == "ahead")
            books.check()
    finally:
        for _, pin in books.pins:
            pin.close()


@hypothesis_settings(deadline=None, max_examples=25, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=5, max_size=5), limit=st.integers(5, 20), operations=OPERATIONS
)
def test_any_sequence_keeps_the_limit_and_the_pins(
    one_web: WebServer,
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    limit: int,
    operations: list[tuple[str, int]],
) -> None:
    """Whatever is used, kept, fetched ahead and let go of, in whatever order."""
    play(tmp_path_factory.mktemp("cache"), one_web, sizes, limit, operations)


@pytest.mark.parametrize("sabotage", ["evicts what is pinned", "evicts nothing"])
def test_the_books_notice_a_broken_cache(
    one_web: WebServer, tmp_path: Path, sabotage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The property above is not empty."""

    def evict_first(self: SpoolCache, size: int, most: int) -> int | None:
        for path in sorted(self.folder.glob("*.shard"))[:1]:
            path.unlink()
        return None

    broken = evict_first if sabotage == "evicts what is pinned" else lambda *_: None
    monkeypatch.setattr(SpoolCache, "_make_room", broken)
    with pytest.raises(AssertionError):
        play(tmp_path, one_web, [5] * 5, 11, [("keep", 0), ("keep", 1), ("use", 2), ("use", 3)])

"""Shards that are here before they are needed."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ddkmix.config import Storage
from ddkmix.errors import StorageError
from ddkmix.storage.prefetch import Prefetcher
from ddkmix.storage.spool import Full, SpoolCache
from tests.storage import servers
from tests.storage.conftest import FAST
from tests.storage.servers import WebServer
from tests.storage.test_spool import SIZE, cache_in, content_of, put, use

PATIENT = Storage(attempts=2, timeout_s=30.0)


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether it becomes true in time."""
    give_up = time.monotonic() + seconds
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def cache(tmp_path: Path) -> SpoolCache:
    """Room for eight shards, so for four ahead."""
    return cache_in(tmp_path / "cache", 8, settings=PATIENT)


@pytest.fixture
def prefetcher(cache: SpoolCache) -> Iterator[Prefetcher]:
    """Closed in the end, whatever it has to say then."""
    prefetcher = Prefetcher(cache)
    yield prefetcher
    if not prefetcher._closed:
        prefetcher.close()


def test_what_is_wanted_comes_in_its_order(web: WebServer, cache: SpoolCache, prefetcher: Prefetcher) -> None:
    """Soonest first, each once, and then reading costs no request."""
    shards = [put(web, i) for i in range(4)]
    order = [shards[i] for i in (2, 0, 3, 1)]
    prefetcher.want([*order, order[0]])
    assert eventually(lambda: all(cache.holds(shard) for shard in shards))
    assert ["2.tar", "0.tar", "3.tar", "1.tar"] == [asked.name for asked in web.asked]
    assert content_of(3) == use(cache, shards[3])
    assert 4 == len(web.asked)


def test_wanting_is_cheap(web: WebServer, prefetcher: Prefetcher, cache: SpoolCache) -> None:
    """It waits for nothing, and the same list again does nothing."""
    go = threading.Event()
    shards = [put(web, 0, servers.hang(go, 10))]
    start = time.monotonic()
    for _ in range(1000):
        prefetcher.want(shards)
    assert time.monotonic() - start < 20
    go.set()
    assert eventually(lambda: cache.holds(shards[0]))
    assert 1 == len(web.asked)


def test_what_is_wanted_is_pinned_until_it_no_longer_is(
    web: WebServer, tmp_path: Path, cache: SpoolCache, prefetcher: Prefetcher
) -> None:
    """Readers of eight other shards cannot evict it; afterwards they can."""
    first, *others = [put(web, i) for i in range(10)]
    prefetcher.want([first])
    assert eventually(lambda: first in prefetcher._pins)
    for shard in others:
        use(cache, shard)
    assert cache.holds(first)
    prefetcher.want([])
    use(cache, others[0])
    use(cache, others[1])
    assert not cache.holds(first)


def test_it_stops_at_half_the_room_and_goes_on_when_there_is_more(
    web: WebServer, cache: SpoolCache, prefetcher: Prefetcher
) -> None:
    """Four of eight; when the first is done with, the fifth comes."""
    shards = [put(web, i) for i in range(6)]
    prefetcher.want(shards)
    assert eventually(lambda: len(prefetcher._pins) == 4)
    time.sleep(0.1)
    assert [True] * 4 + [False] * 2 == [cache.holds(shard) for shard in shards]
    prefetcher.want(shards[1:])
    assert eventually(lambda: cache.holds(shards[4]))
    time.sleep(0.1)
    assert not cache.holds(shards[5])


def test_room_that_another_process_frees_is_found(
    web: WebServer, cache: SpoolCache, prefetcher: Prefetcher
) -> None:
    """Nobody tells it; it looks again by itself."""
    shards = [put(web, i) for i in range(5)]
    pins = [cache.pin(shard) for shard in shards[:4]]
    prefetcher.want(shards[4:])
    time.sleep(0.2)
    assert not cache.holds(shards[4])
    for pin in pins:
        pin.close()
    assert eventually(lambda: cache.holds(shards[4]))


def test_what_is_no_longer_wanted_is_given_up_in_mid_download(
    web: WebServer, cache: SpoolCache, prefetcher: Prefetcher
) -> None:
    """The next one does not wait for it."""
    go = threading.Event()
    slow, other = put(web, 0, servers.hang(go, 10)), put(web, 1)
    prefetcher.want([slow])
    assert eventually(lambda: bool(web.asked))
    prefetcher.want([other])
    assert eventually(lambda: cache.holds(other), 5)
    assert not cache.holds(slow)
    go.set()


def test_an_error_is_raised_in_the_loop_that_wants(
    web: WebServer, cache: SpoolCache, prefetcher: Prefetcher
) -> None:
    """Once; others are fetched all the same, and what failed is tried again afterwards."""
    bad, good = put(web, 0, *[servers.status(403)]), put(web, 1)
    prefetcher.want([bad, good])
    assert eventually(lambda: cache.holds(good))
    with pytest.raises(StorageError, match="access refused"):
        prefetcher.want([bad, good])
    prefetcher.want([bad, good])
    assert eventually(lambda: cache.holds(bad) or prefetcher._errors != {})


def test_an_error_about_what_a_reader_got_anyway_is_dropped(
    web: WebServer, cache: SpoolCache, prefetcher: Prefetcher
) -> None:
    """Its own attempts went better."""
    shard = put(web, 0, servers.status(403))
    prefetcher.want([shard])
    assert eventually(lambda: prefetcher._errors != {})
    assert content_of(0) == use(cache, shard)
    prefetcher.want([shard])
    prefetcher.close()


def test_an_error_about_what_is_no_longer_wanted_is_dropped(web: WebServer, prefetcher: Prefetcher) -> None:
    """The plan has changed."""
    shard = put(web, 0, servers.status(403))
    prefetcher.want([shard])
    assert eventually(lambda: prefetcher._errors != {})
    prefetcher.want([])


def test_closing_raises_what_is_left(web: WebServer, cache: SpoolCache) -> None:
    """An error that nobody has seen yet."""
    prefetcher = Prefetcher(cache)
    prefetcher.want([put(web, 0, servers.status(403))])
    assert eventually(lambda: prefetcher._errors != {})
    with pytest.raises(StorageError, match="access refused"):
        prefetcher.close()


@pytest.mark.parametrize("state", ["idle", "downloading", "backing off", "waiting for room"])
def test_closing_is_prompt(web: WebServer, tmp_path: Path, state: str) -> None:
    """Whatever it is doing; pins are gone and no thread is left."""
    go = threading.Event()
    faults = {"downloading": [servers.hang(go, 10)], "backing off": [servers.status(503)] * 9}.get(state, [])
    backoff = 60.0 if state == "backing off" else FAST
    cache = SpoolCache(tmp_path / "cache", 4 * SIZE, PATIENT, backoff_s=backoff)
    prefetcher = Prefetcher(cache)
    shards = [put(web, i) for i in range(3)] if state == "waiting for room" else [put(web, 0, *faults)]
    prefetcher.want(shards)
    at_rest = 2 if state == "waiting for room" else 1
    assert eventually(lambda: len(web.asked) >= at_rest)
    if state in ("idle", "waiting for room"):
        assert eventually(lambda: len(prefetcher._pins) == at_rest)
    thread = prefetcher._thread
    assert thread is not None
    start = time.monotonic()
    prefetcher.close()
    prefetcher.close()
    assert time.monotonic() - start < 20
    assert not thread.is_alive()
    go.set()
    assert {} == prefetcher._pins
    full = cache_in(tmp_path / "cache", 1)
    assert content_of(9) == use(full, put(web, 9))


def test_a_prefetcher_that_was_never_used_closes(cache: SpoolCache) -> None:
    """No thread was started."""
    Prefetcher(cache).close()


def test_a_shard_too_large_for_the_folder_waits_for_its_reader(web: WebServer, tmp_path: Path) -> None:
    """More than half of the room is nothing to fetch ahead; the reader gets it, or the one clear error."""
    cache = cache_in(tmp_path / "cache", 1.5)
    prefetcher = Prefetcher(cache)
    shard = put(web, 0)
    prefetcher.want([shard])
    time.sleep(0.2)
    prefetcher.want([shard])
    assert content_of(0) == use(cache, shard)
    prefetcher.close()
    with pytest.raises(Full, match="alone has 1000 bytes"):
        cache_in(tmp_path / "cache", 0.5).pin(shard)

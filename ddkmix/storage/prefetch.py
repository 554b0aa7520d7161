"""Shards downloaded before anybody waits for them: the order of the rows is known, so this is exact."""

import threading
from collections.abc import Sequence

from ddkmix.storage.faults import Stopped
from ddkmix.storage.spool import Full, Pin, SpoolCache, StoredShard

_MOST_PINS = 256
"""Each pin is an open file."""
_FULL_WAIT_S = 0.5
_JOIN_S = 5.0


class Prefetcher:
    """Downloads what will be needed soon, in a thread of its own, and keeps it from being evicted.

    It uses at most half of the spool folder and never makes a reader wait for room.
    """

    def __init__(self, cache: SpoolCache) -> None:
        self._cache = cache
        self._changed = threading.Condition()
        self._wanted: tuple[StoredShard, ...] = ()
        self._pins: dict[StoredShard, Pin] = {}
        self._errors: dict[StoredShard, Exception] = {}
        self._current: StoredShard | None = None
        self._stop = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def want(self, shards: Sequence[StoredShard]) -> None:
        """Say which shards will be needed, soonest first. Cheap when nothing has changed.

        Raises:
            StorageError: a shard that is still wanted could not be had, and no reader has got it since.
        """
        wanted = tuple(dict.fromkeys(shards))
        with self._changed:
            assert not self._closed
            if wanted != self._wanted:
                self._change(wanted)
            if self._thread is None and wanted:
                self._thread = threading.Thread(target=self._work, name="ddkmix-prefetch", daemon=True)
                self._thread.start()
            self._raise_error()

    def close(self) -> None:
        """Stop, and let everything be evicted.

        Raises:
            StorageError: as `want` does.
        """
        with self._changed:
            self._closed = True
            self._stop.set()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_JOIN_S)
        with self._changed:
            self._release(self._pins)
            self._raise_error()

    def _change(self, wanted: tuple[StoredShard, ...]) -> None:
        self._wanted = wanted
        self._release([shard for shard in self._pins if shard not in wanted])
        self._errors = {shard: error for shard, error in self._errors.items() if shard in wanted}
        if self._current is not None and self._current not in wanted:
            self._stop.set()
        self._changed.notify_all()

    def _release(self, shards: "Sequence[StoredShard] | dict[StoredShard, Pin]") -> None:
        for shard in list(shards):
            self._pins.pop(shard).close()

    def _raise_error(self) -> None:
        for shard in list(self._errors):
            error = self._errors.pop(shard)
            self._changed.notify_all()  # it may be tried again
            if not self._cache.holds(shard):
                raise error

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and self._next() is None:
                    self._changed.wait()
                if self._closed:
                    return
                self._current, self._stop = self._next(), threading.Event()
                shard, stop = self._current, self._stop
            assert shard is not None
            self._fetch(shard, stop)

    def _next(self) -> StoredShard | None:
        if len(self._pins) >= _MOST_PINS:
            return None
        return next((s for s in self._wanted if s not in self._pins and s not in self._errors), None)

    def _fetch(self, shard: StoredShard, stop: threading.Event) -> None:
        pin, error = None, None
        try:
            pin = self._cache.pin(shard, ahead=True, stop=stop)
        except Stopped:
            pass
        except Full:
            with self._changed:  # until something is let go of: by us, which notifies, or by another process
                if not self._closed:
                    self._changed.wait(_FULL_WAIT_S)
        except Exception as caught:
            error = caught
        with self._changed:
            self._current = None
            if pin is not None and not self._closed and shard in self._wanted:
                self._pins[shard] = pin
            elif pin is not None:
                pin.close()
            if error is not None and shard in self._wanted:
                self._errors[shard] = error

"""Bytes of remote shards for whoever reads rows: ranged reads, or a whole copy on this machine.

In `auto` mode both: rows are there from the first moment by ranges, and from the copy of their shard as soon
as somebody who knows the order of the rows has fetched it (`prefetching`).

A failed read is a `StorageError` and says nothing about the data, so no row is ever taken for damaged because
a network was. Readers hold nothing between calls: no file stays open, no pin stays held by an idle worker.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from ddkmix.config import Storage
from ddkmix.errors import StorageError
from ddkmix.storage.faults import BACKOFF_S
from ddkmix.storage.location import scheme_of, shown, store_of
from ddkmix.storage.remote import read_ranges, stat
from ddkmix.storage.spool import SpoolCache, StoredShard

logger = logging.getLogger(__name__)

Request = tuple[StoredShard, int, int]
"""(shard, offset, length) in bytes."""


class ByteReader:
    """Reads bytes of shards on any store; can be sent to another process, and used after a fork."""

    def __init__(self, settings: Storage, folder: Path, *, backoff_s: float = BACKOFF_S) -> None:
        """`folder` is where spooled shards go (`settings.folder`, resolved)."""
        self._settings, self._backoff_s = settings, backoff_s
        self.cache = SpoolCache(folder, int(settings.max_gb * 1e9), settings, backoff_s=backoff_s)
        self._spools: dict[str, bool] = {}
        """Store -> whether its shards are spooled."""

    def read(self, requests: Sequence[Request]) -> list[bytes]:
        """The bytes of each request, in order. Ranged reads of one call go out together.

        Raises:
            StorageError: some cannot be had.
        """
        answers: list[bytes] = [b""] * len(requests)
        ranged: list[int] = []
        spooled: dict[StoredShard, list[int]] = {}
        for i, (shard, _, _) in enumerate(requests):
            if self.spools(shard.location) or (self.copies(shard.location) and self.cache.holds(shard)):
                spooled.setdefault(shard, []).append(i)
            else:
                ranged.append(i)
        parts = [(requests[i][0].location, *requests[i][1:]) for i in ranged]
        for i, data in zip(
            ranged, read_ranges(parts, self._settings, backoff_s=self._backoff_s), strict=True
        ):
            answers[i] = data
        for shard, indices in spooled.items():
            # one pin at a time: who holds none while waiting blocks nobody
            with self.cache.pin(shard) as pin:
                for i in indices:
                    answers[i] = pin.read(*requests[i][1:])
        return answers

    def spools(self, location: str) -> bool:
        """Whether shards of a location's store are copied here whole. Asks the store once, if it must.

        Raises:
            StorageError: `storage.mode` is "ranged" and the store cannot do that, or it cannot be asked.
        """
        store = store_of(location)
        if store not in self._spools:
            self._spools[store] = self._decide(location)
        return self._spools[store]

    def copies(self, location: str) -> bool:
        """Whether shards are worth fetching ahead: always but in `ranged` mode."""
        return self._settings.mode != "ranged"

    def _decide(self, location: str) -> bool:
        mode = self._settings.mode
        if mode == "spool":
            return True
        if mode == "auto" and scheme_of(location) == "hf":
            return True  # the Hub counts requests, and every row would be one or two
        can = (
            scheme_of(location) != "pipe" and stat(location, self._settings, backoff_s=self._backoff_s).ranges
        )
        if mode == "ranged" and not can:
            raise StorageError(
                f"storage.mode = 'ranged', but the store of {shown(location)} has no ranged reads; set "
                "storage.mode=spool or auto."
            )
        logger.info("%s: %s", store_of(location), "has ranged reads" if can else "shards are spooled")
        return not can

    def close(self) -> None:
        """Nothing stays open between calls; connections belong to the process and close with it."""

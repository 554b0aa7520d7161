"""Which remote shards a stream will need next, kept ahead of its readers.

The order of the rows is known, so this is no guess: of each domain that has weight, the shards from its next
row to the end of the block after it, soonest first, one of each domain at a time.
"""

from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, zip_longest

from ddkmix.errors import StorageError
from ddkmix.index import DomainRows
from ddkmix.order import shards_from
from ddkmix.storage.location import is_remote
from ddkmix.storage.prefetch import Prefetcher
from ddkmix.storage.reader import ByteReader
from ddkmix.storage.spool import StoredShard
from ddkmix.stream import Stream

_LOOKS_PER_BLOCK = 16
"""How often the list of a domain is made anew while a block of it is served."""


class ShardPrefetch:
    """Follows a stream with downloads; does nothing for local shards and in `ranged` mode."""

    def __init__(self, stream: Stream[DomainRows], reader: ByteReader) -> None:
        self._stream, self._reader = stream, reader
        self._domains: list[int] | None = None
        self._prefetcher: Prefetcher | None = None
        self._seen: tuple[object, ...] = ()

    def follow(self, served: Sequence[int], weights: Sequence[int]) -> None:
        """Say how far each domain has been planned, and which still have weight.

        Raises:
            StorageError: a shard that is needed soon cannot be had.
        """
        if self._domains is None:
            self._domains = [i for i, rows in enumerate(self._stream.rows) if self._is_copied(rows)]
        if not self._domains:
            return
        self._prefetcher = self._prefetcher or Prefetcher(self._reader.cache)
        wanted = [i for i in self._domains if weights[i]]
        look = max(self._stream.orders[0].block_rows // _LOOKS_PER_BLOCK, 1)
        seen = tuple((i, served[i] // look) for i in wanted)
        if seen != self._seen:
            self._seen = seen
            self._shards = self._upcoming(served, wanted)
        self._prefetcher.want(self._shards)

    def _is_copied(self, rows: DomainRows) -> bool:
        location = rows.shards[0].location
        return is_remote(location) and self._reader.copies(location)

    def _upcoming(self, served: Sequence[int], domains: Sequence[int]) -> list[StoredShard]:
        lists = []
        for i in domains:
            upcoming = shards_from(self._stream.orders[i], served[i])
            lists.append([self._stream.rows[i].shards[shard].stored for shard in upcoming])
        return [shard for shard in chain.from_iterable(zip_longest(*lists)) if shard is not None]

    def close(self) -> None:
        """Stop downloading, and let everything be evicted; `follow` begins again."""
        prefetcher, self._prefetcher, self._seen = self._prefetcher, None, ()
        if prefetcher is not None:
            with suppress(StorageError):  # of a shard that nobody waits for any more
                prefetcher.close()

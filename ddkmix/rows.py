"""Read packed rows: many at once, each checked against its checksum.

Local shards are read with positional reads, remote ones through `storage`. A row that is not the one that was
packed is a `RowError` that the caller may answer with a substitute; a store that cannot be reached is a
`StorageError` and never taken for bad data.
"""

import errno
import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from ddkmix.config import Storage
from ddkmix.errors import DataError, RowError
from ddkmix.index import DomainRows
from ddkmix.storage.location import is_remote
from ddkmix.storage.reader import ByteReader, Request


class OpenFiles:
    """Files open for reading, at most `limit` of them, shared by the readers of a process."""

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        self._files: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_limit": self._limit, "_files": OrderedDict()}

    def of(self, path: str) -> int:
        """The descriptor of a file; valid until the next call.

        Raises:
            DataError: it cannot be opened.
        """
        if path in self._files:
            self._files.move_to_end(path)
        else:
            if len(self._files) >= self._limit:
                os.close(self._files.popitem(last=False)[1])
            try:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                if hasattr(os, "posix_fadvise"):  # rows come in random order, and soon all of them
                    os.posix_fadvise(self._files[path], 0, 0, os.POSIX_FADV_WILLNEED)
            except OSError as error:
                raise DataError(f"{path} cannot be opened ({error.strerror}).") from None
        return self._files[path]

    def close(self) -> None:
        """Close every file; `of` opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()


def byte_reader(storage: Storage | None = None) -> ByteReader:
    """How remote shards are read; with the defaults of a config when None."""
    storage = storage or Storage()
    return ByteReader(storage, storage.folder or Path(".cache/ddkmix/shards"))


class RowReader:
    """Reads rows of one `DomainRows`; can be sent to another process."""

    def __init__(
        self, rows: DomainRows, files: OpenFiles | None = None, remote: ByteReader | None = None
    ) -> None:
        """Nothing is opened before the first row is read.

        Args:
            rows: what to read.
            files: open files, shared with other readers.
            remote: how remote shards are read; default settings when None.
        """
        self.rows = rows
        self._files = files or OpenFiles()
        self._locations = [shard.location for shard in rows.shards]
        self.is_remote = bool(rows.shards) and is_remote(rows.shards[0].location)
        self._remote = (remote or byte_reader()) if self.is_remote else None

    def read(self, shard: int, row: int) -> UInt[np.ndarray, " T"]:
        """The `seq_len` tokens of one row, padding included.

        Raises:
            RowError: it is not the row that was packed.
            DataError: see `read_into`.
        """
        tokens = np.empty((1, self.rows.seq_len), dtype=self.rows.dtype)
        failures = self.read_into(tokens, np.array([shard]), np.array([row]))
        if failures:
            raise failures[0]
        return tokens[0]

    def requests(self, shards: Int[np.ndarray, " n"], rows: Int[np.ndarray, " n"]) -> list[Request]:
        """The bytes of some remote rows, as `ByteReader.read` wants them."""
        places = self.rows.places.starts[shards] + rows
        sizes = self.rows.places.num_tokens[places] * np.dtype(self.rows.dtype).itemsize
        offsets = self.rows.places.offsets[places]
        return [
            (shard.stored, offset, size)
            for shard, offset, size in zip(
                (self.rows.shards[i] for i in shards.tolist()), offsets.tolist(), sizes.tolist(), strict=True
            )
        ]

    def read_into(
        self,
        tokens: UInt[np.ndarray, "n T"],
        shards: Int[np.ndarray, " n"],
        rows: Int[np.ndarray, " n"],
        answers: Sequence[bytes] | None = None,
        lengths: Int[np.ndarray, " n"] | None = None,
    ) -> dict[int, RowError]:
        """Fill `tokens` with rows, padding included.

        Args:
            tokens: of the rows' stored type, contiguous.
            shards: shard of each row.
            rows: its number in the shard.
            answers: what the store answered to `requests`, of remote rows; asked for here when None.
            lengths: filled with the tokens of each row, without padding.

        Returns:
            What is wrong with each row (by its place in `tokens`) that is not the one that was packed.

        Raises:
            DataError: a shard cannot be opened or read.
        """
        assert tokens.flags.c_contiguous  # a copy would be filled instead
        if self._remote is not None and answers is None:
            answers = self._remote.read(self.requests(shards, rows))
        index = self.rows.places
        places = index.starts[shards] + rows
        num_tokens = index.num_tokens[places]
        if lengths is not None:
            lengths[:] = num_tokens
        width = tokens.shape[1] * tokens.itemsize
        buffer = tokens.reshape(-1).view(np.uint8).data
        wanted = zip(
            shards.tolist(),
            index.offsets[places].tolist(),
            (num_tokens * tokens.itemsize).tolist(),
            index.crc32[places].tolist(),
            strict=True,
        )
        failures: dict[int, RowError] = {}
        for i, (shard, offset, size, checksum) in enumerate(wanted):
            target = buffer[i * width : i * width + size]
            if answers is None:
                count = self._fill(target, shard, offset)
            else:
                count = len(answers[i])
                target[:count] = answers[i]
                if zlib.crc32(target) != checksum:
                    count = self._ask_again(target, shard, offset)
            if count != size or zlib.crc32(target) != checksum:
                failures[i] = self._failure(shard, int(rows[i]), count)
            if size < width:
                tokens[i, size // tokens.itemsize :] = self.rows.padding_id
        return failures

    def _fill(self, target: memoryview, shard: int, offset: int) -> int:
        """Read as many bytes as `target` holds; fewer at the end of a file or where the disk is damaged."""
        location, done = self._locations[shard], 0
        try:
            done = os.preadv(self._files.of(location), [target], offset)
            while 0 < done < len(target):  # a network file system may give less than asked for
                count = os.preadv(self._files.of(location), [target[done:]], offset + done)
                if not count:
                    break
                done += count
        except OSError as error:
            if error.errno != errno.EIO:
                raise DataError(f"{location} cannot be read ({error.strerror}).") from None
        return done

    def _ask_again(self, target: memoryview, shard: int, offset: int) -> int:
        """Read a remote row once more, not from the same copy: the row itself need not be damaged."""
        assert self._remote is not None
        stored = self.rows.shards[shard].stored
        self._remote.cache.discard(stored)
        data = self._remote.read([(stored, offset, len(target))])[0]
        target[: len(data)] = data
        return len(data)

    def _failure(self, shard: int, row: int, count: int) -> RowError:
        index = self.rows.shards[shard]
        size = int(index.num_tokens[row]) * np.dtype(index.dtype).itemsize
        where = f"at offset {int(index.offsets[row])} of {index.location}"
        what = f"only {count} of {size} bytes can be read" if count < size else f"{size} bytes have changed"
        name = self.rows.name_of(shard, row)
        return RowError(f"{name}: {what} {where} since they were packed; pack the shard again.")

    def close(self) -> None:
        """Close the files."""
        self._files.close()

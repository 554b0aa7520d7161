"""Read packed rows: many at once, each checked against its checksum.

Local shards are read with positional reads, remote ones through `storage`. A row that is not the one that was
packed is a `RowError` that the caller may answer with a substitute; a store that cannot be reached is a
`StorageError` and never taken for bad data.
"""

import errno
import os
import zlib
from collections import OrderedDict
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from ddkmix.errors import DataError, RowError
from ddkmix.index import DomainRows


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
            except OSError as error:
                raise DataError(f"{path} cannot be opened ({error.strerror}).") from None
        return self._files[path]

    def close(self) -> None:
        """Close every file; `of` opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()


class RowReader:
    """Reads rows of one `DomainRows`; can be sent to another process."""

    def __init__(self, rows: DomainRows, files: OpenFiles | None = None) -> None:
        self.rows = rows
        self._files = files or OpenFiles()

    def num_tokens(self, shards: Int[np.ndarray, " n"], rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Tokens without padding of some rows."""
        lengths: Int[np.ndarray, " n"] = self.rows.places.num_tokens[self.rows.places.starts[shards] + rows]
        return lengths

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

    def read_into(
        self, tokens: UInt[np.ndarray, "n T"], shards: Int[np.ndarray, " n"], rows: Int[np.ndarray, " n"]
    ) -> dict[int, RowError]:
        """Fill `tokens` with rows, padding included.

        Args:
            tokens: of the rows' stored type, contiguous.
            shards: shard of each row.
            rows: its number in the shard.

        Returns:
            What is wrong with each row (by its place in `tokens`) that is not the one that was packed.

        Raises:
            DataError: a shard cannot be opened or read.
        """
        assert tokens.flags.c_contiguous  # a copy would be filled instead
        index = self.rows.places
        places = index.starts[shards] + rows
        num_tokens = index.num_tokens[places]
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
            count = self._fill(target, shard, offset)
            if count != size or zlib.crc32(target) != checksum:
                failures[i] = self._failure(shard, int(rows[i]), count)
        short = np.flatnonzero(num_tokens < tokens.shape[1])
        for i in short.tolist():
            tokens[i, num_tokens[i] :] = self.rows.padding_id
        return failures

    def _fill(self, target: memoryview, shard: int, offset: int) -> int:
        """Read as many bytes as `target` holds; fewer at the end of a file or where the disk is damaged."""
        location, done = self.rows.shards[shard].location, 0
        try:
            while done < len(target):  # a network file system may give less than asked for
                count = os.preadv(self._files.of(location), [target[done:]], offset + done)
                if not count:
                    break
                done += count
        except OSError as error:
            if error.errno != errno.EIO:
                raise DataError(f"{location} cannot be read ({error.strerror}).") from None
        return done

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

"""Megatron-Energon's index of a tar, `<shard>.tar.idx`: where each sample's first header lies.

The file is a row of unsigned 64-bit integers, little-endian on every machine that writes it: the offset of
the first header of each sample, and last the offset at which the tar's end mark begins. A sample is
WebDataset's: a run of regular members with one name up to the first dot.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from ddkmix.errors import DataError

_BLOCK_BYTES = 512
_END_MARK_BYTES = 2 * _BLOCK_BYTES


def read_tar_idx(path: Path) -> Int[np.ndarray, " N_plus_1"]:
    """Byte offset of each sample's first header, and of the end of the last sample.

    Raises:
        DataError: the file is no such index.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    if not data or len(data) % 8:
        raise DataError(_explain(path, f"has {len(data)} bytes, no whole number of 8-byte offsets"))
    offsets = np.frombuffer(data, dtype="<u8")
    if (offsets % _BLOCK_BYTES).any() or (offsets >= 1 << 63).any() or (offsets[1:] <= offsets[:-1]).any():
        raise DataError(_explain(path, "has offsets that are not rising multiples of 512"))
    return offsets.astype(np.int64)


class IndexCheck:
    """Holds what a reader finds in a tar against the tar's index, sample by sample.

    Raises:
        DataError: from every method, when the two differ.
    """

    def __init__(self, index: Path, offsets: Int[np.ndarray, " N_plus_1"], name: str) -> None:
        self._index = index
        self._offsets = offsets
        self._name = name
        self._samples = 0

    def sample(self, offset: int) -> None:
        """A sample has been found at this offset."""
        if self._samples + 1 >= len(self._offsets):
            raise DataError(
                _explain(self._index, f"has {self._samples} samples and {self._name} more: it is stale")
            )
        self._hold(offset, f"sample {self._samples}")
        self._samples += 1

    def end(self, offset: int) -> None:
        """The tar's members end at this offset."""
        if self._samples + 1 != len(self._offsets):
            raise DataError(
                _explain(
                    self._index,
                    f"has {len(self._offsets) - 1} samples and {self._name} {self._samples}: it is stale",
                )
            )
        self._hold(offset, "the end")

    def _hold(self, offset: int, what: str) -> None:
        expected = int(self._offsets[self._samples])
        if expected != offset:
            raise DataError(
                _explain(
                    self._index,
                    f"is stale: it has {what} at byte {expected}, {self._name} has it at byte {offset}",
                )
            )


def index_beside(tar: Path, name: str) -> IndexCheck | None:
    """The check against the index beside a plain tar; None when there is none.

    Raises:
        DataError: the index is damaged, or does not fit the size of the tar.
        OSError: it cannot be read.
    """
    path = tar.with_name(f"{tar.name}.idx")
    if tar.suffix != ".tar" or not path.is_file():
        return None
    offsets, size = read_tar_idx(path), tar.stat().st_size
    if offsets[-1] + _END_MARK_BYTES > size:
        raise DataError(
            _explain(path, f"is stale: it ends at byte {offsets[-1]}, {name} has {size} bytes in all")
        )
    return IndexCheck(path, offsets, name)


def _explain(path: Path, what: str) -> str:
    return f"{path} {what}. Copy the shard again, or prepare it again (energon prepare), or delete the index."

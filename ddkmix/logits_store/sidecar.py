"""The file of one row shard: one safetensors file, written once, row by row, and memory-mapped.

    8 bytes + JSON, in a fixed room    written last; what the file says of itself is in its `__metadata__`
    records  uint8                     the rows' records, one after the other
    offsets  int64, rows + 1           where each begins, and where the last one ends
    crc32    uint32, rows              of each record

While rows are captured the file is called `.partial`, has no header, and grows by one record at a time; a
`.journal` beside it has the size and checksum of each. A process that is killed leaves both, and the next one
goes on behind the last record that is whole. At the end tables and header are added and the file takes its
name: nothing is copied, and nothing that is not whole ever has that name.

A record is any bytes. What captures or generates them is a `Command`, by whose name messages call it.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

import numpy as np
from jaxtyping import Int, UInt

from ddkmix.errors import DataError, RowError
from ddkmix.index import ShardIndex
from ddkmix.storage import locks

HEADER_BYTES = 4096
"""Room of the header, length included."""
_ENTRY = Struct("<QII")
"""Of the journal: size and checksum of a record, and its row, lest a block of zeros pass for one."""
_ALIGNMENT = 8
_TYPES = {"records": ("U8", 1), "offsets": ("I64", 8), "crc32": ("U32", 4)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """What writes sidecars."""

    verb: str
    """Also the command's name, and that of its section of the config."""
    past: str


CAPTURE = Command(verb="capture", past="captured")
GENERATE = Command(verb="generate", past="generated")


def sidecar_path(store: Path, domain: str, shard: ShardIndex) -> Path:
    """Where the records of a shard lie: under its name and its content."""
    return store / domain / f"{shard.name}-{shard.sha256[:12]}.logits"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sidecar:
    """An open sidecar."""

    path: Path
    facts: Mapping[str, str]
    """What it says of itself."""
    records: UInt[np.ndarray, " bytes"]
    """Memory-mapped."""
    offsets: Int[np.ndarray, " ends"]
    crc32: UInt[np.ndarray, " R"]

    @property
    def num_rows(self) -> int:
        """Rows that it has records of."""
        return len(self.crc32)

    def record(self, row: int) -> memoryview:
        """The bytes of a row's record.

        Raises:
            RowError: they have changed since they were written.
        """
        data = self.records[self.offsets[row] : self.offsets[row + 1]].data
        if zlib.crc32(data) != self.crc32[row]:
            raise RowError(
                f"{len(data)} bytes at offset {HEADER_BYTES + int(self.offsets[row])} have changed"
            )
        return data


def open_sidecar(path: Path, command: Command = CAPTURE) -> Sidecar:
    """Map a sidecar into memory; only its header and tables are read.

    Raises:
        DataError: it is missing, cut or not a sidecar; `FileNotFoundError` is its cause if it is missing.
    """
    try:
        size = path.stat().st_size
        if size < HEADER_BYTES:
            raise ValueError(f"{size} bytes")
        data = np.memmap(path, dtype=np.uint8, mode="r")
        facts, places = _read_header(data[:HEADER_BYTES].tobytes(), size)
        tables = {name: data[start:end] for name, (start, end) in places.items()}
        offsets, crc32 = tables["offsets"].view("<i8").copy(), tables["crc32"].view("<u4").copy()
        whole = len(offsets) == len(crc32) + 1 and offsets[0] == 0 and bool((np.diff(offsets) >= 0).all())
        if not whole or offsets[-1] > len(tables["records"]):
            raise ValueError("its tables do not fit")
    except FileNotFoundError as error:
        verb = command.verb
        raise DataError(f"{path} is missing; {verb} it with `ddkmix {verb} CONFIG`.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(
            f"{path} is not a whole sidecar ({reason}); it was cut or changed. Delete it and {command.verb} "
            "again."
        ) from None
    return Sidecar(path=path, facts=facts, records=tables["records"], offsets=offsets, crc32=crc32)


def sidecar_of(path: Path, shard: ShardIndex, command: Command = CAPTURE) -> Sidecar:
    """The sidecar of a shard, which has one record for each of its rows.

    Raises:
        DataError: it is missing, damaged, or of another shard.
    """
    found = open_sidecar(path, command)
    content = found.facts.get("shard", "?")
    if content != shard.sha256 or found.num_rows != shard.num_rows:
        raise DataError(
            f"{path} has {found.num_rows} rows of the shard {content[:12]}; the run has {shard.num_rows} of "
            f"{shard.sha256[:12]}. Delete it and {command.verb} again."
        )
    return found


def _read_header(data: bytes, size: int) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Facts, and where each tensor begins and ends in the file."""
    length = int.from_bytes(data[:8], "little")
    if length != HEADER_BYTES - 8:
        raise ValueError("no header")
    tree = json.loads(data[8:])
    facts = {str(name): str(value) for name, value in tree["__metadata__"].items()}
    places, at = {}, 0
    for name, (dtype, item) in _TYPES.items():
        start, end = tree[name]["data_offsets"]
        if tree[name]["dtype"] != dtype or start != at or (end - start) % item:
            raise ValueError(f"header of {name}")
        places[name] = (HEADER_BYTES + start, HEADER_BYTES + end)
        at = end
    if size != HEADER_BYTES + at:
        raise ValueError(f"{size} bytes where {HEADER_BYTES + at} are needed")
    return facts, places


@dataclass(frozen=True, slots=True)
class _Entry:
    size: int
    crc32: int

    def pack(self, row: int) -> bytes:
        return _ENTRY.pack(self.size, self.crc32, row + 1)


class SidecarWriter:
    """Writes one sidecar, or goes on with it; nobody else does at the same time."""

    def __init__(self, path: Path, command: Command = CAPTURE) -> None:
        """Take the shard; whole rows that a killed process left are kept.

        Args:
            path: of the sidecar.
            command: what messages call the writing.

        Raises:
            DataError: the folder cannot be written, or another process is writing this sidecar.
        """
        self.path, self._command = path, command
        self._partial = path.with_name(path.name + ".partial")
        self._journal = path.with_name(path.name + ".journal")
        self._record_file = self._journal_file = -1
        with self._named_when_full():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.touch()
            lock = locks.exclusive_if_free(self._partial)
        if lock is None:
            raise DataError(f"{path} is being {command.past} by another process; wait for it, or stop it.")
        self._lock = lock
        try:
            with self._named_when_full():
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._record_file = os.open(self._partial, flags)
        self._journal_file = os.open(self._journal, flags, 0o666)
        self._entries = self._whole_entries()
        os.ftruncate(self._journal_file, len(self._entries) * _ENTRY.size)
        os.lseek(self._journal_file, 0, os.SEEK_END)
        end = HEADER_BYTES + sum(entry.size for entry in self._entries)
        os.ftruncate(self._record_file, end)  # also makes the header's room
        os.lseek(self._record_file, end, os.SEEK_SET)

    def _whole_entries(self) -> list[_Entry]:
        """What the journal lists and the file has, up to the first difference."""
        size = os.fstat(self._journal_file).st_size // _ENTRY.size * _ENTRY.size
        available = os.fstat(self._record_file).st_size
        at = HEADER_BYTES
        whole: list[_Entry] = []
        for length, crc32, number in _ENTRY.iter_unpack(os.pread(self._journal_file, size, 0)):
            if number != len(whole) + 1 or at + length > available:
                break
            if zlib.crc32(os.pread(self._record_file, length, at)) != crc32:
                break
            whole.append(_Entry(length, crc32))
            at += length
        return whole

    @property
    def num_rows(self) -> int:
        """Rows whose records are there."""
        return len(self._entries)

    def records(self) -> Iterator[bytes]:
        """The records that are there, from the first row on."""
        at = HEADER_BYTES
        for entry in list(self._entries):
            yield os.pread(self._record_file, entry.size, at)
            at += entry.size

    def append(self, record: bytes) -> None:
        """Add the next row's record; it survives the process when this returns.

        Raises:
            DataError: it cannot be written.
        """
        entry = _Entry(len(record), zlib.crc32(record))
        with self._named_when_full():
            _write(self._record_file, record)
            _write(
                self._journal_file, entry.pack(len(self._entries))
            )  # after the record: what is listed is there
        self._entries.append(entry)

    def finish(self, facts: Mapping[str, str]) -> None:
        """Add tables and header, and give the file its name.

        Args:
            facts: what the file says of itself.

        Raises:
            DataError: it cannot be written.
        """
        sizes = [entry.size for entry in self._entries]
        offsets = np.cumsum([0, *sizes], dtype="<i8")
        crc32 = np.array([entry.crc32 for entry in self._entries], dtype="<u4")
        length = -(-int(offsets[-1]) // _ALIGNMENT) * _ALIGNMENT
        header = _header(length, len(sizes), facts)
        with self._named_when_full():
            _write(self._record_file, bytes(length - int(offsets[-1])) + offsets.tobytes() + crc32.tobytes())
            os.pwrite(self._record_file, header, 0)
            os.fsync(self._record_file)
            self._partial.replace(self.path)
            self._journal.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the shard back, finished or not."""
        for file in (self._record_file, self._journal_file):
            if file >= 0:
                os.close(file)
        self._record_file = self._journal_file = -1
        self._lock.close()

    def __enter__(self) -> "SidecarWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _named_when_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            verb, past = self._command.verb, self._command.past
            raise DataError(
                f"{self.path} cannot be written ({error.strerror}); free space or set {verb}.folder. What is "
                f"{past} stays, and the same command goes on from there."
            ) from None


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _header(records: int, rows: int, facts: Mapping[str, str]) -> bytes:
    sizes = {"records": records, "offsets": 8 * (rows + 1), "crc32": 4 * rows}
    tree: dict[str, object] = {"__metadata__": dict(facts)}
    at = 0
    for name, (dtype, item) in _TYPES.items():
        end = at + sizes[name]
        tree[name] = {"dtype": dtype, "shape": [sizes[name] // item], "data_offsets": [at, end]}
        at = end
    text = json.dumps(tree, separators=(",", ":")).encode()
    assert len(text) <= HEADER_BYTES - 8  # facts are few and short
    return (HEADER_BYTES - 8).to_bytes(8, "little") + text.ljust(HEADER_BYTES - 8)

"""The file of a shard: whole or not there, resumed row by row, read by any safetensors library."""

import contextlib
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from ddkmix.errors import DataError, RowError
from ddkmix.logits_store.sidecar import GENERATE, HEADER_BYTES, SidecarWriter, open_sidecar
from tests.test_checkpoint import no_file_larger_than

RECORDS = [b"first", b"", b"the third record", b"4"]
FACTS = {"shard": "abc"}


def write(path, records=RECORDS):
    """A whole sidecar."""
    with SidecarWriter(path) as writer:
        for record in records[writer.num_rows :]:
            writer.append(record)
        writer.finish(FACTS)
    return path


def contents(path):
    """All records."""
    sidecar = open_sidecar(path)
    return [bytes(sidecar.record(row)) for row in range(sidecar.num_rows)]


def test_records_come_back(tmp_path):
    """In order, an empty one too, with what the file says of itself; nothing else is left in the folder."""
    path = write(tmp_path / "math" / "a.logits")
    assert RECORDS == contents(path)
    assert FACTS == open_sidecar(path).facts
    assert [path] == list(path.parent.iterdir())


def test_the_safetensors_library_reads_it(tmp_path):
    """Three tensors and their description."""
    with safe_open(write(tmp_path / "a.logits"), framework="numpy") as file:
        assert {"records", "offsets", "crc32"} == set(file.keys())
        assert FACTS == file.metadata()
        offsets, records = file.get_tensor("offsets"), file.get_tensor("records")
        assert [0, 5, 5, 21, 22] == offsets.tolist()
        assert RECORDS[2] == records[5:21].tobytes()
        assert [zlib.crc32(record) for record in RECORDS] == file.get_tensor("crc32").tolist()


def test_a_shard_without_rows_has_a_sidecar(tmp_path):
    """Empty tables."""
    assert [] == contents(write(tmp_path / "a.logits", []))


def flip(path, at):
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def interrupted(path, rows):
    """What a process leaves that was killed after so many rows."""
    with SidecarWriter(path) as writer:
        for record in RECORDS[:rows]:
            writer.append(record)
    return path.with_name(path.name + ".partial"), path.with_name(path.name + ".journal")


@pytest.mark.parametrize("rows", range(5))
def test_a_capture_goes_on_where_it_stopped(tmp_path, rows):
    """The bytes are those of one that was not interrupted; before the end there is no file of that name."""
    whole = write(tmp_path / "whole.logits")
    path = tmp_path / "a.logits"
    interrupted(path, rows)
    assert not path.exists()
    with SidecarWriter(path) as writer:
        assert rows == writer.num_rows
        assert RECORDS[:rows] == list(writer.records())
    assert whole.read_bytes() == write(path).read_bytes()


@pytest.mark.parametrize(
    ("damage", "rows"),
    [
        (lambda partial, journal: os.truncate(partial, HEADER_BYTES + 7), 2),
        (lambda partial, journal: os.truncate(journal, 16 * 2 + 9), 2),
        (lambda partial, journal: flip(partial, HEADER_BYTES), 0),
        (lambda partial, journal: partial.unlink(), 0),
        (lambda partial, journal: journal.unlink(), 0),
        (lambda partial, journal: partial.write_bytes(partial.read_bytes() + b"without an entry"), 3),
        (lambda partial, journal: journal.write_bytes(bytes(48)), 0),
    ],
    ids=["cut", "entry cut", "changed", "no records", "no journal", "not listed", "zeros"],
)
def test_only_rows_that_are_whole_are_kept(tmp_path, damage, rows):
    """After a power failure any part of either file may be missing; the rest is captured again."""
    path = tmp_path / "a.logits"
    damage(*interrupted(path, 3))
    with SidecarWriter(path) as writer:
        assert rows == writer.num_rows
    assert RECORDS == contents(write(path))
    assert [path] == list(tmp_path.iterdir())


def test_two_processes_do_not_write_one_shard(tmp_path):
    """The second is told; when the first is gone, however it went, the shard is free."""
    path = tmp_path / "a.logits"
    code = (
        "import sys; from pathlib import Path; from ddkmix.logits_store.sidecar import SidecarWriter\n"
        "writer = SidecarWriter(Path(sys.argv[1])); writer.append(b'first'); print('ready', flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(DataError, match="is being captured by another process"):
            SidecarWriter(path)
        process.kill()
    assert RECORDS == contents(write(path))


def test_a_full_disk_is_one_line_and_leaves_what_was_captured(tmp_path):
    """Rows before it stay; with space again the file is that of a capture that had it all along."""
    path = tmp_path / "a.logits"
    large = [bytes([i]) * 5000 for i in range(4)]
    with no_file_larger_than(HEADER_BYTES + 12_000), pytest.raises(DataError, match=r"free space.*goes on"):
        write(path, large)
    assert not path.exists()
    with SidecarWriter(path) as writer:
        assert 2 == writer.num_rows
    assert large == contents(write(path, large))


def test_a_disk_that_is_full_for_the_tables_leaves_no_sidecar(tmp_path):
    """The last bytes count as much as the first."""
    path = tmp_path / "a.logits"
    records = [b"x" * 1000] * 3
    with no_file_larger_than(HEADER_BYTES + 3004), pytest.raises(DataError, match="cannot be written"):
        write(path, records)
    assert not path.exists()
    assert records == contents(write(path, records))


def test_a_changed_record_is_found_when_it_is_read_and_others_are_served(tmp_path):
    """By its checksum."""
    path = write(tmp_path / "a.logits")
    flip(path, HEADER_BYTES + 6)
    sidecar = open_sidecar(path)
    assert RECORDS[0] == bytes(sidecar.record(0))
    with pytest.raises(RowError, match=f"16 bytes at offset {HEADER_BYTES + 5} have changed"):
        sidecar.record(2)


@pytest.mark.parametrize("size", [0, 5, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 30])
def test_a_file_that_was_cut_is_refused_when_it_is_opened(tmp_path, size):
    """Wherever it was cut, in one line with the way out."""
    path = write(tmp_path / "a.logits")
    os.truncate(path, size)
    with pytest.raises(DataError, match=r"is not a whole sidecar .*Delete it and capture again"):
        open_sidecar(path)


def test_any_changed_byte_of_header_or_tables_is_refused_or_changes_no_record(tmp_path):
    """Flipping each of them in turn: an error, or (in the facts) the same records."""
    path = write(tmp_path / "a.logits")
    good = path.read_bytes()
    length = len(good.rstrip())
    header = len(good[:HEADER_BYTES].rstrip())
    for at in [*range(header), *range(HEADER_BYTES + 24, length)]:
        flip(path, at)
        with contextlib.suppress(DataError):
            assert RECORDS == contents(path), at
        path.write_bytes(good)


def test_a_missing_file_is_named(tmp_path):
    """With the command that makes it."""
    with pytest.raises(DataError, match=r"a\.logits is missing; capture it with `ddkmix capture CONFIG`"):
        open_sidecar(tmp_path / "a.logits")


def test_records_are_mapped_not_read(tmp_path):
    """Opening a file costs its header and tables, whatever its size."""
    sidecar = open_sidecar(write(tmp_path / "a.logits"))
    assert isinstance(sidecar.records.base, np.memmap) or isinstance(sidecar.records, np.memmap)
    assert isinstance(sidecar.path, Path)


def test_messages_speak_of_the_command_that_writes(tmp_path):
    """Of files that `generate` makes: its name, its section of the config, its suffix."""
    path = tmp_path / "a.responses"
    with pytest.raises(DataError, match="is missing; generate it with `ddkmix generate CONFIG`"):
        open_sidecar(path, GENERATE)
    path.write_bytes(b"cut")
    with pytest.raises(DataError, match="Delete it and generate again"):
        open_sidecar(path, GENERATE)
    with SidecarWriter(path, GENERATE) as writer:
        with pytest.raises(DataError, match="is being generated by another process"):
            SidecarWriter(path, GENERATE)
        with (
            no_file_larger_than(HEADER_BYTES + 10),
            pytest.raises(DataError, match=r"set generate\.folder. What is generated stays"),
        ):
            writer.append(b"a" * 100)

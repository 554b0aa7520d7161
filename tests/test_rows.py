"""Reading packed rows: into a buffer, past damage, through few descriptors."""

import errno
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.domains import load_domains
from ddkmix.errors import DataError, RowError
from ddkmix.index import DomainRows
from ddkmix.pack import pack_domains
from ddkmix.rows import OpenFiles, RowReader
from ddkmix.tokenizer import read_tokenizer
from tests.conftest import write_domain
from tests.hand_made import damage, numbered_rows, write_rows

SEQ_LEN, PADDING = 6, 7
TOKENS = [[[1, 2, 3, 4, 5, 6], [10, 11], [20]], [[30, 31, 32, 33], [40, 41, 42, 43, 44, 45]]]
"""Rows of a domain of two shards."""
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")


@pytest.fixture
def rows(tmp_path: Path) -> DomainRows:
    """The rows above, in files that a test may damage."""
    return write_rows(tmp_path, "code", TOKENS, seq_len=SEQ_LEN, padding=PADDING)


def padded(row: list[int]) -> list[int]:
    """A row with its padding."""
    return row + [PADDING] * (SEQ_LEN - len(row))


def read_all(
    reader: RowReader, places: list[tuple[int, int]], dtype: str = "<u2"
) -> tuple[list[list[int]], dict[int, RowError]]:
    """Some rows with one call, into a buffer full of rubbish, and what was wrong with them."""
    tokens = np.full((len(places), reader.rows.seq_len), 0xABAB, dtype=dtype)
    pairs = np.array(places, dtype=np.int64).reshape(-1, 2)
    failures = reader.read_into(tokens, pairs[:, 0], pairs[:, 1])
    return tokens.tolist(), failures


# --- whole rows -------------------------------------------------------------------------------------


def test_packed_rows_are_what_numpy_reads_from_the_tar(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Each row, in any order, is the array of its member."""
    write_domain(tmp_path, "code", shards=2, per_shard=2)
    packed = pack_domains(
        load_domains([str(tmp_path)]),
        read_tokenizer(str(tokenizer_folder)),
        seq_len=16,
        cache_dir=tmp_path / "cache",
        processes=1,
    )["code"].train
    reader = RowReader(packed)
    for shard in (1, 0):
        with tarfile.open(packed.shards[shard].location) as tar:
            expected = [np.load(io.BytesIO(tar.extractfile(member).read())).tolist() for member in tar]
        order = [*range(0, len(expected), 2), *range(1, len(expected), 2)]
        assert [expected[row] for row in order] == [reader.read(shard, row).tolist() for row in order]


def test_many_rows_are_read_into_a_buffer(rows: DomainRows) -> None:
    """In the order asked for, repeats included, padding written by the reader."""
    places = [(1, 1), (0, 1), (0, 0), (0, 1), (1, 0), (0, 2)]
    tokens, failures = read_all(RowReader(rows), places)
    assert [padded(TOKENS[shard][row]) for shard, row in places] == tokens
    assert {} == failures


def test_no_rows_are_read(rows: DomainRows) -> None:
    """An empty buffer stays empty."""
    assert ([], {}) == read_all(RowReader(rows), [])


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    shards=st.lists(
        st.lists(st.lists(st.integers(0, 60000), max_size=SEQ_LEN), max_size=4), min_size=1, max_size=4
    ),
    dtype=st.sampled_from(["<u2", "<u4"]),
    data=st.data(),
)
def test_any_rows_come_back(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[list[int]]], dtype: str, data: st.DataObject
) -> None:
    """Rows of any length (none at all, too), shards without rows, both token types."""
    places = [(shard, row) for shard, rows in enumerate(shards) for row in range(len(rows))]
    chosen = data.draw(st.lists(st.sampled_from(places), max_size=10)) if places else []
    rows = write_rows(
        tmp_path_factory.mktemp("r"), "code", shards, seq_len=SEQ_LEN, dtype=dtype, padding=PADDING
    )
    reader = RowReader(rows)
    assert ([padded(shards[shard][row]) for shard, row in chosen], {}) == read_all(reader, chosen, dtype)
    pairs = np.array(chosen, dtype=np.int64).reshape(-1, 2)
    lengths = [len(shards[shard][row]) for shard, row in chosen]
    found = np.zeros(len(pairs), dtype=np.int64)
    reader.read_into(np.empty((len(pairs), SEQ_LEN), dtype=dtype), pairs[:, 0], pairs[:, 1], lengths=found)
    assert lengths == found.tolist()


def test_a_buffer_with_gaps_is_our_own_mistake(rows: DomainRows) -> None:
    """numpy would fill a copy of it and leave the buffer as it was."""
    wide = np.zeros((2, 2 * SEQ_LEN), dtype="<u2")
    with pytest.raises(AssertionError):
        RowReader(rows).read_into(wide[:, :SEQ_LEN], np.array([0, 0]), np.array([0, 1]))


def test_reads_that_give_less_than_asked_for_go_on(rows: DomainRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may; the row is whole and nothing is called damaged."""
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: whole(fd, [buffers[0][:5]], at))
    assert ([padded(TOKENS[0][0]), padded(TOKENS[1][0])], {}) == read_all(RowReader(rows), [(0, 0), (1, 0)])


# --- damage -----------------------------------------------------------------------------------------


def test_every_flipped_byte_of_the_text_is_noticed(rows: DomainRows) -> None:
    """Each of the 8 bytes of a row of four tokens; the other rows of the call are read as ever."""
    for byte in range(8):
        damage(rows, 1, 0, byte=byte, flip=1 << byte)
        tokens, failures = read_all(RowReader(rows), [(0, 1), (1, 0), (1, 1)])
        assert [1] == list(failures)
        assert [padded(TOKENS[0][1]), padded(TOKENS[1][1])] == [tokens[0], tokens[2]]
        damage(rows, 1, 0, byte=byte, flip=1 << byte)
    assert {} == read_all(RowReader(rows), [(1, 0)])[1]


def test_damage_in_the_padding_is_no_damage(rows: DomainRows) -> None:
    """Padding is written by the reader, so what lies there on disk does not matter."""
    for byte in range(8, 12):
        damage(rows, 1, 0, byte=byte)
    assert ([padded(TOKENS[1][0])], {}) == read_all(RowReader(rows), [(1, 0)])


def test_the_message_names_the_row_and_its_place(rows: DomainRows) -> None:
    """In one line; the same from `read` and from `read_into`."""
    damage(rows, 1, 1, byte=3)
    with pytest.raises(RowError) as info:
        RowReader(rows).read(1, 1)
    assert (
        f"code/1.tar#1: 12 bytes have changed at offset 12 of {rows.shards[1].location} since they were "
        "packed; pack the shard again."
    ) == str(info.value)
    assert str(info.value) == str(read_all(RowReader(rows), [(0, 0), (1, 1)])[1][1])


def test_rows_that_swapped_places_are_noticed(tmp_path: Path) -> None:
    """Each is whole and of the right length, and still not the row that was packed."""
    rows = numbered_rows(tmp_path, "code", 4, length=3, seq_len=3)
    path = Path(rows.shards[0].location)
    content = path.read_bytes()
    path.write_bytes(content[6:12] + content[:6] + content[12:])
    assert [0, 1] == list(read_all(RowReader(rows), [(0, i) for i in range(4)])[1])


@pytest.mark.parametrize("size", [36, 28, 27, 24, 23, 12, 11, 1, 0])
def test_a_shard_that_was_cut(tmp_path: Path, size: int) -> None:
    """Rows before the cut are read, also where it goes through padding; the others say what is left."""
    lengths = [6, 6, 2]
    rows = write_rows(
        tmp_path, "code", [[[row + 1] * length for row, length in enumerate(lengths)]], seq_len=6
    )
    os.truncate(rows.shards[0].location, size)
    failures = read_all(RowReader(rows), [(0, 0), (0, 1), (0, 2)])[1]
    left = [min(max(size - 12 * row, 0), 2 * length) for row, length in enumerate(lengths)]
    assert [row for row in range(3) if left[row] < 2 * lengths[row]] == list(failures)
    for row, failure in failures.items():
        expected = f"only {left[row]} of {2 * lengths[row]} bytes can be read at offset {12 * row} of"
        assert expected in str(failure)


def test_a_shard_cut_while_in_use_is_noticed(rows: DomainRows) -> None:
    """Its file is open already."""
    reader = RowReader(rows)
    assert TOKENS[0][0] == reader.read(0, 0).tolist()
    os.truncate(rows.shards[0].location, 13)
    assert TOKENS[0][0] == reader.read(0, 0).tolist()
    with pytest.raises(RowError, match=r"code/0\.tar#1: only 1 of 4 bytes can be read at offset 12 of "):
        reader.read(0, 1)


def test_a_disk_that_cannot_read_a_place_loses_that_row(
    rows: DomainRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO is damage of single rows, as a bad sector gives it."""
    whole = os.preadv

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == 12:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    tokens, failures = read_all(RowReader(rows), [(0, 0), (0, 1)])
    assert TOKENS[0][0] == tokens[0]
    assert [1] == list(failures)
    assert "only 0 of 4 bytes can be read" in str(failures[1])


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES])
def test_other_errors_are_not_taken_for_bad_data(
    rows: DomainRows, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A store that refuses says nothing about its rows: no substitute, one line."""

    def failing(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(DataError) as info:
        RowReader(rows).read(0, 0)
    assert not isinstance(info.value, RowError)
    assert f"{rows.shards[0].location} cannot be read ({os.strerror(number)})." == str(info.value)


def test_a_shard_that_vanished_is_named(rows: DomainRows) -> None:
    """It is opened when its first row is read, and its rows have no substitutes."""
    reader = RowReader(rows)
    Path(rows.shards[0].location).unlink()
    assert TOKENS[1][1] == reader.read(1, 1).tolist()
    with pytest.raises(DataError, match=r"0\.tar cannot be opened \(No such file or directory\)\.") as info:
        reader.read(0, 0)
    assert not isinstance(info.value, RowError)


# --- files ------------------------------------------------------------------------------------------


def open_files() -> int:
    """Files that this process holds open."""
    return len(list(Path("/proc/self/fd").iterdir()))


@needs_proc
def test_few_files_are_open_at_once(tmp_path: Path) -> None:
    """200 shards through 8 descriptors, which come back when the reader goes; every row is right."""
    rows = numbered_rows(tmp_path, "code", 200, length=2, seq_len=2, per_shard=1)
    reader, before = RowReader(rows, OpenFiles(limit=8)), open_files()
    for shard in [*range(200), *range(0, 200, 7)]:
        assert [shard + 1] * 2 == reader.read(shard, 0).tolist()
        assert open_files() <= before + 8
    assert before + 8 == open_files()
    del reader
    assert before == open_files()


@needs_proc
def test_readers_share_one_limit(tmp_path: Path) -> None:
    """Many domains do not need many times as many descriptors."""
    files, before = OpenFiles(limit=3), open_files()
    readers = [
        RowReader(numbered_rows(tmp_path, name, 4, length=1, seq_len=2, per_shard=1, first=10 * i), files)
        for i, name in enumerate(("code", "math", "prose"))
    ]
    for shard in (0, 1, 2, 3, 0):
        for i, reader in enumerate(readers):
            assert [10 * i + shard, 0] == reader.read(shard, 0).tolist()
            assert open_files() <= before + 3
    readers[0].close()
    assert before == open_files()


def test_the_file_used_last_stays_open(tmp_path: Path) -> None:
    """With room for two: a, b, a, c closes b."""
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(b"x")
    files = OpenFiles(limit=2)
    first, second = files.of(str(paths[0])), files.of(str(paths[1]))
    assert first == files.of(str(paths[0]))
    assert second == files.of(str(paths[2]))  # the descriptor that was closed is the next to be given
    assert first == files.of(str(paths[0]))


def test_a_closed_reader_opens_again(rows: DomainRows) -> None:
    """Closing, also twice, is about files and not about the reader."""
    reader = RowReader(rows)
    assert TOKENS[0][0] == reader.read(0, 0).tolist()
    reader.close()
    reader.close()
    assert TOKENS[0][0] == reader.read(0, 0).tolist()


@needs_proc
def test_a_reader_travels_without_its_files(rows: DomainRows) -> None:
    """Descriptors mean nothing in another process, so a copy opens its own."""
    reader, before = RowReader(rows, OpenFiles(limit=5)), open_files()
    assert TOKENS[1][1] == reader.read(1, 1).tolist()
    copy = pickle.loads(pickle.dumps(reader))
    assert before + 1 == open_files()
    reader.close()
    assert TOKENS[1][1] == copy.read(1, 1).tolist()
    assert before + 1 == open_files()
    del copy
    assert before == open_files()

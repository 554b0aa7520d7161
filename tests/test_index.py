"""The index of a packed shard, and reading one row."""

import errno
import io
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.domains import load_domains
from ddkmix.errors import DataError
from ddkmix.index import DomainRows, RowReader, ShardIndex, index_path, read_index, write_index
from ddkmix.pack import pack_domains
from ddkmix.tokenizer import read_tokenizer
from tests.conftest import write_domain

SEQ_LEN = 16


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> DomainRows:
    """The train rows of a domain of two shards."""
    folder = tmp_path_factory.mktemp("packed")
    write_domain(folder, "code", shards=2, per_shard=2)
    domains = load_domains([str(folder)])
    tokenizer = read_tokenizer(str(tokenizer_folder))
    return pack_domains(domains, tokenizer, seq_len=SEQ_LEN, cache_dir=folder / "cache", processes=1)[
        "code"
    ].train


@pytest.fixture
def shard(packed: DomainRows, tmp_path: Path) -> ShardIndex:
    """The first shard, in a copy that a test may damage."""
    path = tmp_path / "train-000000.tar"
    for source, target in (
        (Path(packed.shards[0].location), path),
        (index_path(Path(packed.shards[0].location)), index_path(path)),
    ):
        target.write_bytes(source.read_bytes())
    return read_index(path)


def rows_of(*shards: ShardIndex) -> DomainRows:
    """Rows of a domain called code."""
    return DomainRows(domain="code", shards=shards, fingerprint="f")


def check_same(expected: ShardIndex, actual: ShardIndex) -> None:
    """Two indices say the same."""
    for field in ("path", "seq_len", "dtype", "report"):
        assert getattr(expected, field) == getattr(actual, field)
    for field in ("offsets", "num_tokens", "num_bytes"):
        assert getattr(expected, field).tolist() == getattr(actual, field).tolist()


# --- the sidecar ------------------------------------------------------------------------------------


def test_the_index_lies_beside_its_shard() -> None:
    """`train-000003.tar` has `train-000003.tar.index.npz`."""
    assert Path("rows/train-000003.tar.index.npz") == index_path(Path("rows/train-000003.tar"))


def test_an_index_survives_the_disk(shard: ShardIndex) -> None:
    """Written and read again it says the same, and no temporary file is left."""
    before = sorted(path.name for path in Path(shard.location).parent.iterdir())
    changed = replace(shard, num_bytes=shard.num_bytes + 1, report={"documents": 2, "dropped": {"empty": 1}})
    write_index(changed)
    check_same(changed, read_index(Path(shard.location)))
    assert before == sorted(path.name for path in Path(shard.location).parent.iterdir())


def test_the_same_index_has_the_same_bytes(shard: ShardIndex) -> None:
    """No clock is written into it."""
    before = index_path(Path(shard.location)).read_bytes()
    write_index(shard)
    assert before == index_path(Path(shard.location)).read_bytes()


def damage_is_noticed(shard: ShardIndex, content: bytes) -> bool:
    """Whether a sidecar with this content is refused; if not, it must still say the same."""
    index_path(Path(shard.location)).write_bytes(content)
    try:
        check_same(shard, read_index(Path(shard.location)))
    except DataError as error:
        assert str(index_path(Path(shard.location))) in str(error)
        assert "delete its folder to pack again" in str(error)
        assert "\n" not in str(error)
        return True
    return False


def test_a_cut_index_is_refused(shard: ShardIndex) -> None:
    """Wherever it ends, from the first byte to the last but one."""
    whole = index_path(Path(shard.location)).read_bytes()
    cuts = [*range(0, len(whole), 37), len(whole) - 1]
    assert [True] * len(cuts) == [damage_is_noticed(shard, whole[:cut]) for cut in cuts]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(data=st.data())
def test_a_damaged_index_is_refused(packed: DomainRows, data: st.DataObject) -> None:
    """A flipped byte gives an error or changes nothing that counts, and never other rows."""
    shard = packed.shards[0]
    whole = index_path(Path(shard.location)).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(1, 255))
    try:
        damage_is_noticed(shard, whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
    finally:
        index_path(Path(shard.location)).write_bytes(whole)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_index_is_refused(shard: ShardIndex, content: bytes) -> None:
    """An empty file, text, an empty archive."""
    assert damage_is_noticed(shard, content)


@pytest.mark.parametrize("missing", ["offsets", "num_tokens", "num_bytes", "meta"])
def test_an_index_without_one_of_its_parts_is_refused(shard: ShardIndex, missing: str) -> None:
    """Every array is needed."""
    with np.load(index_path(Path(shard.location))) as arrays:
        kept = {name: array for name, array in arrays.items() if name != missing}
    with index_path(Path(shard.location)).open("wb") as file:
        np.savez(file, **kept)
    with pytest.raises(DataError, match=missing):
        read_index(Path(shard.location))


@pytest.mark.parametrize("meta", ["[]", "null", "{}", '{"seq_len": 16}', "{"])
def test_an_index_with_other_metadata_is_refused(shard: ShardIndex, meta: str) -> None:
    """Metadata that is not what `write_index` writes."""
    with np.load(index_path(Path(shard.location))) as arrays:
        kept = {**arrays, "meta": np.array(meta)}
    with index_path(Path(shard.location)).open("wb") as file:
        np.savez(file, **kept)
    with pytest.raises(DataError, match="delete its folder to pack again"):
        read_index(Path(shard.location))


def test_pickles_are_not_loaded(shard: ShardIndex, tmp_path: Path) -> None:
    """An index whose array would run code when it is unpickled is refused, and the code does not run."""

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    with np.load(index_path(Path(shard.location))) as arrays:
        kept = {**arrays, "offsets": np.array([Evil()], dtype=object)}
    with index_path(Path(shard.location)).open("wb") as file:
        np.savez(file, **kept)
    with pytest.raises(DataError, match="allow_pickle"):
        read_index(Path(shard.location))
    assert not (tmp_path / "owned").exists()


def test_a_missing_index_is_refused(shard: ShardIndex) -> None:
    """The message names the file."""
    index_path(Path(shard.location)).unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar\.index\.npz cannot be read"):
        read_index(Path(shard.location))


def test_an_index_without_its_shard_is_refused(shard: ShardIndex) -> None:
    """The rows are gone."""
    Path(shard.location).unlink()
    with pytest.raises(DataError, match="delete its folder to pack again"):
        read_index(Path(shard.location))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_shard_of_another_size_is_refused(shard: ShardIndex, change: int) -> None:
    """The index remembers how long its shard was."""
    size = Path(shard.location).stat().st_size
    os.truncate(Path(shard.location), size + change)
    with pytest.raises(DataError) as info:
        read_index(Path(shard.location))
    assert (
        f"{shard.location} has {size + change} bytes but was packed with {size}; it is truncated or was "
        "changed. Delete its folder to pack again."
    ) == str(info.value)


# --- reading rows -----------------------------------------------------------------------------------


def test_rows_are_read_in_any_order(packed: DomainRows) -> None:
    """Each row is what numpy reads from its member of the tar."""
    reader = RowReader(packed)
    for shard in (1, 0):
        with tarfile.open(packed.shards[shard].path) as tar:
            expected = [np.load(io.BytesIO(tar.extractfile(member).read())).tolist() for member in tar]
        order = [*range(0, len(expected), 2), *range(1, len(expected), 2)]
        assert [expected[row] for row in order] == [reader.read(shard, row).tolist() for row in order]


def test_rows_counts_and_names(packed: DomainRows) -> None:
    """Sums over shards; a name is domain, shard and row."""
    first, second = packed.shards
    assert first.num_rows + second.num_rows == packed.num_rows
    assert int(first.num_tokens.sum() + second.num_tokens.sum()) == packed.num_tokens
    assert SEQ_LEN == packed.seq_len
    assert "code/train-000001.tar#17" == packed.name_of(1, 17)


def test_a_shard_cut_while_in_use_is_noticed(shard: ShardIndex) -> None:
    """Rows before the cut are still read; the message names the first that is not whole, and its place."""
    rows = rows_of(shard)
    reader = RowReader(rows)
    expected = reader.read(0, 0).tolist()
    offset = int(shard.offsets[3])
    os.truncate(Path(shard.location), offset + 10)
    assert expected == reader.read(0, 0).tolist()
    with pytest.raises(DataError) as info:
        reader.read(0, 3)
    assert (
        f"code/train-000000.tar#3: 10 of 32 bytes at offset {offset} of {shard.location}; the shard was cut "
        "while in use."
    ) == str(info.value)


def test_a_shard_that_vanished_is_named(shard: ShardIndex) -> None:
    """Opened only when its first row is read."""
    reader = RowReader(rows_of(shard))
    Path(shard.location).unlink()
    with pytest.raises(
        DataError, match=r"train-000000\.tar cannot be opened \(No such file or directory\)\."
    ):
        reader.read(0, 0)


def test_a_disk_that_fails_is_named(shard: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operating system says, and of which file."""

    def failing(*_: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(DataError) as info:
        RowReader(rows_of(shard)).read(0, 0)
    assert f"{shard.location} cannot be read (Input/output error)." == str(info.value)


def open_files() -> int:
    """Files that this process holds open."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_few_files_are_open_at_once(shard: ShardIndex) -> None:
    """A domain of 200 shards costs at most 64 descriptors, which come back when the reader goes."""
    reader, before = RowReader(rows_of(*[shard] * 200)), open_files()
    expected = reader.read(0, 1).tolist()
    for i in [*range(200), *range(200)]:
        assert expected == reader.read(i, 1).tolist()
        assert open_files() <= before + 64
    assert before + 64 == open_files()
    del reader
    assert before == open_files()


def test_a_closed_reader_opens_again(packed: DomainRows) -> None:
    """Closing is about files, not about the reader."""
    reader = RowReader(packed)
    expected = reader.read(0, 0).tolist()
    reader.close()
    reader.close()
    assert expected == reader.read(0, 0).tolist()


def test_a_reader_travels_without_its_files(packed: DomainRows) -> None:
    """Descriptors mean nothing in another process, so a copy opens its own."""
    reader = RowReader(packed)
    expected = reader.read(1, 0).tolist()
    copy = pickle.loads(pickle.dumps(reader))
    reader.close()
    assert expected == copy.read(1, 0).tolist()

"""The index of a packed shard, and the indices of a domain end to end."""

import os
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.domains import load_domains
from ddkmix.errors import DataError
from ddkmix.fingerprint import hash_file
from ddkmix.index import (
    DomainRows,
    ShardIndex,
    index_path,
    read_index,
    read_sidecar,
    row_checksums,
    write_index,
)
from ddkmix.pack import pack_domains
from ddkmix.tokenizer import read_tokenizer
from tests.conftest import write_domain
from tests.hand_made import unread_rows, write_rows

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


def check_same(expected: ShardIndex, actual: ShardIndex) -> None:
    """Two indices say the same."""
    for field in ("location", "size", "sha256", "seq_len", "dtype", "report"):
        assert getattr(expected, field) == getattr(actual, field)
    for field in ("offsets", "num_tokens", "num_bytes", "crc32"):
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


@pytest.mark.parametrize("missing", ["offsets", "num_tokens", "num_bytes", "crc32", "meta"])
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


def test_a_sidecar_is_read_without_its_shard(shard: ShardIndex) -> None:
    """Shards of a remote store stay there: the index alone says where their rows are."""
    Path(shard.location).unlink()
    index = read_sidecar(index_path(Path(shard.location)), "s3://bucket/rows/train-000000.tar")
    check_same(replace(shard, location="s3://bucket/rows/train-000000.tar"), index)
    assert "train-000000.tar" == index.name == shard.name


def test_the_index_knows_the_shards_digest(packed: DomainRows) -> None:
    """Size and SHA-256 are those of the file."""
    for index in packed.shards:
        assert Path(index.location).stat().st_size == index.size
        assert hash_file(Path(index.location)) == index.sha256


# --- checksums --------------------------------------------------------------------------------------


def test_checksums_are_of_the_stored_bytes_without_padding() -> None:
    """zlib's CRC-32 of the little-endian tokens; a row without tokens has that of nothing."""
    rows, lengths = np.array([[1, 2, 9], [3, 9, 9], [9, 9, 9]], dtype="<u2"), np.array([2, 1, 0])
    expected = [zlib.crc32(b"\1\0\2\0"), zlib.crc32(b"\3\0"), 0]
    assert expected == row_checksums(rows, lengths).tolist()
    wide = [zlib.crc32(b"\1\0\0\0\2\0\0\0"), zlib.crc32(b"\3\0\0\0"), 0]
    assert wide == row_checksums(rows.astype("<u4"), lengths).tolist()


def test_no_rows_have_no_checksums() -> None:
    """A shard may be empty."""
    found = row_checksums(np.zeros((0, 4), dtype="<u2"), np.zeros(0, dtype=np.int64))
    assert (0, np.uint32) == (len(found), found.dtype)


# --- a domain ---------------------------------------------------------------------------------------


def test_rows_counts_and_names(packed: DomainRows) -> None:
    """Sums over shards; a name is domain, shard and row."""
    first, second = packed.shards
    assert first.num_rows + second.num_rows == packed.num_rows
    assert int(first.num_tokens.sum() + second.num_tokens.sum()) == packed.num_tokens
    assert SEQ_LEN == packed.seq_len
    assert "code/train-000001.tar#17" == packed.name_of(1, 17)


def test_places_are_the_indices_end_to_end(tmp_path: Path) -> None:
    """Three shards of 2, 0 and 3 rows: starts 0, 2, 2, and one entry per row."""
    rows = write_rows(tmp_path, "code", [[[1], [2, 3]], [], [[4], [5], [6, 7, 8]]], seq_len=4)
    places = rows.places
    assert [0, 2, 2] == places.starts.tolist()
    assert [0, 8, 0, 8, 16] == places.offsets.tolist()
    assert [1, 2, 1, 1, 3] == places.num_tokens.tolist()
    assert [int(crc) for shard in rows.shards for crc in shard.crc32] == places.crc32.tolist()
    assert (5, 8) == (rows.num_rows, rows.num_tokens)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 8), max_size=6), min_size=1, max_size=6))
def test_shards_are_views_of_the_places(lengths: list[list[int]]) -> None:
    """Nothing is kept twice, and entry starts[shard] + row is that row."""
    rows = unread_rows("code", lengths)
    for shard, start, expected in zip(rows.shards, rows.places.starts, lengths, strict=True):
        assert expected == shard.num_tokens.tolist()
        for name in ("offsets", "num_tokens", "crc32"):
            own, whole = getattr(shard, name), getattr(rows.places, name)
            assert own.tolist() == whole[start : start + len(expected)].tolist()
            assert np.shares_memory(own, whole) or not len(own)


def test_a_changed_copy_has_its_own_places(tmp_path: Path) -> None:
    """`dataclasses.replace` with other shards counts their rows."""
    rows = write_rows(tmp_path, "code", [[[1]], [[2], [3]]], seq_len=4)
    assert 2 == replace(rows, shards=rows.shards[1:]).num_rows
    assert [0] == replace(rows, shards=rows.shards[1:]).places.starts.tolist()
    assert rows.places.crc32.tolist() == replace(rows, prior=2.0).places.crc32.tolist()

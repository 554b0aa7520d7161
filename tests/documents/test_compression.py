"""Compressed files: what was compressed comes out, or what is not whole is noticed at its end."""

import bz2
import gzip
import lzma
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.documents import compression
from ddkmix.documents.compression import open_bytes, suffix_of_content
from ddkmix.errors import DataError

Compress = Callable[[bytes], bytes]


def zstd(data: bytes) -> bytes:
    """A frame as the command line tool writes it: with a checksum."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


COMPRESSORS: dict[str, Compress] = {
    "gzip": gzip.compress,
    "zstd": zstd,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
}
every_format = pytest.mark.parametrize("kind", COMPRESSORS)
CONTENT = bytes(range(256)) * 3 + b"text " * 100


def read(path: Path, kind: str) -> bytes:
    """The content of a compressed file."""
    with open_bytes(path, str(path), kind) as file:
        return file.read()


def refusal(path: Path, kind: str) -> str:
    """The one line that reading a file to its end raises."""
    with pytest.raises(DataError) as info:
        read(path, kind)
    message = str(info.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    kind=st.sampled_from(sorted(COMPRESSORS)),
    parts=st.lists(st.binary(max_size=3000), min_size=1, max_size=4),
    size=st.integers(1, 4000),
)
def test_streams_one_after_another_are_one_content(
    tmp_path_factory: pytest.TempPathFactory, kind: str, parts: list[bytes], size: int
) -> None:
    """As pigz, pbzip2, pixz and pzstd write them, and `cat`; read in pieces of any size."""
    path = tmp_path_factory.mktemp("parts") / "a"
    path.write_bytes(b"".join(map(COMPRESSORS[kind], parts)))
    with open_bytes(path, "a", kind) as file:
        found = b"".join(iter(lambda: file.read(size), b""))
    assert b"".join(parts) == found


def check_cuts(path: Path, kind: str) -> None:
    """Cut between its two streams a file is a whole file of one; cut anywhere else it is an error."""
    first, second = COMPRESSORS[kind](CONTENT), COMPRESSORS[kind](CONTENT[::-1])
    for cut in [*range(len(first + second)), len(first)]:
        path.write_bytes((first + second)[:cut])
        if cut == len(first):
            assert CONTENT == read(path, kind)
        else:
            refusal(path, kind)


@every_format
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    """Also cut to nothing; the exact end of a stream is the end of a whole file."""
    check_cuts(tmp_path / "a", kind)


@every_format
def test_files_that_are_cut_pass_the_libraries_own_readers(tmp_path: Path, kind: str) -> None:
    """Why there is a loop of ours: where the standard openers or zstandard's reader end silently."""
    good = COMPRESSORS[kind](CONTENT)
    readers: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.decompress,
        "bzip2": bz2.decompress,
        "xz": lzma.decompress,
        "zstd": lambda data: zstandard.ZstdDecompressor().stream_reader(data).read(),
    }
    path = tmp_path / "a"
    path.write_bytes({"zstd": good[:-9], "gzip": b""}.get(kind, good + b"x" + good[1:]))
    assert len(readers[kind](path.read_bytes())) < 2 * len(CONTENT)
    refusal(path, kind)


@every_format
def test_what_follows_the_end_must_be_another_stream(tmp_path: Path, kind: str) -> None:
    """A damaged header of a later stream looks like this, and would lose all after it."""
    path = tmp_path / "a"
    path.write_bytes(COMPRESSORS[kind](CONTENT) + b"garbage, and more of it")
    assert f"is not a whole {kind} stream" in refusal(path, kind)


@pytest.mark.parametrize("kind", ["gzip", "xz"])
def test_padding_with_zeros_is_allowed_where_the_format_allows_it(tmp_path: Path, kind: str) -> None:
    """Tapes and block devices pad; streams may follow."""
    path = tmp_path / "a"
    path.write_bytes(COMPRESSORS[kind](b"a") + bytes(512) + COMPRESSORS[kind](b"b") + bytes(1 << 17))
    assert b"ab" == read(path, kind)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(kind=st.sampled_from(sorted(COMPRESSORS)), at=st.integers(0), change=st.integers(1, 255))
def test_a_changed_byte_never_shortens_the_content(
    tmp_path_factory: pytest.TempPathFactory, kind: str, at: int, change: int
) -> None:
    """All four end a stream with a checksum: the content is the one that was compressed, or an error."""
    path = tmp_path_factory.mktemp("flip") / "a"
    data = bytearray(COMPRESSORS[kind](CONTENT) * 2)
    data[at % len(data)] ^= change
    path.write_bytes(data)
    try:
        found = read(path, kind)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert CONTENT * 2 == found


def test_skippable_frames_hold_nothing(tmp_path: Path) -> None:
    """pzstd and the seekable format put their tables there."""
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"info"
    path = tmp_path / "a"
    path.write_bytes(skippable + zstd(b"a") + skippable + zstd(b"b") + skippable)
    assert b"ab" == read(path, "zstd")


def test_a_long_window_is_read(tmp_path: Path) -> None:
    """Dumps are compressed with `zstd --long=31`, which zstandard refuses by itself."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    path = tmp_path / "a"
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(compressor.compress(b"text") + compressor.flush())
    with pytest.raises(zstandard.ZstdError):
        zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj().decompress(path.read_bytes())
    assert b"text" == read(path, "zstd")


@pytest.mark.parametrize("kind", ["bzip2", "xz"])
def test_a_few_bytes_do_not_become_gigabytes_at_once(tmp_path: Path, kind: str) -> None:
    """20 MB of zeros are a few hundred bytes of bzip2; they come a megabyte at a time."""
    path = tmp_path / "a"
    path.write_bytes(COMPRESSORS[kind](bytes(20_000_000)))
    with path.open("rb") as file:
        sizes = [len(chunk) for chunk in compression._decompress(file, "a", kind)]
    assert 20_000_000 == sum(sizes)
    assert max(sizes) <= 1 << 20


@every_format
def test_closing_closes_the_file(tmp_path: Path, kind: str) -> None:
    """A reader that stops early leaves nothing open (an open file would be a warning, which is an error)."""
    path = tmp_path / "a"
    path.write_bytes(COMPRESSORS[kind](CONTENT * 1000))
    file = open_bytes(path, "a", kind)
    assert CONTENT[:10] == file.read(10)
    file.close()


def test_plain_files_are_opened_as_they_are(tmp_path: Path) -> None:
    """No compression, no change."""
    path = tmp_path / "a"
    path.write_bytes(CONTENT)
    with open_bytes(path, "a", None) as file:
        assert CONTENT == file.read()


def test_content_tells_its_compression() -> None:
    """By its first bytes."""
    found = {kind: suffix_of_content(compress(b"x")) for kind, compress in COMPRESSORS.items()}
    assert {"gzip": ".gz", "zstd": ".zst", "xz": ".xz", "bzip2": ".bz2"} == found
    assert suffix_of_content(b'{"text": ""}') is None
    assert suffix_of_content(zlib.compress(b"x")) is None

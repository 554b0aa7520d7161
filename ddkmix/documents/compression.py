"""Open a compressed file as the stream of bytes within, and notice when it is not whole.

The openers of the standard library end silently where a bzip2 or xz file goes on with something that is no
stream (a damaged header in a file of many streams loses the rest), and zstandard's where a frame is
cut. Here every byte belongs to a whole stream, or reading raises.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ddkmix.errors import DataError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_READ_BYTES = 1 << 16
_BUFFER_BYTES = 1 << 20
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\0": ".xz", b"BZh": ".bz2"}
_LARGEST_ZSTD_WINDOW = 1 << 31
"""`zstd --ultra --long=31`; only a file that was written so needs the memory."""


def open_bytes(path: Path, name: str, compression: str | None) -> io.BufferedReader:
    """Open a file; what is read is its content, decompressed when `compression` names a format.

    Reading raises DataError when the compressed stream is cut, damaged, or followed by something else.
    """
    file = path.open("rb")
    if compression is None:
        return file
    return io.BufferedReader(_Chunked(_decompress(file, name, compression), file), _BUFFER_BYTES)


def suffix_of_content(data: bytes) -> str | None:
    """The suffix that a compressed file should have, from its first bytes; None for anything else."""
    return next((suffix for magic, suffix in _MAGIC.items() if data.startswith(magic)), None)


class _Chunked(io.RawIOBase):
    """A readable stream out of chunks of any size."""

    def __init__(self, chunks: Iterator[bytes], source: io.BufferedReader) -> None:
        self._chunks = chunks
        self._source = source
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


def _decompress(file: io.BufferedReader, name: str, compression: str) -> Iterator[bytes]:
    new_decoder, damage = _decoder(compression)
    decoder = new_decoder()
    while data := file.read(_READ_BYTES):
        while data:
            if decoder.eof:
                # gzip and xz files may be padded with zeros, and may hold one stream after another
                data = data.lstrip(b"\0") if compression in ("gzip", "xz") else data
                if not data:
                    break
                decoder = new_decoder()
            try:
                yield decoder.decompress(data, *_limit(compression))
                while not (decoder.eof or getattr(decoder, "needs_input", True)):
                    yield decoder.decompress(b"", *_limit(compression))
            except damage as error:
                raise DataError(
                    f"{name} is not a whole {compression} stream ({error}); copy or compress it again."
                ) from None
            data = decoder.unused_data if decoder.eof else b""
    if not decoder.eof:
        raise DataError(
            f"{name} is truncated: its {compression} stream has no end after {file.tell()} bytes. "
            "Copy or compress it again."
        )


def _limit(compression: str) -> tuple[int, ...]:
    """What bounds the output of one call: a few bytes of bzip2 or xz may stand for gigabytes."""
    return (_BUFFER_BYTES,) if compression in ("bzip2", "xz") else ()


def _decoder(compression: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """What makes a decoder, and what it raises on damage."""
    if compression == "gzip":
        return lambda: zlib.decompressobj(wbits=31), (zlib.error,)
    if compression == "bzip2":
        return bz2.BZ2Decompressor, (OSError, ValueError)
    if compression == "xz":
        return lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ), (lzma.LZMAError,)
    assert compression == "zstd", compression
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=_LARGEST_ZSTD_WINDOW)
    return context.decompressobj, (zstandard.ZstdError,)

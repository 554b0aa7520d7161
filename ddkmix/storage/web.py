"""HTTP that believes nothing: fsspec's HTTP file system with every answer checked.

fsspec takes whatever comes back. A server that ignores Range and sends the whole file, a proxy that answers
with another range, one that compresses on the way: each would be data of the right length in the wrong place.
"""

import logging
import re
import threading
from typing import TYPE_CHECKING, Any

import aiohttp
import yarl
from fsspec.asyn import sync
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.http import HTTPFileSystem

from ddkmix.storage.coroutines import run
from ddkmix.storage.faults import Fault, status_fault

if TYPE_CHECKING:
    from ddkmix.storage.streams import Partial

logger = logging.getLogger(__name__)

_PIECE = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


class Web(HTTPFileSystem):
    """http and https. Proxies and .netrc are taken from the environment."""

    cachable = False  # `connections` keeps them, one per process

    def __init__(self, timeout_s: float, **kwargs: Any) -> None:
        limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        client = {
            "timeout": limits,
            "auto_decompress": False,
            "trust_env": True,
            **kwargs.pop("client_kwargs", {}),
        }
        super().__init__(client_kwargs=client, **kwargs)  # type: ignore[no-untyped-call]
        self._session: aiohttp.ClientSession | None = None

    async def set_session(self) -> aiohttp.ClientSession:
        """The session, which `close` closes: fsspec's finalizer would do it in a forked child too."""
        if self._session is None:
            self._session = aiohttp.ClientSession(**self.client_kwargs)
        return self._session

    def close(self, timeout_s: float) -> None:
        """Close the connections."""
        if self._session is not None:
            try:
                sync(self.loop, self._session.close, timeout=timeout_s)
            except FSTimeoutError:
                logger.debug("connections were not closed within %g s", timeout_s)

    def encode_url(self, url: str) -> yarl.URL:
        """A URL that is quoted already (a signed one) must reach the server as it is."""
        return yarl.URL(url, encoded="%" in url and url.isascii() and " " not in url)

    async def answer(self, url: str, headers: dict[str, str]) -> aiohttp.ClientResponse:
        """The head of an answer that is no error; whoever asks must close it.

        Raises:
            Fault: a status of 400 or more (but 416), or content that is compressed on the way.
        """
        session = await self.set_session()
        options = dict(self.kwargs)
        headers = {"Accept-Encoding": "identity", **options.pop("headers", {}), **headers}
        response = await session.get(self.encode_url(url), headers=headers, **options)
        try:
            if response.status >= 400 and response.status != 416:
                raise status_fault(response.status, response.headers.get("Retry-After"))
            coding = response.headers.get("Content-Encoding", "identity").lower()
            stored_so = coding in ("gzip", "x-gzip") and response.url.name.endswith((".gz", ".tgz"))
            if coding != "identity" and not stored_so:
                raise Fault(f"the server compresses on the way (Content-Encoding: {coding})", again=False)
        except Fault:
            response.close()
            raise
        return response

    async def probe(self, url: str) -> tuple[int | None, str | None, bool]:
        """(size, mark, whether ranges work) by asking for one byte, as HEAD says little and lies at times."""
        response = await self.answer(url, {"Range": "bytes=0-0"})
        try:
            first, last, total = content_range(response)
            if response.status == 416 and total == 0:
                return 0, strong_mark(response), True
            if response.status == 416:
                raise status_fault(416)
            if response.status == 206 and (first, last) == (0, 0):
                return total, strong_mark(response), len(await response.content.read(2)) == 1
            return response.content_length, strong_mark(response), False
        finally:
            response.close()

    async def _cat_file(  # type: ignore[override]
        self, url: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """The bytes [start, end)."""
        assert start is not None and end is not None and start < end
        response = await self.answer(url, {"Range": f"bytes={start}-{end - 1}"})
        try:
            check_range(response, start, end - 1)
            if response.content_length not in (None, end - start):
                raise Fault(f"{response.content_length} bytes of {end - start} are to come", again=True)
            return await response.read()
        finally:
            response.release()

    def stream(self, url: str, partial: "Partial", stop: threading.Event | None) -> None:
        """Append the rest of a file to what was received of it, or start over where that is not safe.

        Raises:
            Fault: an error, or fewer bytes than the server said.
        """
        headers: dict[str, str] = {}
        if partial.received and partial.can_go_on:
            headers["Range"] = f"bytes={partial.received}-"
            if partial.mark:
                headers["If-Range"] = partial.mark
        response = run(self, self.answer(url, headers), stop)
        try:
            _begin(response, partial, asked="Range" in headers)
            while piece := run(self, _read(response), stop):
                partial.write(piece)
        finally:
            run(self, _close(response))
        if partial.total is not None and partial.received != partial.total:
            raise Fault(f"{partial.received} of {partial.total} bytes came", again=True)


def _begin(response: aiohttp.ClientResponse, partial: "Partial", asked: bool) -> None:
    """Decide from the head of an answer where its bytes go."""
    if asked and response.status == 206:
        check_range(response, partial.received, None)
        total, mark = content_range(response)[2], strong_mark(response)
        if partial.total in (None, total) and partial.mark in (None, mark):
            partial.total = total
            return
        partial.restart()
        raise Fault("the file changed while it was read", again=True)
    partial.restart()
    if asked and response.status == 416:
        raise Fault("the transfer could not go on where it broke off", again=True)
    if response.status != 200:
        raise (
            status_fault(response.status)
            if response.status >= 400
            else Fault(f"an answer of status {response.status} to a request for the whole file", again=True)
        )
    partial.total, partial.mark = response.content_length, strong_mark(response)
    chunked = "chunked" in response.headers.get("Transfer-Encoding", "").lower()
    partial.end_is_marked = partial.total is not None or chunked


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """About a mebibyte, or what there is at the end; what came before a failure is not lost with it."""
    pieces, size = [], 0
    try:
        while size < _PIECE and (piece := await response.content.read(_PIECE - size)):
            pieces.append(piece)
            size += len(piece)
    except Exception:
        if not pieces:
            raise
    return b"".join(pieces)


async def _close(response: aiohttp.ClientResponse) -> None:
    response.close()


def check_range(response: aiohttp.ClientResponse, first: int, last: int | None) -> None:
    """Raises Fault if an answer holds other bytes than the ones asked for."""
    if response.status == 416:
        raise status_fault(416)
    if response.status != 206:
        raise Fault(
            "the server ignores Range and answers with the whole file",
            again=True,
            hint="set storage.mode=spool",
        )
    got_first, got_last, total = content_range(response)
    if got_first != first or (last is not None and got_last != last):
        if last is not None and total is not None and total <= last:
            raise Fault(
                f"the file has {total} bytes, and bytes {first} to {last} were asked for", again=False
            )
        raise Fault(
            f"the server answered with bytes {got_first} to {got_last} instead of {first} to {last}",
            again=True,
        )


def content_range(response: aiohttp.ClientResponse) -> tuple[int | None, int | None, int | None]:
    """(first, last, total) of the header Content-Range, None for what it does not say."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    numbers = match.groups() if match else (None, None, None)
    first, last, total = (int(n) if n is not None and n.isdigit() else None for n in numbers)
    return first, last, total


def strong_mark(response: aiohttp.ClientResponse) -> str | None:
    """What the server says identifies the content; weak ETags and dates do not."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else None

"""Real servers for the tests: a web server that breaks as it is told, and an S3 store.

A fault is a function of the request handler that answers one GET its own way; `server.faults[name]` is the
plan for a file, one fault a request, `None` for a healthy answer, and healthy ones when the plan is over.
"""

import gzip
import hashlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PIECE = 1 << 16


@dataclass(frozen=True)
class Asked:
    """One request that the server saw."""

    name: str
    range: str | None
    headers: dict[str, str]


class WebServer(ThreadingHTTPServer):
    """Files over HTTP/1.1, with or without ranges and ETags."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # the default of 5 drops what connects at the same time

    def __init__(self, *, ranges: bool = True, etags: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges, self.etags = ranges, etags
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault | None]] = {}
        self.asked: list[Asked] = []
        self.sent: dict[str, int] = {}
        """Bytes of bodies per file."""
        self.lock = threading.Lock()

    def put(self, name: str, content: bytes, *faults: "Fault | None") -> str:
        """Serve a file, after these faults; returns its URL."""
        self.files[name], self.faults[name] = content, list(faults)
        return self.url(name)

    def url(self, name: str) -> str:
        """Where a file is."""
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def ranges_asked(self, name: str) -> list[str | None]:
        """The Range header of each request for a file, in order."""
        return [asked.range for asked in self.asked if asked.name == name]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are a part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """Answers GET."""

    protocol_version = "HTTP/1.1"
    server: WebServer

    def log_message(self, *_: Any) -> None:
        """Tests are quiet."""

    def do_GET(self) -> None:
        """One request: a planned fault or a healthy answer."""
        self.name = self.path.partition("?")[0].lstrip("/")
        with self.server.lock:
            self.server.asked.append(Asked(self.name, self.headers.get("Range"), dict(self.headers)))
            plan = self.server.faults.get(self.name, [])
            fault = plan.pop(0) if plan else None
        if self.name not in self.server.files:
            self.answer_status(404)
        elif fault is not None:
            fault(self)
        else:
            self.answer()

    @property
    def content(self) -> bytes:
        """The file."""
        return self.server.files[self.name]

    def etag(self) -> str:
        """A strong one."""
        return f'"{hashlib.md5(self.content).hexdigest()}"'

    def wanted(self) -> tuple[int, int] | None:
        """[first, last] as asked for, if ranges are served and the condition holds."""
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        if not asked or not self.server.ranges or condition not in (None, self.etag()):
            return None
        first, _, last = asked.removeprefix("bytes=").partition("-")
        return int(first), min(int(last) if last else len(self.content) - 1, len(self.content) - 1)

    def start(self, status: int, length: int | None, **headers: str) -> None:
        """The head of an answer."""
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if self.server.etags:
            self.send_header("ETag", self.etag())
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def body(self, data: bytes) -> None:
        """Bytes of the body, counted."""
        for at in range(0, len(data), PIECE):
            with self.server.lock:
                self.server.sent[self.name] = self.server.sent.get(self.name, 0) + len(data[at : at + PIECE])
            self.wfile.write(data[at : at + PIECE])

    def answer_head(self) -> bytes:
        """The head of a healthy answer; returns the body that belongs to it."""
        wanted = self.wanted()
        if wanted is None:
            self.start(200, len(self.content))
            return self.content
        first, last = wanted
        if first >= len(self.content):
            self.start(416, 0, Content_Range=f"bytes */{len(self.content)}")
            return b""
        self.start(206, last + 1 - first, Content_Range=f"bytes {first}-{last}/{len(self.content)}")
        return self.content[first : last + 1]

    def answer(self) -> None:
        """A healthy answer."""
        self.body(self.answer_head())

    def answer_status(self, status: int, **headers: str) -> None:
        """An error."""
        self.send_response(status)
        self.send_header("Content-Length", "0")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


Fault = Callable[[Handler], None]


def status(code: int, **headers: str) -> Fault:
    """An error status."""
    return lambda handler: handler.answer_status(code, **headers)


def reset(after: int) -> Fault:
    """The connection is reset in mid-body."""

    def fault(handler: Handler) -> None:
        handler.body(handler.answer_head()[:after])
        handler.wfile.flush()
        time.sleep(0.05)  # a reset throws away what the client has not read yet
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.close_connection = True

    return fault


def cut(after: int) -> Fault:
    """The right Content-Length, and fewer bytes."""

    def fault(handler: Handler) -> None:
        handler.body(handler.answer_head()[:after])
        handler.close_connection = True

    return fault


def chunked(after: int | None = None, *, end: bool = True) -> Fault:
    """Chunked coding of the first `after` bytes, with or without the last chunk that says "this is all"."""

    def fault(handler: Handler) -> None:
        handler.start(200, None, Transfer_Encoding="chunked")
        data = handler.content[:after]
        handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n" + (b"0\r\n\r\n" if end else b""))
        handler.close_connection = True

    return fault


def without_length(after: int | None = None) -> Fault:
    """As HTTP/1.0 does: the body ends when the connection does."""

    def fault(handler: Handler) -> None:
        handler.start(200, None, Connection="close")
        handler.body(handler.content[:after])
        handler.close_connection = True

    return fault


def slow(seconds: float, *, pieces: int = 1) -> Fault:
    """A pause before each of so many pieces of the body."""

    def fault(handler: Handler) -> None:
        data = handler.answer_head()
        size = -(-len(data) // pieces)
        for at in range(0, len(data), size):
            time.sleep(seconds)
            handler.body(data[at : at + size])

    return fault


def together(barrier: threading.Barrier) -> Fault:
    """No answer before as many requests as the barrier has parties are under way; nothing if it breaks."""

    def fault(handler: Handler) -> None:
        try:
            barrier.wait()
        except threading.BrokenBarrierError:
            handler.close_connection = True
            return
        handler.body(handler.answer_head())

    return fault


def silent(seconds: float) -> Fault:
    """No answer at all, for a while; then the connection is closed."""

    def fault(handler: Handler) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return fault


def hang(until: threading.Event, after: int) -> Fault:
    """A part of the body, then nothing until the test says so."""

    def fault(handler: Handler) -> None:
        data = handler.answer_head()
        handler.body(data[:after])
        until.wait(30)
        handler.body(data[after:])

    return fault


def whole(handler: Handler) -> None:
    """The whole file, whatever Range says."""
    handler.start(200, len(handler.content))
    handler.body(handler.content)


def shifted(handler: Handler) -> None:
    """As many bytes as asked for, from one byte further on."""
    wanted = handler.wanted()
    assert wanted is not None
    first, last = wanted[0] + 1, wanted[1] + 1
    handler.start(206, last + 1 - first, Content_Range=f"bytes {first}-{last}/{len(handler.content)}")
    handler.body(handler.content[first : last + 1])


def nameless_range(handler: Handler) -> None:
    """206 without saying which bytes."""
    wanted = handler.wanted()
    assert wanted is not None
    data = handler.content[wanted[0] : wanted[1] + 1]
    handler.start(206, len(data))
    handler.body(data)


def longer(handler: Handler) -> None:
    """206 for the right range, with a byte too many."""
    wanted = handler.wanted()
    assert wanted is not None
    data = handler.content[wanted[0] : wanted[1] + 2]
    handler.start(206, len(data), Content_Range=f"bytes {wanted[0]}-{wanted[1]}/{len(handler.content)}")
    handler.body(data)


def compressed(handler: Handler) -> None:
    """Compressed on the way, though nobody asked for it."""
    data = gzip.compress(handler.content)
    handler.start(200, len(data), Content_Encoding="gzip")
    handler.body(data)


def corrupted(handler: Handler) -> None:
    """One bit flipped on the way."""
    data = bytearray(handler.answer_head())
    data[len(data) // 2] ^= 1
    handler.body(bytes(data))


def replaced(content: bytes, then: Fault | None = None) -> Fault:
    """The file is replaced on the server, just before this answer."""

    def fault(handler: Handler) -> None:
        handler.server.files[handler.name] = content
        (then or Handler.answer)(handler)

    return fault


@contextmanager
def web_server(*, ranges: bool = True, etags: bool = True) -> Iterator[WebServer]:
    """A server that runs until the block ends."""
    server = WebServer(ranges=ranges, etags=etags)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

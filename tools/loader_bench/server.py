"""A threaded HTTP/1.1 server for a folder, with byte ranges: remote shards without a network."""

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

_CHUNK = 1 << 20


class _Ranges(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def send_head(self) -> IO[bytes] | None:
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        self.left = -1
        if wanted is None or not path.is_file():
            return super().send_head()
        size = path.stat().st_size
        first, last = wanted.groups()
        start = int(first) if first else size - int(last)
        end = min(int(last) if first and last else size - 1, size - 1)
        if start >= size or start > end:
            self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            return None
        file = path.open("rb")
        file.seek(start)
        self.left = end - start + 1
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.send_header("Content-Length", str(self.left))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        return file

    def copyfile(self, source: Any, outputfile: Any) -> None:
        if self.left < 0:
            super().copyfile(source, outputfile)
        while self.left > 0:
            data = source.read(min(_CHUNK, self.left))
            if not data:
                return
            outputfile.write(data)
            self.left -= len(data)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a reader that has read enough hangs up
            super().handle()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The base URL of a server on this machine, while the block runs."""
    server = _Server(("127.0.0.1", 0), partial(_Ranges, directory=os.fspath(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()

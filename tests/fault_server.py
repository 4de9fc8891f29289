"""A folder served on loopback by a server that can be told to misbehave: HTTP, and as much of S3 and GCS as reading takes."""

import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FaultServer(ThreadingHTTPServer):
    """`faults[name]` are done one per request, in order; after them the file is served as it is.

    A fault is a status to answer, or a function of (handler, body) that writes the body. `requests` are (name, first byte).
    """

    daemon_threads = True

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges = folder, ranges
        self.faults: dict[str, list[int | Callable[[_Handler, bytes], None]]] = defaultdict(list)
        self.requests: list[tuple[str, int]] = []
        self.headers: list[dict[str, str]] = []
        self.released = threading.Event()  # what a hanging answer waits for
        self.place = f"http://127.0.0.1:{self.server_port}"

    def count(self, name: str) -> int:
        return sum(asked == name for asked, _ in self.requests)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        server, parts = self.server, urlsplit(self.path)
        name = unquote(parts.path).rsplit("/", 1)[-1]  # buckets and folders do not matter
        first, last = 0, None
        if server.ranges and (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            first, last = int(asked[1]), int(asked[2]) if asked[2] else None
        server.requests.append((name, first))
        server.headers.append(dict(self.headers.items()))
        fault = server.faults[name].pop(0) if server.faults[name] else None
        if fault is None and not (server.folder / name).is_file():
            fault = 404
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        whole = (server.folder / name).read_bytes()
        if parts.path.startswith("/storage/v1/b/"):  # what GCS knows of a file
            whole = json.dumps({"name": name, "bucket": "archive", "size": str(len(whole))}).encode()
        body = whole[first : None if last is None else last + 1]
        self.send_response(206 if first or last is not None else 200)
        if first or last is not None:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(whole)}")
        if fault is not endless:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault is None:
            self.wfile.write(body)
        else:
            fault(self, body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def cut(handler: _Handler, body: bytes) -> None:
    """Half of it, then the connection ends."""
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    time.sleep(0.05)  # what comes together with the end, aiohttp throws away
    handler.close_connection = True


def hang(handler: _Handler, body: bytes) -> None:
    """A little, then nothing until the test lets go."""
    handler.wfile.write(body[:10])
    handler.wfile.flush()
    handler.server.released.wait(60)
    handler.close_connection = True


def drip(handler: _Handler, body: bytes) -> None:
    """A byte now and then, so that no read ever times out."""
    for byte in body:
        if handler.server.released.is_set():
            break
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.02)
    handler.close_connection = True


def endless(handler: _Handler, body: bytes) -> None:
    """No length, no end."""
    while not handler.server.released.is_set():
        handler.wfile.write(bytes(1 << 16))


def flip(handler: _Handler, body: bytes) -> None:
    """All of it, one bit wrong."""
    handler.wfile.write(body[:-1] + bytes([body[-1] ^ 1]))


@contextmanager
def serving(folder: Path, *, ranges: bool = True) -> Iterator[FaultServer]:
    server = FaultServer(folder, ranges=ranges)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()

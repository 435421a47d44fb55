"""A web server of a folder with ranges, on this machine, that can be told to fail."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class WebStore(ThreadingHTTPServer):
    """``faults``: what becomes of the next requests for bytes, in turn; a number is a status."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_port}"
        self.faults: list[str] = []
        self.reads: list[str] = []
        """Names of the files whose bytes were asked for."""
        self.waiting, self.go_on = threading.Event(), threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebStore

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        self._answer(200 if path.is_file() else 404, b"", path.stat().st_size if path.is_file() else 0)

    def do_GET(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        self.server.reads.append(path.name)
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if not path.is_file():
            return self._answer(404, b"")
        data = path.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        assert span is not None, "every read is of a range"
        part = data[int(span[1]) : int(span[2]) + 1]
        if fault.isdigit():
            self._answer(int(fault), b"no")
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif fault == "stall":
            self.server.waiting.set()
            self.server.go_on.wait(60)
            self._answer(206, part)
        elif fault == "cut":
            self._answer(206, part[: len(part) // 2], len(part))
            self.close_connection = True
        elif fault == "short":
            self._answer(206, part[:-1])
        elif fault == "whole":
            self._answer(200, data)
        elif fault == "flip":
            self._answer(206, bytes([part[0] ^ 1]) + part[1:])
        elif not part:
            self._answer(416, b"")
        else:
            self._answer(206, part)
        return None

    def _answer(self, status: int, body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serve(folder: Path) -> Iterator[WebStore]:
    store = WebStore(folder)
    thread = threading.Thread(target=store.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield store
    finally:
        store.go_on.set()
        store.shutdown()
        thread.join()
        store.server_close()

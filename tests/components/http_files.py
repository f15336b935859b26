"""A plain HTTP server for files, with validators, redirections, passwords and large answers, as real ones have."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@dataclass
class FileServer:
    """The files to serve, and the answers that were given.

    Attributes:
        url: The URL of the server, without a slash at its end.
        files: Path → content; any other path is a 404.
        redirects: Path → URL.
        credentials: The ``user:password`` to ask for; None lets everybody in.
        etags: True to send ETags and to answer 304.
        busy: The number of requests to answer with 503 from now on.
        answers: The path and status of every answer.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    credentials: str | None = None
    etags: bool = True
    busy: int = 0
    answers: list[tuple[str, int]] = field(default_factory=list)


@pytest.fixture
def http_files() -> Iterator[FileServer]:
    """A file server on loopback."""
    with serve_files() as server:
        yield server


@contextmanager
def serve_files() -> Iterator[FileServer]:
    """Serve files during the block."""
    server = FileServer()

    class Handler(_Handler):
        file_server = server

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    file_server: FileServer

    def do_GET(self) -> None:
        server = self.file_server
        path = self.path.partition("?")[0]
        given = self.headers.get("Authorization", "")
        if server.busy:
            server.busy -= 1
            self._answer(503, b"", {"Retry-After": "0"})
        elif server.credentials and given != "Basic " + base64.b64encode(server.credentials.encode()).decode():
            self._answer(401, b"", {"WWW-Authenticate": "Basic"})
        elif path in server.redirects:
            self._answer(302, b"", {"Location": server.redirects[path]})
        elif path not in server.files:
            self._answer(404, b"not here", {})
        else:
            self._send_file(server.files[path])

    def _send_file(self, data: bytes) -> None:
        if not self.file_server.etags:
            return self._answer(200, data, {})
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        if self.headers.get("If-None-Match") == etag:
            return self._answer(304, b"", {"ETag": etag})
        return self._answer(200, data, {"ETag": etag})

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.file_server.answers.append((self.path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 304:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Keep quiet."""

"""A Git server that speaks smart HTTP: `git http-backend` behind Python's own HTTP server."""

from __future__ import annotations

import base64
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from components import missing


class GitServer:
    """A server of the bare repositories below a folder.

    Attributes:
        root: The folder.
        credentials: The ``user:password`` to ask for; None lets everybody in.
        requests: The paths that were asked for, with their queries.
        agents: The User-Agents of the requests.
        requested: An event that every request sets.
        down: True to answer everything with 503.
        busy: The number of requests to answer with 503 from now on.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.credentials: str | None = None
        self.requests: list[str] = []
        self.agents: set[str] = set()
        self.requested = threading.Event()
        self.down = False
        self.busy = 0
        self.url = ""

    @property
    def discoveries(self) -> int:
        """The number of times a client read the refs of a repository, the first step of every fetch."""
        return sum("/info/refs?" in path for path in self.requests)


@contextmanager
def serve(root: Path) -> Iterator[GitServer]:
    """Serve the repositories below `root` on loopback."""
    server = GitServer(root)

    class Handler(_Handler):
        git_server = server

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture
def git_http(tmp_path: Path) -> Iterator[GitServer]:
    """A Git server over HTTP with a folder of its own."""
    if subprocess.run(["git", "http-backend"], capture_output=True, env={"PATH": os.environ["PATH"]}).returncode == 1:
        missing("git http-backend", "install git with its http-backend")
    root = tmp_path / "served"
    root.mkdir()
    with serve(root) as server:
        yield server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    git_server: GitServer

    def do_GET(self) -> None:
        server = self.git_server
        server.requests.append(self.path)
        server.agents.add(self.headers.get("User-Agent", ""))
        server.requested.set()
        body = self._body()
        if server.down or server.busy:
            server.busy = max(server.busy - 1, 0)
            self._answer(503, [], b"")
        elif server.credentials is not None and self.headers.get("Authorization") != _basic(server.credentials):
            self._answer(401, [("WWW-Authenticate", 'Basic realm="git"')], b"")
        else:
            self._answer(*self._ask_git(body))

    do_POST = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _ask_git(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        path, _, query = self.path.partition("?")
        environ = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(self.git_server.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_COUNT": "2",
            "GIT_CONFIG_KEY_0": "uploadpack.allowFilter",
            "GIT_CONFIG_VALUE_0": "true",
            "GIT_CONFIG_KEY_1": "safe.directory",
            "GIT_CONFIG_VALUE_1": "*",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "REMOTE_ADDR": "127.0.0.1",
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
        }
        out = subprocess.run(["git", "http-backend"], input=body, env=environ, stdout=subprocess.PIPE).stdout
        head, _, data = out.partition(b"\r\n\r\n")
        headers = [(name, value) for name, _, value in (line.partition(": ") for line in head.decode().split("\r\n"))]
        status = next((int(value.split()[0]) for name, value in headers if name == "Status"), 200)
        return status, [header for header in headers if header[0] not in ("", "Status")], data

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Keep quiet."""


def _basic(credentials: str) -> str:
    return "Basic " + base64.b64encode(credentials.encode()).decode()

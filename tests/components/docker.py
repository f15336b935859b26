"""The machine's Docker engine (this module starts none), and images for it that need no registry.

The images are made from what is on this machine: busybox (Debian's busybox-static), bash, and the Python that runs the
tests.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from components import missing

__all__ = ["DockerEngine", "docker_engine", "python_image", "shell_files", "shell_image", "tar"]

_APPLETS = (
    "cat", "chmod", "cp", "date", "dd", "echo", "env", "false", "head", "id", "kill", "ls", "mkdir", "mv", "printf",
    "ps", "pwd", "readlink", "rm", "sed", "seq", "sh", "sleep", "sort", "stat", "tail", "tar", "touch", "tr", "true",
    "uname", "wc", "wget", "which", "whoami", "yes",
)  # fmt: skip


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class DockerEngine:
    """A blocking client of an engine for tests, independent of the code under test."""

    def __init__(self, url: str) -> None:
        self.url = url

    def call(
        self, method: str, path: str, body: object = None, *, headers: dict[str, str] | None = None, ok: bool = True
    ) -> Any:
        parts = urlsplit(self.url)
        connection = (
            _UnixConnection(parts.path)
            if parts.scheme == "unix"
            else http.client.HTTPConnection(parts.netloc, timeout=60)
        )
        try:
            data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
            kind = "application/x-tar" if isinstance(body, bytes) else "application/json"
            connection.request(method, path, data, {"Content-Type": kind, **(headers or {})})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        finally:
            connection.close()
        if ok:
            assert answer.status < 400, f"{method} {path}: {answer.status} {text}"
            assert '"errorDetail"' not in text, f"{method} {path}: {text}"
        lines = [json.loads(line) for line in text.splitlines() if line.startswith(("{", "["))]
        return lines[0] if len(lines) == 1 else lines

    def containers(self, label: str) -> list[dict[str, Any]]:
        """Return all containers with that label (``name`` or ``name=value``)."""
        filters = quote(json.dumps({"label": [label]}))
        found = self.call("GET", f"/containers/json?all=1&filters={filters}")
        return found if isinstance(found, list) else [found]

    def inspect(self, container: str) -> dict[str, Any]:
        return dict(self.call("GET", f"/containers/{container}/json"))

    def remove(self, container: str) -> None:
        self.call("DELETE", f"/containers/{container}?force=1", ok=False)

    def has_image(self, name: str) -> bool:
        return "Id" in self.call("GET", f"/images/{name}/json", ok=False)

    def remove_image(self, name: str) -> None:
        self.call("DELETE", f"/images/{name}?force=1", ok=False)

    def remove_with_children(self, name: str) -> None:
        """Remove an image and the images that were built on it."""
        layer = self.call("GET", f"/images/{name}/json")["RootFS"]["Layers"][0]
        filters = quote(json.dumps({"label": ["mlfleet.content"]}))
        built = self.call("GET", f"/images/json?filters={filters}")
        for image in built if isinstance(built, list) else [built]:
            found = self.call("GET", f"/images/{image['Id']}/json", ok=False)
            if found.get("RootFS", {}).get("Layers", [None])[0] == layer:
                self.remove_image(str(image["Id"]))
        self.remove_image(name)

    def import_image(self, name: str, content: bytes, *changes: str) -> None:
        """Create an image from a tar archive."""
        repo, _, tag = name.rpartition(":")
        query = "".join(f"&changes={quote(change)}" for change in changes)
        self.call("POST", f"/images/create?fromSrc=-&repo={quote(repo)}&tag={tag}{query}", content)


def find_engine() -> DockerEngine | None:
    engine = DockerEngine(os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock")
    try:
        engine.call("GET", "/version")
    except OSError:
        return None
    return engine


@pytest.fixture(scope="session")
def docker_engine() -> DockerEngine:
    engine = find_engine()
    if engine is None:
        missing("a Docker engine", "start one (dockerd), or set DOCKER_HOST to one that this user may use")
    return engine


@pytest.fixture(scope="session")
def shell_image(docker_engine: DockerEngine) -> Iterator[str]:
    """An image with busybox's sh and bash."""
    name = f"mlfleet-test/shell:{uuid.uuid4().hex[:8]}"
    docker_engine.import_image(name, tar(shell_files()), "ENV PATH=/usr/local/bin:/usr/bin:/bin")
    yield name
    docker_engine.remove_with_children(name)


@pytest.fixture(scope="session")
def python_image(docker_engine: DockerEngine) -> Iterator[str]:
    """An image with this Python's standard library and bash."""
    name = f"mlfleet-test/python:{uuid.uuid4().hex[:8]}"
    content = tar([*shell_files(), *_python_files()])
    docker_engine.import_image(name, content, "ENV PATH=/usr/local/bin:/usr/bin:/bin")
    yield name
    docker_engine.remove_with_children(name)


_File = tuple[str, "Path | str"]  # the path in the image, and a file here or the target of a link


def shell_files() -> Iterator[_File]:
    busybox = shutil.which("busybox")
    if busybox is None or "statically linked" not in _file_kind(busybox):
        missing("a static busybox", "apt-get install busybox-static")
    yield "bin/busybox", Path(busybox)
    for applet in _APPLETS:
        yield f"bin/{applet}", "busybox"
    bash = shutil.which("bash") or missing("bash", "apt-get install bash")
    yield "bin/bash", Path(bash)
    yield from _libraries([Path(bash)])
    yield "usr/bin/env", "../../bin/env"


def _python_files() -> Iterator[_File]:
    program = Path(sys.executable).resolve()
    library = Path(sysconfig.get_path("stdlib"))
    yield str(program)[1:], program
    yield "usr/local/bin/python", str(program)
    yield "usr/local/bin/python3", str(program)
    loaded = [program]
    for folder, names, files in os.walk(library):
        unwanted = ("__pycache__", "test", "tests", "site-packages", "dist-packages", "idlelib", "ensurepip", "tkinter")
        names[:] = [name for name in names if name not in unwanted and not name.startswith("config-")]
        for name in files:
            path = Path(folder, name)
            yield str(path)[1:], path.resolve()
            if path.suffix == ".so":
                loaded.append(path)
    yield from _libraries(loaded)


def _file_kind(path: str) -> str:
    # A dynamic program names its loader in a segment of its own (PT_INTERP).
    return "dynamically linked" if b"/ld-linux" in Path(path).read_bytes()[:4096] else "statically linked"


def _libraries(programs: Iterable[Path]) -> Iterator[_File]:
    seen: set[str] = set()
    for program in programs:
        listed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
        for word in listed.split():
            if word.startswith("/") and word not in seen and Path(word).is_file():
                seen.add(word)
                yield word[1:], Path(word).resolve()


def tar(files: Iterable[_File]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, mode in (("tmp", 0o1777), ("root", 0o700), ("etc", 0o755)):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, mode
            archive.addfile(folder)
        # A layer like no other, so that what was built on it can be told from what other tests have built.
        own = ("etc/made-for", uuid.uuid4().hex)
        for name, text in (("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"), ("etc/group", "root:x:0:\n"), own):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
        seen: set[str] = set()
        for name, source in files:
            if name in seen:
                continue
            seen.add(name)
            if isinstance(source, Path):
                archive.add(source, name, recursive=False)
            else:
                link = tarfile.TarInfo(name)
                link.type, link.linkname = tarfile.SYMTYPE, source
                archive.addfile(link)
    return buffer.getvalue()

"""A Docker engine of a test's own, beside the one that is there: to be stopped, killed, filled up or locked.

It keeps everything in a folder of its own, makes no bridge and touches no firewall rules; so its containers have
the network of the host or none.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from components import missing
from components.docker import DockerEngine, shell_files, tar

__all__ = ["OwnEngine", "own_engine", "start_engine"]

STARTS_WITHIN = 60.0  # seconds, on a busy machine
STOPS_WITHIN = 60.0


class OwnEngine(DockerEngine):
    """An engine that can be stopped and started again; see `own_engine`.

    Attributes:
        socket: its Unix socket.
        image: busybox's sh and bash, once `add_image` was called.
    """

    image = "mlfleet-test/shell:own"

    def __init__(self, folder: Path, *flags: str) -> None:
        self.socket = folder / "engine.sock"
        super().__init__(f"unix://{self.socket}")
        self.folder = folder
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("dockerd") or missing("dockerd", "apt-get install docker.io")
        command = [
            program, f"--host={self.url}", f"--pidfile={self.folder}/pid", f"--data-root={self.folder}/data",
            f"--exec-root={self.folder}/exec", f"--containerd-namespace={self.folder.name}",
            f"--containerd-plugins-namespace={self.folder.name}-plugins", "--bridge=none", "--iptables=false",
            "--ip-forward=false", *self._flags,
        ]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + STARTS_WITHIN
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                self.call("GET", "/version")
            except (OSError, AssertionError):
                time.sleep(0.05)
            else:
                return
        text = (self.folder / "log").read_text(errors="replace")
        if "permitted" in text or "denied" in text:
            missing("the right to start a Docker engine", f"run as root, outside of a container: {text[-500:]}")
        raise RuntimeError(f"the engine did not start:\n{text[-3000:]}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it, and wait until it is gone. What becomes of its containers is its own affair."""
        process, self._process = self._process, None
        assert process is not None
        process.send_signal(how)
        process.wait(STOPS_WITHIN)
        if how is signal.SIGKILL:
            # Its containerd dies with it. Where no process 1 reaps, the next engine would take it for a living one.
            (self.folder / "exec/containerd/containerd.pid").unlink(missing_ok=True)

    def add_image(self) -> None:
        self.import_image(self.image, tar(shell_files()), "ENV PATH=/usr/local/bin:/usr/bin:/bin")

    def close(self) -> None:
        """End it with all that runs in it, and leave nothing mounted."""
        if self._process is not None and self._process.poll() is None:
            found = self.call("GET", "/containers/json?all=1")
            for item in found if isinstance(found, list) else [found]:
                self.remove(str(item["Id"]))
            self.stop()
        _end_what_is_left(self.folder)
        _unmount_below(self.folder)


def _end_what_is_left(folder: Path) -> None:
    """End the containers of an engine that was killed, and the shims that hold them."""
    shims = [pid for pid, words in _processes() if b"containerd-shim" in words[0] and folder.name.encode() in words]
    for pid in shims:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)


def _processes() -> Iterator[tuple[int, list[bytes]]]:
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            yield int(entry), Path("/proc", entry, "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue


def _unmount_below(folder: Path) -> None:
    """Unmount what is mounted below a folder, the innermost first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in reversed(points):
        if point.startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", point], check=False)


@contextmanager
def start_engine(*flags: str, size: str | None = None) -> Iterator[OwnEngine]:
    """Start an engine with these flags of dockerd; `size` puts its data on a small disk."""
    if os.getuid() != 0:
        missing("the right to start a Docker engine", "run as root")
    # pytest's folders are too long for a socket.
    folder = Path(os.path.realpath("/tmp"), f"mlfleet-engine-{uuid.uuid4().hex[:8]}")
    folder.mkdir(mode=0o700)
    engine = OwnEngine(folder, *flags)
    try:
        if size is not None:
            (folder / "data").mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "mlfleet-test", str(folder / "data")]
            if subprocess.run(command, check=False).returncode != 0:
                missing("the right to mount", "run as root, outside of a container")
        engine.start()
        engine.add_image()
        yield engine
    finally:
        engine.close()
        shutil.rmtree(folder)


@pytest.fixture
def own_engine() -> Iterator[Callable[..., OwnEngine]]:
    """`start_engine`, for the time of the test."""
    with ExitStack() as stack:
        yield lambda *flags, **options: stack.enter_context(start_engine(*flags, **options))

"""A separate Docker engine for one test, which the test may stop, kill, fill up or lock.

It keeps everything in a folder of its own and touches no firewall rules. It has a bridge of its own, since an engine
without one (``--bridge=none``) deletes that of all others, ``docker0``. Containers get the network of the host or none.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import signal
import socket
import struct
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
        folder: The folder that holds all its files.
        bridge: The name of its own network interface.
        image: An image with busybox's sh and bash, after a call of `add_image`.
    """

    image = "mlfleet-test/shell:own"

    def __init__(self, folder: Path, *flags: str) -> None:
        super().__init__(f"unix://{folder}/engine.sock")
        self.folder = folder
        self.bridge = f"mlf-{folder.name[-8:]}"
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("dockerd") or missing("dockerd", "apt-get install docker.io")
        command = [
            program, f"--host={self.url}", f"--pidfile={self.folder}/pid", f"--data-root={self.folder}/data",
            f"--exec-root={self.folder}/exec", f"--containerd-namespace={self.folder.name}",
            f"--containerd-plugins-namespace={self.folder.name}-plugins", f"--bridge={self.bridge}",
            "--iptables=false", "--ip-forward=false", *self._flags,
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
        """Stop the engine with a signal and wait for its end; its containers are left as they are."""
        process, self._process = self._process, None
        assert process is not None
        process.send_signal(how)
        process.wait(STOPS_WITHIN)
        if how is signal.SIGKILL:
            # Its containerd dies with it. Without a process 1 that reaps, the next engine would take it for alive.
            (self.folder / "exec/containerd/containerd.pid").unlink(missing_ok=True)

    def add_image(self) -> None:
        self.import_image(self.image, tar(shell_files()), "ENV PATH=/usr/local/bin:/usr/bin:/bin")

    def close(self) -> None:
        """End the engine and its containers, and leave nothing mounted."""
        if self._process is not None and self._process.poll() is None:
            found = self.call("GET", "/containers/json?all=1")
            for item in found if isinstance(found, list) else [found]:
                self.remove(str(item["Id"]))
            self.stop()
        _end_what_is_left(self.folder)
        _unmount_below(self.folder)
        _remove_bridge(self.bridge)


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


def _make_bridge(name: str) -> None:
    """Make a network bridge with an address (linux/sockios.h, netdevice(7)); Debian's minimal systems have no ip(8)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x89A0, name.encode() + b"\0")  # SIOCBRADDBR
        # From the network for benchmarks of devices (RFC 2544), which is not routed.
        address = socket.inet_aton(f"198.18.{random.randrange(256)}.1")
        for request, value in ((0x8916, address), (0x891C, b"\xff\xff\xff\0")):  # SIOCSIFADDR, SIOCSIFNETMASK
            fcntl.ioctl(control, request, struct.pack("16sHxx4s8x", name.encode(), socket.AF_INET, value))
        fcntl.ioctl(control, 0x8914, struct.pack("16sH14x", name.encode(), 1))  # SIOCSIFFLAGS, IFF_UP


def _remove_bridge(name: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control, contextlib.suppress(OSError):
        fcntl.ioctl(control, 0x8914, struct.pack("16sH14x", name.encode(), 0))  # SIOCSIFFLAGS
        fcntl.ioctl(control, 0x89A1, name.encode() + b"\0")  # SIOCBRDELBR


def _unmount_below(folder: Path) -> None:
    """Unmount all mounts below a folder, the innermost first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in reversed(points):
        if point.startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", point], check=False)


@contextmanager
def start_engine(*flags: str, size: str | None = None) -> Iterator[OwnEngine]:
    """Start an engine with these flags of dockerd; with `size`, its data is on a small disk."""
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
        try:
            _make_bridge(engine.bridge)
        except OSError as error:
            missing("the right to make a network bridge", f"run as root, outside of a container ({error})")
        engine.start()
        engine.add_image()
        yield engine
    finally:
        engine.close()
        shutil.rmtree(folder)


@pytest.fixture
def own_engine() -> Iterator[Callable[..., OwnEngine]]:
    """The function `start_engine`; the engines end with the test."""
    with ExitStack() as stack:
        yield lambda *flags, **options: stack.enter_context(start_engine(*flags, **options))

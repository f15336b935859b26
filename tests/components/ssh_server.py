"""An OpenSSH server for git and sftp, for this user only, with keys of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from components import free_port, missing, stop


@dataclass(frozen=True)
class SshServer:
    """A running sshd.

    Attributes:
        port: on 127.0.0.1.
        user: The name of the only user who can log in, the user that runs the tests.
        key: the private key that it takes.
        known_hosts: a file with its host key.
    """

    port: int
    user: str
    key: Path
    known_hosts: Path

    @property
    def command(self) -> str:
        """A value for GIT_SSH_COMMAND that takes nothing from the user's own ssh configuration."""
        return (
            f"ssh -F none -i {self.key} -o IdentitiesOnly=yes -o UserKnownHostsFile={self.known_hosts} -o BatchMode=yes"
        )


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """An ssh server on loopback."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if sshd is None:
        missing("sshd", "apt-get install openssh-server")
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port = free_port()
    (folder / "authorized_keys").write_text((folder / "user.pub").read_text())
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized_keys\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "PermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it when it runs as root
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [sshd, "-D", "-e", "-f", str(folder / "config")], stdin=subprocess.DEVNULL, stderr=log
        ) as process,
    ):
        try:
            _wait_for_banner(port, process, folder / "log")
            user = pwd.getpwuid(os.geteuid()).pw_name
            yield SshServer(port, user, folder / "user", folder / "known_hosts")
        finally:
            stop(process)


def _wait_for_banner(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                if connection.recv(4) == b"SSH-":
                    return
        except OSError:
            time.sleep(0.02)
    missing("a working sshd", log.read_text()[-500:] or "it does not answer")

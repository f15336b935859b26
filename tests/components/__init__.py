"""Real components for the tests, each started on loopback by the fixture that needs it.

A component that is missing on a person's machine skips its tests and says why; with MLFLEET_REQUIRE_ALL=1 (CI) it
fails them.
"""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import suppress
from typing import NoReturn

import psutil
import pytest


def missing(what: str, how: str) -> NoReturn:
    """Skip the test, or fail it where everything is required.

    Args:
        what: The component.
        how: The way to install or start it.
    """
    text = f"{what} is missing: {how}"
    if os.environ.get("MLFLEET_REQUIRE_ALL") == "1":
        pytest.fail(text, pytrace=False)
    pytest.skip(text)


def free_port() -> int:
    """Return a port of loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(process: subprocess.Popen[bytes], *, timeout: float = 10.0) -> None:
    """End a process and everything that it has started: first by SIGTERM, then by SIGKILL.

    Args:
        process: The process.
        timeout: Seconds to wait after each of the signals.
    """
    family: list[psutil.Process] = []
    with suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout)
    for each in family:
        with suppress(psutil.Error):
            each.kill()
    process.kill()
    process.wait(timeout)

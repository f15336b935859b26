"""Real components for the tests, each started on loopback by the fixture that needs it.

A component that is missing on a person's machine skips its tests and says why; with MLFLEET_REQUIRE_ALL=1 (CI) it
fails them.
"""

from __future__ import annotations

import os
import socket
from typing import NoReturn

import pytest


def missing(what: str, how: str) -> NoReturn:
    """Skip the test, or fail it where everything is required.

    Args:
        what: the component.
        how: what installs or starts it.
    """
    text = f"{what} is missing: {how}"
    if os.environ.get("MLFLEET_REQUIRE_ALL") == "1":
        pytest.fail(text, pytrace=False)
    pytest.skip(text)


def free_port() -> int:
    """A port of loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""A real browser without a window: Debian's Chromium."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from components import missing

__all__ = ["Browser"]

Browser = Callable[[Path], str]
"""A function that opens a page, runs its scripts, and returns the resulting document as HTML."""

_QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    """The browser, with a profile of its own."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        missing("the browser Chromium", "apt-get install chromium")
    profile = tmp_path_factory.mktemp("browser")

    def open_page(page: Path) -> str:
        argv = [program, *_QUIET, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return open_page

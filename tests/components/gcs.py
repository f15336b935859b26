"""An emulator of Google Cloud Storage on loopback."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from components import free_port, missing, stop

__all__ = ["gcs_emulator"]

_STARTS_WITHIN = 60.0


@pytest.fixture(scope="session")
def gcs_emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the emulator, which has one bucket named ``bucket``."""
    for package, name in (("gcp_storage_emulator", "gcp-storage-emulator"), ("gcsfs", "gcsfs")):
        if importlib.util.find_spec(package) is None:
            missing("Google's storage", f"pip install {name}")
    folder = tmp_path_factory.mktemp("gcs")
    port = free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--default-bucket", "bucket"]
    argv = [sys.executable, "-m", "gcp_storage_emulator", "--data-dir", str(folder), "start", *options]
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen(argv, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_it_answers(f"http://127.0.0.1:{port}/storage/v1/b", process, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with opener.open(url, timeout=5):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the emulator of Google's storage did not start:\n{log.read_text(errors='replace')[-2000:]}")

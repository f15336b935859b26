"""The backend of docs/writing-a-backend.md, with the harness of that page, as a plugin author would test it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from components.plugins import install_plugin, on_path
from mlfleet.testing import BackendContract

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-backend.md"


# The whole contract, in an interpreter of its own.
@pytest.mark.timeout(180)
def test_the_documented_backend_passes_the_contract_with_the_documented_harness(tmp_path: Path) -> None:
    module, test = re.findall(r"^```python no-run\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    (entry,) = re.findall(r"^nice = \"(.*)\"$", PAGE.read_text(), re.M)
    install_plugin(tmp_path, "mlfleet_nice", module, group="mlfleet.backends", entry=f"nice = {entry}")
    (tmp_path / "test_nice.py").write_text(test)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"),
            *("-c", os.devnull, "-o", "asyncio_default_fixture_loop_scope=function"),
            *("--rootdir", str(tmp_path), str(tmp_path / "test_nice.py")),
        ],
        env=on_path(tmp_path / "installed"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    tests = [name for name in dir(BackendContract) if name.startswith("test_")]
    assert f"{len(tests)} passed" in done.stdout
    asked = subprocess.run(
        [sys.executable, "-c", "from mlfleet.backends.registry import find; print(find('nice').__module__)"],
        env=on_path(tmp_path / "installed"),
        capture_output=True,
        text=True,
    )
    assert asked.stdout == "mlfleet_nice\n", asked.stderr

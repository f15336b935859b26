"""SIGTERM for programs that use mlfleet by ``asyncio.run``, with what docs/cancellation.md tells them to do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.mlflow_server import MlflowServer
from components.projects import pid_is_gone, write_project
from mlfleet import RunStatus
from mlfleet.tracking import RestTracking

pytestmark = pytest.mark.timeout(150)  # the MLflow server may have to start

PAGE = Path(__file__).parent.parent.parent / "docs" / "cancellation.md"
(ON_THE_PAGE,) = re.findall(r"^```python\n(import asyncio\nimport signal\n.*?)^```$", PAGE.read_text(), re.M | re.S)
WITHOUT_FLEET = """\
import asyncio, signal, sys, mlfleet

async def main():
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    run = await mlfleet.submit("examples/quickstart")
    await asyncio.Event().wait()

try:
    asyncio.run(main())
except asyncio.CancelledError:
    sys.exit(128 + signal.SIGTERM)
"""
# It does not end when it is asked to, and neither does what it has started.
STUBBORN = "trap 'touch ../../asked' TERM; echo $$ > ../../pid\nwhile :; do sleep 0.1; done"


@pytest.mark.parametrize("program", [ON_THE_PAGE, WITHOUT_FLEET], ids=["fleet", "submit"])
@pytest.mark.parametrize("signals", [1, 3])
async def test_sigterm_ends_the_runs_and_mlflow_is_told(
    program: str, signals: int, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    write_project(tmp_path / "examples" / "quickstart", STUBBORN)
    # A short grace, for the sake of the time that this test takes.
    options = 'env_manager="local", timeouts=mlfleet.Timeouts(cancel_grace=1)'
    program = program.replace('"examples/quickstart")', f'"examples/quickstart", {options})')
    name = f"signals {tmp_path}"
    environ = {**os.environ, "MLFLOW_TRACKING_URI": mlflow_server.url, "MLFLOW_EXPERIMENT_NAME": name}
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environ) as process:
        pid = await_text(tmp_path / "pid", process)
        process.send_signal(signal.SIGTERM)
        if signals > 1:
            await_text(tmp_path / "asked", process, empty=True)
        for _ in range(signals - 1):
            process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    assert pid_is_gone(int(pid))
    async with RestTracking(mlflow_server.url) as tracking:
        found = await tracking.search_runs([await tracking.experiment_id(name)])
    assert [run.status for run in found] == [RunStatus.KILLED]


def await_text(path: Path, process: subprocess.Popen[bytes], *, empty: bool = False) -> str:
    """What is in a file, as soon as there is something (or at least the file)."""
    while process.poll() is None:
        if path.exists() and (empty or path.read_text()):
            return path.read_text()
        time.sleep(0.02)
    raise AssertionError(f"the program ended with {process.returncode}")

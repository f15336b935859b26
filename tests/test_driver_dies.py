"""A program that is killed while its local runs go on: each test is a script of its own in a process of its own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from components.projects import pid_is_gone, write_project
from components.scripts import Script
from mlfleet._process.guardian import MARKER_VARIABLE

pytestmark = pytest.mark.timeout(90)  # each script imports mlflow, which takes seconds on a busy machine

# The command's own process, a child in its session, and one that left it.
COMMAND = "setsid sleep 1000 &\nleft=$!\nsleep 1000 &\necho $$ $! $left > pids.new; mv pids.new pids-{name}; wait"


@pytest.fixture
def start(tmp_path: Path, new_store: Callable[[Path], str]) -> Iterator[Callable[[str], Script]]:
    store = new_store(tmp_path / "mlflow.db")
    with ExitStack() as stack:
        yield lambda code: stack.enter_context(Script(tmp_path, code, store))


def pids(path: Path) -> list[int]:
    """Wait for the file in which a command names its processes."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} was not written"
        time.sleep(0.05)
    return [int(word) for word in path.read_text().split()]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while not all(pid_is_gone(pid) for pid in pids):
        assert time.monotonic() < deadline, "still running"
        time.sleep(0.05)


def kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


UNNAMED = """
import asyncio, mlfleet
asyncio.run(mlfleet.run_async("demo", parameters={"name": "unnamed"}, env_manager="local"))
"""

BOTH = """
import asyncio, mlfleet
async def main():
    await asyncio.gather(
        mlfleet.run_async("demo", parameters={"name": "unnamed"}, env_manager="local"),
        mlfleet.sweep_async("demo", mlfleet.grid(name=["named"]), name="sweep", env_manager="local"),
    )
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_script_leaves_no_command(
    start: Callable[[str], Script], tmp_path: Path, number: signal.Signals
) -> None:
    write_project(tmp_path / "demo", COMMAND, parameters="name: string")
    script = start(UNNAMED)
    commands = pids(tmp_path / "demo" / "pids-unnamed")
    script.process.send_signal(number)
    wait_until_gone(commands)


def test_a_loop_that_is_never_closed_leaves_no_command(start: Callable[[str], Script], tmp_path: Path) -> None:
    write_project(tmp_path / "demo", COMMAND, parameters="name: string")
    script = start(
        """
        import asyncio, os, mlfleet
        loop = asyncio.new_event_loop()
        run = loop.run_until_complete(mlfleet.submit("demo", parameters={"name": "unnamed"}, env_manager="local"))
        async def read():
            while not os.path.exists("demo/pids-unnamed"):
                await asyncio.sleep(0.05)
        loop.run_until_complete(read())
        """
    )
    commands = pids(tmp_path / "demo" / "pids-unnamed")
    script.end()
    wait_until_gone(commands)


def test_a_named_sweep_outlives_its_driver_and_the_driver_above_it(
    start: Callable[[str], Script], tmp_path: Path
) -> None:
    write_project(tmp_path / "demo", COMMAND, parameters="name: string")
    (tmp_path / "inner.py").write_text(BOTH)
    write_project(tmp_path / "outer", f"cd {tmp_path}; exec python inner.py")
    script = start("import mlfleet; mlfleet.run('outer', env_manager='local')")
    named = pids(tmp_path / "demo" / "pids-named")
    try:
        unnamed = pids(tmp_path / "demo" / "pids-unnamed")
        markers = {psutil.Process(pid).environ()[MARKER_VARIABLE] for pid in unnamed}
        assert len(markers) == 1
        inner = int(markers.pop().partition("-")[0])
        script.process.kill()
        wait_until_gone([inner, *unnamed])
        assert not any(pid_is_gone(pid) for pid in named)
        assert not any(MARKER_VARIABLE in psutil.Process(pid).environ() for pid in named)
    finally:
        kill(named)


def test_the_guardian_of_a_killed_inner_driver_ends_its_runs(start: Callable[[str], Script], tmp_path: Path) -> None:
    write_project(tmp_path / "demo", COMMAND, parameters="name: string")
    (tmp_path / "inner.py").write_text(UNNAMED)
    write_project(tmp_path / "outer", f"cd {tmp_path}; exec python inner.py")
    script = start("import mlfleet; mlfleet.run('outer', env_manager='local')")
    unnamed = pids(tmp_path / "demo" / "pids-unnamed")
    os.kill(int(psutil.Process(unnamed[0]).environ()[MARKER_VARIABLE].partition("-")[0]), signal.SIGKILL)
    wait_until_gone(unnamed)
    assert script.end()[0] == 1
    assert script.statuses()[0] == "FAILED"


def test_without_a_guardian_runs_go_on_and_one_warning_says_so(start: Callable[[str], Script], tmp_path: Path) -> None:
    write_project(tmp_path / "demo", "echo hello")
    script = start(
        """
        import sys
        import mlfleet
        sys.executable, sys.exec_prefix = "/usr/sbin/uwsgi", "/nowhere"  # as in a program that embeds Python
        for _ in range(3):
            mlfleet.run("demo", env_manager="local")
        """
    )
    code, out, err = script.end()
    assert (code, out) == (0, "hello\n" * 3)
    assert err == (
        "local runs will go on if this process is killed: their guardian cannot be started: "
        "no Python was found to run it with\n"
    )

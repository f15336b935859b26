"""Runs whose driver was killed: each way to look at them concludes them, in a store of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from components.projects import pid_is_gone, write_project
from components.scripts import Script
from mlfleet import Fleet, RunStatus
from mlfleet._cli import main
from mlfleet.errors import ExecutionException, UsageError
from mlfleet.tracking import RunInfo, open_tracking

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]  # a script and the test import mlflow, which takes seconds

DRIVER = """
import asyncio, mlfleet
async def main():
    timeouts = mlfleet.Timeouts(cancel_grace=0.5)
    async with mlfleet.Fleet(max_concurrent=1, timeouts=timeouts) as fleet:
        begun = await fleet.submit("demo", env_manager="local")
        queued = await fleet.submit("demo", env_manager="local")
        async for line in begun.logs():
            print(begun.run_id, queued.run_id, line, flush=True)
asyncio.run(main())
"""


PIPES = shutil.ignore_patterns("*.requests")  # of the dead driver: they cannot be copied


@dataclass(frozen=True)
class Left:
    """What a killed driver has left: a run that had begun, and one that had not.

    Attributes:
        folder: The folder with the store ``mlflow.db`` and the state folder ``state``.
        begun: The id of the first run.
        queued: The id of the second run.
    """

    folder: Path
    begun: str
    queued: str

    @property
    def store(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    def runs(self) -> dict[str, RunInfo]:
        async def read() -> dict[str, RunInfo]:
            async with open_tracking(self.store) as tracking:
                return {run_id: await tracking.get_run(run_id) for run_id in (self.begun, self.queued)}

        return anyio.run(read)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while not pid_is_gone(pid):
        assert time.monotonic() < deadline, "the command still runs"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, _empty_store: Path) -> Left:
    """Kill a driver, and let its guardian end the command."""
    folder = tmp_path_factory.mktemp("killed")
    shutil.copyfile(_empty_store, folder / "mlflow.db")
    write_project(folder / "demo", "echo $$; sleep 600")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLEET_STATE_DIR", str(folder / "state"))
        patch.setenv("MLFLEET_CACHE_DIR", str(folder / "cache"))
        with Script(folder, DRIVER, f"sqlite:///{folder}/mlflow.db") as script:
            begun, queued, pid = script.line().split()
            script.process.kill()
            wait_until_gone(int(pid))
    return Left(folder, begun, queued)


@pytest.fixture
def left(killed: Left, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Left:
    """A copy of it, so that what one command writes is not there for the next. The next Fleet only knows the first."""
    shutil.copyfile(killed.folder / "mlflow.db", tmp_path / "mlflow.db")
    shutil.copytree(killed.folder / "state", tmp_path / "state", ignore=PIPES)
    monkeypatch.setenv("MLFLEET_STATE_DIR", str(tmp_path / "state"))
    mine = Left(tmp_path, killed.begun, killed.queued)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mine.store)
    return mine


@pytest.fixture(autouse=True)
def blockbuster() -> None:
    """Let the command line block its event loop, on which nothing else is."""


def check_died(run: RunInfo) -> None:
    assert run.status is RunStatus.FAILED
    assert (run.tags["mlfleet.reason"], run.tags["mlfleet.failure_kind"]) == ("its driver died", "infrastructure")
    assert run.end_time is not None


def command(*arguments: str) -> int:
    return main(arguments)


def test_ps_lists_them_and_concludes_those_that_are_named(left: Left, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("ps", "--json") == 0
    assert local_rows(capfd.readouterr().out) == {left.begun: False, left.queued: False}
    assert command("ps", left.begun) == 0
    assert f"{left.begun}  local   failed " in capfd.readouterr().out
    runs = left.runs()
    check_died(runs[left.begun])
    assert runs[left.queued].status is RunStatus.RUNNING
    assert command("ps", "--json") == 0
    assert local_rows(capfd.readouterr().out) == {left.queued: False}


def local_rows(output: str) -> dict[str, bool]:
    """Return which local runs are listed, and whether they are supervised. Containers may be those of other tests."""
    return {row["run_id"]: row["supervised"] for row in json.loads(output) if row["backend"] == "local"}


def test_wait_concludes_them(left: Left, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("wait", left.begun, left.queued) == 1
    lines = sorted(capfd.readouterr().out.splitlines())
    assert lines == sorted(f"{run_id} FAILED (its driver died)" for run_id in (left.begun, left.queued))
    for run in left.runs().values():
        check_died(run)


def test_cancel_keeps_their_end(left: Left, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("cancel", left.begun) == 0
    assert capfd.readouterr().out == f"{left.begun} FAILED (its driver died)\n"
    check_died(left.runs()[left.begun])


@pytest.mark.parametrize("follow", [(), ("-f",)])
def test_logs_print_and_conclude_them(left: Left, capfd: pytest.CaptureFixture[str], follow: tuple[str, ...]) -> None:
    assert command("logs", *follow, left.begun) == 0
    assert capfd.readouterr().out.strip().isdigit()
    check_died(left.runs()[left.begun])


def test_attach_concludes_them(left: Left) -> None:
    async def attach() -> None:
        async with Fleet(tracking_uri=left.store) as fleet:
            run = await fleet.attach(left.begun)
            assert await run.get_status() is RunStatus.FAILED
            with pytest.raises(ExecutionException, match="its driver died"):
                await run.check()
            with pytest.raises(UsageError, match="cannot be attached to"):
                await fleet.attach(left.begun)

    anyio.run(attach)
    check_died(left.runs()[left.begun])


def test_the_next_fleet_concludes_those_of_its_own_store_in_the_background(
    killed: Left, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: Left
) -> None:
    shutil.copytree(killed.folder / "state", tmp_path / "again", ignore=PIPES)
    monkeypatch.setenv("MLFLEET_STATE_DIR", str(tmp_path / "again"))
    kept = tmp_path / "kept.db"
    shutil.copyfile(killed.folder / "mlflow.db", kept)

    async def open_next(store: str) -> None:
        async with Fleet(tracking_uri=store) as fleet:
            while store == killed.store and list((tmp_path / "again" / "active").glob("*.json")):  # noqa: ASYNC110
                await anyio.sleep(0.05)
            assert fleet.runs == ()

    try:
        anyio.run(open_next, left.store)
        assert {run.status for run in left.runs().values()} == {RunStatus.RUNNING}
        anyio.run(open_next, killed.store)
        for run in killed.runs().values():
            check_died(run)
    finally:
        shutil.copyfile(kept, killed.folder / "mlflow.db")


def test_cancel_ends_what_a_driver_without_a_guardian_has_left(
    tmp_path: Path,
    new_store: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    store = new_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    write_project(tmp_path / "demo", "echo $$; sleep 600")
    code = 'import sys; sys.executable, sys.exec_prefix = "/usr/sbin/uwsgi", "/nowhere"' + DRIVER
    with Script(tmp_path, code, store) as script:
        begun, queued, pid = script.line().split()
        script.process.kill()
        script.process.wait()
    try:
        assert not pid_is_gone(int(pid))
        assert command("cancel", begun, queued) == 0
        assert sorted(capfd.readouterr().out.splitlines()) == sorted(
            [f"{begun} KILLED", f"{queued} FAILED (its driver died)"]
        )
        assert pid_is_gone(int(pid))
    finally:
        if not pid_is_gone(int(pid)):
            os.kill(int(pid), signal.SIGKILL)

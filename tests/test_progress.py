"""``progress=True`` on a terminal and where there is none. tests/test_notebook.py has the notebooks."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

import mlfleet
from components.command_line import mlfleet as mlfleet_command
from components.command_line import on_terminal, read_json
from components.plugins import on_path
from components.projects import pid_is_gone, write_project
from fakes.scripted_server import scripted
from fakes.small_mlflow import SmallMlflow
from mlfleet import ExecutionException, RunEvent, Stage, SweepCounts, UsageError, grid
from mlfleet._cli.sweep_json import SweepJson
from mlfleet._progress import BestRuns, SweepScreen
from mlfleet._progress.painters import LinePainter
from mlfleet._progress.picture import Painter, Picture
from mlfleet._progress.screen import RunScreen, shown

PYTHON = (sys.executable, "-c")


@pytest.fixture
async def mlflow(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SmallMlflow]:
    mlflow = SmallMlflow()
    async with scripted(mlflow.script) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server.place}")
        yield mlflow


async def test_a_terminal_shows_a_sweep_and_ctrl_c_ends_it(mlflow: SmallMlflow, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo $$ waits {x}; exec sleep 1000", parameters="x: string")
    options = "max_concurrent=2, env_manager='local', progress=True"
    script = f"import mlfleet; mlfleet.sweep({uri!r}, mlfleet.grid(x=[1, 2]), {options})"
    with on_terminal(script, argv=PYTHON) as terminal:
        await asyncio.to_thread(terminal.read_until, "waits 2")
        assert "0/2" in terminal.plain
        assert "2 running" in terminal.plain
        pids = [int(line.split(f" waits {x}")[0].split()[-1]) for x in (1, 2) for line in [terminal.plain]]
        terminal.press_ctrl_c()
        assert await asyncio.to_thread(terminal.finish) != 0
    assert all(pid_is_gone(pid) for pid in pids)
    assert mlflow.statuses == ["KILLED"] * 3
    assert "is KILLED: 0 finished, 0 failed, 2 killed" in " ".join(terminal.plain.split())
    assert "KeyboardInterrupt" in terminal.plain
    assert terminal.seen.rfind("\x1b[?25h") > terminal.seen.rfind("\x1b[?25l")  # the cursor is visible again


async def test_runs_that_share_a_terminal_leave_each_line_whole(mlflow: SmallMlflow, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo says {x}; test {x} = 1", parameters="x: string")
    script = f"""
import asyncio, mlfleet
async def one(x):
    await mlfleet.run_async({uri!r}, parameters={{"x": x}}, env_manager="local", progress=True)
async def main():
    print(await asyncio.gather(one(1), one(2), return_exceptions=True))
asyncio.run(main())
"""
    with on_terminal(script, argv=PYTHON) as terminal:
        assert await asyncio.to_thread(terminal.finish) == 0
    for run_id, run in mlflow.runs.items():
        end = {"FINISHED": "FINISHED", "FAILED": "FAILED: exit code 1"}[run["info"]["status"]]
        assert f"mlfleet: running '' (run {run_id})" in terminal.plain
        assert f"mlfleet: '' (run {run_id}) is {end}" in terminal.plain
    assert sorted(mlflow.statuses) == ["FAILED", "FINISHED"]
    assert "[None, ExecutionException" in terminal.plain


async def test_elsewhere_there_are_lines(
    mlflow: SmallMlflow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = write_project(tmp_path / "demo", "echo says {x}; test {x} = 1", parameters="x: string")
    await mlfleet.run_async(uri, parameters={"x": "1"}, env_manager="local", progress=True)
    with pytest.raises(ExecutionException):
        await mlfleet.run_async(uri, parameters={"x": "2"}, env_manager="local", progress=True)
    result = await mlfleet.sweep_async(uri, grid(x=[1, 2]), env_manager="local", progress=True, metric="loss")
    first, second, sweep, *_ = mlflow.runs
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"mlfleet: running '' (run {first})",
        f"mlfleet: '' (run {first}) is FINISHED",
        f"mlfleet: running '' (run {second})",
        f"mlfleet: '' (run {second}) is FAILED: exit code 1",
        f"mlfleet: sweep '' (run {sweep}): 2 points, up to {err.split('up to ')[1].split()[0]} at once",
        "point 1: x=2: exit code 1: says 2",
        "mlfleet: sweep '' is FAILED: 1 finished, 1 failed",
    ]
    assert [point.run is None for point in result.results] == [False, False]
    assert (result.metric, result.goal) == ("loss", "min")


async def test_what_a_backend_does_is_shown_under_its_own_name(
    mlflow: SmallMlflow, tmp_path: Path, plugin_folder: Path
) -> None:
    uri = write_project(tmp_path / "demo", "echo says {x}", parameters="x: string")
    options = (uri, "-b", "echo", "--env-manager", "local")
    environment = on_path(plugin_folder)
    doing = "looking for a place to say hello"

    done = await asyncio.to_thread(mlfleet_command, "run", *options, "-P", "x=1", env=environment)
    assert done.returncode == 0, done.stderr
    started, shown, ended, _ = done.stderr.splitlines()
    assert started.startswith("mlfleet: running")
    assert shown == f"mlfleet: {doing}"
    assert ended.endswith("is FINISHED")

    with on_terminal("run", *options, "-P", "x=1", env=environment) as terminal:
        assert await asyncio.to_thread(terminal.finish) == 0
    before, _, after = terminal.seen.partition("mlfleet: running")
    assert "preparing the environment" in before
    assert "building" not in terminal.plain
    assert "fetching" not in terminal.plain  # the project is a folder here
    # No spinner comes back where the project writes.
    assert f"mlfleet: {doing}" in after
    assert "\x1b" not in after

    done = await asyncio.to_thread(mlfleet_command, "sweep", *options, "-P", "x=1,2", env=environment)
    lines = done.stderr.splitlines()
    assert lines.count(f"mlfleet: {doing}") == 1
    assert sum(" FINISHED point " in line for line in lines) == 2

    done = await asyncio.to_thread(mlfleet_command, "sweep", *options, "-P", "x=1,2", "--json", env=environment)
    events = [read_json(line, "event") for line in done.stdout.splitlines()]
    assert [event["event"] for event in events if event.get("detail") == doing] == ["starting"] * 2


def test_lines_about_the_state_come_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    counts = SweepCounts(total=3, finished=1, running=2)
    often, seldom = LinePainter(interval=0), LinePainter(interval=3600)
    for painter in (often, seldom):
        for picture in (
            Picture(lines=[("red", "lasting \x1b[31mline")]),
            *[Picture(lines=(), title="s", counts=counts)] * 2,
        ):
            painter.paint(picture)
        painter.close()
        shown = capsys.readouterr().err.splitlines()
        assert shown == ["lasting line"] + ["mlfleet: s 1/3: 1 finished, 2 running"] * (painter is often)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"synchronous": False}, "give synchronous=True with it"),
        ({"output": "inherit"}, "give output='capture' with it"),
    ],
)
async def test_progress_follows_what_is_captured_to_its_end(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        await mlfleet.run_async("nowhere", progress=True, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="goal is 'most'"):
        await mlfleet.sweep_async("nowhere", grid(x=[1]), progress=True, goal="most")  # type: ignore[arg-type]


async def test_a_view_that_fails_harms_no_run(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Painter):
        def paint(self, picture: Picture) -> None:
            raise RuntimeError("no paper")

        def close(self) -> None:
            raise RuntimeError("no table")

    async def nothing() -> AsyncIterator[mlfleet.RunEvent]:
        return
        yield

    async with shown(RunScreen(Broken(), "demo", nothing())):
        while not caplog.messages:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.01)
    assert caplog.messages == [
        "the progress cannot be shown any more",
        "the end of the progress could not be shown",
    ]


@pytest.mark.parametrize("kind", ["json", "lines"])
async def test_no_line_is_lost_at_whatever_moment_the_view_is_closed(
    kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for turns in range(8):
        view = SweepJson(quiet=True) if kind == "json" else SweepScreen(LinePainter(), BestRuns(None))
        writing = asyncio.ensure_future(view.keep_up())
        await asyncio.sleep(0)
        view.follow(RunEvent(Stage.RETRIED, "demo", detail="the last", index=7))
        for _ in range(turns):
            await asyncio.sleep(0)
        writing.cancel()
        with suppress(asyncio.CancelledError):
            await writing
        await view.close()
        out, err = capfd.readouterr()
        assert (out if kind == "json" else err).count("the last") == 1, turns

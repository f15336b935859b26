"""Runs and sweeps in the cells of a real Jupyter kernel: what they show, and what an interrupted cell leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from components.html_page import Page
from components.notebook import Cell, NotebookServer
from components.projects import pid_is_gone, write_project
from fakes.scripted_server import scripted
from fakes.small_mlflow import SmallMlflow

pytestmark = pytest.mark.timeout(90)  # a kernel starts, on a machine that may be busy

EVIL = "<img src=x onerror=alert(1)>"
SETUP = "import asyncio, mlfleet; local = {'env_manager': 'local'}"


@pytest.fixture
async def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SmallMlflow]:
    mlflow = SmallMlflow()
    # It waits for the file, and writes the processes of its session.
    write_project(
        tmp_path / "waits",
        "sleep 1000 &\necho begun {name}\necho $$ $! > new-{name} && mv new-{name} pids-{name}\nwait",
        parameters="name: string",
    )
    write_project(tmp_path / "says", "echo hello {name}; exit {code}", parameters="name: string\ncode: string")
    async with scripted(mlflow.script) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server.place}")
        yield mlflow


async def execute(notebook: NotebookServer, code: str) -> Cell:
    await asyncio.to_thread(notebook.execute, code)
    return await asyncio.to_thread(notebook.result)


async def pids(path: Path) -> list[int]:
    while not path.exists():  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.02)
    return [int(word) for word in path.read_text().split()]


def last(display: list[dict[str, str]]) -> str:
    """The text of the last state of a display."""
    page = Page(display[-1]["text/html"])
    assert page.root.all("img") == []
    return page.root.text


async def test_cells_show_progress_and_results(mlflow: SmallMlflow, notebook: NotebookServer, tmp_path: Path) -> None:
    await asyncio.to_thread(notebook.start)
    assert (await execute(notebook, SETUP)).error is None

    cell = await execute(notebook, "mlfleet.run('says', parameters={'name': 'you', 'code': 0}, **local)")
    assert "hello you" in cell.text
    assert cell.displays == []
    assert "FINISHED" in Page(cell.result["text/html"]).root.text

    parameters = {"name": EVIL, "code": 3}
    for call in ("mlfleet.run", "await mlfleet.run_async"):
        cell = await execute(notebook, f"{call}('says', parameters={parameters}, progress=True, **local)")
        assert cell.error == "ExecutionException"
        [display] = cell.displays
        assert "is FAILED: exit code 3" in last(display)
        assert cell.text == ""

    space = {"name": ["a", EVIL], "code": [0, 4]}
    for call in ("mlfleet.sweep", "await mlfleet.sweep_async"):
        cell = await execute(notebook, f"{call}('says', mlfleet.grid({space}), progress=True, **local)")
        assert cell.error is None
        [display] = cell.displays
        page = Page(display[-1]["text/html"])
        [bar] = page.root.all("progress")
        assert (bar.attributes["value"], bar.attributes["max"]) == ("4", "4")
        assert "2 finished" in page.root.text
        assert f"point 3: name={EVIL} code=4: exit code 4" in last(display)
        assert display[-1]["text/plain"].endswith("4/4: 2 finished, 2 failed")
        assert "2 did not finish" in Page(cell.result["text/html"]).root.text


async def test_the_view_of_a_notebook_is_updated_while_runs_are_active(
    mlflow: SmallMlflow, notebook: NotebookServer, tmp_path: Path
) -> None:
    await asyncio.to_thread(notebook.start)
    # The cell ends its runs when their view has shown the output.
    code = f"""{SETUP}
from IPython import get_ipython
publish = get_ipython().display_pub.publish
seen = asyncio.Event()
loop = asyncio.get_running_loop()
def watch(data, *args, **kwargs):
    publish(data, *args, **kwargs)
    if "begun b" in data["text/html"] and "begun a" in data["text/html"]:
        loop.call_soon_threadsafe(seen.set)
get_ipython().display_pub.publish = watch
space = mlfleet.grid(name=["a", "b"])
task = asyncio.ensure_future(mlfleet.sweep_async("waits", space, max_concurrent=2, progress=True, **local))
await seen.wait()
task.cancel()
await asyncio.wait([task])
task.cancelled()
"""
    cell = await execute(notebook, code)
    assert cell.result["text/plain"] == "True"
    [display] = cell.displays
    assert any("0: name=a" in state["text/html"] and "2 running" in state["text/html"] for state in display)
    assert "is KILLED: 0 finished, 0 failed, 2 killed" in last(display)
    assert mlflow.statuses == ["KILLED"] * 3


CALLS = {
    "run": "mlfleet.run('waits', parameters={'name': 'a'}, **local)",
    "run_async": "await mlfleet.run_async('waits', parameters={'name': 'a'}, **local)",
    "sweep": "mlfleet.sweep('waits', mlfleet.grid(name=['a', 'b']), max_concurrent=2, progress=True, **local)",
    "sweep_async": "await mlfleet.sweep_async('waits', mlfleet.grid(name=['a', 'b']), max_concurrent=2, **local)",
    "async fleet": """async with mlfleet.Fleet(max_concurrent=2) as fleet:
    for name in "ab":
        await fleet.submit("waits", parameters={"name": name}, **local)""",
    "async group": """async with asyncio.TaskGroup() as group:
    for name in "ab":
        group.create_task(mlfleet.run_async("waits", parameters={"name": name}, **local))""",
}


async def test_an_interrupted_cell_ends_its_runs_before_the_kernel_is_idle(
    mlflow: SmallMlflow, notebook: NotebookServer, tmp_path: Path
) -> None:
    await asyncio.to_thread(notebook.start)
    await execute(notebook, SETUP)
    for name, call in CALLS.items():
        mlflow.runs.clear()
        await asyncio.to_thread(notebook.execute, call)
        files = [tmp_path / "waits" / f"pids-{each}" for each in ("a" if "run" in name else "ab")]
        commands = [pid for file in files for pid in await pids(file)]
        await asyncio.to_thread(notebook.interrupt)
        cell = await asyncio.to_thread(notebook.result)
        assert [pid for pid in commands if not pid_is_gone(pid)] == [], name
        assert set(mlflow.statuses) == {"KILLED"}, name
        assert cell.error == ("CancelledError" if "async" in name else "KeyboardInterrupt")
        for file in files:
            file.unlink()
    # The kernel goes on to be of use.
    cell = await execute(notebook, "mlfleet.run('says', parameters={'name': 'you', 'code': 0}, **local).get_status()")
    assert cell.result["text/plain"] == "'FINISHED'"


async def test_a_second_interrupt_of_a_blocking_call_does_not_wait_for_the_grace(
    mlflow: SmallMlflow, notebook: NotebookServer, tmp_path: Path
) -> None:
    folder = tmp_path / "stays"
    command = "trap 'touch asked' TERM\necho $$ > new && mv new pids\nwhile :; do sleep 0.1; done"
    write_project(folder, command, parameters="x: {type: string, default: a}")
    await asyncio.to_thread(notebook.start)
    await execute(notebook, SETUP)
    for call in ("mlfleet.run('stays'", "mlfleet.sweep('stays', [{'x': 'a'}]"):
        await asyncio.to_thread(notebook.execute, f"{call}, timeouts=mlfleet.Timeouts(cancel_grace=3600), **local)")
        [pid] = await pids(folder / "pids")
        await asyncio.to_thread(notebook.interrupt)
        await pids(folder / "asked")
        await asyncio.to_thread(notebook.interrupt)
        cell = await asyncio.to_thread(notebook.result)
        assert pid_is_gone(pid)
        assert cell.error == "KeyboardInterrupt"
        assert set(mlflow.statuses) == {"KILLED"}
        (folder / "pids").unlink()
        (folder / "asked").unlink()

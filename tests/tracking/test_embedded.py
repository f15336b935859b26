"""Tracking in a store that mlflow opens itself."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from components import missing
from mlfleet.errors import TrackingError
from mlfleet.runs import RunStatus
from mlfleet.tracking import EmbeddedTracking, open_tracking

pytestmark = pytest.mark.timeout(60)  # a new database takes mlflow some seconds, more on a busy machine


@pytest.fixture(autouse=True)
def needs_mlflow() -> None:
    if not all(importlib.util.find_spec(name) for name in ("mlflow", "sqlalchemy", "alembic")):
        missing("mlflow", "pip install 'mlfleet[mlflow]'")


@pytest.fixture
async def tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EmbeddedTracking]:
    monkeypatch.chdir(tmp_path)
    async with EmbeddedTracking("sqlite:///runs.db") as opened:
        yield opened


async def test_a_run_from_its_creation_to_its_end(tracking: EmbeddedTracking, tmp_path: Path) -> None:
    experiment = await tracking.experiment_id("plain")
    run = await tracking.create_run(experiment, name="first", tags={"a": "b"}, start_time=1000)
    assert (run.name, run.status, run.tags["a"]) == ("first", RunStatus.RUNNING, "b")
    many = {f"p{number}": str(number) for number in range(150)}
    await tracking.log(run.run_id, params=many, tags={"t": "1"})
    await tracking.update_run(run.run_id, RunStatus.KILLED, end_time=2000)
    seen = await tracking.get_run(run.run_id)
    assert (seen.status, seen.params, seen.tags["t"]) == (RunStatus.KILLED, many, "1")
    assert [found.run_id for found in await tracking.search_runs([experiment], "tags.a = 'b'")] == [run.run_id]
    # The run's own working directory is another one.
    assert await tracking.environ() == ({"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/runs.db"}, {})


async def test_artifacts_are_logged_and_downloaded(tracking: EmbeddedTracking, tmp_path: Path) -> None:
    run = await tracking.create_run("0", name=None, tags={})
    file = tmp_path / "model.txt"
    file.write_text("weights")
    await tracking.log_artifact(run, file, "models/best")
    folder = tmp_path / "here"
    folder.mkdir()
    got = await tracking.download(f"runs:/{run.run_id}/models", folder)
    assert (got / "best" / "model.txt").read_text() == "weights"
    assert [path.name for path in folder.iterdir()] == ["models"]
    assert (await tracking.download(f"runs:/{run.run_id}/models/best/model.txt", folder)).read_text() == "weights"
    with pytest.raises(TrackingError, match="nope"):
        await tracking.download(f"runs:/{run.run_id}/nope", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["model.txt", "models"]


async def test_dozens_of_runs_at_once(tracking: EmbeddedTracking) -> None:
    async def one(number: int) -> RunStatus:
        run = await tracking.create_run("0", name=None, tags={})
        await tracking.log(run.run_id, params={"n": str(number)})
        await tracking.update_run(run.run_id, RunStatus.FINISHED)
        return (await tracking.get_run(run.run_id)).status

    assert set(await asyncio.gather(*(one(number) for number in range(60)))) == {RunStatus.FINISHED}


async def test_mlflow_keeps_its_messages_and_its_global_uri_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    import mlflow  # sets the level of alembic's logger, once for this process

    alembic = logging.getLogger("alembic")
    monkeypatch.setattr(alembic, "level", logging.DEBUG)
    async with EmbeddedTracking(f"sqlite:///{tmp_path}/new.db") as tracking:
        run = await tracking.create_run(await tracking.experiment_id("e"), name=None, tags={})
        await tracking.update_run(run.run_id, RunStatus.FINISHED)
    assert capfd.readouterr() == ("", "")
    assert alembic.level == logging.DEBUG
    assert "new.db" not in mlflow.get_tracking_uri()


@pytest.mark.slow
async def test_two_processes_make_one_new_database(tmp_path: Path) -> None:
    script = (
        "import anyio\n"
        "from mlfleet.tracking import open_tracking\n"
        "async def main():\n"
        f"    async with open_tracking('sqlite:///{tmp_path}/shared.db') as tracking:\n"
        "        run = await tracking.create_run(await tracking.experiment_id('shared'), name=None, tags={})\n"
        "        print(run.experiment_id)\n"
        "anyio.run(main)\n"
    )
    started = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path
        )
        for _ in range(2)
    ]
    printed = [(await process.communicate())[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    assert printed[0] == printed[1]


async def test_a_cancelled_creation_leaves_no_run_that_seems_to_run(tracking: EmbeddedTracking) -> None:
    experiment = await tracking.experiment_id("cancelled")
    tasks = [asyncio.create_task(tracking.create_run(experiment, name=None, tags={})) for _ in range(20)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    returned = {task.result().run_id for task in tasks if not task.cancelled()}
    runs = await tracking.search_runs([experiment])
    assert {run.run_id for run in runs if run.status is RunStatus.RUNNING} == returned
    assert {run.status for run in runs if run.run_id not in returned} <= {RunStatus.KILLED}


async def test_a_cancelled_scope_leaves_no_run_that_seems_to_run(tracking: EmbeddedTracking) -> None:
    # Unlike a task's `cancel`, a scope cancels whatever its tasks still wait for, also what they clean up with.
    experiment = await tracking.experiment_id("cancelled")
    returned = []

    async def create(scope: anyio.CancelScope) -> None:
        returned.append((await tracking.create_run(experiment, name=None, tags={})).run_id)
        scope.cancel()

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(create, group.cancel_scope)
    runs = await tracking.search_runs([experiment])
    assert {run.run_id for run in runs if run.status is RunStatus.RUNNING} == set(returned)
    assert {run.status for run in runs if run.run_id not in returned} <= {RunStatus.KILLED}


async def test_a_deleted_experiment_says_how_to_restore_it(tracking: EmbeddedTracking, tmp_path: Path) -> None:
    experiment = await tracking.experiment_id("gone")
    script = f"import mlflow; mlflow.MlflowClient('sqlite:///{tmp_path}/runs.db').delete_experiment('{experiment}')"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
    assert await process.wait() == 0
    async with EmbeddedTracking("sqlite:///runs.db") as fresh:
        with pytest.raises(TrackingError, match=f"mlflow experiments restore -x {experiment}"):
            await fresh.experiment_id("gone")


async def test_a_folder_store_names_the_setting_that_mlflow_requires(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="set MLFLOW_ALLOW_FILE_STORE=true, or use a database"):
        async with open_tracking(str(tmp_path / "mlruns")) as tracking:
            await tracking.experiment_id("any")


async def test_a_folder_works_if_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    async with open_tracking("mlruns") as tracking:
        run = await tracking.create_run(await tracking.experiment_id("e"), name="n", tags={})
        await tracking.update_run(run.run_id, RunStatus.FINISHED)
        assert (await tracking.environ())[0] == {"MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri()}
    # From now on it is what is taken when nothing is said.
    async with open_tracking() as tracking:
        assert (await tracking.get_run(run.run_id)).status is RunStatus.FINISHED


async def test_without_any_setting_it_is_a_database_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with open_tracking() as tracking:
        assert tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"
        assert not (tmp_path / "mlflow.db").exists(), "nothing needed it yet"
        await tracking.experiment_id("first")
    assert (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("nonsense://somewhere", "nonsense"),
        ("sqlite:////proc/nothing/here.db", "sqlite:////proc/nothing/here.db"),
        ("postgresql://ada:secret-word@127.0.0.1:1/runs", "postgresql://\\*\\*\\*@127.0.0.1:1/runs"),
    ],
)
async def test_a_store_that_cannot_be_opened_is_one_clear_error(uri: str, text: str) -> None:
    with pytest.raises(TrackingError, match=text) as caught:
        async with open_tracking(uri) as tracking:
            await tracking.experiment_id("any")
    assert "secret-word" not in str(caught.value)

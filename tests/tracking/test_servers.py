"""The life of runs on the MLflow servers that people have: old, new, with passwords, below paths, with workspaces."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from anyio import to_thread

from components.mlflow_server import MlflowServer
from components.projects import pid_is_gone, write_project
from mlfleet import ExecutionException, Fleet, RunStatus, Timeouts, TrackingError, grid, run_async
from mlfleet.runs import JobRef
from mlfleet.tracking import Credentials, RestTracking, open_tracking
from mlfleet.tracking.links import run_url

pytestmark = pytest.mark.timeout(180)  # the server may have to be installed and started

SERVERS = {
    "2.0.1": "oldest_mlflow_server",
    "newest": "mlflow_server",
    "passwords": "mlflow_server_with_auth",
    "prefix": "mlflow_server_with_prefix",
    "nginx": "mlflow_behind_nginx",
    "workspace": "mlflow_server_with_workspaces",
}
DRIVER = Path(__file__).parent.parent / "components" / "sweep_driver.py"
# What code in a run does: it names no server, and no password.
LOG_A_METRIC = "import os, mlflow; mlflow.MlflowClient().log_metric(os.environ['MLFLOW_RUN_ID'], 'loss', 0.5)"


@pytest.fixture(scope="module", params=list(SERVERS))
def any_server(request: pytest.FixtureRequest) -> MlflowServer:
    server = request.getfixturevalue(SERVERS[request.param])
    assert isinstance(server, MlflowServer)
    return server


@pytest.fixture
def server(any_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    """A server, named by the variables that users name it by; every test has an experiment of its own."""
    for name, text in any_server.environ.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", f"life {uuid.uuid4().hex[:8]}")
    return any_server


@pytest.fixture
async def fleet(server: MlflowServer) -> AsyncIterator[Fleet]:
    async with Fleet(tracking=open_tracking(retry_for=20), timeouts=Timeouts(cancel_grace=0.5)) as opened:
        yield opened
        await opened.cancel()  # what a failed test has left


async def test_the_life_of_a_run(server: MlflowServer, fleet: Fleet, tmp_path: Path) -> None:
    tracking = fleet.tracking
    (tmp_path / "data.bin").write_bytes(os.urandom(3 * 2**20))
    parent = await tracking.create_run(
        await tracking.experiment_id(os.environ["MLFLOW_EXPERIMENT_NAME"]), name="parent", tags={}
    )
    await tracking.log_artifact(parent, tmp_path / "data.bin", "in put")
    assert parent.artifact_uri.startswith("mlflow-artifacts:/")

    # What is not declared is appended to the command: true does not mind.
    code = shlex.quote(LOG_A_METRIC)
    uri = write_project(
        tmp_path / "demo",
        f"cat {{one}} {{two}} | sha256sum\n{shlex.quote(server.python)} -c {code} && echo well\ntrue",
        parameters="one: path\ntwo: path",
    )
    many = {f"p{number}": str(number) for number in range(130)}
    paths = {"one": f"runs:/{parent.run_id}/in put/data.bin", "two": f"{parent.artifact_uri}/in put/data.bin"}
    run = await fleet.submit(
        uri,
        parameters={**many, **paths},
        env_manager="local",
        run_name="whole life",
        tags={"team": "blue"},
        parent_run_id=parent.run_id,
        log_output=True,
    )
    await run.check()

    seen = await tracking.get_run(run.run_id)
    assert (seen.status, seen.name) == (RunStatus.FINISHED, "whole life")
    assert seen.end_time is not None
    assert seen.params == {**many, **paths}
    assert seen.metrics == {"loss": 0.5}
    assert (seen.tags["team"], seen.tags["mlflow.parentRunId"]) == ("blue", parent.run_id)
    assert seen.tags["mlflow.project.entryPoint"] == "main"
    log = await tracking.download(f"runs:/{run.run_id}/output.log", tmp_path)
    expected = subprocess.run(
        ["bash", "-c", "cat data.bin data.bin | sha256sum"], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    lines = log.read_text().splitlines()
    assert (lines[0], lines[-1]) == (expected.strip(), "well")


async def test_runs_that_fail_and_runs_that_are_cancelled(fleet: Fleet, tmp_path: Path) -> None:
    fails = await fleet.submit(write_project(tmp_path / "fails", "exit 3"), env_manager="local")
    with pytest.raises(ExecutionException, match="exit code 3"):
        await fails.check()
    endless = await fleet.submit(write_project(tmp_path / "endless", "echo on; sleep 1000"), env_manager="local")
    assert await anext(endless.logs()) == "on"
    await endless.cancel()
    again = await fleet.submit(write_project(tmp_path / "ok", "true"), env_manager="local", run_id=fails.run_id)
    await again.check()
    statuses = [(await fleet.tracking.get_run(run.run_id)).status for run in (fails, endless)]
    assert statuses == [RunStatus.FINISHED, RunStatus.KILLED]


async def test_a_parameter_that_the_code_logs_with_another_text_is_the_reason(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    code = shlex.quote("import mlflow; mlflow.log_param('lr', 1.0)")
    command = f"{shlex.quote(mlflow_server.python)} -c {code} {{lr}}"
    uri = write_project(tmp_path / "demo", command, parameters="lr: float")
    async with Fleet(tracking=open_tracking(mlflow_server.url)) as fleet:
        run = await fleet.submit(uri, parameters={"lr": 1}, env_manager="local")
        outcome = await run.outcome()
        tags = (await fleet.tracking.get_run(run.run_id)).tags
    assert outcome.reason == (
        "exit code 1: its code logs the parameter 'lr' with another text than it was given, as 1.0 for 1"
    )
    assert tags["mlfleet.reason"] == outcome.reason


@pytest.fixture
def killed_driver(server: MlflowServer, tmp_path: Path) -> Iterator[str]:
    """The project of a sweep of two points, ``lr``, whose driver was killed while both ran."""
    uri = write_project(
        tmp_path / "demo",
        "echo $$ > ../pid-{n}; until test -e ../go; do sleep 0.02; done; echo {n}",
        parameters="n: string",
    )
    argv = [sys.executable, str(DRIVER), uri, server.url, "lr", "2", "2"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "entered\n"
        while len(pids := [int(text) for path in tmp_path.glob("pid-*") if (text := path.read_text())]) < 2:
            if driver.poll() is not None:
                raise AssertionError(driver.stdout.read())
        driver.kill()
    yield uri
    for pid in pids:
        if not pid_is_gone(pid):
            os.killpg(os.getpgid(pid), signal.SIGKILL)


async def test_a_sweep_of_a_killed_process_is_resumed(killed_driver: str, fleet: Fleet, tmp_path: Path) -> None:
    experiment = await fleet.tracking.experiment_id(os.environ["MLFLOW_EXPERIMENT_NAME"])
    children = [run for run in await fleet.tracking.search_runs([experiment]) if JobRef.TAG in run.tags]
    assert len(children) == 2
    attached = await fleet.attach(children[0].run_id)
    assert await attached.get_status() is RunStatus.RUNNING
    await to_thread.run_sync((tmp_path / "go").touch)
    await attached.check()
    assert [line async for line in attached.logs()] == [children[0].params["n"]]

    async with fleet.sweep(killed_driver, grid(n=range(3)), name="lr", resume=True, env_manager="local") as sweep:
        result = await sweep.result()
    assert [(each.status, each.attempts) for each in result.results] == [(RunStatus.FINISHED, 1)] * 3
    assert result.results[int(children[0].params["n"])].earlier
    assert {each.run_id for each in result.results[:2]} == {run.run_id for run in children}
    assert {run.status for run in await fleet.tracking.search_runs([experiment])} == {RunStatus.FINISHED}


async def test_a_proxy_that_takes_no_large_files(mlflow_behind_nginx: MlflowServer, tmp_path: Path) -> None:
    (tmp_path / "large.bin").write_bytes(bytes(2 * 2**20))
    async with RestTracking(mlflow_behind_nginx.url.replace("team/mlflow", "small")) as tracking:
        run = await tracking.create_run("0", name=None, tags={})
        with pytest.raises(TrackingError, match=r"large.bin.* 413 .*client_max_body_size"):
            await tracking.log_artifact(run, tmp_path / "large.bin")


async def test_a_proxy_that_finds_no_server(mlflow_behind_nginx: MlflowServer) -> None:
    url = mlflow_behind_nginx.url.replace("team/mlflow", "gone")
    async with RestTracking(url, retry_for=0) as tracking:
        with pytest.raises(TrackingError, match=r"answered runs/get with 502 and a web page \(502 Bad Gateway\)"):
            await tracking.get_run("x")


async def test_two_workspaces_of_one_server_in_one_process(
    mlflow_server_with_workspaces: MlflowServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = mlflow_server_with_workspaces.url
    uri = write_project(tmp_path / "demo", "echo in ${MLFLOW_WORKSPACE:-none}")
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team-a")
    name, told = f"shared {uuid.uuid4().hex[:8]}", []
    for workspace in ("team-a", ""):
        async with Fleet(tracking=RestTracking(url, workspace=workspace)) as fleet:
            run = await fleet.submit(uri, experiment_name=name, env_manager="local")
            await run.check()
            told += [line async for line in run.logs()]
            found = await fleet.tracking.search_runs([await fleet.tracking.experiment_id(name)])
            assert [each.run_id for each in found] == [run.run_id]
    assert told == ["in team-a", "in none"]
    # The runs of `run_async` follow the variable, which mlflow.set_workspace sets.
    for workspace in ("team-a", "default"):
        monkeypatch.setenv("MLFLOW_WORKSPACE", workspace)
        run = await run_async(uri, experiment_name=name, env_manager="local", tracking_uri=url)
        async with RestTracking(url) as tracking:
            found = await tracking.search_runs([await tracking.experiment_id(name)])
            assert run.run_id in [each.run_id for each in found]
            assert len(found) == 2


async def test_a_workspace_that_is_not_there(mlflow_server_with_workspaces: MlflowServer) -> None:
    async with RestTracking(mlflow_server_with_workspaces.url, workspace="team-b") as tracking:
        with pytest.raises(TrackingError, match=r"Workspace 'team-b' not found"):
            await tracking.create_run("0", name=None, tags={})


@pytest.mark.parametrize("which", ["oldest_mlflow_server", "mlflow_server"])
async def test_a_server_without_workspaces_does_not_get_the_runs_of_one(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = request.getfixturevalue(which).url
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team-a")
    with pytest.raises(TrackingError, match=r"the workspace 'team-a' cannot be used: .* unset MLFLOW_WORKSPACE"):
        async with RestTracking(url):
            pass


def test_links_to_runs_lead_into_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_url("http://host/team/", "1", "r") == "http://host/team/#/experiments/1/runs/r"
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team-a")
    assert run_url("http://host/team/", "1", "r") == "http://host/team/#/experiments/1/runs/r?workspace=team-a"


async def test_a_read_only_user_gets_a_clear_error(mlflow_server_with_auth: MlflowServer, tmp_path: Path) -> None:
    server = mlflow_server_with_auth
    name, password = f"reader-{uuid.uuid4().hex[:8]}", f"only to read {uuid.uuid4().hex}"
    async with httpx.AsyncClient(auth=(server.username, server.password), trust_env=False, timeout=60) as admin:
        body = {"username": name, "password": password}
        (await admin.post(f"{server.url}/api/2.0/mlflow/users/create", json=body)).raise_for_status()
    tracking = RestTracking(server.url, credentials=Credentials(name, password))
    async with Fleet(tracking=tracking) as fleet:
        with pytest.raises(TrackingError, match=r"403: Permission denied.*check that this user may do it") as caught:
            await fleet.submit(write_project(tmp_path / "demo", "true"), env_manager="local")
        assert await fleet.tracking.search_runs(["0"]) is not None
    assert password not in str(caught.value)

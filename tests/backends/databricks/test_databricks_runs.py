"""Projects that a Fleet runs for real in an emulated Databricks workspace, with a real MLflow server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from databricks.sdk.service import jobs

from components.command_line import mlfleet
from components.http_files import FileServer
from components.minilake import MARK, SCOPE, Databricks, Minilake, processes_of
from components.mlflow_server import MlflowServer
from components.projects import write_project
from mlfleet import Fleet, FleetRun, RunStatus
from mlfleet.backends.base import Job
from mlfleet.backends.databricks import DatabricksBackend
from mlfleet.errors import ExecutionException, ParameterError, UsageError
from mlfleet.testing import FakeTracking

CLUSTER = {"spark_version": "15.4.x-scala2.12", "num_workers": 0}
CONFIG = {"new_cluster": CLUSTER}


def reachable() -> FakeTracking:
    """In-memory tracking with a URI that Databricks can reach."""
    tracking = FakeTracking()
    tracking.uri = "http://tracking.example.com"
    return tracking


@pytest.fixture
async def fleet(databricks: Databricks) -> AsyncIterator[Fleet]:
    async with Fleet(tracking=reachable()) as fleet:
        yield fleet


async def lines_of(run: FleetRun) -> list[str]:
    return [line async for line in run.logs()]


# A Python with mlflow takes some seconds to start, and the server too.
@pytest.mark.timeout(150)
async def test_a_project_with_parameters_on_a_real_mlflow_server(
    databricks: Databricks, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    uri = write_project(tmp_path / "demo", "python train.py {alpha}", parameters="alpha: float")
    (tmp_path / "demo" / "train.py").write_text(
        "import sys, mlflow\n"
        "with mlflow.start_run():\n"
        "    mlflow.log_metric('score', float(sys.argv[1]) * 2)\n"
        "    mlflow.log_artifact('train.py')\n"
        "print('trained with', sys.argv[1])\n"
    )
    with (tmp_path / "demo" / "MLproject").open("a") as file:
        file.write("  show:\n    parameters: {code: path}\n    command: cat {code}\n")
    async with Fleet(tracking_uri=mlflow_server.url) as fleet:
        run = await fleet.submit(uri, parameters={"alpha": 0.5}, backend="databricks", backend_config=CONFIG)
        await run.check()
        info = await fleet.tracking.get_run(run.run_id)
        again = await fleet.submit(
            uri,
            "show",
            parameters={"code": f"runs:/{run.run_id}/train.py"},
            backend="databricks",
            backend_config=CONFIG,
        )
        await again.check()
        assert await lines_of(again) == (tmp_path / "demo" / "train.py").read_text().splitlines()
    assert info.status is RunStatus.FINISHED
    assert info.metrics == {"score": 1.0}
    assert info.params == {"alpha": "0.5"}
    assert info.tags["mlflow.databricks.webappURL"] == databricks.url
    assert info.tags["mlflow.databricks.runURL"].startswith("http")
    assert info.tags["mlflow.project.backend"] == "databricks"
    assert run.output_path is not None
    assert "trained with 0.5" in run.output_path.read_text()


async def test_a_failing_run_reports_its_traceback(fleet: Fleet, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "python train.py")
    (tmp_path / "demo" / "train.py").write_text("print('loading')\nraise KeyError('price')\n")
    run = await fleet.submit(uri, backend="databricks", backend_config=CONFIG)
    with pytest.raises(ExecutionException, match="failed: exit code 1") as caught:
        await run.check()
    assert caught.value.exit_code == 1
    assert caught.value.output[-1] == "KeyError: 'price'"
    assert "Traceback (most recent call last):" in str(caught.value)


@pytest.mark.parametrize(
    "where", [{}, {"upload_path": "/Volumes/main/default/runs/a b"}, {"upload_path": "dbfs:/mlfleet"}], ids=str
)
async def test_projects_run_from_every_upload_location(fleet: Fleet, tmp_path: Path, where: dict[str, str]) -> None:
    uri = write_project(tmp_path / "demo", "cat data.txt; cat data.bin | wc -c")
    (tmp_path / "demo" / "data.txt").write_text(f"{uuid.uuid4().hex}\n")
    (tmp_path / "demo" / "data.bin").write_bytes(os.urandom(3 * 2**20))
    run = await fleet.submit(uri, backend="databricks", backend_config={**CONFIG, **where})
    assert await run.wait() is True
    assert await lines_of(run) == [(tmp_path / "demo" / "data.txt").read_text().strip(), str(3 * 2**20)]


@pytest.mark.parametrize(
    "config", [{}, {"existing_cluster_id": "0923-164208-meows279"}, {**CLUSTER, "task": "shell_command"}], ids=str
)
async def test_projects_run_on_every_kind_of_compute(fleet: Fleet, tmp_path: Path, config: dict[str, Any]) -> None:
    uri = write_project(tmp_path / "demo", 'echo "{what} in $PWD"; exit 3', parameters="what: string")
    run = await fleet.submit(uri, parameters={"what": "it's"}, backend="databricks", backend_config=config)
    outcome = await run.outcome()
    assert (outcome.status, outcome.exit_code, outcome.reason) == (RunStatus.FAILED, 3, "exit code 3")
    (line,) = await lines_of(run)
    assert line.startswith("it's in /")
    assert line.endswith("/project")


async def test_path_parameters_are_available_at_every_upload_location(
    fleet: Fleet, minilake: Minilake, http_files: FileServer, tmp_path: Path
) -> None:
    uri = write_project(
        tmp_path / "demo",
        'cd / && cat {ours} "{remote}" {there} && echo {remote}',
        parameters="ours: path\nremote: path\nthere: path",
    )
    (tmp_path / "demo" / "it's ours.txt").write_text("of the project\n")
    http_files.files["/data/remote.csv"] = b"from elsewhere\n"
    volume = minilake.folder / "dbfs" / "Volumes" / "main" / "default" / "data"
    volume.mkdir(parents=True)
    (volume / "there.txt").write_text("of a volume\n")
    parameters = {
        "ours": tmp_path / "demo" / "it's ours.txt",
        "remote": f"{http_files.url}/data/remote.csv",
        "there": "/Volumes/main/default/data/there.txt",
    }
    run = await fleet.submit(uri, parameters=parameters, backend="databricks", backend_config=CONFIG)
    assert await run.wait() is True
    *lines, place = await lines_of(run)
    assert lines == ["of the project", "from elsewhere", "of a volume"]
    assert place.endswith("/param_1/remote.csv")
    assert not Path(place).exists()  # removed at the end of the run
    with pytest.raises(ParameterError, match=r"'ours': '/etc/hostname' is on this machine, where Databricks cannot"):
        await fleet.submit(
            uri, parameters={**parameters, "ours": "/etc/hostname"}, backend="databricks", backend_config=CONFIG
        )


async def test_a_path_parameter_that_cannot_be_downloaded(fleet: Fleet, http_files: FileServer, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "cat {data}", parameters="data: path")
    parameters = {"data": f"{http_files.url}/nothing?signature=hush"}
    run = await fleet.submit(uri, parameters=parameters, backend="databricks", backend_config=CONFIG)
    outcome = await run.outcome()
    told = " ".join([outcome.reason or "", *outcome.output])
    assert f"a path parameter: {http_files.url}/nothing cannot be downloaded: HTTPError: HTTP Error 404" in told
    assert "hush" not in told


async def test_large_output_is_returned_completely(fleet: Fleet, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "seq 400000")
    run = await fleet.submit(uri, backend="databricks", backend_config=CONFIG)
    assert await run.wait() is True
    assert run.output_path is not None
    assert run.output_path.read_text() == "".join(f"{n}\n" for n in range(1, 400001))


async def test_a_spark_job_runs_its_file_with_parameters(fleet: Fleet, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "MLproject").write_text(
        "name: demo\ndatabricks_spark_job:\n  python_file: src/job.py\n  parameters: [--rows, 'a b']\n"
        "  python_libraries: [xgboost]\n"
    )
    (folder / "src").mkdir()
    (folder / "src" / "beside.py").write_text("NAME = 'beside'\n")
    (folder / "src" / "job.py").write_text(
        "import os, sys, beside\nprint(sys.argv[1:], beside.NAME, os.environ['MLFLOW_RUN_ID'])\n"
    )
    run = await fleet.submit(str(folder), backend="databricks", backend_config=CLUSTER)
    assert await run.wait() is True
    assert await lines_of(run) == [f"['--rows', 'a b'] beside {run.run_id}"]


async def test_a_spark_job_that_fails(fleet: Fleet, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "MLproject").write_text("name: demo\ndatabricks_spark_job:\n  python_file: job.py\n")
    (folder / "job.py").write_text("raise SystemExit(7)\n")
    run = await fleet.submit(str(folder), backend="databricks", backend_config=CLUSTER)
    outcome = await run.outcome()
    assert (outcome.status, outcome.exit_code, outcome.reason) == (RunStatus.FAILED, 7, "exit code 7")
    tags = (await fleet.tracking.get_run(run.run_id)).tags
    assert (tags["mlfleet.reason"], tags["mlfleet.failure_kind"]) == ("exit code 7", "failure")


async def test_mlflow_checks_run_before_anything_is_created(databricks: Databricks, tmp_path: Path) -> None:
    plain = write_project(tmp_path / "plain", "true")
    docker = write_project(tmp_path / "docker", "true", extra="docker_env:\n  image: python:3.12\n")
    tracking = FakeTracking()
    async with Fleet(tracking=tracking) as fleet:
        with pytest.raises(UsageError, match="the tracking URI 'memory:' is on this machine"):
            await fleet.submit(plain, backend="databricks", backend_config=CONFIG)
    async with Fleet(tracking=reachable()) as fleet:
        with pytest.raises(UsageError, match="docker_env cannot run on Databricks"):
            await fleet.submit(docker, backend="databricks", backend_config=CONFIG)
        for config, message in (
            ({"num_workers": 1}, "new_cluster has no spark_version"),
            ({"profile": "nowhere"}, "no profile 'nowhere'"),
        ):
            with pytest.raises(UsageError, match=message):
                await fleet.submit(plain, backend="databricks", backend_config=config)
    assert tracking.runs == {}
    assert databricks.requests == []


async def test_variables_of_the_caller_go_through_a_secret_scope(
    fleet: Fleet, databricks: Databricks, tmp_path: Path
) -> None:
    uri = write_project(tmp_path / "demo", 'echo "${#TOKEN} $LEVEL"')
    env = {"TOKEN": "correct-horse", "LEVEL": "two words"}
    with pytest.raises(UsageError, match=r"\(LEVEL, TOKEN\).* name one in backend_config {'secret_scope'"):
        await fleet.submit(uri, backend="databricks", backend_config=CONFIG, env=env)
    assert databricks.requests == []
    run = await fleet.submit(uri, backend="databricks", backend_config={**CONFIG, "secret_scope": SCOPE}, env=env)
    assert await lines_of(run) == ["13 two words"]
    assert await run.wait()
    shown = [request for request in databricks.requests if "secrets/put" not in request.target]
    assert "correct-horse" not in repr([(request.target, request.body) for request in shown])


# The emulator runs as many at a time as it has threads: six on two cores.
@pytest.mark.timeout(280)
async def test_200_runs_at_once(fleet: Fleet, databricks: Databricks, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo point {n}; exit $(( {n} % 2 ))", parameters="n: float")
    runs = await asyncio.gather(
        *(fleet.submit(uri, parameters={"n": n}, backend="databricks", backend_config=CONFIG) for n in range(200))
    )
    assert await asyncio.gather(*(run.wait() for run in runs)) == [True, False] * 100
    for n, run in enumerate(runs):
        assert await lines_of(run) == [f"point {n}"]
    uploaded = [request.target for request in databricks.requests if "import-file" in request.target]
    assert len([target for target in uploaded if ".tar.gz" in target]) == 1


async def test_child_processes_end_when_their_script_is_killed(databricks: Databricks, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    run_id = uuid.uuid4().hex
    async with DatabricksBackend() as backend:
        config = backend.configure({**CONFIG, "secret_scope": SCOPE})
        run = await backend.submit(
            Job(
                run_id=run_id,
                experiment_id="0",
                project_name="demo",
                project_dir=project,
                command="(sleep 600 & sleep 600) & echo ready; wait",
                environ={MARK: run_id},
                config=config,
                output=tmp_path / "output.log",
                cancel_grace=0.2,
            )
        )
        async for line in run.logs():
            assert line == "ready"
            break
        script = next(int(text.partition(":")[0]) for text in processes_of(run_id) if text.endswith("the script"))
        os.kill(script, signal.SIGKILL)
        outcome = await run.outcome()
        assert outcome.status is RunStatus.FAILED
        assert "-9" in (outcome.reason or "")
        await anyio.to_thread.run_sync(_wait_until_gone, run_id)


async def test_the_databricks_sdk_reads_a_submitted_run(fleet: Fleet, databricks: Databricks, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "true")
    run = await fleet.submit(uri, backend="databricks", backend_config=CONFIG)
    assert await run.wait() is True
    bodies = [json.loads(request.body) for request in databricks.requests if request.target.endswith("runs/submit")]
    (task,) = bodies[0]["tasks"]
    assert jobs.SubmitTask.from_dict(task).as_dict() == task


def test_the_dry_run_prints_the_request(tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "python train.py {alpha}", parameters="alpha: float")
    arguments = ("run", uri, "-P", "alpha=0.5", "-b", "databricks", "-c", json.dumps(CONFIG), "--dry-run")
    variables = {"MLFLOW_TRACKING_URI": "databricks", "DATABRICKS_HOST": "https://x", "DATABRICKS_TOKEN": "dapi-hush"}
    done = mlfleet(*arguments, cwd=tmp_path, env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert "dapi-hush" not in done.stdout
    body = json.loads(done.stdout[done.stdout.index("\n{") :])
    (task,) = body["tasks"]
    assert task["new_cluster"] == CLUSTER
    assert json.loads(task["spark_python_task"]["parameters"][0])["command"].strip() == "python train.py 0.5"
    as_json = json.loads(mlfleet(*arguments, "--json", cwd=tmp_path, env=variables).stdout)
    assert json.loads(as_json["request"])["tasks"] == body["tasks"]
    assert as_json["variables"].keys() == {"MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"}


def test_the_command_line_reports_mistakes_before_anything_is_created(tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "true")
    # Avoids creating a database for the default tracking.
    variables = {"MLFLOW_TRACKING_URI": "databricks", "DATABRICKS_HOST": "https://x", "DATABRICKS_TOKEN": "dapi-hush"}
    done = mlfleet("run", uri, "-b", "databricks", "-c", '{"profile": "nowhere"}', cwd=tmp_path, env=variables)
    assert done.returncode == 2
    assert "no profile 'nowhere'" in done.stderr


def _wait_until_gone(run_id: str) -> None:
    while processes_of(run_id):
        time.sleep(0.05)

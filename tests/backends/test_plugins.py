"""Plugins that are installed for real, used by fresh interpreters: by the command line and by the blocking API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from components.command_line import mlfleet, run_on
from components.git_http import GitServer
from components.git_repository import make_repository
from components.mlflow_server import MlflowServer
from components.plugins import on_path
from components.projects import pid_is_gone, write_project

# Each of these imports mlflow in a process of its own, on a machine that may be busy.
pytestmark = pytest.mark.timeout(120)

LOG_A_METRIC = """
import json, os, urllib.request
data = {"run_id": os.environ["MLFLOW_RUN_ID"], "key": "score", "value": 0.5, "timestamp": 1}
url = os.environ["MLFLOW_TRACKING_URI"] + "/api/2.0/mlflow/runs/log-metric"
urllib.request.urlopen(urllib.request.Request(url, json.dumps(data).encode(), {"Content-Type": "application/json"}))
"""


def new_experiment(server: MlflowServer) -> str:
    name = os.urandom(8).hex()
    answer = httpx.post(f"{server.url}/api/2.0/mlflow/experiments/create", json={"name": name}, trust_env=False)
    return str(answer.raise_for_status().json()["experiment_id"])


def runs_in(server: MlflowServer, experiment: str) -> list[dict[str, Any]]:
    """All runs of an experiment, the oldest first."""
    body = {"experiment_ids": [experiment], "order_by": ["attributes.start_time ASC"]}
    answer = httpx.post(f"{server.url}/api/2.0/mlflow/runs/search", json=body, trust_env=False)
    found: list[dict[str, Any]] = answer.raise_for_status().json().get("runs", [])
    return found


def tags_of(run: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in run["data"]["tags"]}


def python(code: str, *, folder: Path, server: MlflowServer, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a script that finds the plugins."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=on_path(folder, MLFLOW_TRACKING_URI=server.url, MLFLOW_DISABLE_TELEMETRY="true"),
        cwd=cwd,
        capture_output=True,
        text=True,
    )


class Workplace:
    """Runs the command line with the plugins, in an experiment of its own."""

    def __init__(self, folder: Path, server: MlflowServer, tmp_path: Path) -> None:
        self.folder, self.server, self.tmp_path = folder, server, tmp_path
        self.experiment = new_experiment(server)

    def run(self, project: str, backend: str, *options: str, **config: object) -> subprocess.CompletedProcess[str]:
        return mlfleet(
            *("run", project, "-b", backend, "--experiment-id", self.experiment, *options),
            *("--backend-config", json.dumps(config)),
            cwd=self.tmp_path,
            env=on_path(self.folder, MLFLOW_TRACKING_URI=self.server.url),
        )

    def mlflow_run(self, project: str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(sys.executable, "-m", "mlflow", "run", project, "-b", "mlfleet"),
                *("--experiment-id", self.experiment, *options),
            ],
            env=on_path(self.folder, MLFLOW_TRACKING_URI=self.server.url, MLFLOW_DISABLE_TELEMETRY="true"),
            cwd=self.tmp_path,
            capture_output=True,
            text=True,
        )

    def script(self, code: str) -> subprocess.CompletedProcess[str]:
        head = f"import mlfleet, sys\nEXPERIMENT = {self.experiment!r}\n"
        return python(head + code, folder=self.folder, server=self.server, cwd=self.tmp_path)

    @property
    def runs(self) -> list[dict[str, Any]]:
        return runs_in(self.server, self.experiment)


@pytest.fixture
def place(plugin_folder: Path, mlflow_server: MlflowServer, tmp_path: Path) -> Workplace:
    return Workplace(plugin_folder, mlflow_server, tmp_path)


# ---- plugins of mlflow ----------------------------------------------------------------------------------------------


def test_plugin_that_takes_our_run(place: Workplace) -> None:
    parameters = "name: string\ntags: {type: list, default: []}"
    project = write_project(place.tmp_path / "hello", "echo hello {name} > greeting", parameters=parameters)
    record = place.tmp_path / "seen.json"
    done = place.run(
        project, "spool", "-P", "name=you", "-P", "tags=a", "-P", "tags=b", "--env-manager", "local", record=str(record)
    )
    assert done.returncode == 0, done.stderr
    assert Path(project, "greeting").read_text() == "hello you\n"
    (run,) = place.runs
    assert run["info"]["status"] == "FINISHED"
    assert tags_of(run)["mlflow.project.backend"] == "spool"
    assert "mlfleet.second_run" not in tags_of(run)
    assert {each["key"]: each["value"] for each in run["data"]["params"]} == {"name": "you", "tags": "[a,b]"}

    seen = json.loads(record.read_text())
    config = seen.pop(4)
    assert seen == [project, "main", {"name": "you", "tags": "[a,b]"}, None, place.server.url, place.experiment]
    assert config == {
        "record": str(record),
        "ENV_MANAGER": "local",
        "SYNCHRONOUS": True,
        "DOCKER_ARGS": {},
        "STORAGE_DIR": None,
        "build_image": False,
        "docker_auth": None,
        "_mlflow_local_backend_run_id": run["info"]["run_id"],
    }


def test_plugin_that_makes_a_run_of_its_own(place: Workplace) -> None:
    project = place.tmp_path / "score"
    write_project(project, "python log.py")
    (project / "log.py").write_text(LOG_A_METRIC)
    done = place.script(f"""
import asyncio
async def main():
    run = await mlfleet.run_async({str(project)!r}, backend="spool", backend_config={{"mode": "own run"}},
                                  experiment_id=EXPERIMENT)
    print(run.run_id, dict(run.metrics))
asyncio.run(main())
""")
    assert done.returncode == 0, done.stderr
    ours, theirs = place.runs
    assert done.stdout.split(maxsplit=1) == [ours["info"]["run_id"], "{'score': 0.5}\n"]
    assert [run["info"]["status"] for run in (ours, theirs)] == ["FINISHED", "FINISHED"]
    assert tags_of(ours)["mlfleet.second_run"] == theirs["info"]["run_id"]
    assert tags_of(theirs)["mlflow.parentRunId"] == ours["info"]["run_id"]
    assert tags_of(theirs)["mlflow.project.backend"] == "spool"
    assert theirs["data"]["metrics"][0]["key"] == "score"


def test_both_runs_fail_together(place: Workplace) -> None:
    project = write_project(place.tmp_path / "bad", "exit 3")
    done = place.run(project, "spool", mode="own run")
    assert done.returncode == 1
    assert "the plugin 'spool' says that it failed" in done.stderr
    assert [run["info"]["status"] for run in place.runs] == ["FAILED", "FAILED"]
    (tags,) = [tags_of(run) for run in place.runs if "mlfleet.second_run" in tags_of(run)]
    assert tags["mlfleet.reason"].startswith("the plugin 'spool' says that it failed")
    assert tags["mlfleet.failure_kind"] == "failure"


def test_plugin_that_refuses(place: Workplace) -> None:
    project = write_project(place.tmp_path / "hello", "echo hello")
    done = place.script(f"""
try:
    mlfleet.run({project!r}, backend="spool", backend_config={{"mode": "refuse"}}, experiment_id=EXPERIMENT,
                docker_auth={{"username": "me", "password": "hush-hush"}})
except mlfleet.ExecutionException as error:
    print(error)
    raise SystemExit(isinstance(error.__cause__, mlfleet.SubmitError))
""")
    assert done.returncode == 1, done.stderr
    assert "the plugin 'spool' did not take the run: RuntimeError: no spool for" in done.stdout
    assert "'password': '***'" in done.stdout
    assert [run["info"]["status"] for run in place.runs] == ["FAILED"]


def test_plugin_that_gives_no_handle(place: Workplace) -> None:
    project = write_project(place.tmp_path / "hello", "echo hello")
    done = place.run(project, "spool", mode="nothing")
    assert done.returncode == 1
    assert "it returned NoneType, which has no wait, cancel, get_status, run_id" in done.stderr
    assert [run["info"]["status"] for run in place.runs] == ["FAILED"]


def test_plugin_takes_no_variables(place: Workplace) -> None:
    project = write_project(place.tmp_path / "hello", "echo hello")
    done = place.run(project, "spool", "--env", "TOKEN=hush-hush")
    assert done.returncode == 2
    assert "'spool' cannot be given environment variables (TOKEN)" in done.stderr
    done = place.run(project, "spool", "--inherit-env", "none")
    assert done.returncode == 2
    assert "'spool' decides itself which variables of this process its runs see: leave out inherit_env" in done.stderr
    assert "hush-hush" not in done.stderr
    assert place.runs == []


def test_the_callers_configuration_is_not_changed(place: Workplace) -> None:
    project = write_project(place.tmp_path / "hello", "echo hello")
    done = place.script(f"""
config = {{"nested": {{"key": 1}}}}
mlfleet.run({project!r}, backend="spool", backend_config=config, experiment_id=EXPERIMENT)
assert config == {{"nested": {{"key": 1}}}}, config
""")
    assert done.returncode == 0, done.stderr


def test_cancel(place: Workplace) -> None:
    project = write_project(place.tmp_path / "long", "echo $$ > pid; echo > begun; exec sleep 600")
    os.mkfifo(Path(project, "begun"))
    done = place.script(f"""
run = mlfleet.run({project!r}, backend="spool", experiment_id=EXPERIMENT, synchronous=False)
open({project!r} + "/begun").read()
while (status := run.get_status()) == "SCHEDULED":
    pass  # the command may begin before the plugin has given its handle
print(status)
run.cancel()
print(run.get_status(), run.wait())
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["RUNNING", "KILLED", "False"]
    assert pid_is_gone(int(Path(project, "pid").read_text()))
    assert [run["info"]["status"] for run in place.runs] == ["KILLED"]


def test_cancel_by_its_id(place: Workplace) -> None:
    """Only the process that submitted the run has the plugin's handle."""
    project = write_project(place.tmp_path / "long", "echo > begun; exec sleep 600")
    os.mkfifo(Path(project, "begun"))
    done = place.script(f"""
import anyio
async def main():
    async with mlfleet.Fleet() as fleet, mlfleet.Fleet() as other:
        run = await fleet.submit({project!r}, backend="spool", experiment_id=EXPERIMENT)
        await anyio.Path({project!r} + "/begun").read_text()
        seen = await other.get(run.run_id)
        await seen.cancel()
        print(seen.info.status, await run.get_status())
anyio.run(main)
""")
    assert done.stdout.split() == ["KILLED", "KILLED"], done.stderr


def test_a_run_that_cannot_be_cancelled_is_reported_as_possibly_running(place: Workplace) -> None:
    project = write_project(place.tmp_path / "long", "echo $$ > pid; echo > begun; exec sleep 600 >/dev/null 2>&1")
    os.mkfifo(Path(project, "begun"))
    done = place.script(f"""
run = mlfleet.run({project!r}, backend="spool", backend_config={{"mode": "cannot cancel"}}, experiment_id=EXPERIMENT,
                  synchronous=False, timeouts=mlfleet.Timeouts(cancel_grace=0))
open({project!r} + "/begun").read()
run.cancel()
print(run.get_status())
""")
    pid = int(Path(project, "pid").read_text())
    assert not pid_is_gone(pid)
    os.kill(pid, 9)
    assert done.stdout.split() == ["FAILED"], done.stderr
    assert "failed to cancel the run" in done.stderr
    assert "RuntimeError: the spool is locked" in done.stderr


def test_a_run_returned_too_late_that_cannot_be_cancelled_is_reported(place: Workplace) -> None:
    project = write_project(place.tmp_path / "long", "echo $$ > pid; echo > begun; exec sleep 600 >/dev/null 2>&1")
    os.mkfifo(Path(project, "begun"))
    os.mkfifo(place.tmp_path / "hold")
    done = place.script(f"""
import anyio
hold = {str(place.tmp_path / "hold")!r}
async def main():
    async with mlfleet.Fleet(timeouts=mlfleet.Timeouts(cancel_grace=0)) as fleet:
        config = {{"mode": "cannot cancel", "hold": hold}}
        run = await fleet.submit({project!r}, backend="spool", backend_config=config, experiment_id=EXPERIMENT)
        await anyio.Path({project!r} + "/begun").read_text()
        async with anyio.create_task_group() as group:
            group.start_soon(run.cancel)
            await anyio.lowlevel.checkpoint()
            await anyio.Path(hold).write_text("the plugin's run may return")
        print(await run.get_status(), (await run.outcome()).reason)
anyio.run(main)
""")
    os.kill(int(Path(project, "pid").read_text()), 9)
    assert done.stdout.startswith("FAILED the run may still go on at the plugin 'spool': cancelling failed"), (
        done.stderr
    )
    assert [run["info"]["status"] for run in place.runs] == ["FAILED"]


def test_leaving_a_fleet_ends_its_plugins_runs(place: Workplace) -> None:
    project = write_project(place.tmp_path / "long", "echo $$ > pid; echo > begun; exec sleep 600")
    os.mkfifo(Path(project, "begun"))
    done = place.script(f"""
import anyio
async def main():
    async with mlfleet.Fleet() as fleet:
        await fleet.submit({project!r}, backend="spool", experiment_id=EXPERIMENT)
        await anyio.Path({project!r} + "/begun").read_text()
        raise SystemExit("enough")
anyio.run(main)
""")
    assert done.stderr.strip().endswith("enough")
    assert pid_is_gone(int(Path(project, "pid").read_text()))
    assert [run["info"]["status"] for run in place.runs] == ["KILLED"]


def test_another_tracking_server_than_mlflow_has_is_refused(place: Workplace) -> None:
    project = write_project(place.tmp_path / "hello", "echo hello")
    done = place.run(project, "spool", "--tracking-uri", "http://127.0.0.1:9")
    assert done.returncode == 2, done.stderr
    assert f"the plugin 'spool' would log to {place.server.url}" in done.stderr
    assert "the run is to be on http://127.0.0.1:9. Set MLFLOW_TRACKING_URI" in done.stderr


def test_plugin_gets_a_git_project_at_the_commit_that_was_planned(place: Workplace, git_http: GitServer) -> None:
    repository = make_repository(git_http.root)
    commit = repository.commit(MLproject="name: hello\nentry_points:\n  main:\n    command: echo hello\n")
    record = place.tmp_path / "seen.json"
    uri = f"{git_http.url}/project.git"
    done = place.run(uri, "spool", "-v", "main", record=str(record))
    assert done.returncode == 0, done.stderr
    seen = json.loads(record.read_text())
    assert (seen[0], seen[3]) == (uri, commit)
    assert tags_of(place.runs[0])["mlflow.source.git.commit"] == commit


# ---- native ones ----------------------------------------------------------------------------------------------------


def test_native_plugin(place: Workplace) -> None:
    project = write_project(place.tmp_path / "hello", "echo world")
    done = place.run(project, "echo", greeting="good morning")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "good morning\nworld\n"
    assert tags_of(place.runs[0])["mlflow.project.backend"] == "echo"


def test_mistake_in_the_configuration_of_a_native_plugin(place: Workplace) -> None:
    project = write_project(place.tmp_path / "hello", "echo world")
    done = place.run(project, "echo", greetin="hi")
    assert done.returncode == 2
    assert "echo does not know ['greetin'], but greeting" in done.stderr
    assert place.runs == []


# ---- mlfleet as a plugin of mlflow ----------------------------------------------------------------------------------


def test_mlflow_run(place: Workplace) -> None:
    project = write_project(place.tmp_path / "hello", "echo hello {name} $AND > greeting", parameters="name: string")
    config = json.dumps({"env": {"AND": "hush-hush"}})
    done = place.mlflow_run(project, "-P", "name=you", "--env-manager", "local", "--backend-config", config)
    assert done.returncode == 0, done.stderr
    assert Path(project, "greeting").read_text() == "hello you hush-hush\n"
    (run,) = place.runs
    assert "hush-hush" not in json.dumps(run)
    assert run["info"]["status"] == "FINISHED"
    assert tags_of(run)["mlflow.project.backend"] == "mlfleet"


def test_mlflow_run_names_the_backend_of_mlfleet(place: Workplace) -> None:
    project = write_project(place.tmp_path / "hello", "echo world > $OUT; echo world")
    config = json.dumps({"backend": "echo", "greeting": "good morning"})
    done = place.mlflow_run(project, "--backend-config", config)
    assert "good morning\nworld\n" in done.stdout + done.stderr


def test_mistakes_are_reported_as_mlflow_reports_them(place: Workplace) -> None:
    project = write_project(place.tmp_path / "hello", "echo hello")
    done = place.mlflow_run(project, "--backend-config", '{"backend": "kubernets"}')
    assert done.returncode == 1
    assert "there is no backend 'kubernets'. Did you mean 'kubernetes'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert place.runs == []


def test_mlflow_projects_run_waits_and_raises(place: Workplace) -> None:
    project = write_project(place.tmp_path / "bad", "exit 3")
    done = place.script(f"""
import mlflow
try:
    mlflow.projects.run({project!r}, backend="mlfleet", experiment_id=EXPERIMENT, env_manager="local")
except mlflow.exceptions.ExecutionException as error:
    print(error)
""")
    (run,) = place.runs
    assert done.stdout.endswith(f"Run (ID '{run['info']['run_id']}') failed\n"), done.stderr
    assert run_on(place.server, run["info"]["run_id"])["info"]["status"] == "FAILED"


def test_mlfleet_is_not_a_backend_of_itself(place: Workplace) -> None:
    project = write_project(place.tmp_path / "hello", "echo hello")
    done = place.run(project, "mlfleet")
    assert done.returncode == 2
    assert "there is no backend 'mlfleet'" in done.stderr

"""What killed processes leave in a scripted Databricks workspace, and its removal."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
from click.testing import CliRunner

from components.fake_databricks import QUICK, JobMaker, succeed
from fakes.databricks import FakeRun, FakeWorkspace
from mlfleet._cli.program import _cli as cli
from mlfleet._paths import run_folder
from mlfleet.backends.databricks import DatabricksBackend
from mlfleet.backends.databricks.records import Record, change_owner, read_records
from mlfleet.errors import RunLost, SubmitError
from mlfleet.runs import JobRef

DRIVER = """
import asyncio, json, sys
from pathlib import Path
from mlfleet.backends.base import Job
from mlfleet.backends.databricks import DatabricksBackend

async def main():
    async with DatabricksBackend() as backend:
        for run_id, config in json.loads(sys.argv[1]).items():
            job = Job(
                run_id=run_id, experiment_id="0", project_name="demo", project_dir=Path(sys.argv[2]), command="true",
                environ={"LONG": "x" * 20_000}, secrets={"MLFLOW_TRACKING_TOKEN": "hush"}, output=Path("output.log"),
                tracking_uri="https://mlflow", config=backend.configure({"secret_scope": "ours", **config}),
            )
            await backend.submit(job)
        print("submitted", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def submit_and_die(folder: Path, *configs: Mapping[str, Any]) -> list[str]:
    """Submit runs with secrets and long arguments in a process that is killed then; return their ids."""
    runs = {uuid.uuid4().hex: config for config in configs}
    (folder / "dead").mkdir()
    arguments = (json.dumps(runs), str(folder / "dead"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DRIVER, *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"submitted\n"
    process.kill()
    await process.wait()
    return list(runs)


async def test_prune_removes_what_a_killed_process_left_of_ended_and_forgotten_runs(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker, tmp_path: Path
) -> None:
    places = ["/Workspace/Shared/x", "/Volumes/a/b/c", "dbfs:/mlfleet", "/Workspace/Shared/y"]
    dead = await submit_and_die(tmp_path, *({"upload_path": place} for place in places))
    ours = await backend.submit(make_job())
    assert await backend.prune() == [], "they are active, and the last one is looked after"
    listed = {run.run_id: (run.supervised, run.state) for run in await backend.list_runs()}
    assert listed == {**dict.fromkeys(dead, (False, "pending")), ours.run_id: (True, "pending")}
    for number in (1, 2, 3):
        workspace.put_output(workspace.runs[number], b"done\n")
        workspace.runs[number].set_state("TERMINATED", "SUCCESS")
    del workspace.runs[4]
    listed = {run.run_id: (run.supervised, run.state) for run in await backend.list_runs()}
    states = dict.fromkeys(dead, (False, "terminated")) | {dead[3]: (False, "gone"), ours.run_id: (True, "pending")}
    assert listed == states
    assert {run.run_id for run in await backend.prune(dry_run=True)} == set(dead)
    assert await backend.prune(["another"]) == []
    assert len(workspace.secrets) == 4
    assert [run.run_id for run in await backend.prune([dead[1]])] == [dead[1]]
    assert len(workspace.secrets) == 3
    assert {run.run_id for run in await backend.prune()} == {dead[0], dead[2], dead[3]}
    assert workspace.secrets == {}
    assert [path for path in workspace.files if any(run_id in path for run_id in dead)] == []
    assert len([path for path in workspace.files if path.endswith(".tar.gz")]) == 5
    assert await backend.prune() == []
    assert [run.run_id for run in await backend.list_runs()] == [ours.run_id]


async def submit_for_a_dead_process(backend: DatabricksBackend, make_job: JobMaker) -> str:
    """Submit a run with secrets, and record a process that is gone as its owner. Return the run's id."""
    secrets = {"MLFLOW_TRACKING_TOKEN": "hush"}
    job = make_job({"secret_scope": "ours"}, tracking_uri="https://mlflow", secrets=secrets)
    await backend.submit(job)

    def change() -> None:
        (record,) = read_records()
        change_owner(job.run_id, {**record.reference.data["owner"], "started": -1})

    await anyio.to_thread.run_sync(change)
    return job.run_id


async def test_prune_leaves_a_run_that_another_process_has_attached_to(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    run_id = await submit_for_a_dead_process(backend, make_job)
    (record,) = await anyio.to_thread.run_sync(read_records)
    async with DatabricksBackend(timing=QUICK) as other:
        run = await other.attach(record.reference)
        assert await backend.prune(running=True) == []
        succeed(workspace)(workspace.only_run)
        assert await run.wait() is True
    assert run.run_id == run_id
    assert await anyio.to_thread.run_sync(read_records) == []


async def test_prune_ends_active_runs_of_killed_processes_if_asked(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    run_id = await submit_for_a_dead_process(backend, make_job)
    workspace.only_run.set_state("RUNNING")
    assert [run.run_id for run in await backend.prune(running=True)] == [run_id]
    assert workspace.only_run.cancelled == 1
    assert workspace.secrets == {}
    assert [path for path in workspace.files if run_id in path] == []


async def test_prune_removes_old_secrets_of_other_machines(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    month = 30 * 86_400_000  # milliseconds
    secret: dict[str, Any] = {"tracking_uri": "https://mlflow", "secrets": {"MLFLOW_TRACKING_TOKEN": "hush"}}
    ours = await backend.submit(make_job({"secret_scope": "ours"}, **secret))
    old, young = uuid.uuid4().hex, uuid.uuid4().hex
    for run_id in (old, young):
        workspace.secrets["ours", f"mlfleet-{run_id}"] = "hush"
        workspace.secret_times[f"mlfleet-{run_id}"] = workspace.secret_times[f"mlfleet-{ours.run_id}"]
    for run_id in (old, ours.run_id):
        workspace.secret_times[f"mlfleet-{run_id}"] -= month
    workspace.secrets["ours", "a-key"] = "not ours"
    workspace.secret_times["a-key"] = 0
    assert [run.run_id for run in await backend.prune(dry_run=True)] == [old]
    assert await backend.prune([young]) == []
    assert [run.run_id for run in await backend.prune()] == [old]
    kept = {"a-key", f"mlfleet-{young}", f"mlfleet-{ours.run_id}"}
    assert {key for _, key in workspace.secrets} == kept


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["-c", '{"profile": "ours"}'], ""),
        (["--tracking-uri", "databricks://ours"], "[backends.databricks]\nupload_path = '/Volumes/a/b/c'"),
        ([], "[backends.databricks]\nprofile = 'ours'"),
        ([], "tracking-uri = 'databricks://ours'"),
    ],
)
async def test_ps_and_prune_ask_the_workspace_that_a_run_would_use(
    workspace: FakeWorkspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], settings: str
) -> None:
    monkeypatch.setenv("DATABRICKS_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "profiles"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiles").write_text(f"[ours]\nhost = {workspace.url}\ntoken = {workspace.token}\n")
    (tmp_path / "mlfleet.toml").write_text(settings)
    active, old = uuid.uuid4().hex, uuid.uuid4().hex
    workspace.runs[1] = FakeRun(1, {"run_name": f"demo ({active})"}, start_time=0)
    workspace.secrets["ours", f"mlfleet-{old}"] = "hush"
    workspace.secret_times[f"mlfleet-{old}"] = 0
    for command, run_id in (("ps", active), ("prune", old)):
        arguments = [command, "-b", "databricks", "--json", *options]
        done = await anyio.to_thread.run_sync(CliRunner().invoke, cli, arguments)
        assert done.exit_code == 0, done.output
        assert [run["run_id"] for run in json.loads(done.stdout) if run["backend"] == "databricks"] == [run_id]


async def test_attach_to_a_deleted_run_of_a_killed_process_removes_its_secret(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    job = make_job({"secret_scope": "ours"}, tracking_uri="https://mlflow", secrets={"MLFLOW_TRACKING_TOKEN": "hush"})
    reference = backend.reference(job)
    workspace.secrets["ours", f"mlfleet-{job.run_id}"] = "hush"
    with pytest.raises(RunLost):
        await backend.attach(reference)
    assert workspace.secrets != {}, "this process may be about to submit it"
    owner = {**reference.data["owner"], "started": -1}
    with pytest.raises(RunLost):
        await backend.attach(replace(reference, data={**reference.data, "owner": owner}))
    assert workspace.secrets == {}


async def test_no_record_is_left_of_runs_whose_end_was_seen(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    workspace.on_submit = succeed(workspace)
    await (await backend.submit(make_job())).wait()
    workspace.quota = 0
    with pytest.raises(SubmitError):
        await backend.submit(make_job(queue_timeout=0))
    assert await anyio.to_thread.run_sync(read_records) == []


def test_records_of_earlier_versions_are_read() -> None:
    reference = JobRef("databricks", uuid.uuid4().hex, {"attempt": "0123456789ab", "upload": "workspace", "path": ""})
    folder = run_folder(reference.run_id)
    folder.mkdir(parents=True)
    record = {"ref": reference.to_json(), "number": "7", "argument": "/Workspace/Users/me/.mlfleet/arguments/a.json"}
    (folder / "databricks.json").write_text(json.dumps(record))
    assert read_records() == [Record(reference, "7")]

"""The Databricks backend against a scripted workspace: states, paging, faults of the network, refusals."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from fakes.databricks import FakeRun, FakeWorkspace, error
from fakes.flaky_proxy import Answer, Forward, Request
from mlfleet.backends.base import Job
from mlfleet.backends.databricks import DatabricksBackend
from mlfleet.backends.databricks.workspace import WorkspaceError
from mlfleet.errors import MlfleetError, RunLost, SubmitError
from mlfleet.runs import FailureKind, JobRef, RunStatus

JobMaker = Callable[..., Job]


@pytest.fixture
async def workspace(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeWorkspace]:
    async with FakeWorkspace().open() as fake:
        monkeypatch.setenv("DATABRICKS_HOST", fake.url)
        monkeypatch.setenv("DATABRICKS_TOKEN", fake.token)
        monkeypatch.setenv("DATABRICKS_CONFIG_FILE", "/dev/null")
        yield fake


@pytest.fixture
async def backend(workspace: FakeWorkspace) -> AsyncIterator[DatabricksBackend]:
    async with DatabricksBackend() as backend:
        yield backend


@pytest.fixture
def make_job(tmp_path: Path) -> JobMaker:
    project = tmp_path / "project"
    project.mkdir()
    (project / "train.py").write_text("print('hello')\n")

    def make(config: dict[str, Any] | None = None, **options: Any) -> Job:
        run_id = options.pop("run_id", uuid.uuid4().hex)
        return Job(
            run_id=run_id,
            experiment_id="0",
            project_name="demo",
            project_dir=options.pop("project_dir", project),
            command="python train.py",
            tracking_uri=options.pop("tracking_uri", "databricks"),
            output=tmp_path / run_id / "output.log",
            config=DatabricksBackend().configure(config or {}),
            **options,
        )

    return make


def succeed(workspace: FakeWorkspace) -> Callable[[FakeRun], None]:
    def end(run: FakeRun) -> None:
        workspace.put_output(run, b"done\n")
        run.become("TERMINATED", "SUCCESS")

    return end


async def lines_of(run: Any) -> list[str]:
    return [line async for line in run.logs()]


# ---- how runs end


async def test_a_run_that_succeeds(backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker) -> None:
    workspace.on_submit = succeed(workspace)
    job = make_job()
    run = await backend.submit(job)
    assert await run.wait() is True
    assert await lines_of(run) == ["done"]
    assert backend.tags(run) == {
        "mlflow.databricks.runURL": f"{workspace.url}/jobs/1000001/runs/1",
        "mlflow.databricks.shellJobRunID": "1",
        "mlflow.databricks.shellJobID": "1000001",
        "mlflow.databricks.webappURL": workspace.url,
    }
    assert len(workspace.only.body["idempotency_token"]) <= 64
    assert workspace.only.body["idempotency_token"].startswith(job.run_id)


@pytest.mark.parametrize(
    ("life", "result", "status", "reason"),
    [
        ("TERMINATED", "FAILED", RunStatus.FAILED, "FAILED: as told: RuntimeError: no such column"),
        ("TERMINATED", "TIMEDOUT", RunStatus.FAILED, "TIMEDOUT: as told"),
        ("TERMINATED", "SUCCESS_WITH_FAILURES", RunStatus.FAILED, "SUCCESS_WITH_FAILURES"),
        ("INTERNAL_ERROR", None, RunStatus.FAILED, "INTERNAL_ERROR: as told"),
        ("INTERNAL_ERROR", "FAILED", RunStatus.FAILED, "FAILED: as told"),
        ("SKIPPED", None, RunStatus.FAILED, "SKIPPED: as told"),
        ("TERMINATED", "CANCELED", RunStatus.KILLED, "cancelled in Databricks"),
    ],
)
async def test_a_run_that_does_not(
    backend: DatabricksBackend,
    workspace: FakeWorkspace,
    make_job: JobMaker,
    life: str,
    result: str | None,
    status: RunStatus,
    reason: str,
) -> None:
    def end(run: FakeRun) -> None:
        trace = "Traceback (most recent call last)\n  File train.py\nRuntimeError: no such column"
        run.output = {"error": "RuntimeError: no such column", "error_trace": trace, "logs": "loading\n"}
        run.become(life, result, "as told")

    workspace.on_submit = end
    outcome = await (await backend.submit(make_job())).outcome()
    assert outcome.status is status
    assert (outcome.reason or "").startswith(reason)
    assert outcome.output[0] == "loading"
    assert outcome.output[-1] == "RuntimeError: no such column"


async def test_all_states_on_the_way(backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker) -> None:
    run = await backend.submit(make_job())
    assert await run.get_status() is RunStatus.SCHEDULED
    for life in ("QUEUED", "BLOCKED", "WAITING_FOR_RETRY"):
        workspace.only.become(life)
        with anyio.move_on_after(2.0) as still_waiting:
            await run.started()
        assert still_waiting.cancelled_caught
    workspace.only.become("RUNNING")
    await run.started()
    assert await run.get_status() is RunStatus.RUNNING
    workspace.put_output(workspace.only, b"done\n")
    workspace.only.become("TERMINATING")
    with anyio.move_on_after(2.0) as still_ending:
        await run.wait()
    assert still_ending.cancelled_caught
    workspace.only.become("TERMINATED", "SUCCESS")
    assert await run.wait() is True


async def test_a_run_that_vanished(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlfleet.backends.databricks.poller._NOT_YET", 0.0)
    run = await backend.submit(make_job())
    workspace.runs.clear()
    outcome = await run.outcome()
    assert isinstance(outcome.error, RunLost)
    assert "Databricks does not know the run 1" in str(outcome.error)
    assert outcome.kind is FailureKind.INFRASTRUCTURE


# ---- cancelling


async def test_cancel_waits_for_the_end(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    workspace.on_submit = lambda run: run.become("RUNNING")
    workspace.on_cancel = lambda run: run.become("TERMINATING")
    run = await backend.submit(make_job())
    cancelling = asyncio.create_task(run.cancel())
    with anyio.move_on_after(3.0) as still_ending:
        await run.wait()
    assert still_ending.cancelled_caught
    assert not cancelling.done()
    workspace.only.become("TERMINATED", "CANCELED")
    await cancelling
    assert (await run.outcome()).status is RunStatus.KILLED
    assert workspace.only.cancelled == 1


async def test_cancel_of_what_has_just_ended(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    run = await backend.submit(make_job())
    succeed(workspace)(workspace.only)
    await run.cancel()  # answered with INVALID_STATE
    assert await run.get_status() is RunStatus.FINISHED


async def test_a_submit_that_is_cancelled_cancels_the_run(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    submitted, answer = asyncio.Event(), asyncio.Event()

    async def slow(request: Request, forward: Forward) -> Answer | None:
        told = await forward()
        if request.target.endswith("runs/submit"):
            submitted.set()
            await answer.wait()
        return told

    workspace.fault = slow
    submitting = asyncio.create_task(backend.submit(make_job()))
    await submitted.wait()
    submitting.cancel()
    answer.set()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    assert workspace.only.cancelled == 1
    assert not workspace.only.active


async def test_leaving_the_backend_cancels_its_runs(workspace: FakeWorkspace, make_job: JobMaker) -> None:
    async with DatabricksBackend() as backend:
        runs = [await backend.submit(make_job()) for _ in range(3)]
    assert [await run.get_status() for run in runs] == [RunStatus.KILLED] * 3
    assert [run.cancelled for run in workspace.runs.values()] == [1, 1, 1]


# ---- faults


def once_each(fault: Callable[[Request, Forward], Any]) -> Callable[[Request, Forward], Any]:
    """Do it to the first request of each kind, and pass the next ones on."""
    seen: set[str] = set()

    async def rule(request: Request, forward: Forward) -> Answer | None:
        kind = f"{request.method} {request.target.split('?')[0]}"
        if kind in seen:
            return await forward()
        seen.add(kind)
        answer: Answer | None = await fault(request, forward)
        return answer

    return rule


async def busy(request: Request, forward: Forward) -> Answer | None:
    return Answer(429, b'{"error_code": "RESOURCE_EXHAUSTED", "message": "too many"}')


async def busy_for_a_second(request: Request, forward: Forward) -> Answer | None:
    return Answer(429, b"", {"retry-after": "1"})


async def broken(request: Request, forward: Forward) -> Answer | None:
    return Answer(500, b"oops")


async def away(request: Request, forward: Forward) -> Answer | None:
    return Answer(503, b'{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "soon"}')


async def locked(request: Request, forward: Forward) -> Answer | None:
    return await forward() if request.method == "HEAD" else error(400, "COULD_NOT_ACQUIRE_LOCK", "try again")


async def torn(request: Request, forward: Forward) -> Answer | None:
    answer = await forward()
    return Answer(answer.status, answer.body + b" " * 100, answer.headers, sent=3)


async def lost_answer(request: Request, forward: Forward) -> Answer | None:
    await forward()
    return None


async def lost_request(request: Request, forward: Forward) -> Answer | None:
    return None


async def slow(request: Request, forward: Forward) -> Answer | None:
    await asyncio.sleep(0.3)
    return await forward()


VOLUME, DBFS = {"upload_path": "/Volumes/a/b/c"}, {"upload": "dbfs"}
FAULTS = [
    *(({}, fault) for fault in (busy, busy_for_a_second, broken, away, locked, torn, lost_answer, lost_request, slow)),
    *((config, fault) for config in (VOLUME, DBFS) for fault in (torn, lost_answer, lost_request)),
]


# Each kind of request fails once and is tried again after half a second or a whole one.
@pytest.mark.timeout(40)
@pytest.mark.parametrize(("config", "fault"), FAULTS, ids=lambda part: getattr(part, "__name__", str(part)))
async def test_a_fault_at_every_call_costs_time_and_nothing_else(
    backend: DatabricksBackend,
    workspace: FakeWorkspace,
    make_job: JobMaker,
    fault: Callable[[Request, Forward], Any],
    config: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    workspace.fault = once_each(fault)
    workspace.on_submit = succeed(workspace)
    config = {**config, "secret_scope": "ours"}
    job = make_job(config, tracking_uri="https://mlflow", secrets={"MLFLOW_TRACKING_TOKEN": "hush-hush"})
    run = await backend.submit(job)
    assert await run.wait() is True
    assert await lines_of(run) == ["done"]
    assert len(workspace.runs) == 1
    assert workspace.secrets == {}
    assert not {"hush-hush", workspace.token} & set(caplog.text.split())


async def test_a_bad_poll_fails_no_run(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker, caplog: pytest.LogCaptureFixture
) -> None:
    run = await backend.submit(make_job())
    refused = asyncio.Event()

    async def refuse(request: Request, forward: Forward) -> Answer | None:
        if "runs/get?" in request.target and not refused.is_set():
            refused.set()
            return error(403, "PERMISSION_DENIED", "not now")
        return await forward()

    workspace.fault = refuse
    with caplog.at_level(logging.WARNING):
        await refused.wait()
        succeed(workspace)(workspace.only)
        assert await run.wait() is True
    assert "the states of 1 Databricks runs are not known" in caplog.text


# ---- refusals


async def test_an_expired_token(backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker) -> None:
    workspace.token = "another"
    with pytest.raises(
        MlfleetError, match=r"403.*Invalid access token.*; check DATABRICKS_HOST and DATABRICKS_TOKEN"
    ) as caught:
        await backend.submit(make_job())
    assert "dapi-not" not in str(caught.value)


async def test_a_bad_cluster_spec(backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker) -> None:
    async def refuse(request: Request, forward: Forward) -> Answer | None:
        if request.target.endswith("runs/submit"):
            return error(400, "INVALID_PARAMETER_VALUE", "Invalid spark version 1.2.3.")
        return await forward()

    workspace.fault = refuse
    config = {"new_cluster": {"spark_version": "1.2.3", "num_workers": 0}, "secret_scope": "ours"}
    job = make_job(config, tracking_uri="https://mlflow", secrets={"MLFLOW_TRACKING_TOKEN": "hush"})
    with pytest.raises(SubmitError, match=r"Databricks does not take the run.*400.*Invalid spark version 1\.2\.3"):
        await backend.submit(job)
    assert workspace.secrets == {}


async def test_a_disabled_dbfs_root(backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker) -> None:
    workspace.dbfs = False
    with pytest.raises(SubmitError, match=r"the DBFS root is disabled.*'upload_path': '/Volumes/<catalog>") as caught:
        await backend.submit(make_job({"upload": "dbfs"}))
    assert "DATABRICKS_TOKEN" not in str(caught.value)
    assert workspace.runs == {}


async def test_a_workspace_that_is_not_there(make_job: JobMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABRICKS_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("DATABRICKS_TOKEN", "dapi-not-to-be-seen")
    async with DatabricksBackend() as backend:
        with pytest.raises(WorkspaceError, match=r"cannot be reached: connection refused; check DATABRICKS_HOST"):
            await backend.submit(make_job())


async def test_no_way_to_log_in(make_job: JobMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABRICKS_HOST", "DATABRICKS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", "/dev/null")
    async with DatabricksBackend() as backend:
        with pytest.raises(WorkspaceError, match="no way to log in to Databricks was found"):
            await backend.submit(make_job())


async def test_secrets_without_a_scope(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    secrets = {"MLFLOW_TRACKING_PASSWORD": "hush"}
    with pytest.raises(SubmitError, match=r"\(MLFLOW_TRACKING_PASSWORD\).*name one in backend_config {'secret_scope'"):
        await backend.submit(make_job(tracking_uri="https://mlflow", secrets=secrets))
    job = make_job({"secret_scope": "theirs"}, tracking_uri="https://mlflow", secrets=secrets)
    with pytest.raises(SubmitError, match=r"cannot be put into the secret scope 'theirs'.*does not exist"):
        await backend.submit(job)
    assert workspace.files.keys() <= {path for path in workspace.files if "runs/submit" not in path}
    assert workspace.runs == {}


async def test_a_project_that_is_too_large_for_the_workspace(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker, tmp_path: Path
) -> None:
    import random

    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "data.bin").write_bytes(random.Random(1).randbytes(11 * 2**20))
    with pytest.raises(SubmitError, match=r"11\.0 MiB, and the workspace takes files of up to 10 MB.*\.dockerignore"):
        await backend.submit(make_job(project_dir=folder))
    workspace.on_submit = succeed(workspace)
    run = await backend.submit(make_job({"upload_path": "/Volumes/a/b/c"}, project_dir=folder))
    assert await run.wait() is True


# ---- many runs


async def test_the_same_content_is_uploaded_once(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    workspace.on_submit = succeed(workspace)
    runs = await asyncio.gather(*(backend.submit(make_job({"upload_path": "/Volumes/a/b/c"})) for _ in range(20)))
    assert all(await asyncio.gather(*(run.wait() for run in runs)))
    uploads = [request.target for request in workspace.requests if request.method == "PUT"]
    assert len(uploads) == 1
    assert workspace.count("import-file") <= 2  # the bootstrap script; its folder was missing at first


async def test_another_process_uploads_nothing_again(workspace: FakeWorkspace, make_job: JobMaker) -> None:
    workspace.on_submit = succeed(workspace)
    for _ in range(2):
        async with DatabricksBackend() as backend:
            assert await (await backend.submit(make_job())).wait()
    assert len([path for path in workspace.files if path.endswith(".tar.gz")]) == 1
    first, second = (run.body["tasks"] for run in workspace.runs.values())
    assert first[0]["spark_python_task"]["python_file"] == second[0]["spark_python_task"]["python_file"]
    written = [request.target for request in workspace.requests if "import-file" in request.target]
    assert len([target for target in written if ".tar.gz" in target]) <= 2


# Submitting is paced to 30 a second.
@pytest.mark.timeout(120)
async def test_500_runs_are_listed_in_pages(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    job = make_job()
    workspace.on_submit = lambda run: run.become("RUNNING")
    runs = await asyncio.gather(*(backend.submit(make_job(project_dir=job.project_dir)) for _ in range(500)))
    waiting = asyncio.gather(*(run.wait() for run in runs))
    before = workspace.count("runs/get?")
    listed_twice = asyncio.Event()

    async def watch(request: Request, forward: Forward) -> Answer | None:
        if workspace.count("page_token=475") >= 2:
            listed_twice.set()
        return await forward()

    workspace.fault = watch
    await listed_twice.wait()
    assert workspace.count("runs/get?") == before  # those that are active need no more than the list
    for run in workspace.runs.values():
        workspace.put_output(run, b"done\n", run.number % 2)
        run.become("TERMINATED", "FAILED" if run.number % 2 else "SUCCESS")
    assert sorted(await waiting) == [False] * 250 + [True] * 250
    assert workspace.count("runs/get?") - before == 500


# ---- finding runs again


async def test_attach_finds_runs_by_one_listing(workspace: FakeWorkspace, make_job: JobMaker) -> None:
    jobs = [make_job() for _ in range(60)]
    async with DatabricksBackend() as first:
        references = [JobRef.from_json(first.reference(job).to_json()) for job in jobs]
        for job in jobs:
            await first.submit(job)
        async with DatabricksBackend() as second:
            again = await asyncio.gather(*(second.attach(reference) for reference in references))
            assert workspace.count("runs/list") - workspace.count("active_only") == 3
            for run in workspace.runs.values():
                workspace.put_output(run, f"output of {run.body['run_name'][-33:-1]}\n".encode(), 4)
                run.become("TERMINATED", "FAILED")
            for run_again in again:
                assert (await run_again.outcome()).exit_code == 4
                assert await lines_of(run_again) == [f"output of {run_again.run_id}"]


async def test_leaving_the_backend_leaves_attached_runs_alone(workspace: FakeWorkspace, make_job: JobMaker) -> None:
    job = make_job()
    async with DatabricksBackend() as first:
        reference = first.reference(job)
        await first.submit(job)
        async with DatabricksBackend() as second:
            run = await second.attach(reference)
        assert workspace.only.cancelled == 0
        assert isinstance((await run.outcome()).error, RunLost)


async def test_attach_to_what_is_gone(backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker) -> None:
    job = make_job()
    with pytest.raises(RunLost, match=f"has no run of the MLflow run {job.run_id}, or none any more"):
        await backend.attach(backend.reference(job))


async def test_a_run_again_of_the_same_mlflow_run_is_another_run(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    workspace.on_submit = succeed(workspace)
    job = make_job()
    for _ in range(2):
        backend.reference(job)
        assert await (await backend.submit(job)).wait()
    assert len(workspace.runs) == 2


# ---- what goes there


async def test_a_long_command_goes_by_a_file(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    job = make_job(environ={"LONG": "x" * 20_000})
    run = await backend.submit(job)
    (argument,) = workspace.only.body["tasks"][0]["spark_python_task"]["parameters"]
    path = json.loads(argument)["spec"]
    assert json.loads(workspace.files[path])["environ"]["LONG"] == "x" * 20_000
    await run.cancel()


async def test_secrets_are_there_for_the_time_of_the_run(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    job = make_job({"secret_scope": "ours"}, tracking_uri="https://mlflow", secrets={"MLFLOW_TRACKING_TOKEN": "hush"})
    run = await backend.submit(job)
    assert json.loads(workspace.secrets["ours", f"mlfleet-{job.run_id}"]) == {"MLFLOW_TRACKING_TOKEN": "hush"}
    assert "hush" not in json.dumps(workspace.only.body)
    await run.cancel()
    assert workspace.secrets == {}

"""The Databricks backend against a scripted workspace: faults of the network, refusals, logins that expire."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.fake_databricks import QUICK, JobMaker, lines_of, succeed
from components.projects import write_project
from fakes.databricks import FakeWorkspace, error
from fakes.flaky_proxy import Answer, Forward, Request
from mlfleet import FailureKind, Fleet, Timeouts
from mlfleet.backends.databricks import DatabricksBackend
from mlfleet.backends.databricks.client import WorkspaceError
from mlfleet.errors import MlfleetError, SubmitError
from mlfleet.testing import FakeTracking
from mlfleet.tracking.databricks import DatabricksLogin

# ---- faults


def once_each(fault: Callable[[Request, Forward], Any]) -> Callable[[Request, Forward], Any]:
    """Apply the fault to the first request of each kind, and forward the later ones."""
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


async def busy_for_some_time(request: Request, forward: Forward) -> Answer | None:
    return Answer(429, b"", {"retry-after": "1" if request.target.endswith("runs/submit") else "0"})


async def broken(request: Request, forward: Forward) -> Answer | None:
    return Answer(500, b"oops")


async def away_for_some_time(request: Request, forward: Forward) -> Answer | None:
    return Answer(503, b"", {"retry-after": "0"})


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
    *(
        ({}, fault)
        for fault in (
            busy,
            busy_for_some_time,
            broken,
            away,
            away_for_some_time,
            locked,
            torn,
            lost_answer,
            lost_request,
            slow,
        )
    ),
    *((config, fault) for config in (VOLUME, DBFS) for fault in (torn, lost_answer, lost_request)),
]


@pytest.mark.parametrize(("config", "fault"), FAULTS, ids=lambda part: getattr(part, "__name__", str(part)))
async def test_a_run_survives_a_fault_at_every_request(
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
    (archive,) = (path for path in workspace.files if path.endswith(".tar.gz"))
    assert hashlib.sha256(workspace.files[archive]).hexdigest() in archive
    assert not {"hush-hush", workspace.token} & set(caplog.text.split())


async def test_a_failed_poll_does_not_fail_the_run(
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
        succeed(workspace)(workspace.only_run)
        assert await run.wait() is True
    assert "the states of 1 Databricks runs cannot be read" in caplog.text


async def test_a_file_already_uploaded_by_another_process_is_accepted(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    async def conflict(request: Request, forward: Forward) -> Answer | None:
        answer = await forward()
        if request.method == "PUT" and answer.status == 204 and "fs/files" in request.target:
            return error(409, "ALREADY_EXISTS", "The file exists.")
        return answer

    workspace.fault = conflict
    workspace.on_submit = succeed(workspace)
    assert await (await backend.submit(make_job(VOLUME))).wait() is True


async def test_names_are_escaped_in_urls(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    workspace.on_submit = succeed(workspace)
    for place in ("/Volumes/a/b/c/50% of #1?", "/Workspace/Shared/50% of #1?", "dbfs:/50% of #1?"):
        run = await backend.submit(make_job({"upload_path": place}))
        assert await run.wait() is True
        assert await lines_of(run) == ["done"]
    paths = {path.partition("/projects/")[0] for path in workspace.files if "/projects/" in path}
    assert paths == {"/Volumes/a/b/c/50% of #1?", "/Workspace/Shared/50% of #1?", "/dbfs/50% of #1?"}


# ---- logins


async def test_an_expired_token(backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker) -> None:
    workspace.token = "another"
    with pytest.raises(
        MlfleetError, match=r"403.*Invalid access token.*; check DATABRICKS_HOST and DATABRICKS_TOKEN"
    ) as caught:
        await backend.submit(make_job())
    assert "dapi-not" not in str(caught.value)
    assert len(workspace.requests) == 1  # the same token is not tried again


@pytest.fixture
def service_principal(workspace: FakeWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABRICKS_TOKEN")
    monkeypatch.setenv("DATABRICKS_CLIENT_ID", "robot")
    monkeypatch.setenv("DATABRICKS_CLIENT_SECRET", "robot-secret")


async def expired(request: Request, forward: Forward) -> Answer | None:
    return error(401, "401", "The access token expired.")


@pytest.mark.usefixtures("service_principal")
@pytest.mark.parametrize(
    ("config", "where"), [({}, "/api/"), (VOLUME, "/api/"), (DBFS, "/dbfs/add-block"), (DBFS, "/dbfs/close")], ids=str
)
async def test_an_expired_login_is_renewed(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker, config: dict[str, Any], where: str
) -> None:
    """The token expires once for each kind of request."""
    workspace.fault = once_each(_only(where, expired))
    workspace.on_submit = succeed(workspace)
    run = await backend.submit(make_job(config))
    assert await run.wait() is True
    assert await lines_of(run) == ["done"]
    assert len(workspace.runs) == 1
    assert workspace.logins > (1 if config == DBFS else 5)


@pytest.mark.usefixtures("service_principal")
async def test_an_expired_login_is_renewed_once_for_hundreds_of_requests(
    workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    async with DatabricksBackend(timing=QUICK) as backend:
        first = await backend.submit(make_job())
        workspace.token = "revoked"
        workspace.on_submit = succeed(workspace)
        runs = await asyncio.gather(*(backend.submit(make_job()) for _ in range(30)))
        assert all(await asyncio.gather(*(run.wait() for run in runs)))
        await first.cancel()
    assert workspace.logins == 2


@pytest.mark.usefixtures("service_principal")
async def test_a_refused_new_login_gives_one_clear_error(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    workspace.fault = _only("/api/", expired)
    with pytest.raises(WorkspaceError, match=r"answered .* with 401: .*expired.*; check DATABRICKS_HOST") as caught:
        await backend.submit(make_job())
    assert workspace.logins == 2
    for secret in ("robot-secret", "issued-1", "issued-2"):
        assert secret not in str(caught.value)


async def test_a_changed_profile_token_is_read_again(
    workspace: FakeWorkspace, make_job: JobMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "databrickscfg"
    file.write_text(f"[team]\nhost = {workspace.url}\ntoken = {workspace.token}\n")
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(file))
    async with DatabricksBackend(timing=QUICK) as backend:
        run = await backend.submit(make_job({"profile": "team"}))
        workspace.token = "dapi-of-today"
        await workspace.wait_answered("runs/get", 2)  # refused
        file.write_text(f"[team]\nhost = {workspace.url}\ntoken = dapi-of-today\n")
        succeed(workspace)(workspace.only_run)
        assert await run.wait() is True


async def test_a_token_for_another_workspace_is_never_sent(
    workspace: FakeWorkspace, make_job: JobMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "databrickscfg"
    file.write_text(f"[team]\nhost = {workspace.url}\ntoken = old\n")
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(file))

    async def change(request: Request, forward: Forward) -> Answer | None:
        file.write_text("[team]\nhost = https://elsewhere.example.com\ntoken = dapi-elsewhere\n")
        return await forward()

    workspace.fault = change
    async with DatabricksBackend(timing=QUICK) as backend:
        with pytest.raises(WorkspaceError, match="403"):
            await backend.submit(make_job({"profile": "team"}))
    assert {request.headers["authorization"] for request in workspace.requests} == {"Bearer old"}


async def test_a_missing_permission_is_reported_without_a_new_login(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    async def refuse(request: Request, forward: Forward) -> Answer | None:
        if request.target.endswith("runs/submit"):
            return error(403, "PERMISSION_DENIED", "me@example.com may not use serverless compute.")
        return await forward()

    workspace.fault = refuse
    with pytest.raises(SubmitError, match=r"Databricks does not take the run: .*403.*may not use serverless compute"):
        await backend.submit(make_job())
    assert workspace.count("runs/submit") == 1


def _only(part: str, fault: Callable[[Request, Forward], Any]) -> Callable[[Request, Forward], Any]:
    async def rule(request: Request, forward: Forward) -> Answer | None:
        if part not in request.target:
            return await forward()
        answer: Answer | None = await fault(request, forward)
        return answer

    return rule


# ---- refusals


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


async def test_submissions_wait_while_the_workspace_takes_no_new_jobs(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker, caplog: pytest.LogCaptureFixture
) -> None:
    workspace.quota = 3
    workspace.on_submit = succeed(workspace)
    lines: list[str] = []
    with caplog.at_level(logging.WARNING):
        submitting = asyncio.gather(*(backend.submit(make_job(on_progress=lines.append)) for _ in range(10)))
        while len(workspace.runs) < 3:
            await workspace.wait_answered("runs/submit", 1)
        await workspace.wait_answered("runs/submit", 8)
        assert len(workspace.runs) == 3
        workspace.quota = 10
        assert all([await run.wait() for run in await submitting])
    assert "waiting until the workspace takes new jobs again" in lines
    assert len(workspace.runs) == 10
    assert "3 jobs created in past 3600 seconds" in caplog.text


async def test_a_quota_that_stays_used_up_is_a_failure_of_the_infrastructure(
    workspace: FakeWorkspace, tmp_path: Path
) -> None:
    workspace.quota = 0
    tracking = FakeTracking()
    tracking.uri = "http://tracking.example.com"
    uri = write_project(tmp_path / "demo", "true")
    async with Fleet(tracking=tracking, timeouts=Timeouts(queue=0.2)) as fleet:
        outcome = await (await fleet.submit(uri, backend="databricks")).outcome()
    assert outcome.kind is FailureKind.INFRASTRUCTURE
    assert "Databricks does not take the run: " in (outcome.reason or "")
    assert "0 jobs created in past 3600 seconds. (waited 0 s for the quota)" in (outcome.reason or "")
    assert workspace.runs == {}


async def test_submissions_wait_while_the_workspace_has_too_many_active_runs(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # instead of five minutes

    async def refuse(request: Request, forward: Forward) -> Answer | None:
        return await busy(request, forward) if request.target.endswith("runs/submit") else await forward()

    workspace.fault = refuse
    submitting = asyncio.create_task(backend.submit(make_job()))
    await workspace.wait_answered("runs/submit", 5)
    workspace.fault = None
    run = await submitting
    succeed(workspace)(workspace.only_run)
    assert await run.wait() is True


async def test_a_submission_that_waits_for_the_quota_can_be_cancelled(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    workspace.quota = 0
    job = make_job({"secret_scope": "ours"}, tracking_uri="https://mlflow", secrets={"MLFLOW_TRACKING_TOKEN": "hush"})
    submitting = asyncio.create_task(backend.submit(job))
    await workspace.wait_answered("runs/submit", 2)
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    workspace.quota = 1
    assert workspace.secrets == {}
    await backend.submit(make_job())  # does not wait for the cancelled one
    assert len(workspace.runs) == 1


async def test_a_disabled_dbfs_root(backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker) -> None:
    workspace.dbfs = False
    with pytest.raises(SubmitError, match=r"the DBFS root is disabled.*'upload_path': '/Volumes/<catalog>") as caught:
        await backend.submit(make_job({"upload": "dbfs"}))
    assert "DATABRICKS_TOKEN" not in str(caught.value)
    assert workspace.runs == {}


async def test_an_unreachable_workspace_is_reported(make_job: JobMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABRICKS_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("DATABRICKS_TOKEN", "dapi-not-to-be-seen")
    async with DatabricksBackend(timing=QUICK) as backend:
        with pytest.raises(WorkspaceError, match=r"cannot be reached: connection refused; check DATABRICKS_HOST"):
            await backend.submit(make_job())


AZURE_RESOURCE = "/subscriptions/1/resourceGroups/2/providers/Microsoft.Databricks/workspaces/3"
SERVICE_PRINCIPALS = {
    "databricks": {"DATABRICKS_CLIENT_ID": "robot", "DATABRICKS_CLIENT_SECRET": "robot-secret"},
    "azure": {
        "ARM_CLIENT_ID": "robot",
        "ARM_CLIENT_SECRET": "robot-secret",
        "ARM_TENANT_ID": "team",
        "DATABRICKS_AZURE_RESOURCE_ID": AZURE_RESOURCE,
    },
}


@pytest.mark.parametrize("kind", SERVICE_PRINCIPALS)
async def test_a_service_principal_login_to_an_unreachable_workspace_is_reported(
    make_job: JobMaker, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.delenv("DATABRICKS_TOKEN", raising=False)
    environ = {"DATABRICKS_HOST": "http://127.0.0.1:9", "DATABRICKS_CONFIG_FILE": "/dev/null"}
    for name, value in {**environ, **SERVICE_PRINCIPALS[kind]}.items():
        monkeypatch.setenv(name, value)
    async with DatabricksBackend(timing=QUICK) as backend:
        with pytest.raises(
            WorkspaceError, match=r"cannot be reached: connection refused; check DATABRICKS_HOST"
        ) as caught:
            await backend.submit(make_job())
    assert "(tried 3 times in " in str(caught.value)
    assert "robot-secret" not in str(caught.value)


SETTINGS = """\
[__settings__]
default_profile = chosen
[DEFAULT]
host = https://default.example
token = of-default
[chosen]
host = https://chosen.example
token = of-chosen
"""


@pytest.mark.parametrize(
    ("uri", "variables", "host", "token"),
    [
        ("databricks", {}, "chosen", "of-chosen"),
        ("databricks", {"DATABRICKS_CONFIG_PROFILE": "DEFAULT"}, "default", "of-default"),
        (
            "databricks",
            {
                "DATABRICKS_CONFIG_PROFILE": "chosen",
                "DATABRICKS_HOST": "https://environment.example",
                "DATABRICKS_TOKEN": "of-environment",
            },
            "environment",
            "of-environment",
        ),
        (
            "databricks://chosen",
            {"DATABRICKS_HOST": "https://environment.example", "DATABRICKS_TOKEN": "of-environment"},
            "chosen",
            "of-chosen",
        ),
    ],
)
def test_the_workspace_is_chosen_as_the_databricks_sdk_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uri: str, variables: dict[str, str], host: str, token: str
) -> None:
    for name in ("DATABRICKS_HOST", "DATABRICKS_TOKEN", "DATABRICKS_CONFIG_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "databrickscfg"
    file.write_text(SETTINGS)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(file))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    login = DatabricksLogin(uri)
    login.prepare()
    assert login.url == f"https://{host}.example"
    assert login.environ()[1] == {"DATABRICKS_TOKEN": token}


async def test_missing_credentials_are_reported(make_job: JobMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABRICKS_HOST", "DATABRICKS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", "/dev/null")
    async with DatabricksBackend(timing=QUICK) as backend:
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


async def test_a_project_too_large_for_the_workspace_is_refused(
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

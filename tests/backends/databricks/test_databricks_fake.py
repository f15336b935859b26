"""The Databricks backend against a scripted workspace: states, cancelling, paging, attaching, requests."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import logging
import os
import tarfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.service import jobs

from components.fake_databricks import QUICK, JobMaker, lines_of, succeed
from components.git_repository import git, make_repository
from components.projects import write_project
from fakes.databricks import FakeRun, FakeWorkspace, not_found, unknown_value
from fakes.flaky_proxy import Answer, Forward, Request
from mlfleet import Fleet, TrackedRun
from mlfleet._engine.records import RunRecord, RunRecords
from mlfleet.backends.databricks import DatabricksBackend
from mlfleet.backends.databricks.request import ROOT
from mlfleet.backends.databricks.states import read_state
from mlfleet.errors import RunLost, SpecError, SubmitError
from mlfleet.runs import FailureKind, JobRef, RunStatus
from mlfleet.testing import FakeTracking

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
    assert len(workspace.only_run.body["idempotency_token"]) <= 64
    assert workspace.only_run.body["idempotency_token"].startswith(job.run_id)


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
async def test_a_run_that_does_not_succeed(
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
        run.set_state(life, result, "as told")

    workspace.on_submit = end
    outcome = await (await backend.submit(make_job())).outcome()
    assert outcome.status is status
    assert (outcome.reason or "").startswith(reason)
    assert outcome.output[0] == "loading"
    assert outcome.output[-1] == "RuntimeError: no such column"


async def test_the_output_is_that_of_the_last_attempt_of_a_task(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    def end(run: FakeRun) -> None:
        run.attempts = 3
        run.output = {"error": "RuntimeError: no such column", "logs": "of the last attempt\n"}
        run.set_state("TERMINATED", "FAILED", "Task failed.")

    workspace.on_submit = end
    outcome = await (await backend.submit(make_job())).outcome()
    assert outcome.output == ("of the last attempt",)
    assert outcome.reason == "FAILED: Task failed.: RuntimeError: no such column"


async def test_output_whose_beginning_databricks_has_cut(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker, caplog: pytest.LogCaptureFixture
) -> None:
    def end(run: FakeRun) -> None:
        run.output = {"logs": "the last lines\n", "logs_truncated": True}
        run.set_state("TERMINATED", "SUCCESS")

    workspace.on_submit = end
    run = await backend.submit(make_job())
    with caplog.at_level(logging.WARNING):
        lines = await lines_of(run)
    assert lines == ["(mlfleet: the beginning is missing, Databricks keeps the last 5 MB)", "the last lines"]
    assert f"the beginning of the output of the run {run.run_id} is missing" in caplog.text
    assert f"{workspace.url}/jobs/1000001/runs/1" in caplog.text


async def test_a_run_passes_through_all_states(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    run = await backend.submit(make_job())
    assert await run.get_status() is RunStatus.SCHEDULED
    started = asyncio.create_task(run.started())
    for life in ("QUEUED", "BLOCKED", "WAITING_FOR_RETRY"):
        workspace.only_run.set_state(life)
        await workspace.wait_answered("runs/get", 2)
        assert not started.done()
    workspace.only_run.set_state("RUNNING")
    await started
    assert await run.get_status() is RunStatus.RUNNING
    workspace.put_output(workspace.only_run, b"done\n")
    workspace.only_run.set_state("TERMINATING")
    ended = asyncio.create_task(run.wait())
    await workspace.wait_answered("runs/get", 2)
    assert not ended.done()
    workspace.only_run.set_state("TERMINATED", "SUCCESS")
    assert await ended is True


LIVES = [each.value for each in jobs.RunLifeCycleState]
RESULTS = [None, *(each.value for each in jobs.RunResultState)]
ENDED = ("TERMINATED", "SKIPPED", "INTERNAL_ERROR")


@pytest.mark.parametrize("form", ["status", "both"])
async def test_every_pair_of_states(workspace: FakeWorkspace, make_job: JobMaker, form: str) -> None:
    """`test_databricks_states.py` covers their meaning; here listings and single responses report them."""
    pairs = list(itertools.product(LIVES, RESULTS))
    workspace.limits = {}
    async with DatabricksBackend(timing=replace(QUICK, rates={})) as backend:
        runs = await asyncio.gather(*(backend.submit(make_job()) for _ in pairs))
        by_id = {run.run_id: run for run in runs}
        expected: dict[str, RunStatus | None] = {}
        for fake, (life, result) in zip(workspace.runs.values(), pairs, strict=True):
            fake.set_state(life, result, "so it is")
            fake.shows_state = form != "status"
            if form != "state":
                details = {"code": result or "RUN_EXECUTION_ERROR", "type": "CLIENT_ERROR", "message": "so it is"}
                fake.status = {
                    "state": "TERMINATED" if life in ENDED else "RUNNING",
                    "termination_details": details if life in ENDED else None,
                }
            expected[fake.spec["run"]] = read_state(fake.as_response(workspace.url)).status
        done = {id_: status for id_, status in expected.items() if status is not None}
        assert {id_: (await by_id[id_].outcome()).status for id_ in done} == done
        await workspace.wait_answered("runs/list", 2)
        going = [by_id[id_] for id_ in expected.keys() - done.keys()]
        assert {await run.get_status() for run in going} <= {RunStatus.SCHEDULED, RunStatus.RUNNING}
    assert len(done) == 3 * len(RESULTS)


@pytest.mark.parametrize("answer", [unknown_value, not_found])
async def test_a_vanished_run_is_reported_lost(workspace: FakeWorkspace, make_job: JobMaker, answer: Any) -> None:
    workspace.unknown = answer
    async with DatabricksBackend(timing=replace(QUICK, visibility_delay=0.0)) as backend:
        run = await backend.submit(make_job())
        workspace.runs.clear()
        outcome = await run.outcome()
        await run.cancel()
    assert isinstance(outcome.error, RunLost)
    assert "Databricks does not know the run 1" in str(outcome.error)
    assert outcome.kind is FailureKind.INFRASTRUCTURE


async def test_cancel_of_a_vanished_run(workspace: FakeWorkspace, make_job: JobMaker) -> None:
    async with DatabricksBackend(timing=replace(QUICK, visibility_delay=0.5)) as backend:
        run = await backend.submit(make_job())
        workspace.runs.clear()
        await run.cancel()
        assert isinstance((await run.outcome()).error, RunLost)


async def test_a_new_run_may_be_unknown_at_first(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    hidden: dict[int, FakeRun] = {}
    workspace.on_submit = lambda run: hidden.update({run.number: workspace.runs.pop(run.number)})
    run = await backend.submit(make_job())
    await workspace.wait_answered("runs/get", 3)
    workspace.runs = hidden
    succeed(workspace)(workspace.only_run)
    assert await run.wait() is True


# ---- cancelling


async def test_cancel_waits_for_the_end(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    workspace.on_submit = lambda run: run.set_state("RUNNING")
    workspace.on_cancel = lambda run: run.set_state("TERMINATING")
    run = await backend.submit(make_job())
    cancelling = asyncio.create_task(run.cancel())
    await workspace.wait_answered("runs/cancel", 1)
    await workspace.wait_answered("runs/get", 2)
    assert not cancelling.done()
    workspace.only_run.set_state("TERMINATED", "CANCELED")
    await cancelling
    assert (await run.outcome()).status is RunStatus.KILLED
    assert workspace.only_run.cancelled == 1


@pytest.mark.parametrize("taken", [True, False])
async def test_cancel_of_a_run_that_has_just_ended(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker, taken: bool
) -> None:
    workspace.cancels_ended = taken  # otherwise the response is 400 INVALID_STATE
    run = await backend.submit(make_job())
    succeed(workspace)(workspace.only_run)
    await run.cancel()
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
    assert workspace.only_run.cancelled == 1
    assert not workspace.only_run.active


async def test_a_submit_that_is_cancelled_again_and_again_waits_for_the_end_of_the_run(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    workspace.on_cancel = lambda run: run.set_state("TERMINATING")

    async def fail(request: Request, forward: Forward) -> Answer | None:
        if "runs/get?" in request.target and not workspace.only_run.cancelled:
            submitting.cancel()
        return await forward()

    workspace.fault = fail
    submitting = asyncio.create_task(backend.submit(make_job()))
    await workspace.wait_answered("runs/cancel", 1)
    for _ in range(3):
        submitting.cancel()
        await workspace.wait_answered("runs/get", 1)
        assert not submitting.done()
    workspace.only_run.set_state("TERMINATED", "CANCELED")
    with pytest.raises(asyncio.CancelledError):
        await submitting
    assert workspace.only_run.cancelled == 1


async def test_leaving_the_backend_cancels_its_runs(workspace: FakeWorkspace, make_job: JobMaker) -> None:
    async with DatabricksBackend(timing=QUICK) as backend:
        runs = [await backend.submit(make_job()) for _ in range(3)]
    assert [await run.get_status() for run in runs] == [RunStatus.KILLED] * 3
    assert [run.cancelled for run in workspace.runs.values()] == [1, 1, 1]


# ---- many runs


async def test_the_same_content_is_uploaded_once(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    workspace.on_submit = succeed(workspace)
    runs = await asyncio.gather(*(backend.submit(make_job({"upload_path": "/Volumes/a/b/c"})) for _ in range(20)))
    assert all(await asyncio.gather(*(run.wait() for run in runs)))
    uploads = [request.target for request in workspace.requests if request.method == "PUT"]
    assert len([target for target in uploads if "fs/files" in target]) == 2  # the folder was missing at first
    assert workspace.count("import-file") <= 2  # the bootstrap script, whose folder was missing at first, too


async def test_another_process_does_not_upload_again(workspace: FakeWorkspace, make_job: JobMaker) -> None:
    workspace.on_submit = succeed(workspace)
    for _ in range(2):
        async with DatabricksBackend(timing=QUICK) as backend:
            assert await (await backend.submit(make_job())).wait()
    assert len([path for path in workspace.files if path.endswith(".tar.gz")]) == 1
    first, second = (run.body["tasks"] for run in workspace.runs.values())
    assert first[0]["spark_python_task"]["python_file"] == second[0]["spark_python_task"]["python_file"]
    written = [request.target for request in workspace.requests if "import-file" in request.target]
    assert len([target for target in written if ".tar.gz" in target]) <= 2


async def test_requests_stay_within_the_limits(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker, caplog: pytest.LogCaptureFixture
) -> None:
    # Above the real limits, to allow for a slow machine, and below what 75 runs would send at once.
    workspace.limits = {"jobs/runs/submit": 60, "workspace/export": 80}
    with caplog.at_level(logging.WARNING):
        runs = await asyncio.gather(*(backend.submit(make_job()) for _ in range(75)))
        for run in tuple(workspace.runs.values()):
            succeed(workspace)(run)
        assert all(await asyncio.gather(*(run.wait() for run in runs)))
    assert workspace.refused == 0
    assert caplog.text == ""


# Their submissions and outputs are some thousand requests.
@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_500_runs_are_listed_in_pages(workspace: FakeWorkspace, make_job: JobMaker) -> None:
    workspace.limits = {}
    workspace.on_submit = lambda run: run.set_state("RUNNING")
    async with DatabricksBackend(timing=replace(QUICK, fast=0.5, rates={})) as backend:
        runs = await asyncio.gather(*(backend.submit(make_job()) for _ in range(500)))
        waiting = asyncio.gather(*(run.wait() for run in runs))
        before = workspace.count("runs/get?")
        listed_twice = asyncio.Event()

        async def watch(request: Request, forward: Forward) -> Answer | None:
            if workspace.count("page_token=475") >= 2:
                listed_twice.set()
            return await forward()

        workspace.fault = watch
        await listed_twice.wait()
        assert workspace.count("runs/get?") == before  # active runs need only the listing
        for run in workspace.runs.values():
            workspace.put_output(run, b"done\n", run.number % 2)
            run.set_state("TERMINATED", "FAILED" if run.number % 2 else "SUCCESS")
        assert sorted(await waiting) == [False] * 250 + [True] * 250
        assert workspace.count("runs/get?") - before == 500


# ---- finding runs again


async def test_attach_finds_runs_by_one_listing(workspace: FakeWorkspace, make_job: JobMaker) -> None:
    timing = replace(QUICK, rates={})
    workspace.limits = {}
    jobs = [make_job() for _ in range(60)]
    async with DatabricksBackend(timing=timing) as first:
        references = [JobRef.from_json(first.reference(job).to_json()) for job in jobs]
        await asyncio.gather(*(first.submit(job) for job in jobs))
        async with DatabricksBackend(timing=timing) as second:
            again = await asyncio.gather(*(second.attach(reference) for reference in references))
            assert workspace.count("runs/list") - workspace.count("active_only") == 3
            for run in workspace.runs.values():
                workspace.put_output(run, f"output of {run.body['run_name'][-33:-1]}\n".encode(), 4)
                run.set_state("TERMINATED", "FAILED")
            for run_again in again:
                assert (await run_again.outcome()).exit_code == 4
                assert await lines_of(run_again) == [f"output of {run_again.run_id}"]


DAY = 86_400_000  # milliseconds


def add_runs_of_others(workspace: FakeWorkspace, count: int, *, begin: int) -> None:
    """Add ended runs of other programs, one a second from `begin` on, in milliseconds since the epoch."""
    for number in range(10**6, 10**6 + count):
        run = FakeRun(number, {"run_name": "nightly"}, begin + 1000 * (number - 10**6))
        run.set_state("TERMINATED", "SUCCESS")
        workspace.runs[number] = run


async def test_attach_asks_for_the_logged_ids_among_11000_younger_runs(
    workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    jobs_ = [make_job() for _ in range(4)]
    async with DatabricksBackend(timing=QUICK) as first:
        references = [first.reference(job) for job in jobs_]
        tags = [first.tags(await first.submit(job)) for job in jobs_]
        add_runs_of_others(workspace, 11_000, begin=workspace.runs[4].start_time)
        async with DatabricksBackend(timing=QUICK) as second:
            for reference, tags_ in zip(references, tags, strict=True):
                again = await second.attach(replace(reference, tags=tags_))
                assert await again.get_status() is RunStatus.SCHEDULED
    assert workspace.count("runs/list") == 0


async def test_attach_finds_runs_without_logged_ids_among_11000_younger_ones(
    workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    timing = replace(QUICK, rates={})
    async with DatabricksBackend(timing=timing) as first:
        references = []
        for job in [make_job() for _ in range(4)]:
            reference = first.reference(job)
            await first.submit(job)
            references.append(replace(reference, data={**reference.data, "since": reference.data["since"] - DAY}))
        for run in workspace.runs.values():
            run.start_time -= DAY
        add_runs_of_others(workspace, 11_000, begin=workspace.runs[4].start_time)
        async with DatabricksBackend(timing=timing) as second:
            again = await asyncio.gather(*(second.attach(reference) for reference in references))
            assert [await run.get_status() for run in again] == [RunStatus.SCHEDULED] * 4
    assert workspace.count("runs/list") - workspace.count("active_only") < 180  # only the first hour, of 440 pages


async def test_attach_lists_no_more_pages_when_the_runs_are_found(workspace: FakeWorkspace, make_job: JobMaker) -> None:
    job = make_job()
    async with DatabricksBackend(timing=QUICK) as first:
        reference = first.reference(job)
        await first.submit(job)
        add_runs_of_others(workspace, 2500, begin=workspace.runs[1].start_time - DAY)
        earlier = {name: value for name, value in reference.data.items() if name != "since"}
        async with DatabricksBackend(timing=QUICK) as second:
            await second.attach(replace(reference, data=earlier))
    assert workspace.count("runs/list") == 1


@pytest.mark.parametrize("is_submitted", [True, False])
async def test_the_logged_id_of_an_earlier_attempt_does_not_count(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker, is_submitted: bool
) -> None:
    workspace.on_submit = succeed(workspace)
    job = make_job()
    tags = backend.tags(await backend.submit(job))
    workspace.runs[1].start_time -= DAY
    reference = replace(backend.reference(job), tags=tags)
    if is_submitted:
        workspace.on_submit = lambda run: run.set_state("RUNNING")
        await backend.submit(job)
    async with DatabricksBackend(timing=QUICK) as second:
        if is_submitted:
            assert await (await second.attach(reference)).get_status() is RunStatus.RUNNING
        else:
            with pytest.raises(RunLost):
                await second.attach(reference)


async def test_the_logged_id_of_another_run_does_not_count(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    theirs, ours = make_job(), make_job()
    tags = backend.tags(await backend.submit(theirs))
    reference = replace(backend.reference(ours), tags=tags)
    async with DatabricksBackend(timing=QUICK) as second:
        with pytest.raises(RunLost, match=f"has no run of the MLflow run {ours.run_id}"):
            await second.attach(reference)


async def test_a_fleet_attaches_by_the_id_that_the_first_one_logged(workspace: FakeWorkspace, tmp_path: Path) -> None:
    tracking = FakeTracking()
    tracking.uri = "http://tracking.example.com"
    uri = write_project(tmp_path / "demo", "true")

    def start(run: FakeRun) -> None:
        workspace.put_output(run, b"done\n")
        run.set_state("RUNNING")

    workspace.on_submit = start
    async with Fleet(tracking=tracking) as first:
        run = await first.submit(uri, backend="databricks")
        async for _ in run.logs():
            break  # its tags are logged
        async with Fleet(tracking=tracking) as second:
            again = await second.attach(run.run_id)
            succeed(workspace)(workspace.only_run)
            assert await again.wait() is True
    assert workspace.count("runs/list") == 0


@pytest.mark.parametrize("work", [TrackedRun.wait, TrackedRun.cancel])
async def test_a_run_whose_driver_died_is_concluded_with_its_own_end(
    workspace: FakeWorkspace, make_job: JobMaker, work: Callable[[TrackedRun], Awaitable[object]]
) -> None:
    workspace.on_submit = lambda run: run.set_state("INTERNAL_ERROR", "FAILED")
    reference, tracking = await left_by_dead_driver(make_job, submit=True)
    async with DatabricksBackend(timing=QUICK) as backend:
        assert await (await backend.attach(reference)).get_status() is RunStatus.FAILED
    async with Fleet(tracking=tracking) as fleet:
        run = await fleet.get(reference.run_id)
        assert isinstance(run, TrackedRun)
        await work(run)
        assert run.info.status is RunStatus.FAILED


@pytest.mark.slow
async def test_the_secret_of_a_run_that_was_never_submitted_goes_with_it(
    workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    reference, tracking = await left_by_dead_driver(make_job, submit=False)
    place = ("scope", f"mlfleet-{reference.run_id}")
    workspace.secrets[place] = "hush-hush"
    dead = RunRecords()
    await dead.add(RunRecord(run_id=reference.run_id, backend="databricks", project="demo", tracking=""))
    await dead.close()
    async with Fleet(tracking=tracking) as fleet:
        run = await fleet.get(reference.run_id)
        assert await run.wait() is False
    assert run.info.status is RunStatus.FAILED
    assert "has no run of the MLflow run" in run.info.tags["mlfleet.reason"]
    assert place not in workspace.secrets


async def left_by_dead_driver(make_job: JobMaker, *, submit: bool) -> tuple[JobRef, FakeTracking]:
    """Make the MLflow run of a job whose driver is gone, and its run in Databricks if it was submitted."""
    tracking = FakeTracking(uri="http://tracking.example.com")
    run = await tracking.create_run("0", name=None, tags={})
    job = replace(make_job(), run_id=run.run_id)
    async with DatabricksBackend(timing=QUICK) as backend:
        made = backend.reference(job)
        if submit:
            await (await backend.submit(job)).wait()
    owner = {**made.data["owner"], "started": -1}
    reference = replace(made, data={**made.data, "owner": owner, "secret_scope": "scope"})
    await tracking.log(run.run_id, tags={JobRef.TAG: reference.to_json()})
    return reference, tracking


@pytest.mark.parametrize("data", [{"attempt": "../../../Users/else"}, {"upload": "elsewhere"}])
async def test_a_reference_decides_not_on_another_folder_of_the_workspace(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker, data: dict[str, str]
) -> None:
    job = make_job()
    reference = backend.reference(job)
    await backend.submit(job)
    with pytest.raises(SpecError, match=f"mlfleet.ref of the run {job.run_id} is damaged"):
        await backend.attach(replace(reference, data={**reference.data, **data}))


async def test_leaving_the_backend_leaves_attached_runs_alone(workspace: FakeWorkspace, make_job: JobMaker) -> None:
    job = make_job()
    async with DatabricksBackend(timing=QUICK) as first:
        reference = first.reference(job)
        await first.submit(job)
        async with DatabricksBackend(timing=QUICK) as second:
            run = await second.attach(reference)
        assert workspace.only_run.cancelled == 0
        assert isinstance((await run.outcome()).error, RunLost)


async def test_active_runs_are_listed_whichever_process_submitted_them(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    workspace.on_submit = lambda run: run.set_state("RUNNING")
    ended, active = make_job(), make_job()
    run = await backend.submit(ended)
    succeed(workspace)(workspace.only_run)
    await run.wait()
    await backend.submit(active)
    workspace.runs[3] = FakeRun(3, {"run_name": "somebody else's"}, int(time.time() * 1000))
    async with DatabricksBackend(timing=QUICK) as other:
        (listed,) = await other.list_runs()
    assert (listed.run_id, listed.backend, listed.state) == (active.run_id, "databricks", "running")
    assert listed.supervised is True, "the process that submitted it may be on another machine"
    assert listed.detail == {"databricks_run": "2", "url": f"{workspace.url}/jobs/1000002/runs/2"}
    assert int(listed.created.timestamp() * 1000) == workspace.runs[2].start_time


async def test_run_is_abandoned_once_it_and_its_driver_have_ended(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    gone = {"pid": os.getpid(), "started": -1}  # an earlier process that had the pid of this one
    workspace.on_submit = lambda run: run.set_state("RUNNING")
    job = make_job()
    reference = JobRef.from_json(backend.reference(job).to_json())
    dead = replace(reference, data={**reference.data, "owner": {**reference.data["owner"], **gone}})
    run = await backend.submit(job)
    assert await backend.is_abandoned(dead) is False, "it still runs"
    succeed(workspace)(workspace.only_run)
    await run.wait()
    assert await backend.is_abandoned(dead) is True
    assert await backend.is_abandoned(reference) is False, "this process writes its status"
    elsewhere = replace(dead, data={**dead.data, "owner": {**dead.data["owner"], "host": "elsewhere"}})
    assert await backend.is_abandoned(elsewhere) is False
    earlier = replace(dead, data={name: value for name, value in dead.data.items() if name != "owner"})
    assert await backend.is_abandoned(earlier) is False, "references of earlier versions name no process"
    workspace.runs.clear()
    async with DatabricksBackend(timing=QUICK) as other:
        assert await other.is_abandoned(dead) is True, "Databricks has it no more"


async def test_attach_to_a_deleted_run(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    job = make_job()
    with pytest.raises(RunLost, match=f"has no run of the MLflow run {job.run_id}, or has it no more"):
        await backend.attach(backend.reference(job))


async def test_resubmitting_an_mlflow_run_starts_a_new_databricks_run(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    workspace.on_submit = succeed(workspace)
    job = make_job()
    for _ in range(2):
        backend.reference(job)
        assert await (await backend.submit(job)).wait()
    assert len(workspace.runs) == 2


# ---- uploads and requests


async def test_files_ignored_by_git_are_not_uploaded(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker, tmp_path: Path
) -> None:
    project = make_repository(tmp_path).work
    (project / ".gitignore").write_text("*.log\ndata/\n")
    (project / "kept.log").write_text("is tracked\n")
    git(project, "add", "--force", "kept.log")
    for name in ("left.log", "data/secret.csv", "data/wanted.csv", "new.py"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("x\n")
    (project / ".dockerignore").write_text("!data/wanted.csv\nsteps\n")
    workspace.on_submit = succeed(workspace)
    await (await backend.submit(make_job(project_dir=project))).wait()
    (content,) = (content for path, content in workspace.files.items() if path.endswith(".tar.gz"))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        names = set(archive.getnames()) - {".gitignore", ".dockerignore"}
    assert names == {"MLproject", "run.sh", "link", "kept.log", "data/wanted.csv", "new.py"}
    with pytest.raises(
        SubmitError, match=r"'data/secret\.csv' of the project, which \.gitignore or \.dockerignore leaves"
    ):
        await backend.submit(make_job(project_dir=project, placed={f"{ROOT}/project/data/secret.csv": "x"}))


async def test_a_long_command_is_passed_in_a_file(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    job = make_job(environ={"LONG": "x" * 20_000})
    run = await backend.submit(job)
    (argument,) = workspace.only_run.body["tasks"][0]["spark_python_task"]["parameters"]
    path = json.loads(argument)["spec"]
    assert json.loads(workspace.files[path])["environ"]["LONG"] == "x" * 20_000
    await run.cancel()


@pytest.mark.parametrize("place", ["/Volumes/a/b/c", "/Workspace/Shared/runs"])
async def test_a_run_of_somebody_else_needs_nothing_of_my_home(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker, place: str
) -> None:
    config = {"run_as": {"service_principal_name": "robot"}, "upload_path": place}
    await backend.submit(make_job(config, environ={"LONG": "x" * 20_000}))
    assert len(workspace.files) == 3
    assert all(path.startswith(f"{place}/") for path in workspace.files), workspace.files
    (task,) = workspace.only_run.body["tasks"]
    script = task["spark_python_task"]
    argument = json.loads(script["parameters"][0])["spec"]
    assert {script["python_file"], argument} < workspace.files.keys()
    assert json.loads(workspace.files[argument])["archive"] in workspace.files
    assert f"{place}/bootstrap-" in backend.preview(make_job(config))


async def test_secrets_exist_only_during_the_run(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    job = make_job({"secret_scope": "ours"}, tracking_uri="https://mlflow", secrets={"MLFLOW_TRACKING_TOKEN": "hush"})
    run = await backend.submit(job)
    assert json.loads(workspace.secrets["ours", f"mlfleet-{job.run_id}"]) == {"MLFLOW_TRACKING_TOKEN": "hush"}
    assert "hush" not in json.dumps(workspace.only_run.body)
    await run.cancel()
    assert workspace.secrets == {}


# ---- compared with the Databricks SDK


async def test_the_databricks_sdk_sends_and_reads_the_same_data(
    backend: DatabricksBackend, workspace: FakeWorkspace, make_job: JobMaker
) -> None:
    config = {
        "dependencies": ["xgboost"],
        "timeout_seconds": 600,
        "queue": {"enabled": True},
        "run_as": {"user_name": "robot@example.com"},
        "access_control_list": [{"user_name": "me@example.com", "permission_level": "CAN_VIEW"}],
        "git_source": {"git_url": "https://git.example.com/x", "git_provider": "gitHub", "git_branch": "main"},
    }
    run = await backend.submit(make_job(config))
    ours = workspace.only_run

    def ask() -> tuple[jobs.Run, jobs.Run, list[jobs.BaseRun]]:
        client = WorkspaceClient(host=workspace.url, token=workspace.token)
        body: dict[str, Any] = dict(ours.body)
        submitted = client.jobs.submit(
            tasks=[jobs.SubmitTask.from_dict(task) for task in body["tasks"]],
            environments=[jobs.JobEnvironment.from_dict(each) for each in body["environments"]],
            run_name=body["run_name"],
            idempotency_token="of-the-client",
            timeout_seconds=body["timeout_seconds"],
            queue=jobs.QueueSettings.from_dict(body["queue"]),
            run_as=jobs.JobRunAs.from_dict(body["run_as"]),
            access_control_list=[jobs.JobAccessControlRequest.from_dict(each) for each in body["access_control_list"]],
            git_source=jobs.GitSource.from_dict(body["git_source"]),
        )
        active = client.jobs.get_run(ours.number)
        client.jobs.cancel_run(submitted.response.run_id)
        listed = list(client.jobs.list_runs(active_only=True))
        succeed(workspace)(ours)
        return active, client.jobs.get_run(ours.number), listed

    active, ended, listed = await anyio.to_thread.run_sync(ask)
    assert {**workspace.runs[2].body, "idempotency_token": None} == {**ours.body, "idempotency_token": None}
    assert active.state is not None
    assert active.state.life_cycle_state is jobs.RunLifeCycleState.PENDING
    assert ended.state is not None
    assert ended.state.result_state is jobs.RunResultState.SUCCESS
    assert [each.run_id for each in listed] == [1]
    assert read_state(ended.as_dict()) == read_state(ours.as_response(workspace.url))
    assert await run.wait() is True

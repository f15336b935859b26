"""Runs on a fake API server: their outcomes, their pending reasons, and the deletion of their Jobs."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from aiohttp import web

from components.fake_kubernetes import FakeCluster
from components.projects import write_project
from fakes.kubernetes import ApiFailure
from fakes.kubernetes_node import Acting
from mlfleet import Fleet, RunOptions, TrackedRun
from mlfleet._engine.conclude import Driver, judge
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.backends.kubernetes.client import KubernetesClient
from mlfleet.backends.kubernetes.manifest import Code, job_manifest
from mlfleet.backends.kubernetes.run import KubernetesRun
from mlfleet.backends.kubernetes.state import read_job
from mlfleet.backends.kubernetes.watch import NamespaceWatch
from mlfleet.errors import BackendError, RunLost, SubmitError, UsageError
from mlfleet.fleet import context_of
from mlfleet.resources import Resources
from mlfleet.runs import FailureKind, JobRef, RunStatus
from mlfleet.testing import FakeTracking

FOREVER = Acting(seconds=600, output=(b"begun\n",))


def key(run: KubernetesRun) -> tuple[str, str, str]:
    return "jobs", run.target.namespace, run.target.name


async def test_each_run_takes_three_requests_and_all_share_two_watches(fake_cluster: FakeCluster) -> None:
    api = fake_cluster.api
    fake_cluster.play = lambda pod: Acting(seconds=0.2, output=(b"said\n",))
    config = await fake_cluster.config()
    async with KubernetesBackend() as backend:
        runs = await asyncio.gather(*(backend.submit(fake_cluster.job(config)) for _ in range(50)))
        assert await asyncio.gather(*(run.wait() for run in runs)) == [True] * 50
    assert api.counted("GET", "/jobs", watch=True) == api.counted("GET", "/pods", watch=True) == 1
    assert api.counted("GET", "/jobs", watch=False) == api.counted("GET", "/pods", watch=False) == 1
    assert len(api.requests) - 4 <= 3 * 50
    assert {run.target.output.read_text() for run in runs if run.target.output} == {"said\n"}


async def test_out_of_memory_kill_is_named_in_the_outcome(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: Acting(code=137, reason="OOMKilled")
    config = await fake_cluster.config(resources={"memory": "64Mi"})
    async with KubernetesBackend() as backend:
        outcome = await (await backend.submit(fake_cluster.job(config))).outcome()
    assert (outcome.kind, outcome.reason) == (FailureKind.OOM, "out of memory (its limit is 64Mi)")


async def test_memory_limit_is_shown_as_it_was_asked_for(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: Acting(code=137, reason="OOMKilled")
    job = fake_cluster.job(await fake_cluster.config(), resources=Resources(memory="512Mi"))
    async with KubernetesBackend() as backend:
        assert (await (await backend.submit(job)).outcome()).reason == "out of memory (its limit is 512Mi)"


async def test_failed_container_beside_the_command_is_named(fake_cluster: FakeCluster) -> None:
    assert fake_cluster.node is not None
    fake_cluster.others["proxy"] = Acting(code=3)
    fake_cluster.node.injected = [{"name": "proxy", "image": "proxy:1"}]
    async with KubernetesBackend() as backend:
        outcome = await (await backend.submit(fake_cluster.job(await fake_cluster.config()))).outcome()
    assert outcome.status is RunStatus.FAILED
    assert outcome.reason == "the command has succeeded, but the container 'proxy' failed: exit code 3"


async def test_retries_are_one_run(fake_cluster: FakeCluster) -> None:
    seen: list[str] = []

    def play(pod: Any) -> Acting:
        seen.append(pod["metadata"]["name"])
        return Acting(code=0 if len(seen) == 3 else 1, output=(f"attempt {len(seen)}".encode(),))

    fake_cluster.play = play
    template = {"spec": {"backoffLimit": 2, "template": {"spec": {"containers": [{"name": "main"}]}}}}
    config = await fake_cluster.config(job_template=template)
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(config))
        assert await run.wait() is True
        # Neither output ends with a newline.
        assert [line async for line in run.logs()] == ["attempt 1", "attempt 2", "attempt 3"]


@pytest.mark.parametrize(
    ("image", "timeouts", "told"),
    [
        ("registry.invalid/none:1", {"image": 0.1}, "ErrImagePull: failed to pull and unpack image"),
        ("registry.invalid/none:1", 0.1, "ErrImagePull: failed to pull and unpack image"),
    ],
)
async def test_image_that_cannot_be_pulled_ends_the_run(
    fake_cluster: FakeCluster, image: str, timeouts: Any, told: str
) -> None:
    config = await fake_cluster.config(image=image, start_timeout=timeouts)

    def warn(kind: str, key: tuple[str, str, str], value: object) -> None:
        if (kind, key[0]) == ("ADDED", "pods"):
            said = {"type": "Warning", "reason": "Failed", "message": "no such host"}
            about = {"metadata": {"name": "e"}, "involvedObject": {"name": key[2]}}
            fake_cluster.api.create("events", "default", {**about, **said})

    fake_cluster.api.on_change.append(warn)
    async with KubernetesBackend() as backend:
        outcome = await (await backend.submit(fake_cluster.job(config))).outcome()
    assert outcome.status is RunStatus.FAILED
    assert outcome.kind is FailureKind.INFRASTRUCTURE
    assert f"did not start within 0.1 s: {told}" in (outcome.reason or "")
    assert outcome.output == ("Failed: no such host",)
    assert fake_cluster.api.of_kind("jobs") == [], "a Job that can never start must not stay"


async def test_unschedulable_run_fails_after_its_start_timeout(
    fake_cluster: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    config = await fake_cluster.config(node_selector={"gpu": "yes"}, start_timeout={"unschedulable": 0.1})
    async with KubernetesBackend() as backend:
        outcome = await (await backend.submit(fake_cluster.job(config))).outcome()
    assert "no node takes the pod: 0/1 nodes are available" in (outcome.reason or "")


async def test_suspended_job_does_not_use_up_its_start_timeout(fake_cluster: FakeCluster) -> None:
    template = {"spec": {"suspend": True, "template": {"spec": {"containers": [{"name": "main"}]}}}}
    config = await fake_cluster.config(job_template=template, start_timeout=0.01)
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(config))
        assert await run.get_status() is RunStatus.SCHEDULED
        await asyncio.sleep(0.05)  # five times the start timeout
        fake_cluster.api.change(key(run), lambda job: job["spec"].update(suspend=False))
        assert await run.wait() is True


async def test_externally_deleted_job_fails_its_run(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: FOREVER
    config = await fake_cluster.config()
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(config))
        await run.started()
        fake_cluster.api.delete_job(key(run), "Background")
        outcome = await run.outcome()
    assert outcome.status is RunStatus.FAILED
    assert outcome.reason == f"the Job {run.target.name} was deleted from outside"


async def test_run_is_lost_when_its_job_is_removed_while_no_watch_is_open(fake_cluster: FakeCluster) -> None:
    """The watch history is compacted as well, so only a list without the Job is left."""
    fake_cluster.play = lambda pod: FOREVER
    config = await fake_cluster.config()
    api = fake_cluster.api
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(config))
        await run.started()

        def away(request: web.Request) -> web.Response | None:
            if request.query.get("watch"):
                return ApiFailure(503, "ServiceUnavailable", "away").response()
            return None

        api.faults.append(away)
        api.drop_streams()
        api.remove(key(run))
        for pod in list(api.of_kind("pods")):
            api.remove(("pods", "default", pod["metadata"]["name"]))
        api.compact()
        api.faults.clear()
        outcome = await run.outcome()
    assert isinstance(outcome.error, RunLost)
    assert "how it ended was not seen; its ttlSecondsAfterFinished may be too short" in (outcome.reason or "")


async def test_short_ttl_causes_a_warning(fake_cluster: FakeCluster, caplog: pytest.LogCaptureFixture) -> None:
    config = await fake_cluster.config(ttl_seconds=1)
    async with KubernetesBackend() as backend:
        with caplog.at_level(logging.WARNING, "mlfleet.kubernetes"):
            run = await backend.submit(fake_cluster.job(config))
        assert await run.wait() is True
    assert "ttlSecondsAfterFinished is 1 s" in caplog.text


async def test_cancel_deletes_only_our_own_job_and_in_the_foreground(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: FOREVER
    config = await fake_cluster.config()
    api = fake_cluster.api
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(config, secrets={"TOKEN": "hush"}))
        await run.started()
        assert len(api.of_kind("secrets")) == 1
        await run.cancel()
        assert api.of_kind("jobs") == api.of_kind("pods") == api.of_kind("secrets") == []
    body = next(body for (method, _, _), body in zip(api.requests, api.bodies, strict=True) if method == "DELETE")
    assert body["propagationPolicy"] == "Foreground"
    assert body["preconditions"] == {"uid": run.target.uid}
    assert (await run.outcome()).status is RunStatus.KILLED


async def test_shorter_grace_is_passed_on_to_the_pods(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: Acting(seconds=600, obeys=False)
    config = await fake_cluster.config()
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(config, cancel_grace=600.0))
        await run.started()
        cancelling = asyncio.create_task(run.cancel())
        await asyncio.sleep(0)
        await run.cancel(grace=0)
        await cancelling
        assert (await run.outcome()).status is RunStatus.KILLED


async def test_missing_watch_permission_is_named_before_anything_is_created(fake_cluster: FakeCluster) -> None:
    fake_cluster.api.forbidden = {"pods"}
    config = await fake_cluster.config()
    async with KubernetesBackend() as backend:
        with pytest.raises(BackendError, match=r"pods is forbidden.*See the Role in docs/backends/kubernetes\.md"):
            await backend.submit(fake_cluster.job(config))
    assert fake_cluster.api.of_kind("jobs") == []


async def test_lost_watch_permission_fails_every_waiting_run(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: FOREVER
    config = await fake_cluster.config()
    async with KubernetesBackend() as backend:
        runs = [await backend.submit(fake_cluster.job(config)) for _ in range(3)]
        waiting = [asyncio.create_task(run.wait()) for run in runs]
        fake_cluster.api.forbidden = {"pods"}
        fake_cluster.api.drop_streams()
        assert await asyncio.gather(*waiting) == [False] * 3
        assert "forbidden" in str((await runs[0].outcome()).error)


async def test_refused_manifest_leaves_nothing(fake_cluster: FakeCluster) -> None:
    template = {"spec": {"template": {"spec": {"restartPolicy": "Always", "containers": [{"name": "main"}]}}}}
    config = await fake_cluster.config(job_template=template)
    async with KubernetesBackend() as backend:
        with pytest.raises(SubmitError, match="restartPolicy: Required value"):
            await backend.submit(fake_cluster.job(config))
    assert fake_cluster.api.of_kind("jobs") == []


async def test_job_is_deleted_when_its_secret_is_refused(fake_cluster: FakeCluster) -> None:
    fake_cluster.api.forbidden = {"secrets"}
    config = await fake_cluster.config()
    async with KubernetesBackend() as backend:
        with pytest.raises(SubmitError, match="secrets is forbidden"):
            await backend.submit(fake_cluster.job(config, secrets={"A": "b"}))
    assert fake_cluster.api.of_kind("jobs") == []


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "file:///tmp/mlruns", "/tmp/mlruns", "./mlruns"])
async def test_tracking_on_this_machine_is_refused(fake_cluster: FakeCluster, uri: str) -> None:
    config = await fake_cluster.config()
    async with KubernetesBackend() as backend:
        with pytest.raises(UsageError, match="where no pod reaches it"):
            backend.check_tracking(uri, config)
        with pytest.raises(UsageError, match="where no pod reaches it"):
            await backend.submit(fake_cluster.job(config, environ={"MLFLOW_TRACKING_URI": uri}))
        assert fake_cluster.api.requests == []
        config = await fake_cluster.config(tracking_uri="http://mlflow.tracking:5000")
        run = await backend.submit(fake_cluster.job(config, environ={"MLFLOW_TRACKING_URI": uri}))
        job = fake_cluster.api.objects[key(run)]
        environ = {each["name"]: each["value"] for each in job["spec"]["template"]["spec"]["containers"][0]["env"]}
        assert environ["MLFLOW_TRACKING_URI"] == "http://mlflow.tracking:5000"


async def test_tracking_in_the_project_or_the_template_is_checked_before_there_is_a_run(
    fake_cluster: FakeCluster, tmp_path: Path
) -> None:
    tracking = FakeTracking(uri="http://mlflow:5000")
    image = "docker_env:\n  image: python:3.12\n"
    local = 'environment: [["MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"]]\n'
    own = write_project(tmp_path / "own", "true", extra=f"{image}  {local}")
    uri = write_project(tmp_path / "demo", "true", extra=image)
    container = {"name": "main", "env": [{"name": "MLFLOW_TRACKING_URI", "value": "http://other:5000"}]}
    template = {"spec": {"template": {"spec": {"containers": [container]}}}}
    config = {"code-delivery": "none"}
    async with Fleet(tracking=tracking) as fleet:
        with pytest.raises(UsageError, match="where no pod reaches it"):
            await fleet.submit(own, backend="kubernetes", backend_config=config)
        with pytest.raises(UsageError, match="template sets MLFLOW_TRACKING_URI, which the run sets too"):
            await fleet.submit(uri, backend="kubernetes", backend_config={**config, "job-template": template})
    assert tracking.runs == {}


async def test_lost_response_to_a_create_request_makes_no_second_job(fake_cluster: FakeCluster) -> None:
    """The server handles the first POST, but the response is lost."""
    api, posts = fake_cluster.api, 0
    config = await fake_cluster.config()

    def fault(request: web.Request) -> web.Response | None:
        nonlocal posts
        if request.method == "POST" and request.path.endswith("/jobs"):
            posts += 1
            if posts == 1:
                body = api.bodies[-1]
                api.create("jobs", "default", body)
                assert request.transport is not None
                request.transport.abort()
        return None

    api.faults.append(fault)
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(config))
        assert await run.wait() is True
    assert posts == 2
    assert len(api.of_kind("jobs")) == 1


async def test_attach_to_a_finished_job_and_to_a_deleted_job(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: Acting(code=5, output=(b"last words\n",))
    config = await fake_cluster.config()
    job = fake_cluster.job(config)
    async with KubernetesBackend() as first:
        reference = first.reference(job)
        await (await first.submit(job)).wait()
    assert JobRef.from_json(reference.to_json()) == reference
    async with KubernetesBackend() as second:
        again = await second.attach(reference)
        assert await again.get_status() is RunStatus.FAILED
        outcome = await again.outcome()
        assert (outcome.exit_code, outcome.output) == (5, ("last words",))
        fake_cluster.api.remove(key(again))
        with pytest.raises(RunLost, match="is not in the namespace default of fake any more"):
            await second.attach(reference)


async def test_a_reference_decides_neither_where_output_is_written_nor_on_a_path_of_the_server(
    fake_cluster: FakeCluster, tmp_path: Path
) -> None:
    fake_cluster.play = lambda pod: Acting(output=(b"of the run\n",))
    job = fake_cluster.job(await fake_cluster.config())
    async with KubernetesBackend() as backend:
        reference = backend.reference(job)
        await (await backend.submit(job)).wait()
        planted = replace(reference, data={**reference.data, "output": str(tmp_path / "planted")})
        run = await backend.attach(planted)
        await run.wait()
        assert [line async for line in run.logs()] == ["of the run"]
        assert not (tmp_path / "planted").exists()
        with pytest.raises(RunLost, match="names no Job"):
            await backend.attach(replace(reference, data={**reference.data, "name": "../pods/other"}))


async def test_runs_are_listed_whichever_process_submitted_them(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: Acting(code=3) if "ends" in pod["metadata"]["labels"]["mlfleet.run-id"] else FOREVER
    config = await fake_cluster.config()
    async with KubernetesBackend() as first, KubernetesBackend() as second:
        ending = await first.submit(fake_cluster.job(config, run_id="ends"))
        going = await first.submit(fake_cluster.job(config, run_id="goes-on"))
        await asyncio.gather(ending.wait(), going.started())
        listed = {run.run_id: (run.state, run.detail["job"]) for run in await second.list_runs()}
        await anyio.to_thread.run_sync(second.select_service, {"namespace": "elsewhere"}, "")
        assert await second.list_runs() == []
    assert listed == {
        "ends": ("failed", f"default/{ending.target.name}"),
        "goes-on": ("active", f"default/{going.target.name}"),
    }


async def test_run_is_abandoned_once_its_job_and_its_driver_have_ended(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: Acting(code=3) if "ends" in pod["metadata"]["labels"]["mlfleet.run-id"] else FOREVER
    config = await fake_cluster.config()
    gone = await asyncio.create_subprocess_exec("true")
    await gone.wait()
    async with KubernetesBackend() as backend:
        for run_id, expected in (("ends", True), ("goes-on", False)):
            job = fake_cluster.job(config, run_id=run_id, cancel_grace=0.0)
            run = await backend.submit(job)
            await (run.wait() if expected else run.started())
            reference = backend.reference(job)
            assert await backend.is_abandoned(reference) is False, "this process writes its status"
            dead = replace(reference, data={**reference.data, "owner": f"{socket.gethostname()}:{gone.pid}"})
            assert await backend.is_abandoned(dead) is expected
            elsewhere = replace(reference, data={**reference.data, "owner": "elsewhere:1"})
            assert await backend.is_abandoned(elsewhere) is False
        fake_cluster.api.delete_job(key(run), "Background")
        assert await backend.is_abandoned(dead) is True, "its Job is gone"


@pytest.mark.parametrize(
    ("owner", "work"), [("gone", TrackedRun.wait), ("gone", TrackedRun.cancel), ("elsewhere", TrackedRun.cancel)]
)
async def test_a_job_whose_driver_does_not_write_its_end_is_concluded_with_it(
    fake_cluster: FakeCluster, owner: str, work: Callable[[TrackedRun], Awaitable[object]]
) -> None:
    fake_cluster.play = lambda pod: Acting(code=5)
    reference, tracking = await submitted_by_another(fake_cluster, owner)
    async with Fleet(tracking=tracking) as fleet:
        run = await fleet.get(reference.run_id)
        assert isinstance(run, TrackedRun)
        await work(run)
    assert (run.info.status, run.info.tags["mlfleet.reason"]) == (RunStatus.FAILED, "exit code 5")


async def test_the_end_of_a_job_of_another_machine_is_written_by_one_that_waits_long_enough(
    fake_cluster: FakeCluster,
) -> None:
    fake_cluster.play = lambda pod: Acting(code=0)
    reference, tracking = await submitted_by_another(fake_cluster, "elsewhere")
    async with Fleet(tracking=tracking) as fleet:
        context_of(fleet).fleet.unseen_patience = 0
        run = await fleet.get(reference.run_id)
        assert await run.wait() is True
    # A Job that is not there may be one that its driver is about to make.
    fake_cluster.api.objects.clear()
    async with Fleet(tracking=tracking) as fleet:
        verdict = await judge(context_of(fleet), replace(run.info, status=RunStatus.RUNNING))
    assert (verdict.driver, verdict.ended) == (Driver.UNSEEN, False)


async def test_the_run_in_the_queue_of_another_fleet_is_read_and_cancelled_before_it_has_a_job(
    fake_cluster: FakeCluster, tmp_path: Path
) -> None:
    ended, requests = asyncio.Event(), fake_cluster.api.requests
    fake_cluster.play = lambda pod: Acting(seconds=0 if ended.is_set() else 600, output=(b"hello\n",))
    tracking = FakeTracking(uri="http://mlflow:5000")
    uri = write_project(tmp_path / "demo", "true", extra="docker_env:\n  image: python:3.12\n")
    options: RunOptions = {"backend": "kubernetes", "backend_config": {"code-delivery": "none"}}
    async with Fleet(tracking=tracking) as other, Fleet(tracking=tracking, max_concurrent=1) as fleet:
        first, cancelled, read = [await fleet.submit(uri, **options) for _ in range(3)]
        await (await other.get(cancelled.run_id)).cancel()
        assert await cancelled.get_status() is RunStatus.KILLED
        seen = await other.get(read.run_id)
        assert [line async for line in seen.logs(follow=False)] == []
        reader = asyncio.ensure_future(anext(seen.logs()))
        before = len(requests)
        while not any(read.run_id in path for _, path, _ in requests[before:]):  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.01)
        ended.set()
        await first.cancel()
        assert await reader == "hello"
        assert await read.wait() is True
        assert fake_cluster.api.counted("POST", "/jobs") == 2


async def submitted_by_another(cluster: FakeCluster, owner: str) -> tuple[JobRef, FakeTracking]:
    """Make a Job that has ended, and its MLflow run as a driver leaves it that is gone or on another machine."""
    tracking = FakeTracking(uri="http://tracking.example.com")
    run = await tracking.create_run("0", name=None, tags={})
    job = cluster.job(await cluster.config(), run_id=run.run_id)
    async with KubernetesBackend() as backend:
        made = backend.reference(job)
        await (await backend.submit(job)).wait()
    changes: dict[str, Any] = {"started": -1} if owner == "gone" else {"host": "elsewhere"}
    reference = replace(made, data={**made.data, "owner": {**made.data["owner"], **changes}})
    await tracking.log(run.run_id, tags={JobRef.TAG: reference.to_json()})
    return reference, tracking


async def test_leaving_the_backend_leaves_attached_runs_alone(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: FOREVER
    config = await fake_cluster.config()
    job = fake_cluster.job(config)
    async with KubernetesBackend() as first:
        run = await first.submit(job)
        async with KubernetesBackend() as second:
            await second.attach(first.reference(job))
        assert key(run) in fake_cluster.api.objects


async def test_resubmission_after_a_crash_finds_the_existing_job(
    fake_cluster: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """A resumed sweep submits the same run again."""
    fake_cluster.play = lambda pod: FOREVER
    config = await fake_cluster.config()
    job = fake_cluster.job(config, secrets={"A": "b"})
    async with KubernetesBackend() as first, KubernetesBackend() as second:
        one = await first.submit(job)
        # The first process died between Job and Secret.
        fake_cluster.api.remove(("secrets", "default", one.target.name))
        two = await second.submit(job)
        assert one.target.uid == two.target.uid
        assert len(fake_cluster.api.of_kind("jobs")) == len(fake_cluster.api.of_kind("secrets")) == 1
        assert "an earlier process created" in caplog.text


async def test_finished_jobs_are_kept_by_default(fake_cluster: FakeCluster) -> None:
    async with KubernetesBackend() as backend:
        kept = await backend.submit(fake_cluster.job(await fake_cluster.config()))
        taken = await backend.submit(fake_cluster.job(await fake_cluster.config(keep_jobs=False)))
        assert await kept.wait() is await taken.wait() is True
        assert fake_cluster.api.objects[key(kept)]["spec"]["ttlSecondsAfterFinished"] == 24 * 3600
        assert key(taken) not in fake_cluster.api.objects


async def test_plugin_token_is_renewed_once_for_all_runs(fake_cluster: FakeCluster, tmp_path: Path) -> None:
    """The plugin returns a new token at each call; the server accepts only one token at a time."""
    api = fake_cluster.api
    plugin = tmp_path / "plugin"
    plugin.write_text(
        "#!/bin/sh\n"
        f"n=$(( $(cat {tmp_path}/count 2>/dev/null || echo 0) + 1 )); echo $n > {tmp_path}/count\n"
        'printf \'{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential",'
        '"status":{"token":"token-%s"}}\' $n\n'
    )
    plugin.chmod(0o755)
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin)}}
    await asyncio.to_thread(api.kubeconfig, tmp_path / "kubeconfig", user=user)
    api.tokens = {"token-1"}
    config = await fake_cluster.config()
    async with KubernetesBackend() as backend:
        assert await (await backend.submit(fake_cluster.job(config))).wait() is True
        api.tokens = {"token-2"}
        runs = await asyncio.gather(*(backend.submit(fake_cluster.job(config)) for _ in range(20)))
        assert await asyncio.gather(*(run.wait() for run in runs)) == [True] * 20
    assert (tmp_path / "count").read_text().strip() == "2"


async def test_refused_credentials_are_reported(fake_cluster: FakeCluster) -> None:
    fake_cluster.api.tokens = {"another"}
    config = await fake_cluster.config()
    async with KubernetesBackend() as backend:
        with pytest.raises(BackendError, match="log in to the cluster again"):
            await backend.submit(fake_cluster.job(config))


async def test_plugin_failure_is_quoted_in_the_error(fake_cluster: FakeCluster, tmp_path: Path) -> None:
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "no-such-plugin"}}
    await asyncio.to_thread(fake_cluster.api.kubeconfig, tmp_path / "kubeconfig", user=user)
    config = await fake_cluster.config()
    async with KubernetesBackend() as backend:
        with pytest.raises(BackendError, match="plugin 'no-such-plugin' of the context 'fake' cannot be started"):
            await backend.submit(fake_cluster.job(config))


async def test_answer_that_no_api_server_gives_fails_the_submission(fake_cluster: FakeCluster) -> None:
    """Behind a proxy something else may answer."""

    def strange(request: web.Request) -> web.Response | None:
        return web.json_response({"items": [{}]}) if request.path.endswith("/pods") else None

    fake_cluster.api.faults.append(strange)
    config = await fake_cluster.config()
    async with KubernetesBackend() as backend:
        with anyio.fail_after(10), pytest.raises(BackendError, match="the watch of the namespace default has failed"):
            await backend.submit(fake_cluster.job(config))


async def test_runs_survive_a_cluster_restored_from_a_backup(fake_cluster: FakeCluster) -> None:
    """A watch from a future resourceVersion stays silent: the server does not even answer 410."""
    api = fake_cluster.api
    config = await fake_cluster.config()
    made = api.create(
        "jobs",
        "default",
        job_manifest(fake_cluster.job(config), config, Code(image="x:1"), {}, secrets=(), submission=""),
    )
    api.version += 100_000
    cluster = config.cluster
    async with KubernetesClient(cluster) as opened, NamespaceWatch(opened, "default", idle=0.3) as watch:
        cell = watch.track(read_job(made))
        api.version = 2000
        api.history.clear()
        ended = {"conditions": [{"type": "Complete", "status": "True"}]}
        api.objects[("jobs", "default", made["metadata"]["name"])]["status"] = ended
        api.drop_streams()
        assert (await cell.until(lambda seen: seen.ended)).status is RunStatus.FINISHED
        watch.untrack(made["metadata"]["uid"])


async def test_cluster_warnings_are_logged_once(fake_cluster: FakeCluster, caplog: pytest.LogCaptureFixture) -> None:
    """An example is a template field that the cluster does not know and drops."""
    template = {"spec": {"nosuch": 1, "template": {"spec": {"containers": [{"name": "main"}]}}}}
    config = await fake_cluster.config(job_template=template)
    async with KubernetesBackend() as backend:
        runs = [await backend.submit(fake_cluster.job(config)) for _ in range(3)]
        assert all([await run.wait() for run in runs])
    told = [record.message for record in caplog.records if "the cluster warns" in record.message]
    assert told == ['the cluster warns (creating a Job): unknown field "spec.nosuch"']


async def test_the_last_run_of_a_namespace_ends_its_watches(fake_cluster: FakeCluster) -> None:
    api, config = fake_cluster.api, await fake_cluster.config()
    async with KubernetesBackend() as backend:
        for opened in (1, 2):
            runs = [await backend.submit(fake_cluster.job(config)) for _ in range(3)]
            assert [await run.wait() for run in runs] == [True] * 3
            with anyio.fail_after(10):
                while api.streams:  # noqa: ASYNC110 - the server sees the end of a connection a little later
                    await anyio.sleep(0.01)
            assert api.counted("GET", "/jobs", watch=True) == api.counted("GET", "/pods", watch=True) == opened


@pytest.mark.slow
async def test_output_is_not_repeated_after_a_broken_connection(fake_cluster: FakeCluster) -> None:
    api, config, wanted = fake_cluster.api, await fake_cluster.config(), [f"line {number}" for number in range(60)]
    fake_cluster.play = lambda pod: FOREVER
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(config))
        await run.started()
        (log,) = api.logs.values()
        followed = run.logs()
        assert await anext(followed) == "begun"
        for line in wanted:
            log.add(f"{line}\n".encode())
            if line.endswith(("3", "7")):
                api.drop_streams()
            assert await anext(followed) == line
        await followed.aclose()
        await run.cancel()
        assert [line async for line in run.logs()] == ["begun", *wanted]


async def test_a_hundred_log_streams_do_not_delay_a_cancellation(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: FOREVER
    config = await fake_cluster.config()
    async with KubernetesBackend() as backend:
        runs = await asyncio.gather(*(backend.submit(fake_cluster.job(config)) for _ in range(120)))
        for run in runs:
            await anext(run.logs())
        assert fake_cluster.api.streams == 122
        await runs[0].cancel()
        assert key(runs[0]) not in fake_cluster.api.objects

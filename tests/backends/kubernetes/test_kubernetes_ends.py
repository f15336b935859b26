"""The ends of runs: deletions from outside, nodes that do not answer, containers that go on, and what is left."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from aiohttp import web

from components.fake_kubernetes import FakeCluster
from fakes.kubernetes import ApiFailure
from fakes.kubernetes_node import Acting
from mlfleet import Fleet
from mlfleet._cli.run import RunCommand, _say_end
from mlfleet._engine.records import RunRecord, RunRecords
from mlfleet._engine.request import RunRequest
from mlfleet.backends.base import Presence
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.backends.kubernetes.diagnosis import straggling_pod
from mlfleet.backends.kubernetes.run import KubernetesRun
from mlfleet.backends.kubernetes.state import read_job
from mlfleet.errors import BackendError, RunLost
from mlfleet.fleet import context_of
from mlfleet.runs import FailureKind, JobRef, RunStatus, Timeouts
from mlfleet.testing import FakeTracking

FOREVER = Acting(seconds=600, output=(b"begun\n",))


def key(run: KubernetesRun) -> tuple[str, str, str]:
    return "jobs", run.target.namespace, run.target.name


def pod_of(cluster: FakeCluster) -> tuple[str, str, str]:
    meta = cluster.api.of_kind("pods")[-1]["metadata"]
    return "pods", meta["namespace"], meta["name"]


def template(*others: str, **spec: Any) -> dict[str, Any]:
    containers = [{"name": "main"}, *({"name": name, "image": "proxy:1"} for name in others)]
    return {"spec": {**spec, "template": {"spec": {"containers": containers}}}}


async def project(folder: Path) -> str:
    made = anyio.Path(folder / "demo")
    await made.mkdir()
    await (made / "MLproject").write_text("name: demo\nentry_points: {main: {command: sleep 60}}\n")
    return str(made)


CONFIG: Mapping[str, Any] = {"code-delivery": "none", "image": "busybox:1", "tracking-uri": "http://mlflow:5000"}


# ---- deleted from outside


@pytest.mark.parametrize("code", [143, 9, 0])
async def test_pod_deleted_from_outside_is_a_failure_of_infrastructure(fake_cluster: FakeCluster, code: int) -> None:
    fake_cluster.play = lambda pod: replace(FOREVER, asked=code)
    config = await fake_cluster.config()
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(config))
        await run.started()
        pod = pod_of(fake_cluster)
        fake_cluster.api.delete_pod(pod, None)
        outcome = await run.outcome()
    assert outcome.status is RunStatus.FAILED
    assert outcome.reason == f"its pod {pod[2]} was deleted from outside"
    assert (outcome.kind, outcome.exit_code) == (FailureKind.INFRASTRUCTURE, code)


async def test_pod_that_is_deleted_after_its_end_has_failed_by_itself(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: Acting(code=7)

    def collect(kind: str, key: tuple[str, str, str], value: dict[str, Any]) -> None:
        if key[0] == "pods" and kind == "MODIFIED" and value["status"].get("phase") == "Failed":
            fake_cluster.api.delete_pod(key, None)

    config = await fake_cluster.config()
    fake_cluster.api.on_change.append(collect)
    async with KubernetesBackend() as backend:
        outcome = await (await backend.submit(fake_cluster.job(config))).outcome()
    assert (outcome.kind, outcome.reason) == (FailureKind.FAILURE, "exit code 7")


async def test_deleted_namespace_is_a_failure_of_infrastructure(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: FOREVER
    config = await fake_cluster.config()
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(config))
        await run.started()
        fake_cluster.api.delete_namespace("default")
        outcome = await run.outcome()
    assert (outcome.status, outcome.kind) == (RunStatus.FAILED, FailureKind.INFRASTRUCTURE)
    assert outcome.reason == f"the Job {run.target.name} was deleted from outside"


# ---- a node that does not answer


async def test_cancelled_run_is_not_killed_while_its_node_does_not_answer(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: FOREVER
    config = await fake_cluster.config()
    async with KubernetesBackend(end_patience=0.1) as backend:
        run = await backend.submit(fake_cluster.job(config))
        await run.started()
        fake_cluster.node.answers = False
        await run.cancel(grace=0)
        outcome = await run.outcome()
        pod = pod_of(fake_cluster)
        fake_cluster.node.answer()
    assert outcome.status is RunStatus.FAILED
    assert isinstance(outcome.error, RunLost)
    assert f"their commands may still run: {pod[2]} on node1" in (outcome.reason or "")


async def test_run_is_killed_when_only_a_finalizer_holds_its_job(
    fake_cluster: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    fake_cluster.play = lambda pod: FOREVER
    fake_cluster.api.holds_jobs = True
    config = await fake_cluster.config()
    async with KubernetesBackend(end_patience=0.1) as backend:
        run = await backend.submit(fake_cluster.job(config))
        await run.started()
        await run.cancel(grace=0)
        assert (await run.outcome()).status is RunStatus.KILLED
    assert "a finalizer may hold it" in caplog.text


async def test_cancelling_the_run_of_another_process_fails_while_its_node_does_not_answer(
    fake_cluster: FakeCluster, tmp_path: Path
) -> None:
    uri, tracking = await project(tmp_path), FakeTracking()
    fake_cluster.play = lambda pod: FOREVER
    async with Fleet(tracking=tracking) as driver, Fleet(tracking=tracking) as other:
        run = await driver.submit(uri, backend="kubernetes", backend_config=CONFIG)
        async for _ in run.logs():
            break
        fake_cluster.node.answers = False
        context_of(other).fleet.backends["kubernetes"] = KubernetesBackend(end_patience=0.1)
        with pytest.raises(RunLost, match="may still run"):
            await (await other.get(run.run_id)).cancel(grace=0)
        assert tracking.runs[run.run_id].status is RunStatus.RUNNING
        fake_cluster.node.answer()
        assert (await run.outcome()).reason == f"the Job demo-{run.run_id} was deleted from outside"


async def test_readers_of_the_run_of_another_process_share_a_stream_and_leave_none(
    fake_cluster: FakeCluster, tmp_path: Path
) -> None:
    """As the clients of a service do, which come and go while the run goes on."""
    uri, tracking, api = await project(tmp_path), FakeTracking(), fake_cluster.api
    fake_cluster.play = lambda pod: FOREVER
    async with Fleet(tracking=tracking) as driver, Fleet(tracking=tracking) as other:
        run = await driver.submit(uri, backend="kubernetes", backend_config=CONFIG)
        await anext(run.logs())
        before = api.streams
        seen = await other.get(run.run_id)
        readers = [seen.logs() for _ in range(3)]
        assert [await anext(reader) for reader in readers] == ["begun"] * 3
        assert api.streams <= before + 3  # two watches and a log
        for reader in readers:
            await reader.aclose()
        with anyio.fail_after(10):
            while api.streams > before:  # noqa: ASYNC110 - the server sees the end of a connection a little later
                await anyio.sleep(0.01)
        assert await run.get_status() is RunStatus.RUNNING
        assert await anext(seen.logs()) == "begun"
        await run.cancel(grace=0)


async def test_a_program_that_ends_while_it_reads_the_run_of_another_process_leaves_it_alone(
    fake_cluster: FakeCluster, tmp_path: Path
) -> None:
    uri, tracking = await project(tmp_path), FakeTracking()
    fake_cluster.play = lambda pod: FOREVER
    left: list[object] = []
    async with Fleet(tracking=tracking) as driver:
        run = await driver.submit(uri, backend="kubernetes", backend_config=CONFIG)
        await anext(run.logs())

        async def read() -> None:
            fleet = await Fleet(tracking=tracking).__aenter__()
            lines = (await fleet.get(run.run_id)).logs()
            left.append((fleet, lines))
            assert await anext(lines) == "begun"

        await asyncio.to_thread(asyncio.run, read())  # which cancels all tasks at its end
        assert [job["metadata"].get("deletionTimestamp") for job in fake_cluster.api.of_kind("jobs")] == [None]
        assert await run.get_status() is RunStatus.RUNNING
        await run.cancel(grace=0)


async def test_a_run_whose_driver_died_is_concluded_although_a_reader_has_left_it(fake_cluster: FakeCluster) -> None:
    """The reader belongs to a service that lives on, and must not count as the driver."""
    fake_cluster.play = lambda pod: Acting(seconds=0.5, output=(b"begun\n",))
    tracking, dead = FakeTracking(uri="http://tracking.example.com"), RunRecords()
    run = await tracking.create_run("0", name=None, tags={})
    job = fake_cluster.job(await fake_cluster.config(), run_id=run.run_id)
    async with KubernetesBackend() as backend, Fleet(tracking=tracking) as fleet:
        await tracking.log(run.run_id, tags={JobRef.TAG: backend.reference(job).to_json()})
        await backend.submit(job)
        await dead.add(RunRecord(run_id=run.run_id, backend="kubernetes", project="demo", tracking=""))
        await dead.close()
        seen = await fleet.get(run.run_id)
        lines = seen.logs()
        assert await anext(lines) == "begun"
        await lines.aclose()
        with anyio.fail_after(30):
            assert await seen.wait() is True


async def test_interrupted_run_whose_end_is_not_confirmed_says_why_it_failed(
    fake_cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, tracking = await project(tmp_path), FakeTracking()
    fake_cluster.play = lambda pod: FOREVER
    async with Fleet(tracking=tracking) as fleet:
        context_of(fleet).fleet.backends["kubernetes"] = KubernetesBackend(end_patience=0.1)
        run = await fleet.submit(uri, backend="kubernetes", backend_config=CONFIG)
        async for _ in run.logs():
            break
        fake_cluster.node.answers = False
        await run.cancel(grace=0)
        fake_cluster.node.answer()
        command = RunCommand(request=RunRequest.of(uri), run=run, outcome=await run.outcome())
    _say_end(command, signal.SIGINT, quiet=True)
    assert f"(run {run.run_id}) is FAILED: the Job demo-{run.run_id} was deleted, but" in capsys.readouterr().err


async def test_timeout_of_a_run_whose_end_is_not_confirmed_says_so(fake_cluster: FakeCluster, tmp_path: Path) -> None:
    uri, tracking = await project(tmp_path), FakeTracking()
    fake_cluster.play = lambda pod: FOREVER
    timeouts = Timeouts(run=0.1, cancel_grace=0)
    async with Fleet(tracking=tracking, timeouts=timeouts) as fleet:
        context_of(fleet).fleet.backends["kubernetes"] = KubernetesBackend(end_patience=0.1)
        fake_cluster.node.answers = False
        outcome = await (await fleet.submit(uri, backend="kubernetes", backend_config=CONFIG)).outcome()
        fake_cluster.node.answer()
    assert outcome.kind is FailureKind.TIMEOUT
    assert (outcome.reason or "").startswith("the run timeout of 0.1 s ran out; the Job demo-")
    assert "may still run" in (outcome.reason or "")


# ---- other containers


@pytest.mark.parametrize("injected", [False, True])
async def test_containers_that_go_on_after_a_success_are_ended(
    fake_cluster: FakeCluster, injected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    fake_cluster.play = lambda pod: Acting(output=(b"said\n",))
    fake_cluster.others["istio-proxy"] = Acting(seconds=600, asked=0)
    if injected:
        fake_cluster.node.injected = [{"name": "istio-proxy", "image": "proxy:1"}]
    config = await fake_cluster.config(job_template=template(*() if injected else ("istio-proxy",)))
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(config, cancel_grace=0))
        outcome = await run.outcome()
        assert [line async for line in run.logs()] == ["said"]
    assert (outcome.status, outcome.exit_code) == (RunStatus.FINISHED, 0)
    assert fake_cluster.api.of_kind("pods") == []
    told = [record.message for record in caplog.records if "istio-proxy in its pod" in record.message]
    assert len(told) == 1


@pytest.mark.parametrize("counts_deleted", [True, False])
async def test_containers_that_go_on_after_a_failure_are_ended_and_the_job_tries_again(
    fake_cluster: FakeCluster, caplog: pytest.LogCaptureFixture, counts_deleted: bool
) -> None:
    fake_cluster.node.counts_deleted = counts_deleted
    seen: list[str] = []

    def play(pod: Any) -> Acting:
        seen.append(pod["metadata"]["name"])
        return Acting(code=5)

    fake_cluster.play = play
    fake_cluster.others["istio-proxy"] = Acting(seconds=600, asked=0)
    config = await fake_cluster.config(job_template=template("istio-proxy", backoffLimit=1))
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(config, cancel_grace=0))
        outcome = await run.outcome()
    assert (outcome.exit_code, outcome.reason, outcome.kind) == (5, "exit code 5 (attempt 2 of 2)", FailureKind.FAILURE)
    assert len(seen) == 2
    assert caplog.text.count("istio-proxy in its pod") == 1


async def test_run_whose_command_has_ended_is_over_for_other_processes_and_cannot_be_cancelled(
    fake_cluster: FakeCluster,
) -> None:
    commands = [Acting(code=0), FOREVER]
    fake_cluster.play = lambda pod: commands[0]
    fake_cluster.others["istio-proxy"] = Acting(seconds=600, asked=0)
    config = await fake_cluster.config(job_template=template("istio-proxy"))
    async with KubernetesBackend() as backend, KubernetesBackend() as other:
        ended, going = (fake_cluster.job(config, cancel_grace=60) for _ in range(2))
        first = await backend.submit(ended)
        await first._state.until(lambda snapshot: straggling_pod(snapshot) is not None)
        commands.reverse()
        second = await backend.submit(going)
        await second.started()
        assert await other.presence(backend.reference(ended)) is Presence.ENDED
        assert await other.presence(backend.reference(going)) is Presence.ACTIVE
        handle = await other.attach(backend.reference(ended))
        await handle.cancel(grace=0)
        outcome = await handle.outcome()
    assert (outcome.status, outcome.exit_code) == (RunStatus.FINISHED, 0)


async def test_containers_that_end_in_time_are_left_alone(
    fake_cluster: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    fake_cluster.others["shipper"] = Acting(seconds=0.2)
    config = await fake_cluster.config(job_template=template("shipper"))
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(config))
        assert await run.wait() is True
        assert key(run) in fake_cluster.api.objects
    assert "shipper" not in caplog.text


# ---- attached runs


async def abandoned(backend: KubernetesBackend, job: Any) -> JobRef:
    """Return the reference of a run whose process is gone."""
    gone = await asyncio.create_subprocess_exec("true")
    await gone.wait()
    reference = JobRef.from_json(backend.reference(job).to_json())
    return replace(reference, data={**reference.data, "owner": f"{socket.gethostname()}:{gone.pid}"})


async def test_attached_run_keeps_its_start_timeout(fake_cluster: FakeCluster) -> None:
    config = await fake_cluster.config(node_selector={"gpu": "yes"}, start_timeout={"unschedulable": 0.1})
    unlimited = await fake_cluster.config(node_selector={"gpu": "yes"})
    async with KubernetesBackend() as first, KubernetesBackend() as second:
        job = fake_cluster.job(unlimited)
        await first.submit(job)
        again = await second.attach(await abandoned(second, replace(job, config=config)))
        outcome = await again.outcome()
        assert fake_cluster.api.of_kind("jobs") == [], "a Job that can never start must not stay"
    assert "did not start within 0.1 s: no node takes the pod" in (outcome.reason or "")


async def test_attached_run_keeps_keep_jobs(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: replace(FOREVER, seconds=0.3)
    config = await fake_cluster.config(keep_jobs=False)
    job = fake_cluster.job(await fake_cluster.config())
    async with KubernetesBackend() as first, KubernetesBackend() as second, KubernetesBackend() as third:
        run = await first.submit(job)
        reference = await abandoned(second, replace(job, config=config))
        left = await third.attach(reference)
        left.detach()
        await left.outcome()
        assert key(run) in fake_cluster.api.objects, "a run that is left alone"
        again = await second.attach(reference)
        assert await again.wait() is True
        assert key(run) not in fake_cluster.api.objects


# ---- the Secret


async def test_secret_is_deleted_when_its_run_has_ended(fake_cluster: FakeCluster) -> None:
    api, config = fake_cluster.api, await fake_cluster.config()
    fake_cluster.play = lambda pod: Acting(seconds=0.2, output=(b"said\n",))
    async with KubernetesBackend() as backend:
        job = fake_cluster.job(config, secrets={"TOKEN": "hush"})
        before = len(api.requests)
        run = await backend.submit(job)
        (secret,) = api.of_kind("secrets")
        assert secret["metadata"]["ownerReferences"][0]["uid"] == run.target.uid, "it goes with its Job at the latest"
        assert await run.wait() is True
        assert api.of_kind("secrets") == []
        assert key(run) in api.objects
    watches = 4
    assert len(api.requests) - before - watches <= 5


async def test_secret_is_deleted_by_the_process_that_notices_the_end(fake_cluster: FakeCluster) -> None:
    api, config = fake_cluster.api, await fake_cluster.config()
    fake_cluster.play = lambda pod: FOREVER
    async with KubernetesBackend() as first, KubernetesBackend() as second:
        job = fake_cluster.job(config, secrets={"TOKEN": "hush"})
        run = await first.submit(job)
        run.detach()
        await run.outcome()
        assert len(api.of_kind("secrets")) == 1, "the run goes on"
        again = await second.attach(first.reference(job))
        api.delete_pod(pod_of(fake_cluster), None)
        await again.outcome()
        assert api.of_kind("secrets") == []


async def test_secret_that_may_not_be_deleted_stays_with_its_job(
    fake_cluster: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    config = await fake_cluster.config(namespace="old-role")
    async with KubernetesBackend() as backend:
        fake_cluster.play = lambda pod: FOREVER
        runs = [await backend.submit(fake_cluster.job(config, secrets={"A": "b"})) for _ in range(2)]
        fake_cluster.api.forbidden = {"secrets"}
        with caplog.at_level(logging.WARNING, "mlfleet.kubernetes"):
            for run in runs:
                await run.started()
                fake_cluster.api.delete_pod(
                    next(each for each in fake_cluster.api.objects if each[0] == "pods" and run.target.name in each[2]),
                    1,
                )
                await run.outcome()
    assert caplog.text.count("verb 'delete' for secrets") == 1


# ---- prune


def set_owner(cluster: FakeCluster, run: KubernetesRun, owner: str) -> None:
    cluster.api.change(key(run), lambda job: job["metadata"]["annotations"].update({"mlfleet.owner": owner}))


async def test_prune_deletes_the_jobs_that_no_process_looks_after(fake_cluster: FakeCluster) -> None:
    """The Jobs of a process that is gone, one that has ended and one that goes on; and those of this process."""
    api, config = fake_cluster.api, await fake_cluster.config()
    ends = {"ended", "other", "mine"}
    fake_cluster.play = lambda pod: Acting(code=3) if pod["metadata"]["labels"]["mlfleet.run-id"] in ends else FOREVER
    gone = await asyncio.create_subprocess_exec("true")
    await gone.wait()
    owners = {
        "ended": f"{socket.gethostname()}:{gone.pid}",
        "going": f"{socket.gethostname()}:{gone.pid}",
        "other": f"another-machine:{gone.pid}",
    }
    async with KubernetesBackend() as backend, KubernetesBackend() as second:
        runs = [await backend.submit(fake_cluster.job(config, run_id=each)) for each in (*owners, "mine")]
        for run in runs:
            await (run.wait() if run.run_id in ends else run.started())
            if run.run_id in owners:
                set_owner(fake_cluster, run, owners[run.run_id])
        listed = {run.run_id: (run.state, run.supervised) for run in await second.list_runs()}
        assert listed == {
            "ended": ("failed", False), "going": ("active", False), "other": ("failed", True), "mine": ("failed", True),
        }  # fmt: skip

        async def pruned(*run_ids: str, **options: bool) -> list[str]:
            return [run.run_id for run in await second.prune(run_ids, **options)]

        assert await pruned(dry_run=True) == ["ended"]
        assert len(api.of_kind("jobs")) == 4
        assert await pruned("going", "mine") == []
        assert await pruned() == ["ended"]
        assert {job["metadata"]["labels"]["mlfleet.run-id"] for job in api.of_kind("jobs")} == {
            "going",
            "other",
            "mine",
        }
        assert await pruned(running=True) == ["going"]
        assert (await runs[1].outcome()).status is RunStatus.FAILED
        assert {job["metadata"]["labels"]["mlfleet.run-id"] for job in api.of_kind("jobs")} == {"other", "mine"}


async def test_prune_deletes_secrets_with_their_jobs(fake_cluster: FakeCluster) -> None:
    api, config = fake_cluster.api, await fake_cluster.config()
    gone = await asyncio.create_subprocess_exec("true")
    await gone.wait()
    fake_cluster.play = lambda pod: replace(FOREVER, seconds=0.1)
    ended = anyio.Event()

    def note(kind: str, key: tuple[str, str, str], value: dict[str, Any]) -> None:
        if key[0] == "jobs" and read_job(value).ended:
            ended.set()

    api.on_change.append(note)
    async with KubernetesBackend() as backend, KubernetesBackend() as second:
        run = await backend.submit(fake_cluster.job(config, secrets={"TOKEN": "hush"}))
        run.detach()
        await run.outcome()
        set_owner(fake_cluster, run, f"{socket.gethostname()}:{gone.pid}")
        await ended.wait()
        assert [each.run_id for each in await second.prune()] == [run.run_id]
        assert api.of_kind("jobs") == api.of_kind("secrets") == []


async def test_prune_that_is_not_allowed_names_the_refusal(fake_cluster: FakeCluster) -> None:
    def refused(request: web.Request) -> web.Response | None:
        forbidden = ApiFailure(403, "Forbidden", "jobs is forbidden: User cannot delete it")
        return forbidden.response() if request.method == "DELETE" else None

    config = await fake_cluster.config()
    gone = await asyncio.create_subprocess_exec("true")
    await gone.wait()
    async with KubernetesBackend() as backend, KubernetesBackend() as second:
        for run in [await backend.submit(fake_cluster.job(config)) for _ in range(2)]:
            await run.wait()
            set_owner(fake_cluster, run, f"{socket.gethostname()}:{gone.pid}")
        fake_cluster.api.faults.append(refused)
        with pytest.raises(BackendError, match=r"deleting a Job.*forbidden.*See the Role"):
            await second.prune()

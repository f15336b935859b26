"""The copy of a run's output on a fake kubelet that rotates logs and restarts containers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from aiohttp import web

from components.fake_kubernetes import FakeCluster
from fakes.kubernetes import ApiFailure, Log
from fakes.kubernetes_node import Acting
from mlfleet._paths import run_folder
from mlfleet._text.lines import follow_bytes, split_lines
from mlfleet.backends.base import Job
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.backends.kubernetes.output import ContainerLife, Copier, LogSlots
from mlfleet.backends.kubernetes.run import KubernetesRun
from mlfleet.runs import JobRef, RunStatus

FOREVER = Acting(seconds=600)
MISSING = "mlfleet: lines may be missing here: the node has discarded its log between "


def at_home(job: Job) -> Job:
    """Return the job with its output where other processes look for it."""
    return replace(job, output=run_folder(job.run_id) / "output.log")


async def begin(backend: KubernetesBackend, cluster: FakeCluster, **options: Any) -> tuple[KubernetesRun, JobRef, Log]:
    """Return a run that has started, its reference and the kubelet's log of it."""
    job = at_home(cluster.job(await cluster.config(), **options))
    run = await backend.submit(job)
    await run.started()
    (log,) = cluster.api.logs.values()
    return run, backend.reference(job), log


async def copied(run: KubernetesRun, line: str) -> None:
    async for each in run.logs():
        if each == line:
            return


async def leave(run: KubernetesRun) -> None:
    """Stop the supervision, as the death of its process does."""
    run.detach()
    await run.outcome()


def write(log: Log, *numbers: int) -> None:
    for number in numbers:
        log.add(f"line {number}\n".encode())


def read(run: KubernetesRun) -> list[str]:
    assert run.target.output is not None
    return run.target.output.read_text().splitlines()


def lines(*numbers: int) -> list[str]:
    return [f"line {number}" for number in numbers]


def end(cluster: FakeCluster) -> None:
    assert cluster.node is not None
    for containers in cluster.node._containers.values():
        for container in containers:
            container.kill()


@pytest.mark.parametrize("rotated", [False, True])
async def test_resumed_copy_keeps_its_lines_and_says_where_some_are_missing(
    fake_cluster: FakeCluster, caplog: pytest.LogCaptureFixture, rotated: bool
) -> None:
    fake_cluster.play = lambda pod: FOREVER
    async with KubernetesBackend() as first, KubernetesBackend() as second:
        run, reference, log = await begin(first, fake_cluster)
        write(log, *range(5))
        await copied(run, "line 4")
        await leave(run)
        write(log, 5, 6)
        if rotated:
            log.rotate()
        write(log, 7)
        again = await second.attach(reference)
        await copied(again, "line 7")
        write(log, 8)
        await copied(again, "line 8")
        found = read(again)
        await again.cancel()
    if not rotated:
        assert found == lines(*range(9))
        return
    assert found[:5] + found[6:] == lines(0, 1, 2, 3, 4, 7, 8)
    assert found[5].startswith(MISSING)
    assert [record.getMessage() for record in caplog.records if "may not be all there" in record.getMessage()]


async def test_resumed_copy_of_an_ended_run_is_not_repeated(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: Acting(code=3, output=(b"line 0\n", b"line 1"))
    job = at_home(fake_cluster.job(await fake_cluster.config()))
    async with KubernetesBackend() as first:
        reference = first.reference(job)
        await (await first.submit(job)).wait()
    for _ in range(2):
        async with KubernetesBackend() as second:
            again = await second.attach(reference)
            assert (await again.outcome()).output == ("line 0", "line 1")
            assert again.target.output is not None
            assert again.target.output.read_bytes() == b"line 0\nline 1", "not a byte more"


async def test_job_that_is_submitted_again_after_a_crash_keeps_the_output(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: FOREVER
    job = at_home(fake_cluster.job(await fake_cluster.config()))
    async with KubernetesBackend() as first, KubernetesBackend() as second:
        run = await first.submit(job)
        await run.started()
        (log,) = fake_cluster.api.logs.values()
        write(log, 0, 1)
        await copied(run, "line 1")
        await leave(run)
        log.rotate()
        write(log, 2)
        again = await second.submit(job)
        await copied(again, "line 2")
        found = read(again)
        await again.cancel()
    assert found[:2] + found[3:] == lines(0, 1, 2)


@pytest.mark.parametrize("text", [None, b"", b"{}\n", b'{"done": 1, "mark": [1, 2]}\n', b"\xff"])
async def test_copy_without_a_recorded_place_is_continued_by_comparison(
    fake_cluster: FakeCluster, text: bytes | None
) -> None:
    fake_cluster.play = lambda pod: FOREVER
    async with KubernetesBackend() as first, KubernetesBackend() as second:
        run, reference, log = await begin(first, fake_cluster)
        write(log, *range(5))
        await copied(run, "line 4")
        await leave(run)
        assert run.target.output is not None
        for other in run.target.output.parent.iterdir():
            if other != run.target.output:
                other.unlink() if text is None else other.write_bytes(text)
        write(log, 5)
        again = await second.attach(reference)
        await copied(again, "line 5")
        assert read(again) == lines(*range(6))
        await again.cancel()


async def test_two_processes_copy_the_same_output_to_one_file(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: FOREVER
    async with KubernetesBackend() as first, KubernetesBackend() as second:
        run, reference, log = await begin(first, fake_cluster)
        write(log, *range(5))
        await copied(run, "line 4")
        again = await second.attach(reference)
        assert [line async for line in again.logs(follow=False)] == lines(*range(5))
        write(log, *range(5, 10))
        await copied(run, "line 9")
        await copied(again, "line 9")
        assert read(run) == read(again) == lines(*range(10))
        await leave(again)
        await run.cancel()
        assert read(run) == lines(*range(10))


async def test_logs_without_following_are_those_up_to_now(fake_cluster: FakeCluster) -> None:
    fake_cluster.play = lambda pod: FOREVER
    async with KubernetesBackend() as first:
        run, reference, log = await begin(first, fake_cluster)
        write(log, *range(3))
        await copied(run, "line 2")
        await leave(run)
        for number in (3, 4, 5):
            write(log, number)
            async with KubernetesBackend() as second:
                again = await second.attach(reference)
                assert [line async for line in again.logs(follow=False)] == lines(*range(number + 1))
        await (await first.attach(reference)).cancel()


async def test_logs_without_following_do_not_wait_for_a_pod(fake_cluster: FakeCluster) -> None:
    config = await fake_cluster.config(**{"node-selector": {"disk": "ssd"}})
    job = at_home(fake_cluster.job(config))
    async with KubernetesBackend() as first, KubernetesBackend() as second:
        run = await first.submit(job)
        again = await second.attach(first.reference(job))
        assert [line async for line in again.logs(follow=False)] == []
        await run.cancel()


@pytest.mark.parametrize("rotated", [False, True])
async def test_outage_of_the_server_loses_no_lines_silently(fake_cluster: FakeCluster, rotated: bool) -> None:
    api = fake_cluster.api
    fake_cluster.play = lambda pod: FOREVER
    refused = anyio.Event()

    def away(request: web.Request) -> web.Response:
        if request.path.endswith("/log"):
            refused.set()
        return ApiFailure(503, "ServiceUnavailable", "the server is starting").response()

    async with KubernetesBackend() as backend:
        run, _, log = await begin(backend, fake_cluster)
        write(log, 0, 1)
        await copied(run, "line 1")
        api.faults.append(away)
        api.drop_streams()
        await refused.wait()
        write(log, 2)
        if rotated:
            log.rotate()
        write(log, 3)
        end(fake_cluster)
        api.faults.clear()
        assert (await run.outcome()).exit_code == 137
    found = read(run)
    if not rotated:
        assert found == lines(0, 1, 2, 3)
        return
    assert found[:2] + found[3:] == lines(0, 1, 3)
    assert found[2].startswith(MISSING)


async def test_old_kubelet_that_does_not_follow_into_the_next_file_loses_no_lines_silently(
    fake_cluster: FakeCluster,
) -> None:
    fake_cluster.play = lambda pod: FOREVER
    async with KubernetesBackend() as backend:
        run, _, log = await begin(backend, fake_cluster)
        log.follows = False
        write(log, 0, 1)
        await copied(run, "line 1")
        log.rotate()
        write(log, 2)
        end(fake_cluster)
        await run.outcome()
    found = read(run)
    assert found[:2] + found[3:] == lines(0, 1, 2)
    assert found[2].startswith(MISSING), "the new file may not begin where the old one ended"


async def test_large_log_that_is_quiet_is_read_again_for_old_kubelets(
    fake_cluster: FakeCluster, tmp_path: Path
) -> None:
    fake_cluster.play = lambda pod: FOREVER
    async with KubernetesBackend() as backend:
        run, _, log = await begin(backend, fake_cluster)
        log.follows = False
        copier = Copier(run._client, LogSlots(quiet=0.1), run.target.namespace, tmp_path / "copy.log")
        await copier.open()
        pod = run._state.value.pods[0]  # type: ignore[union-attr]
        copying = asyncio.create_task(copier.copy(pod, ContainerLife(run._state, pod.uid, pod.main.name)))
        log.add(b"x" * 300_000 + b"\n")
        for number in range(3):
            write(log, number)
            with anyio.fail_after(10):
                async for line in split_lines(follow_bytes(tmp_path / "copy.log", asyncio.Event().wait)):
                    if line == f"line {number}":
                        break
            log.rotate()
        end(fake_cluster)
        await copying
        await run.outcome()
    assert (tmp_path / "copy.log").read_text().splitlines()[1:] == lines(0, 1, 2)


async def test_log_whose_connection_is_broken_silently_is_read_again(fake_cluster: FakeCluster) -> None:
    api = fake_cluster.api
    fake_cluster.play = lambda pod: FOREVER
    async with KubernetesBackend() as backend:
        run, _, log = await begin(backend, fake_cluster)
        write(log, 0)
        await copied(run, "line 0")
        # Nothing arrives on the connection any more, not even its end.
        log.changed = anyio.Event()  # type: ignore[assignment]
        hidden = log.wake
        log.wake = lambda: None  # type: ignore[method-assign]
        write(log, 1)
        end(fake_cluster)
        assert (await run.outcome()).exit_code == 137
        log.wake = hidden  # type: ignore[method-assign]
    assert api.counted("GET", "/log") == 2, "followed, and read again"
    assert read(run) == lines(0, 1)


async def test_output_that_the_server_does_not_give_is_called_missing(
    fake_cluster: FakeCluster, tmp_path: Path
) -> None:
    api = fake_cluster.api
    fake_cluster.play = lambda pod: FOREVER
    asked = anyio.Event()

    async with KubernetesBackend() as backend:
        run, _, log = await begin(backend, fake_cluster)
        write(log, 0)
        end(fake_cluster)
        await run.outcome()
        assert api.counted("GET", "/log") <= 2

        def broken(request: web.Request) -> web.Response | None:
            if not request.path.endswith("/log"):
                return None
            asked.set()
            return ApiFailure(500, "InternalError", "dial tcp: i/o timeout").response()

        api.faults.append(broken)
        copier = Copier(run._client, LogSlots(), run.target.namespace, tmp_path / "copy.log")
        pod = run._state.value.pods[0]  # type: ignore[union-attr]
        copying = asyncio.create_task(copier.copy(pod, ContainerLife(run._state, pod.uid, pod.main.name)))
        await asked.wait()
        assert copier.lacks
        copying.cancel()
        await asyncio.wait([copying])
        await copier.finish(stalled=True)
    (said,) = (tmp_path / "copy.log").read_text().splitlines()
    assert said == "mlfleet: output is missing here: the API server gives no more of it"


# ---- attempts in one pod ---------------------------------------------------------------------------------------------


def attempts(*plays: Acting) -> Callable[[Any], Acting]:
    left = list(plays)
    return lambda pod: left.pop(0) if left else FOREVER


def restarting(limit: int) -> dict[str, Any]:
    pod = {"restartPolicy": "OnFailure", "containers": [{"name": "main"}]}
    return {"spec": {"backoffLimit": limit, "template": {"spec": pod}}}


async def test_output_of_every_attempt_in_one_pod_is_copied(fake_cluster: FakeCluster) -> None:
    plays = [Acting(seconds=0.1, code=4, output=(f"attempt {n}\n".encode(), b"and no end")) for n in range(3)]
    # The Job controller deletes the pod as soon as the last attempt has begun.
    fake_cluster.play = attempts(*plays, Acting(seconds=0.3, code=143, output=(b"attempt 3\n",), obeys=False))
    config = await fake_cluster.config(**{"job-template": restarting(3)})
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(config))
        outcome = await run.outcome()
    assert (outcome.status, outcome.exit_code) == (RunStatus.FAILED, 4)
    assert outcome.reason == "exit code 4 (attempt 4 of 4)"
    assert read(run) == ["attempt 0", "and no end", "attempt 1", "and no end", "attempt 2", "and no end", "attempt 3"]


async def test_attempts_that_end_at_once_are_copied_or_called_missing(fake_cluster: FakeCluster) -> None:
    plays = [Acting(code=4, output=(f"attempt {n}\n".encode(),)) for n in range(3)]
    fake_cluster.play = attempts(*plays, Acting(seconds=600, output=(b"attempt 3\n",)))
    config = await fake_cluster.config(**{"job-template": restarting(3)})
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(config))
        assert (await run.outcome()).exit_code == 4
    found = read(run)
    counts = {found.count(f"attempt {number}") for number in range(4)}
    assert counts <= ({0, 1} if any("output is missing here" in line for line in found) else {1})


async def test_restarted_container_that_then_finishes(fake_cluster: FakeCluster) -> None:
    failing = Acting(seconds=600, output=(b"no\n",))
    fake_cluster.play = attempts(failing, Acting(seconds=0.05, output=(b"yes\n",)))
    config = await fake_cluster.config(**{"job-template": restarting(3)})
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(config))
        await copied(run, "no")  # otherwise the second attempt may be the first that is seen
        end(fake_cluster)
        assert (await run.outcome()).status is RunStatus.FINISHED
    assert read(run) == ["no", "yes"]


async def test_resumed_copy_goes_on_with_the_attempt_that_runs(fake_cluster: FakeCluster) -> None:
    api, node = fake_cluster.api, fake_cluster.node
    assert node is not None
    fake_cluster.play = lambda pod: FOREVER
    job = at_home(fake_cluster.job(await fake_cluster.config(**{"job-template": restarting(6)})))
    async with KubernetesBackend() as first, KubernetesBackend() as second:
        run = await first.submit(job)
        await run.started()
        (place,) = api.logs
        write(api.logs[place], 0, 1)
        await copied(run, "line 1")
        await leave(run)
        write(api.logs[place], 2)
        for number in range(3, 6):
            before = api.logs[place]
            end(fake_cluster)
            with anyio.fail_after(10):
                while api.logs[place] is before:  # noqa: ASYNC110 - the fake has no event for it
                    await anyio.sleep(0.01)
            write(api.logs[place], number)
        again = await second.attach(first.reference(job))
        await copied(again, "line 5")
        found = read(again)
        await again.cancel()
    # Of four attempts the node keeps the last two.
    assert found[:2] + found[3:] == lines(0, 1, 4, 5)
    assert found[2] == "mlfleet: output is missing here: the node has discarded that of the attempts 1 to 2"


# ---- pods that are gone ----------------------------------------------------------------------------------------------


async def test_deleted_pod_whose_log_was_read_is_not_called_incomplete(
    fake_cluster: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    fake_cluster.play = lambda pod: Acting(seconds=600, output=(b"line 0\n",))
    with caplog.at_level(logging.WARNING):
        async with KubernetesBackend() as backend:
            run, _, _ = await begin(backend, fake_cluster)
            await copied(run, "line 0")
            (pod,) = [key for key in fake_cluster.api.objects if key[0] == "pods"]
            fake_cluster.api.delete_job(("jobs", run.target.namespace, run.target.name), "Foreground")
            await run.outcome()
    assert read(run) == ["line 0"]
    assert not [each.getMessage() for each in caplog.records if "not all there" in each.getMessage()], pod

"""A thousand runs on a cluster with random faults, and drivers killed between any two requests."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from components.fake_kubernetes import FakeCluster
from fakes.kubernetes import ApiFailure
from fakes.kubernetes_node import Acting
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.runs import RunStatus

RUNS = 1000


# A thousand runs, with the server in this process, too.
@pytest.mark.timeout(240)
async def test_a_thousand_runs_survive_random_faults(fake_cluster: FakeCluster, tmp_path: Path) -> None:  # noqa: C901
    api, chance = fake_cluster.api, random.Random(7)
    api.page = 100
    expected: dict[str, int] = {}
    deleted: set[str] = set()
    to_delete: set[str] = set()  # names of Jobs known to their submitter

    def play(pod: Mapping[str, Any]) -> Acting:
        run_id = pod["metadata"]["labels"]["mlfleet.run-id"]
        if run_id in deleted:
            return Acting(seconds=600)
        return Acting(seconds=chance.uniform(0, 2), code=expected[run_id], output=(run_id.encode() + b"\n",))

    def fault(request: web.Request) -> web.Response | None:
        if chance.random() < 0.02:
            return ApiFailure(429, "TooManyRequests", "slow down", Retry_After="0").response()
        if chance.random() < 0.02:
            return ApiFailure(500, "InternalError", "oops").response()
        if chance.random() < 0.01 and request.transport is not None:
            request.transport.abort()
        return None

    plugin = tmp_path / "plugin"
    plugin.write_text(
        '#!/bin/sh\nprintf \'{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential",'
        f'"status":{{"token":"%s"}}}}\' "$(cat {tmp_path}/token)"\n'
    )
    plugin.chmod(0o755)
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin)}}
    await asyncio.to_thread(api.kubeconfig, tmp_path / "kubeconfig", user=user)
    (tmp_path / "token").write_text("first")
    api.tokens = {"first"}

    async def renew_token() -> None:
        token = uuid.uuid4().hex
        await asyncio.to_thread((tmp_path / "token").write_text, token)
        api.tokens = {token}

    async def upset() -> None:
        """Connections break, history is compacted, tokens expire; Jobs are deleted behind everybody's back.

        In steps of what has happened, not of time, so that a slow machine sees no more of it than a fast one. For the
        same reason no Job has a TTL here: while a watch is broken, it might remove one whose end nobody has seen yet.
        """
        step = served = 0
        while True:
            await asyncio.sleep(0.02)
            for name in tuple(to_delete):
                if "startTime" in api.objects[("jobs", "default", name)]["status"]:
                    api.delete_job(("jobs", "default", name), chance.choice(["Background", "Foreground"]))
                    to_delete.discard(name)
            if api.version < 1000 + 250 * (step + 1):
                continue
            step += 1
            if step % 2:
                api.drop_streams()
            if step % 3 == 0:
                api.compact()
            if api.served > served + 100:
                served = api.served
                await renew_token()

    config = await fake_cluster.config()
    fake_cluster.play = play
    api.faults.append(fault)
    upsetting = asyncio.create_task(upset())
    async with KubernetesBackend() as backend:

        async def one(number: int) -> tuple[str, RunStatus, int | None, str | None]:
            job = fake_cluster.job(config)
            expected[job.run_id] = number % 3
            if number % 20 == 0:
                deleted.add(job.run_id)
            run = await backend.submit(job)
            if job.run_id in deleted:
                to_delete.add(run.target.name)
            outcome = await run.outcome()
            return job.run_id, outcome.status, outcome.exit_code, outcome.reason

        ended = await asyncio.gather(*(one(number) for number in range(RUNS)))
    upsetting.cancel()
    for run_id, status, code, reason in ended:
        if run_id in deleted:
            assert status is RunStatus.FAILED, reason
            assert "deleted from outside" in (reason or "") or "how it ended was not seen" in (reason or "")
        else:
            assert (status is RunStatus.FINISHED) == (expected[run_id] == 0), reason
            assert code == expected[run_id], reason
    created = Counter(fake_cluster.created)
    assert len(created) == RUNS
    assert set(created.values()) == {1}, "a Job was created twice"


DRIVER = """
import asyncio, json, os, sys
from pathlib import Path
from mlfleet.backends.base import Job
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.backends.kubernetes.config import parse_config

async def main() -> None:
    folder, run_id = Path(sys.argv[1]), sys.argv[2]
    config = parse_config({"code-delivery": "configmap", "image": "busybox:1"}, os.environ)
    job = Job(run_id=run_id, experiment_id="0", project_name="p", project_dir=folder / "project", command="true",
              secrets={"A": "b"}, output=folder / run_id / "output.log", config=config)
    async with KubernetesBackend() as backend:
        run = await backend.submit(job)
        print(json.dumps([await run.wait(), (await run.outcome()).reason]), flush=True)

asyncio.run(main())
"""


# Some processes that import the Kubernetes client, one after the other.
@pytest.mark.timeout(240)
async def test_killing_the_driver_at_any_request_leaves_one_job(fake_cluster: FakeCluster, tmp_path: Path) -> None:
    """The restarted driver submits the same run, as a resumed sweep does, and finds the one existing Job."""
    api = fake_cluster.api
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "MLproject").write_text("name: p\n")
    (tmp_path / "driver.py").write_text(DRIVER)
    fake_cluster.play = lambda pod: Acting(seconds=0.3)
    for killed_at in range(1, 9):
        run_id = uuid.uuid4().hex
        first = _start(tmp_path, run_id)
        await _kill_at(fake_cluster, first, killed_at)
        again = _start(tmp_path, run_id)
        out, err = await asyncio.to_thread(again.communicate, timeout=60)
        assert json.loads(out) == [True, None], (killed_at, err)
        mine = [job for job in api.of_kind("jobs") if job["metadata"]["labels"]["mlfleet.run-id"] == run_id]
        assert len(mine) == 1, killed_at
        names = [name for name in fake_cluster.created if name == mine[0]["metadata"]["name"]]
        assert len(names) == 1, killed_at
        secrets = [body["metadata"] for body in api.bodies if body and body.get("kind") == "Secret"]
        assert mine[0]["metadata"]["uid"] in [each["ownerReferences"][0]["uid"] for each in secrets], killed_at
        assert api.of_kind("secrets") == [], killed_at


def _start(folder: Path, run_id: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, str(folder / "driver.py"), str(folder), run_id]
    environ = {**os.environ, "KUBECONFIG": str(folder / "kubeconfig")}
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ)


async def _kill_at(cluster: FakeCluster, driver: subprocess.Popen[bytes], number: int) -> None:
    """Send SIGKILL to the driver at its n-th request: before the request is handled, or right after."""
    arrived = 0
    done = asyncio.Event()

    def fault(request: web.Request) -> None:
        nonlocal arrived
        arrived += 1
        if arrived == number:
            driver.send_signal(signal.SIGKILL)
            done.set()

    cluster.api.faults.append(fault)
    ended = asyncio.create_task(asyncio.to_thread(driver.wait))
    await asyncio.wait([ended, asyncio.create_task(done.wait())], return_when=asyncio.FIRST_COMPLETED)
    await ended
    cluster.api.faults.remove(fault)
    for pipe in (driver.stdout, driver.stderr):
        assert pipe is not None
        pipe.close()


async def test_runs_survive_a_temporary_cluster_outage(fake_cluster: FakeCluster) -> None:
    api = fake_cluster.api
    fake_cluster.play = lambda pod: Acting(seconds=0.2, output=(b"said\n",))
    config = await fake_cluster.config()
    async with KubernetesBackend() as backend:
        runs = [await backend.submit(fake_cluster.job(config)) for _ in range(5)]
        refused = 0

        def away(request: web.Request) -> web.Response | None:
            nonlocal refused
            refused += 1
            if refused > 12:
                api.faults.clear()
            return ApiFailure(503, "ServiceUnavailable", "the server is starting").response()

        api.faults.append(away)
        api.drop_streams()
        assert await asyncio.gather(*(run.wait() for run in runs)) == [True] * 5
        assert [[line async for line in run.logs()] for run in runs] == [["said"]] * 5

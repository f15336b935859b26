"""The kubectl commands of the documentation, run on the Jobs of mlfleet; they also check the fake API server."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from components import missing
from components.command_line import mlfleet
from components.fake_kubernetes import FakeCluster
from fakes.kubernetes_node import Acting
from mlfleet._process.process import run_process
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.runs import RunStatus


async def test_kubectl_can_find_and_delete_a_run(
    fake_cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("kubectl") is None:
        missing("kubectl", "apt-get install kubernetes-client")
    monkeypatch.setenv("HOME", str(tmp_path))

    async def kubectl(*args: str) -> str:
        done = await run_process(["kubectl", *args])
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    fake_cluster.play = lambda pod: Acting(seconds=600, output=(b"begun\n",))
    async with KubernetesBackend() as backend:
        run = await backend.submit(fake_cluster.job(await fake_cluster.config(), secrets={"TOKEN": "hush-hush"}))
        await run.started()
        name, mine = run.target.name, f"mlfleet.run-id={run.run_id}"
        assert name in await kubectl("get", "jobs")
        found: dict[str, Any] = json.loads(await kubectl("get", "jobs,pods,secrets", "-l", mine, "-o", "json"))
        assert [each["kind"] for each in found["items"]] == ["Job", "Pod", "Secret"]
        described = await kubectl("describe", "job", name)
        assert "app.kubernetes.io/managed-by=mlfleet" in described
        assert "hush-hush" not in described
        # Without -c: the annotation names the run's container.
        assert await kubectl("logs", f"job/{name}") == await kubectl("logs", "-l", mine) == "begun\n"
        with anyio.fail_after(25):
            await kubectl("delete", "job", name)
        outcome = await run.outcome()
        assert (outcome.status, outcome.reason) == (RunStatus.FAILED, f"the Job {name} was deleted from outside")
        assert await kubectl("get", "jobs", "-o", "name") == ""
        assert fake_cluster.api.of_kind("secrets") == [], "it goes with its Job"


async def test_kubectl_takes_what_a_dry_run_prints(
    fake_cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("kubectl") is None:
        missing("kubectl", "apt-get install kubernetes-client")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hush-hush")
    (tmp_path / "MLproject").write_text("name: demo\nentry_points: {main: {command: 'true'}}\n")
    config = json.dumps({"code-delivery": "none", "image": "busybox:1", "namespace": "team"})
    options = ["--tracking-uri", "http://mlflow.example:5000", "-P", "note=two\nlines", "-c", config]
    arguments = ["run", str(tmp_path), "-b", "kubernetes", "--dry-run", *options]
    done = await anyio.to_thread.run_sync(partial(mlfleet, *arguments))
    printed = tmp_path / "printed.yaml"
    printed.write_text(done.stdout)
    applied = await run_process(
        ["sh", "-c", f"kubectl apply --dry-run=client --validate=false -f - -o json <{printed}"]
    )
    assert applied.returncode == 0, applied.stderr
    items = json.loads(applied.stdout)["items"]
    assert [(each["kind"], each["metadata"]["namespace"]) for each in items] == [("Job", "team"), ("Secret", "team")]

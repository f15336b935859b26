"""A whole run on a fake cluster, through a Fleet and through the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest
import yaml
from click.testing import CliRunner

from components.fake_kubernetes import FakeCluster
from fakes.kubernetes_node import Acting
from mlfleet import Fleet, RunStatus, grid
from mlfleet._cli.program import _cli as cli
from mlfleet.fleet import context_of
from mlfleet.testing import FakeTracking

MLPROJECT = """
name: demo
docker_env: {image: "python:3.11"}
entry_points:
  main:
    parameters: {alpha: float}
    command: "python train.py {alpha}"
"""


def project(folder: Path) -> Path:
    made = folder / "demo"
    made.mkdir()
    (made / "MLproject").write_text(MLPROJECT)
    return made


async def test_fleet_runs_a_project_on_kubernetes(fake_cluster: FakeCluster, tmp_path: Path) -> None:
    folder = await anyio.to_thread.run_sync(project, tmp_path)
    fake_cluster.play = lambda pod: Acting(code=3, output=(b"why it failed\n",))
    tracking = FakeTracking()
    config = {"code-delivery": "configmap", "tracking-uri": "http://mlflow:5000"}
    async with Fleet(tracking=tracking) as fleet:
        run = await fleet.submit(str(folder), parameters={"alpha": 0.5}, backend="kubernetes", backend_config=config)
        outcome = await run.outcome()
    assert (outcome.status, outcome.exit_code, outcome.output) == (RunStatus.FAILED, 3, ("why it failed",))
    (made,) = fake_cluster.api.of_kind("jobs")
    info = tracking.runs[run.run_id]
    assert info.status is RunStatus.FAILED
    assert (info.tags["mlfleet.reason"], info.tags["mlfleet.failure_kind"]) == ("exit code 3", "failure")
    assert info.tags["mlfleet.kubernetes.uid"] == made["metadata"]["uid"]
    assert made["metadata"]["name"] in info.tags["mlfleet.ref"]


async def test_variables_of_the_caller_are_in_the_secret_of_the_run(fake_cluster: FakeCluster, tmp_path: Path) -> None:
    folder = await anyio.to_thread.run_sync(project, tmp_path)
    text = (folder / "MLproject").read_text()
    environment = 'environment: [["SET", "plain"], ["ALSO", "plain"], "COPIED"]'
    (folder / "MLproject").write_text(text.replace('"python:3.11"}', f'"python:3.11", {environment}}}'))
    fake_cluster.play = lambda pod: Acting(code=0)
    tracking = FakeTracking()
    config = {"code-delivery": "configmap", "tracking-uri": "http://mlflow:5000", "keep-jobs": True}
    env = {"SET": "given", "COPIED": "hush-hush"}
    async with Fleet(tracking=tracking) as fleet:
        run = await fleet.submit(
            str(folder), parameters={"alpha": 1}, backend="kubernetes", backend_config=config, env=env
        )
        assert await run.wait()
        (job,) = fake_cluster.api.of_kind("jobs")
    (secret,) = (body for body in fake_cluster.api.bodies if body and body.get("kind") == "Secret")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert secret["stringData"] == env
    assert container["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
    plain = {each["name"]: each["value"] for each in container["env"]}
    assert (plain["ALSO"], plain.keys() & env.keys()) == ("plain", set())
    assert "hush-hush" not in repr([job, tracking.runs[run.run_id]])


@pytest.mark.parametrize("login", ["variables", "file"])
def test_dry_run_prints_manifests_with_the_masked_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, login: str
) -> None:
    folder = project(tmp_path)
    (tmp_path / "kubeconfig").write_text(
        '{"clusters": [], "users": [], "current-context": "c",'
        ' "contexts": [{"name": "c", "context": {"cluster": "c", "namespace": "team"}}]}'
    )
    environ = {"KUBECONFIG": str(tmp_path / "kubeconfig"), "MLFLOW_TRACKING_URI": "http://mlflow.example:5000"}
    if login == "variables":
        environ |= {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "hush-hush"}
    else:
        environ |= {"HOME": str(tmp_path)}
        (tmp_path / ".mlflow").mkdir()
        (tmp_path / ".mlflow" / "credentials").write_text(
            "[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = hush-hush\n"
        )
    arguments = ["run", str(folder), "-P", "alpha=0.5", "-b", "kubernetes", "--dry-run"]
    config = ["-c", '{"code-delivery": "configmap"}']
    done = CliRunner().invoke(cli, [*arguments, *config], env=environ, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "hush-hush" not in done.output
    assert "# project      demo" in done.stdout
    job, secret = yaml.safe_load_all(done.stdout)
    assert job["kind"] == "Job"
    assert job["metadata"]["namespace"] == secret["metadata"]["namespace"] == "team"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert "python train.py 0.5" in container["command"]
    assert {"name": "MLFLOW_TRACKING_USERNAME", "value": "me"} in container["env"]
    assert container["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
    assert secret["stringData"] == {"MLFLOW_TRACKING_PASSWORD": "***"}


async def test_sweep_jobs_are_found_by_their_label(fake_cluster: FakeCluster, tmp_path: Path) -> None:
    folder = await anyio.to_thread.run_sync(project, tmp_path)
    tracking = FakeTracking()
    config = {"code-delivery": "configmap", "tracking-uri": "http://mlflow:5000"}
    async with Fleet(tracking=tracking) as fleet:
        space = grid(alpha=[0.1, 0.2])
        async with fleet.sweep(str(folder), space, backend="kubernetes", backend_config=config) as sweep:
            assert [result.status async for result in sweep] == [RunStatus.FINISHED] * 2
            labels = [job["metadata"]["labels"]["mlfleet.sweep-id"] for job in fake_cluster.api.of_kind("jobs")]
            assert labels == [sweep.run_id] * 2


async def test_run_of_a_suspended_job_is_scheduled_in_mlflow(fake_cluster: FakeCluster, tmp_path: Path) -> None:
    folder = await anyio.to_thread.run_sync(project, tmp_path)
    shown = anyio.Event()

    class Watched(FakeTracking):
        async def update_run(self, run_id: str, status: RunStatus, **options: Any) -> None:
            await super().update_run(run_id, status, **options)
            if status is RunStatus.SCHEDULED:
                shown.set()

    tracking = Watched()
    template = {"spec": {"suspend": True, "template": {"spec": {"containers": [{"name": "main"}]}}}}
    config = {"code-delivery": "configmap", "tracking-uri": "http://mlflow:5000", "job-template": template}
    async with Fleet(tracking=tracking) as fleet:
        context_of(fleet).fleet.scheduled_after = 0.05
        run = await fleet.submit(str(folder), parameters={"alpha": 1}, backend="kubernetes", backend_config=config)
        await shown.wait()
        assert await run.get_status() is RunStatus.SCHEDULED
        (job,) = fake_cluster.api.of_kind("jobs")
        fake_cluster.play = lambda pod: Acting(seconds=0.3)
        key = ("jobs", job["metadata"]["namespace"], job["metadata"]["name"])
        fake_cluster.api.change(key, lambda job: job["spec"].update(suspend=False))
        assert await run.wait() is True
    statuses = tracking.runs[run.run_id].statuses
    assert statuses == [RunStatus.RUNNING, RunStatus.SCHEDULED, RunStatus.RUNNING, RunStatus.FINISHED]

"""Images with a project in them: one push for many runs, with and without a Docker engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from components.docker import DockerEngine
from components.registry import Registry
from mlfleet._project.spec import DockerEnv
from mlfleet.backends.base import DockerRequest, Job
from mlfleet.backends.kubernetes.config import KubernetesConfig
from mlfleet.backends.kubernetes.delivery import Deliveries
from mlfleet.backends.kubernetes.login import Cluster
from mlfleet.errors import SubmitError

# Pulling and running containers on a machine that others use, too.
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "deep").mkdir(parents=True)
    (folder / "MLproject").write_text("name: pushed\n")
    (folder / "deep" / "run.sh").write_text("#!/bin/sh\necho from the layer\n")
    (folder / "deep" / "run.sh").chmod(0o755)
    return folder


@pytest.fixture
def base(docker_engine: DockerEngine, shell_image: str, registry: Registry) -> str:
    return registry.push(docker_engine, shell_image, "team/base:1")


async def test_a_hundred_runs_share_one_push(registry: Registry, base: str, project: Path) -> None:
    said: list[str] = []
    deliveries = Deliveries()
    config = KubernetesConfig(
        cluster=Cluster("c", "default"), namespace="default", repository_uri=f"{registry.host}/team/shared"
    )

    def job(run_id: str) -> Job:
        return Job(
            run_id=run_id,
            experiment_id="0",
            project_name="pushed",
            project_dir=project,
            command="true",
            docker=DockerRequest(env=DockerEnv(image=base)),
            on_progress=said.append,
        )

    api: Any = None  # building an image does not use the cluster
    codes = await asyncio.gather(*(deliveries.deliver(api, job(str(n)), config, base) for n in range(100)))
    assert len({code.image for code in codes}) == 1
    assert sum("of project files" in line for line in said) == 1


async def test_missing_base_image_error_says_how_to_fix_it(registry: Registry, project: Path) -> None:
    config = KubernetesConfig(
        cluster=Cluster("c", "default"), namespace="default", repository_uri=f"{registry.host}/team/x"
    )
    job = Job(run_id="r", experiment_id="0", project_name="pushed", project_dir=project, command="true")
    api: Any = None  # building an image does not use the cluster
    with pytest.raises(SubmitError, match="is in no registry: push it there, or give builder: 'docker'"):
        await Deliveries().deliver(api, job, config, f"{registry.host}/team/none:1")


async def test_docker_engine_builds_and_pushes_the_image(
    docker_engine: DockerEngine, shell_image: str, registry: Registry, project: Path
) -> None:
    config = KubernetesConfig(
        cluster=Cluster("c", "default"),
        namespace="default",
        repository_uri=f"{registry.host}/team/by-engine",
        builder="docker",
    )
    job = Job(run_id="r", experiment_id="0", project_name="pushed", project_dir=project, command="true")
    api: Any = None
    code = await Deliveries().deliver(api, job, config, shell_image)
    assert code.image.startswith(f"{registry.host}/team/by-engine:")
    assert "@sha256:" in code.image
    assert await asyncio.to_thread(run, docker_engine, code.image, "sh", "deep/run.sh") == 0


def run(engine: DockerEngine, image: str, *command: str) -> int:
    """Pull and run an image with the real engine, and return the exit code."""
    engine.call("POST", f"/images/create?fromImage={image}")
    made = engine.call("POST", "/containers/create", {"Image": image, "Cmd": list(command), "Tty": True})
    try:
        engine.call("POST", f"/containers/{made['Id']}/start")
        return int(engine.call("POST", f"/containers/{made['Id']}/wait")["StatusCode"])
    finally:
        engine.remove(made["Id"])

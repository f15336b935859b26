"""The contract on a fake API server whose node runs the containers as processes of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import anyio
import pytest

from components import missing
from fakes.kubernetes import KubernetesApi, serving
from fakes.kubernetes_node import Cluster, Processes, living_in
from mlfleet.backends.base import Job
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.backends.kubernetes.config import parse_config
from mlfleet.testing import BackendContract, Harness


class TestKubernetes(BackendContract):
    @pytest.fixture
    def programs(self, tmp_path: Path) -> str:
        """The PATH of the image."""
        return os.environ["PATH"]

    @pytest.fixture
    async def harness(self, tmp_path: Path, programs: str) -> AsyncIterator[Harness]:
        project = tmp_path / "project"
        project.mkdir()
        (project / "project.txt").write_text("of the project\n")
        api = KubernetesApi()
        node = Processes(api, tmp_path / "node", programs)
        cluster = Cluster(api, node, pace=0.001)
        async with serving(api):
            environ = {"KUBECONFIG": str(api.kubeconfig(tmp_path / "kubeconfig"))}
            given = {"code-delivery": "configmap", "image": "busybox:1"}
            config = await anyio.to_thread.run_sync(parse_config, given, environ)

            def job(run_id: str, command: str, **options: object) -> Job:
                return Job(
                    run_id=run_id,
                    experiment_id="0",
                    project_name="contract",
                    project_dir=project,
                    command=command,
                    output=tmp_path / run_id / "output.log",
                    config=config,
                    **options,  # type: ignore[arg-type]
                )

            async def leftovers(run_id: str) -> Sequence[str]:
                found: list[str] = []
                for pod in api.of_kind("pods"):
                    meta = pod["metadata"]
                    if meta["labels"]["mlfleet.run-id"] != run_id:
                        continue
                    if pod["status"]["phase"] not in ("Succeeded", "Failed"):
                        found.append(f"{meta['name']}: {pod['status']['phase']}")
                    found += [
                        f"process {pid}" for each in node.sessions.get(meta["uid"], ()) for pid in living_in(each)
                    ]
                return found

            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("KUBECONFIG", environ["KUBECONFIG"])
                yield Harness(open=KubernetesBackend, job=job, leftovers=leftovers)
            await cluster.close()


class TestKubernetesBusybox(TestKubernetes):
    """The contract with an image that contains only busybox, without bash."""

    @pytest.fixture
    def programs(self, tmp_path: Path) -> str:
        busybox = shutil.which("busybox")
        if busybox is None:
            missing("busybox", "install busybox-static")
        folder = tmp_path / "programs"
        folder.mkdir()
        subprocess.run([busybox, "--install", "-s", str(folder)], check=True)
        return str(folder)

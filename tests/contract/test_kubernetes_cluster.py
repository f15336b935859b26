"""The contract on a real cluster: ``MLFLEET_TEST_KUBECONFIG=… pytest -m cluster``.

It works in a namespace of its own, with the image of ``MLFLEET_TEST_IMAGE`` (default ``busybox``), which needs sh, tar
and gzip. ``MLFLEET_TEST_CONTEXT`` names a context other than the current one.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlfleet._paths import run_folder
from mlfleet.backends.base import Job
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.backends.kubernetes.client import ApiError, KubernetesClient
from mlfleet.backends.kubernetes.config import KubernetesConfig, StartTimeouts, parse_config
from mlfleet.testing import BackendContract, Harness

GIVEN = os.environ.get("MLFLEET_TEST_KUBECONFIG", "")
IMAGE = os.environ.get("MLFLEET_TEST_IMAGE", "busybox")
CONTEXT = os.environ.get("MLFLEET_TEST_CONTEXT")


@dataclass(frozen=True)
class Place:
    """A namespace of its own on the cluster.

    Attributes:
        api: A client.
        given: The ``backend_config``.
        config: The same, read.
        project: The folder of the project.
        folder: The folder for files.
    """

    api: KubernetesClient
    given: Mapping[str, Any]
    config: KubernetesConfig
    project: Path
    folder: Path

    def output(self, run_id: str) -> Path:
        """Return the file for the output of a run: where other processes look for it."""
        return run_folder(run_id) / "output.log"

    def job(self, run_id: str, command: str, /, **given: Any) -> Job:
        """Return a job. `given` are more keys of ``backend_config``; with any, this call blocks."""
        environ = {"KUBECONFIG": GIVEN, "HOME": str(self.folder)}
        config = parse_config({**self.given, **given}, environ) if given else self.config
        return Job(
            run_id=run_id,
            experiment_id="0",
            project_name="contract",
            project_dir=self.project,
            command=command,
            output=self.output(run_id),
            config=replace(config, timeouts=StartTimeouts(image=120, config=60, unschedulable=120)),
        )


@pytest.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    project = tmp_path / "project"
    project.mkdir()
    (project / "project.txt").write_text("of the project\n")
    monkeypatch.setenv("KUBECONFIG", GIVEN)
    namespace = f"mlfleet-test-{uuid.uuid4().hex[:8]}"
    given = {"code-delivery": "configmap", "image": IMAGE, "namespace": namespace, "kube-context": CONTEXT}
    config = await anyio.to_thread.run_sync(parse_config, given, {"KUBECONFIG": GIVEN, "HOME": str(tmp_path)})
    async with KubernetesClient(config.cluster) as api:
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
        await api.call("making a namespace", "POST", "/api/v1/namespaces", body=body)
        await _service_account(api, namespace)
        try:
            yield Place(api, given, config, project, tmp_path)
        finally:
            with anyio.CancelScope(shield=True):
                await api.call("removing a namespace", "DELETE", f"/api/v1/namespaces/{namespace}")


# A pod takes seconds to start and to end, and sixteen at once on one node some more; its first image must be pulled.
@pytest.mark.timeout(300)
@pytest.mark.cluster
@pytest.mark.skipif(not GIVEN, reason="no real cluster: set MLFLEET_TEST_KUBECONFIG")
class TestKubernetesCluster(BackendContract):
    @pytest.fixture
    async def harness(self, place: Place) -> Harness:
        def job(run_id: str, command: str, **options: object) -> Job:
            return replace(place.job(run_id, command), **options)  # type: ignore[arg-type]

        async def leftovers(run_id: str) -> Sequence[str]:
            path = f"/api/v1/namespaces/{place.given['namespace']}/pods"
            answer = await place.api.call("listing", "GET", path, params={"labelSelector": f"mlfleet.run-id={run_id}"})
            found = [(pod["metadata"]["name"], pod["status"].get("phase")) for pod in answer["items"]]
            return [f"{name}: {phase}" for name, phase in found if phase not in ("Succeeded", "Failed")]

        # A node needs a second or two to report that a pod runs, and that it has ended.
        return Harness(open=KubernetesBackend, job=job, leftovers=leftovers, cancel_grace=1.0, lag=3.0)


async def _service_account(api: KubernetesClient, namespace: str) -> None:
    """Wait for the service account: a new namespace accepts no pods before it has one."""
    for _ in range(100):
        try:
            await api.call("looking", "GET", f"/api/v1/namespaces/{namespace}/serviceaccounts/default")
        except ApiError as error:
            if error.status != 404:
                raise
            await anyio.sleep(0.2)
        else:
            return

"""A fake cluster for tests, with the backend pointed at it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest

from fakes.kubernetes import KubernetesApi, serving
from fakes.kubernetes_node import Acted, Acting, Cluster
from mlfleet.backends.base import Job
from mlfleet.backends.kubernetes.config import KubernetesConfig, parse_config

__all__ = ["FakeCluster", "fake_cluster"]


@dataclass
class FakeCluster:
    """A cluster that acts as if containers ran.

    Attributes:
        api: The API server.
        node: The controllers and the kubelet.
        created: The names of all Jobs that were ever created.
        folder: The folder for files.
        play: A function that returns the behaviour of a pod's run container; tests replace it.
        others: The behaviour of other containers, by their names.
    """

    api: KubernetesApi
    folder: Path
    play: Callable[[Mapping[str, Any]], Acting]
    others: dict[str, Acting] = field(default_factory=dict)
    created: list[str] = field(default_factory=list)
    node: Cluster = field(init=False)

    async def config(self, **given: Any) -> KubernetesConfig:
        """Return a ``backend_config`` with the given keys; an underscore stands for a hyphen."""
        keys = {"code-delivery": "none", "image": "busybox:1"}
        keys.update({name.replace("_", "-"): value for name, value in given.items()})
        environ = {"KUBECONFIG": str(self.folder / "kubeconfig")}
        return await anyio.to_thread.run_sync(parse_config, keys, environ)

    def job(self, config: KubernetesConfig, command: str = "true", **options: Any) -> Job:
        run_id = options.pop("run_id", None) or uuid.uuid4().hex
        return Job(
            run_id=run_id,
            experiment_id="0",
            project_name="Some_Project",
            project_dir=self.folder,
            command=command,
            output=self.folder / run_id / "output.log",
            config=config,
            **options,
        )


@pytest.fixture
async def fake_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeCluster]:
    async with open_fake(tmp_path) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield cluster


@asynccontextmanager
async def open_fake(folder: Path, *, pace: float = 0.0) -> AsyncIterator[FakeCluster]:
    api = KubernetesApi()
    cluster = FakeCluster(api, folder, lambda pod: Acting())
    cluster.node = Cluster(api, Acted(lambda pod: cluster.play(pod), cluster.others), pace=pace)

    def note(kind: str, key: tuple[str, str, str], value: object) -> None:
        if (kind, key[0]) == ("ADDED", "jobs"):
            cluster.created.append(key[2])

    api.on_change.append(note)
    async with serving(api):
        await anyio.to_thread.run_sync(api.kubeconfig, folder / "kubeconfig")
        try:
            yield cluster
        finally:
            await cluster.node.close()

"""The project's code on its way to the cluster, by the way that the configuration names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import anyio

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._oci.references import parse_reference
from mlfleet._project.content import content_hash
from mlfleet._project.git import Checkouts
from mlfleet.backends.base import Job
from mlfleet.backends.kubernetes.client import KubernetesClient
from mlfleet.backends.kubernetes.config import CodeDelivery, KubernetesConfig
from mlfleet.backends.kubernetes.delivery import ConfigMaps, configmap_code, git_code
from mlfleet.backends.kubernetes.manifest import Code
from mlfleet.backends.kubernetes.source import GitSource, git_source

__all__ = ["Deliveries", "previewed"]


class Deliveries:
    """Each content is brought to a place once, for all runs that need it."""

    def __init__(self) -> None:
        self._configmaps = ConfigMaps()
        self._sources: SingleFlight[Path, GitSource] = (
            SingleFlight()
        )  # looked at anew for who comes later: files change
        self._checkouts = Checkouts()
        self._pushes: SingleFlight[tuple[str, ...], str] = SingleFlight(keep=True)

    async def deliver(self, client: KubernetesClient, job: Job, config: KubernetesConfig, image: str) -> Code:
        """Bring the code there.

        Args:
            client: of the cluster.
            job: the run.
            config: of its backend.
            image: to run in, or to build on.

        Raises:
            MlfleetError: it cannot be brought there; the text says why.
        """
        match config.delivery:
            case CodeDelivery.NONE:
                return Code(image=image)
            case CodeDelivery.CONFIGMAP:
                return configmap_code(image, await self._configmaps.put(client, job, config.namespace))
            case CodeDelivery.GIT:
                folder = job.project_dir
                return _git(image, config, await self._sources(folder, partial(git_source, self._checkouts, folder)))
            case CodeDelivery.IMAGE:
                return Code(image=await self._push(job, config, image))

    async def _push(self, job: Job, config: KubernetesConfig, base: str) -> str:
        digest = await content_hash(job.project_dir)
        key = (config.builder, base, str(config.repository_uri), config.platform, digest)
        push = await anyio.to_thread.run_sync(_imported)
        return await self._pushes(key, partial(push, job, config, base))


def _imported() -> Callable[[Job, KubernetesConfig, str], Awaitable[str]]:
    """Only where it is wanted: the clients of registries and of Docker are a good part of all that is in memory."""
    from mlfleet.backends.kubernetes.pushing import push

    return push


def previewed(job: Job, config: KubernetesConfig, image: str) -> Code:
    """The same as far as it is known before anything is made."""
    match config.delivery:
        case CodeDelivery.NONE:
            return Code(image=image)
        case CodeDelivery.CONFIGMAP:
            return configmap_code(image, "mlfleet-code-of-the-run")
        case CodeDelivery.GIT:
            return _git(image, config, GitSource("(of the project)", job.commit or "(of the project)", "."))
        case CodeDelivery.IMAGE:
            return Code(image=f"{parse_reference(config.repository_uri or '').name}:of-the-run")


def _git(image: str, config: KubernetesConfig, source: GitSource) -> Code:
    return git_code(image, config, url=source.url, commit=source.commit, folder=source.inside)

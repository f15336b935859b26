"""What all runs of a cluster share: its connections, and the watch of each namespace for as long as it has runs."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass

import anyio

from mlfleet.backends.kubernetes.client import Api
from mlfleet.backends.kubernetes.cluster import Cluster
from mlfleet.backends.kubernetes.watch import NamespaceWatch

__all__ = ["Connections", "Shared"]


@dataclass(slots=True)
class Shared:
    """A watch, and how many use it.

    Attributes:
        owner: of it.
        api: of its cluster.
        watch: of its namespace.
        key: by which it is shared.
        users: counted.
    """

    owner: Connections
    api: Api
    watch: NamespaceWatch
    key: tuple[Cluster, str]
    users: int = 0

    async def release(self) -> None:
        """Give it back."""
        await self.owner.release(self)


class Connections:
    """Opens each at its first use. The last run of a namespace closes its watch; connections stay for the next."""

    def __init__(self) -> None:
        self._apis: dict[Cluster, Api] = {}
        self._watches: dict[tuple[Cluster, str], Shared] = {}
        self._opened = AsyncExitStack()
        self._lock = asyncio.Lock()

    async def api(self, cluster: Cluster) -> Api:
        """The connections to a cluster.

        Raises:
            BackendError: the credentials cannot be had.
        """
        async with self._lock:
            return await self._api(cluster)

    async def _api(self, cluster: Cluster) -> Api:
        if cluster not in self._apis:
            self._apis[cluster] = await self._opened.enter_async_context(Api(cluster))
        return self._apis[cluster]

    async def watch(self, cluster: Cluster, namespace: str) -> Shared:
        """The watch of a namespace, to be given back by its `release`.

        Raises:
            BackendError: the cluster cannot be reached, or it is not allowed.
        """
        async with self._lock:
            key = (cluster, namespace)
            shared = self._watches.get(key)
            if shared is None or shared.watch.failed is not None:
                api = await self._api(cluster)
                shared = Shared(self, api, await NamespaceWatch(api, namespace).__aenter__(), key)
                self._watches[key] = shared
            shared.users += 1
            return shared

    async def release(self, shared: Shared) -> None:
        """Give a watch back."""
        with anyio.CancelScope(shield=True):
            async with self._lock:
                shared.users -= 1
                if shared.users == 0:
                    if self._watches.get(shared.key) is shared:
                        del self._watches[shared.key]
                    await shared.watch.__aexit__(None, None, None)

    async def close(self) -> None:
        """Close all. Every watch has been given back by then."""
        await self._opened.aclose()

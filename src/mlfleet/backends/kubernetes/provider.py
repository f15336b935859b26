"""The login providers that old kubeconfigs have in place of plugins: ``auth-provider`` with ``oidc`` or ``gcp``."""

from __future__ import annotations

import asyncio

import anyio

from mlfleet.backends.kubernetes.cluster import Cluster
from mlfleet.errors import BackendError

__all__ = ["ask_provider"]

_TIME = 60.0  # seconds


def ask_provider(cluster: Cluster, name: str) -> str:
    """The ``Authorization`` for a context whose user has a provider. Blocking.

    What the provider gives for the next time is kept in the kubeconfig: it gives each refresh token once.

    Args:
        cluster: names the context.
        name: of the provider.

    Raises:
        BackendError: nobody knows it.
        TimeoutError: it gave nothing in time.
    """
    if name not in ("gcp", "oidc"):
        text = f"its auth-provider {name!r} is not known: use the credential plugin of the provider"
        raise BackendError(text, backend="kubernetes")
    # Only now: the library is large, and most kubeconfigs have no provider.
    from kubernetes_asyncio.config.kube_config import KubeConfigLoader, KubeConfigMerger

    merger = KubeConfigMerger(cluster.paths)
    loader = KubeConfigLoader(
        config_dict=merger.config,
        active_context=cluster.context,
        config_base_path=None,
        config_persister=merger.save_changes,
    )

    async def ask() -> None:
        with anyio.fail_after(_TIME):
            # Only the token: what has the rest, too, would leave a copy of each certificate and key among files.
            await loader._load_authentication()

    asyncio.run(ask())
    return str(loader.token)

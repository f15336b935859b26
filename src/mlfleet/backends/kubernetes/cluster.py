"""Which cluster a run goes to: a context of the kubeconfig, or the cluster that this process is in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kubernetes_asyncio.config.kube_config import KubeConfigMerger

from mlfleet.errors import BackendError, UsageError

__all__ = ["IN_CLUSTER", "SERVICE_ACCOUNT", "Cluster", "find_cluster", "kubeconfig"]

IN_CLUSTER = "(in-cluster)"
"""Stands for the name of a context where the pod's own service account is used."""
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster, and who we are there.

    Attributes:
        context: of the kubeconfig; `IN_CLUSTER` where there is none.
        namespace: that the context names, else ``default``.
        paths: of the kubeconfig files, as in ``KUBECONFIG``.
    """

    context: str
    namespace: str
    paths: str = ""


def find_cluster(context: str | None, environ: Mapping[str, str], account: Path = SERVICE_ACCOUNT) -> Cluster:
    """The cluster of that context. Blocking: reads files.

    Args:
        context: of the kubeconfig; None is its current one, or the cluster around this process if there is no
            kubeconfig.
        environ: ``KUBECONFIG`` and ``KUBERNETES_SERVICE_HOST`` are looked at.
        account: the folder of the pod's service account.

    Raises:
        UsageError: there is no such context, or no cluster at all.
        BackendError: the kubeconfig cannot be read.
    """
    paths = environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    config = kubeconfig(paths)
    if context is None and not config:
        return _around_us(environ, account, paths)
    contexts = {str(each["name"]): each.get("context") or {} for each in config.get("contexts") or ()}
    name = context or config.get("current-context") or ""
    if name not in contexts:
        known = f"it has {', '.join(sorted(contexts))}" if contexts else "it has none"
        subject = f"no context {name!r}" if name else "no current context"
        hint = "give one as kube-context" if not name else "kube-context must be one of them"
        raise UsageError(f"the kubeconfig ({paths}) has {subject}; {known}: {hint}")
    return Cluster(name, str(contexts[name].get("namespace") or "default"), paths)


def kubeconfig(paths: str) -> Mapping[str, Any]:
    """The files of a kubeconfig merged, as kubectl does; empty if there are none. Blocking."""
    versions: list[tuple[str, int]] = []
    for path in paths.split(os.pathsep):
        try:
            versions.append((path, Path(path).expanduser().stat().st_mtime_ns))
        except OSError:
            continue
    return _merged(tuple(versions)) if versions else {}


@lru_cache(maxsize=8)
def _merged(versions: tuple[tuple[str, int], ...]) -> Mapping[str, Any]:
    paths = os.pathsep.join(path for path, _ in versions)
    try:
        merged = KubeConfigMerger(paths).config
        contexts = [_plain(each) for each in merged.value.get("contexts") or ()]
        current = merged.value.get("current-context")
    except Exception as error:
        # Whatever a damaged file makes the library stumble over.
        text = f"the kubeconfig {paths} cannot be read: {type(error).__name__}: {error}"
        raise BackendError(text, backend="kubernetes") from error
    return {"contexts": contexts, "current-context": current}


def _plain(node: Any) -> Mapping[str, Any]:
    value: Mapping[str, Any] = getattr(node, "value", node)
    return value


def _around_us(environ: Mapping[str, str], account: Path, paths: str) -> Cluster:
    if not environ.get("KUBERNETES_SERVICE_HOST") or not (account / "token").exists():
        raise UsageError(
            f"there is no cluster: no kubeconfig ({paths}), and this process is in no pod with a service account."
            " Set KUBECONFIG, or make one with 'kind create cluster' or your provider's command line"
        )
    try:
        namespace = (account / "namespace").read_text().strip()
    except OSError:
        namespace = ""
    return Cluster(IN_CLUSTER, namespace or "default")

"""Which cluster a run goes to: a context of the kubeconfig, or the cluster that this process is in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mlfleet.backends.kubernetes.kubeconfig import Kubeconfig, kubeconfig_files, read_kubeconfig
from mlfleet.errors import UsageError

__all__ = ["IN_CLUSTER", "SERVICE_ACCOUNT", "Cluster", "find_cluster"]

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
    files = kubeconfig_files(paths)
    if context is None and not files:
        return _around_us(environ, account, paths)
    config = _read(paths, tuple(file.stat().st_mtime_ns for file in files))
    name = context or config.current
    if name not in config.contexts:
        known = f"it has {', '.join(sorted(config.contexts))}" if config.contexts else "it has none"
        subject = f"no context {name!r}" if name else "no current context"
        hint = "give one as kube-context" if not name else "kube-context must be one of them"
        raise UsageError(f"the kubeconfig ({paths}) has {subject}; {known}: {hint}")
    return Cluster(name, str(config.contexts[name].value.get("namespace") or "default"), paths)


@lru_cache(maxsize=8)
def _read(paths: str, changed: tuple[int, ...]) -> Kubeconfig:
    """Once, not for each of hundreds of runs; again when a file has changed."""
    return read_kubeconfig(paths)


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

"""The cluster that a run goes to, and the login there: found and read here, carried out by kubernetes-asyncio.

kubernetes-asyncio loads certificates, runs credential plugins and refreshes tokens. Three things are arranged before it
is asked, because its loader lacks them (version 36.1): the files of ``KUBECONFIG`` are merged as kubectl does (the
first ``current-context`` counts, and relative paths start from the folder of their own file); a credential plugin gets
no terminal as its standard input; and ``NO_PROXY`` may hold CIDRs.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import json
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlfleet._concurrency.cancellation import wait_done
from mlfleet._concurrency.threads import FILES, LOGINS
from mlfleet._hosts import is_loopback
from mlfleet._run_log import get_logger
from mlfleet._text.masking import mask
from mlfleet.errors import BackendError, UsageError

__all__ = [
    "CERTIFICATES",
    "IN_CLUSTER",
    "SERVICE_ACCOUNT",
    "Cluster",
    "Login",
    "find_cluster",
    "load_login",
    "proxy_for",
]

_log = get_logger("mlfleet.kubernetes")

IN_CLUSTER = "(in-cluster)"
"""The name of the context when the service account of this process's own pod is used."""
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

_PATHS = ("certificate-authority", "client-certificate", "client-key", "tokenFile")
_PLUGIN_TIME = 120.0  # seconds; a plugin may ask a person to log in with a browser
_SHORTEST = 1.0  # seconds between two logins that an expiry asks for
_PLUGIN_MARKER = "MLFLEET_LOGIN"
# kubernetes-asyncio lets the plugin inherit standard input, and tells it that it may ask questions there. The shell
# gives it neither, and takes the program and its arguments as they are.
_WITHOUT_TERMINAL = 'export KUBERNETES_EXEC_INFO="$MLFLEET_EXEC_INFO"; exec "$0" "$@" </dev/null'
_PLUGIN_FAILED = re.compile(r"exec: process returned (-?\d+)(?:\. )?(.*)", re.S)
_CLUSTER_INFO = ("server", "tls-server-name", "insecure-skip-tls-verify", "certificate-authority-data", "proxy-url")


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster, and the user that requests to it are made as.

    Attributes:
        context: The context of the kubeconfig; `IN_CLUSTER` in a pod without a kubeconfig.
        namespace: The namespace that the context names; ``default`` if it names none.
        paths: The kubeconfig files, as in ``KUBECONFIG``.
    """

    context: str
    namespace: str
    paths: str = ""


@dataclass(frozen=True, slots=True)
class Login:
    """A configuration of kubernetes-asyncio, ready for clients.

    Attributes:
        configuration: The ``kubernetes_asyncio.client.Configuration``.
        connection_key: A hash of everything but the token. Clients can be kept while it stays the same.
        refresh_at: The time on the monotonic clock from which a new login is needed; None: only when the server refuses
            this one.
    """

    configuration: Any = field(repr=False)
    connection_key: str = field(repr=False)
    refresh_at: float | None = None

    @property
    def token(self) -> str:
        """The value of the ``Authorization`` header; empty where a client certificate is the whole login."""
        return str(self.configuration.api_key.get("BearerToken", ""))

    @property
    def is_due(self) -> bool:
        """True when the login must be loaded again."""
        return self.refresh_at is not None and time.monotonic() >= self.refresh_at


# ---- which cluster ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kubeconfig:
    """The merged files of a kubeconfig, with absolute paths.

    Attributes:
        contexts: The contexts by name.
        clusters: The clusters by name.
        users: The users by name.
        current: The name of the current context; empty if there is none.
    """

    contexts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    clusters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    users: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    current: str = ""


def find_cluster(context: str | None, environ: Mapping[str, str], account: Path = SERVICE_ACCOUNT) -> Cluster:
    """Return the cluster of a context. Blocking: reads files, but asks no server and imports no Kubernetes client.

    Args:
        context: A context of the kubeconfig; None: its current one, or the cluster around this process if there is no
            kubeconfig.
        environ: The variables ``KUBECONFIG`` and ``KUBERNETES_SERVICE_HOST``.
        account: The folder of the pod's service account.

    Raises:
        UsageError: There is no such context, or no cluster at all.
        BackendError: The kubeconfig cannot be read.
    """
    paths = environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    if context is None and not _existing(paths):
        return _around_us(environ, account, paths)
    config = _read_unless_known(paths)
    name = context or config.current
    if name not in config.contexts:
        known = f"it has {', '.join(sorted(config.contexts))}" if config.contexts else "it has none"
        subject = f"no context {name!r}" if name else "no current context"
        hint = "give one as kube-context" if not name else "kube-context must be one of them"
        raise UsageError(f"the kubeconfig ({paths}) has {subject}; {known}: {hint}")
    return Cluster(name, str(config.contexts[name].get("namespace") or "default"), paths)


def _around_us(environ: Mapping[str, str], account: Path, paths: str) -> Cluster:
    if not environ.get("KUBERNETES_SERVICE_HOST") or not (account / "token").exists():
        raise UsageError(
            f"there is no cluster: no kubeconfig ({paths}), and this process does not run in a pod with a service"
            " account. Set KUBECONFIG, or make one with 'kind create cluster' or your provider's command line"
        )
    try:
        namespace = (account / "namespace").read_text().strip()
    except OSError:
        namespace = ""
    return Cluster(IN_CLUSTER, namespace or "default")


def _existing(paths: str) -> list[Path]:
    files = [Path(path).expanduser() for path in paths.split(os.pathsep) if path]
    return [file for file in files if file.exists()]


def _read_unless_known(paths: str) -> _Kubeconfig:
    return _read_version(paths, tuple(file.stat().st_mtime_ns for file in _existing(paths)))


@lru_cache(maxsize=8)
def _read_version(paths: str, changed: tuple[int, ...]) -> _Kubeconfig:
    """Read the files once for hundreds of runs, and again when one has changed."""
    return _read(paths)


def _read(paths: str) -> _Kubeconfig:
    # https://kubernetes.io/docs/concepts/configuration/organize-cluster-access-kubeconfig/#merging-kubeconfig-files
    import yaml

    found: dict[str, dict[str, Mapping[str, Any]]] = {"context": {}, "cluster": {}, "user": {}}
    current = ""
    for path in _existing(paths):
        try:
            with path.open("rb") as file:
                config = yaml.safe_load(file) or {}
            for kind, known in found.items():
                folder = path.absolute().parent
                for each in config.get(f"{kind}s") or ():
                    known.setdefault(str(each["name"]), _with_absolute_paths(each.get(kind) or {}, folder))
            current = current or str(config.get("current-context") or "")
        except Exception as error:
            # A damaged file may raise anything in the parser or above.
            text = f"the kubeconfig {path} cannot be read: {type(error).__name__}: {error}"
            raise BackendError(text, backend="kubernetes") from error
    return _Kubeconfig(found["context"], found["cluster"], found["user"], current)


def _with_absolute_paths(entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    made = dict(entry)
    for key in _PATHS:
        if made.get(key):
            made[key] = str(folder / str(made[key]))
    plugin = made.get("exec")
    if plugin and "/" in str(plugin["command"]):
        made["exec"] = {**plugin, "command": str(folder / str(plugin["command"]))}
    return made


# ---- logging in ------------------------------------------------------------------------------------------------------


class _CertificateFolder:
    """The private folder of this process into which kubernetes-asyncio writes inline certificates and keys.

    One for all clusters: the library remembers for the life of the process which file holds which content
    (``kube_config._temp_files``), and has no public way to forget it. The folder is removed, and the files forgotten,
    when the last cluster is closed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._path: Path | None = None

    def acquire(self) -> Path:
        """Return the folder, which has mode 0700; `release` it. Blocking."""
        with self._lock:
            if self._path is None:
                self._path = Path(tempfile.mkdtemp(prefix="mlfleet-kubernetes-"))
            self._users += 1
            return self._path

    def release(self) -> None:
        """Give the folder back. Blocking."""
        with self._lock:
            self._users -= 1
            if self._users or self._path is None:
                return
            path, self._path = self._path, None
            self._forget(path)
            shutil.rmtree(path, ignore_errors=True)

    def _forget(self, folder: Path) -> None:
        from kubernetes_asyncio.config import kube_config

        files: dict[str, str] = getattr(kube_config, "_temp_files", {})
        for content, name in tuple(files.items()):
            if Path(name).parent == folder:
                del files[content]


CERTIFICATES = _CertificateFolder()


async def load_login(cluster: Cluster, folder: Path, *, account: Path = SERVICE_ACCOUNT, reread: float = 60.0) -> Login:
    """Log in to a cluster. A cancelled call ends the credential plugin.

    Args:
        cluster: The cluster.
        folder: The private folder for inline certificates.
        account: The folder of the pod's service account.
        reread: Seconds after which a token file is read again: the kubelet, for one, renews it in place.

    Raises:
        BackendError: The login failed; the text says why.
    """
    marker = uuid.uuid4().hex
    loading = asyncio.ensure_future(LOGINS.run(partial(_load, cluster, folder, account, reread, marker)))
    try:
        await asyncio.wait([loading], timeout=_PLUGIN_TIME)
        if not loading.done():
            await FILES.run(partial(_end_plugin, marker))
            await wait_done(loading)
            loading.exception()
            text = f"the login of the context {cluster.context!r} gave nothing within {_PLUGIN_TIME:g} s"
            raise BackendError(text, backend="kubernetes")
    except asyncio.CancelledError:
        await FILES.finish(partial(_end_plugin, marker))
        await wait_done(loading)
        loading.exception()
        raise
    return loading.result()


def _load(cluster: Cluster, folder: Path, account: Path, reread: float, marker: str) -> Login:
    """Load the configuration. Blocking: imports kubernetes-asyncio (800 modules), reads files, runs plugins."""
    from kubernetes_asyncio.client import Configuration

    configuration = Configuration()
    # Many clusters' authorities lack extensions that Python 3.13 asks for by default.
    configuration.disable_strict_ssl_verification = True
    refresh_at = None
    try:
        if cluster.context == IN_CLUSTER:
            refresh_at = _load_in_cluster(configuration, account, reread)
        else:
            config = _read(cluster.paths)
            # Its coroutine blocks in between, on files; so it gets a loop of its own in this thread.
            refresh_at = asyncio.run(_load_context(configuration, cluster, config, folder, reread, marker))
            if not configuration.proxy:
                configuration.proxy = proxy_for(configuration.host, os.environ)
        if token := configuration.api_key.get("BearerToken"):
            # Token files may end with a newline, which a header must not have.
            configuration.api_key["BearerToken"] = token.strip()
        return Login(configuration, _connection_key(configuration), refresh_at)
    except BackendError:
        raise
    except Exception as error:
        # The libraries of the providers raise anything.
        said = mask(str(error) or type(error).__name__, ())[:500]
        text = f"the login of the context {cluster.context!r} failed: {said}"
        raise BackendError(text, backend="kubernetes") from error


def _load_in_cluster(configuration: Any, account: Path, reread: float) -> float:
    from kubernetes_asyncio.config import load_incluster_config

    # Its own refresh would read the token file on the event loop.
    load_incluster_config(
        configuration,
        try_refresh_token=False,
        token_filename=str(account / "token"),
        cert_filename=str(account / "ca.crt"),
    )
    return time.monotonic() + reread


async def _load_context(
    configuration: Any, cluster: Cluster, config: _Kubeconfig, folder: Path, reread: float, marker: str
) -> float | None:
    """Load a context of the kubeconfig.

    Returns:
        The time on the monotonic clock from which the login must be loaded again; None: when it is refused.
    """
    from kubernetes_asyncio.config import load_kube_config, load_kube_config_from_dict

    context = _entry(config.contexts, "context", cluster.context)
    server = _entry(config.clusters, "cluster", str(context.get("cluster") or ""))
    if not server.get("server"):
        raise BackendError(f"the cluster of the context {cluster.context!r} has no server", backend="kubernetes")
    user = dict(config.users.get(str(context.get("user") or ""), {}))
    provider = user.get("auth-provider")
    if provider:
        if provider.get("name") not in ("gcp", "oidc"):
            text = f"its auth-provider {provider.get('name')!r} is not known: use the credential plugin of the provider"
            raise BackendError(text, backend="kubernetes")
        # From the files: a provider gives each refresh token once, and the next one is kept there.
        await load_kube_config(
            config_file=cluster.paths,
            context=cluster.context,
            client_configuration=configuration,
            temp_file_path=str(folder),
        )
        return None
    plugin = user.get("exec")
    if plugin:
        user["exec"] = _adapt_plugin(plugin, server, cluster.context, marker)
    single = {
        "current-context": "it",
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        "clusters": [{"name": "it", "cluster": dict(server)}],
        "users": [{"name": "it", "user": user}],
    }
    try:
        loader = await load_kube_config_from_dict(
            single, context="it", client_configuration=configuration, temp_file_path=str(folder)
        )
    except Exception as error:
        if plugin:
            raise _plugin_error(plugin, cluster.context, error) from error
        raise
    expiry = getattr(loader, "exec_plugin_expiry", None)
    if expiry is not None:
        seconds: float = (expiry.timestamp() - time.time()) * 0.8
        return time.monotonic() + max(_SHORTEST, seconds)
    return time.monotonic() + reread if "tokenFile" in user and not user.get("token") else None


def _entry(entries: Mapping[str, Mapping[str, Any]], kind: str, name: str) -> Mapping[str, Any]:
    try:
        return entries[name]
    except KeyError:
        raise BackendError(f"the kubeconfig has no {kind} {name!r}", backend="kubernetes") from None


def _connection_key(configuration: Any) -> str:
    names = (configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file)
    # Contents, not names: the kubelet and cert-manager renew certificates in place.
    contents = [Path(name).read_bytes() if name else None for name in names]
    rest = (configuration.host, configuration.verify_ssl, configuration.tls_server_name, configuration.proxy)
    return hashlib.sha256(repr((contents, rest)).encode()).hexdigest()


# ---- credential plugins ----------------------------------------------------------------------------------------------
# https://kubernetes.io/docs/reference/access-authn-authz/authentication/#client-go-credential-plugins


def _adapt_plugin(plugin: Mapping[str, Any], server: Mapping[str, Any], context: str, marker: str) -> dict[str, Any]:
    """Return the plugin's entry for kubernetes-asyncio, such that the plugin runs without a terminal.

    Args:
        plugin: The ``exec`` entry of the user.
        server: The cluster's entry, for plugins with ``provideClusterInfo``.
        context: The name of the context, for errors.
        marker: The value of a variable by which `_end_plugin` finds the process.
    """
    command = str(plugin["command"])
    if shutil.which(command) is None:
        hint = str(plugin.get("installHint") or "").strip()
        text = (
            f"the credential plugin {command!r} of the context {context!r} cannot be started: there is no such program"
        )
        raise BackendError(f"{text}. {hint}" if hint else text, backend="kubernetes")
    spec: dict[str, Any] = {"interactive": False}
    if plugin.get("provideClusterInfo"):
        spec["cluster"] = _cluster_info(server)
    info = json.dumps({"apiVersion": plugin["apiVersion"], "kind": "ExecCredential", "spec": spec})
    variables = {str(each["name"]): str(each["value"]) for each in plugin.get("env") or ()}
    variables |= {"MLFLEET_EXEC_INFO": info, _PLUGIN_MARKER: marker}
    return {
        "apiVersion": plugin["apiVersion"],
        "command": "sh",
        "args": ["-c", _WITHOUT_TERMINAL, command, *(str(each) for each in plugin.get("args") or ())],
        "env": [{"name": name, "value": value} for name, value in variables.items()],
    }


def _cluster_info(server: Mapping[str, Any]) -> dict[str, Any]:
    info = {name: server[name] for name in _CLUSTER_INFO if name in server}
    if "certificate-authority" in server and "certificate-authority-data" not in server:
        authority = Path(server["certificate-authority"]).read_bytes()
        info["certificate-authority-data"] = base64.b64encode(authority).decode()
    for each in server.get("extensions") or ():
        if each.get("name") == "client.authentication.k8s.io/exec":
            info["config"] = each.get("extension")
    return info


def _plugin_error(plugin: Mapping[str, Any], context: str, error: Exception) -> BackendError:
    name = f"the credential plugin {str(plugin['command'])!r} of the context {context!r}"
    failed = _PLUGIN_FAILED.match(str(error))
    if failed:
        return BackendError(f"{name} failed (exit code {failed[1]}): {failed[2].strip()[-500:]}", backend="kubernetes")
    return BackendError(f"{name} gave no usable ExecCredential: {str(error)[:500]}", backend="kubernetes")


def _end_plugin(marker: str) -> None:
    """Kill the plugin of a login, found by a variable since kubernetes-asyncio hides its process. Blocking."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            if child.environ().get(_PLUGIN_MARKER) == marker:
                child.kill()
        except psutil.Error:
            continue


# ---- proxies ---------------------------------------------------------------------------------------------------------


def proxy_for(host: str, environ: Mapping[str, str]) -> str | None:
    """Return the proxy of the environment for an address, chosen as kubectl does: ``NO_PROXY`` may hold CIDRs.

    Args:
        host: The server as ``scheme://address:port``.
        environ: The variables ``HTTPS_PROXY``, ``HTTP_PROXY`` and ``NO_PROXY``, in capital or small letters.
    """
    parts = urlsplit(host)
    name = parts.hostname or ""
    proxy = _variable(environ, f"{parts.scheme}_proxy")
    if not proxy or is_loopback(name):
        return None
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        address = None
    given = [each.strip().lower() for each in _variable(environ, "no_proxy").split(",")]
    return None if any(_matches(each, name, parts.port, address) for each in given if each) else proxy


def _variable(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name) or environ.get(name.upper()) or ""


def _matches(
    pattern: str, host: str, port: int | None, address: ipaddress.IPv4Address | ipaddress.IPv6Address | None
) -> bool:
    """Return True if one part of ``NO_PROXY`` names this host."""
    if pattern == "*":
        return True
    if address is not None:
        try:
            return address in ipaddress.ip_network(pattern, strict=False)
        except ValueError:
            pass
    name, _, wanted = pattern.rpartition(":") if pattern.count(":") == 1 else (pattern, "", "")
    if wanted and wanted != str(port):
        return False
    name = name.removeprefix("*").removeprefix(".")
    return host == name or (address is None and host.endswith(f".{name}"))

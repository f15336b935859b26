"""The cluster that a run goes to, and the login there: found and read here, carried out by kubernetes-asyncio.

Three things are arranged before kubernetes-asyncio is asked, because its loader lacks them (version 36.1): the files of
``KUBECONFIG`` are merged as kubectl does (the first ``current-context`` counts, and relative paths start from the
folder of their own file); a credential plugin gets no terminal as its standard input, and ends with a cancelled login;
and ``NO_PROXY`` may hold CIDRs.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import json
import os
import ssl
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio

from mlfleet._concurrency.threads import LOGINS
from mlfleet._hosts import is_loopback
from mlfleet._process.process import run_process
from mlfleet._text.masking import mask
from mlfleet.errors import BackendError, UsageError

__all__ = [
    "IN_CLUSTER",
    "SERVICE_ACCOUNT",
    "Cluster",
    "Login",
    "find_cluster",
    "load_login",
    "proxy_for",
]

IN_CLUSTER = "(in-cluster)"
"""The name of the context when the service account of this process's own pod is used."""
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

_PATHS = ("certificate-authority", "client-certificate", "client-key", "tokenFile")
_PLUGIN_TIME = 120.0  # seconds; a plugin may ask a person to log in with a browser
_SHORTEST = 1.0  # seconds between two logins that an expiry asks for
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
    """A login that was carried out, with what a client needs of it.

    Attributes:
        client: A ``kubernetes_asyncio.client.ApiClient`` to copy; its own session is closed, since a session belongs to
            the event loop that makes it.
        tls: The TLS context for its connections.
        token: The value of the ``Authorization`` header; empty where a client certificate is the whole login.
        connection_key: A hash of everything but the token. Connections can be kept while it stays the same.
        refresh_at: The time on the monotonic clock from which a new login is needed; None: only when the server refuses
            this one.
    """

    client: Any = field(repr=False)
    tls: ssl.SSLContext = field(repr=False)
    token: str = field(repr=False)
    connection_key: str = field(repr=False)
    refresh_at: float | None = None

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
    config = _read_version(paths, tuple(file.stat().st_mtime_ns for file in _existing(paths)))
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


async def load_login(cluster: Cluster, *, account: Path = SERVICE_ACCOUNT, reread: float = 60.0) -> Login:
    """Log in to a cluster. A cancelled call ends the credential plugin.

    Args:
        cluster: The cluster.
        account: The folder of the pod's service account.
        reread: Seconds after which a token file is read again: the kubelet, for one, renews it in place.

    Raises:
        BackendError: The login failed; the text says why.
    """
    try:
        if cluster.context == IN_CLUSTER:
            return await LOGINS.run(partial(_load, partial(_load_in_cluster, account), time.monotonic() + reread))
        server, user = await LOGINS.run(partial(_read_context, cluster))
        refresh_at = time.monotonic() + reread if "tokenFile" in user and not user.get("token") else None
        if plugin := user.pop("exec", None):
            given, refresh_at = await _run_plugin(plugin, server, cluster.context)
            user.update(given)
        return await LOGINS.run(partial(_load, partial(_load_context, cluster, server, user), refresh_at))
    except BackendError:
        raise
    except Exception as error:
        # The libraries of the providers raise anything.
        said = mask(str(error) or type(error).__name__, ())[:500]
        text = f"the login of the context {cluster.context!r} failed: {said}"
        raise BackendError(text, backend="kubernetes") from error


def _load(configure: Callable[[Any, Path], Awaitable[None]], refresh_at: float | None) -> Login:
    """Make the client of a login. Blocking: imports 800 modules, and reads files and the system's certificates (30 ms).

    Args:
        configure: A coroutine function that sets up a ``Configuration``, and may write files to a private folder.
        refresh_at: See `Login`.
    """
    from kubernetes_asyncio.client import ApiClient, Configuration

    async def make(folder: Path) -> Login:
        configuration = Configuration()
        # Many clusters' authorities lack extensions that Python 3.13 asks for by default.
        configuration.disable_strict_ssl_verification = True
        await configure(configuration, folder)
        client = ApiClient(configuration)
        client.user_agent = "mlfleet"
        # Private: neither aiohttp nor kubernetes-asyncio has a public way to the context of a connector.
        tls: ssl.SSLContext = client.rest_client.pool_manager.connector._ssl
        await client.close()
        # Token files may end with a newline, which a header must not have.
        token = str(configuration.api_key.get("BearerToken", "")).strip()
        return Login(client, tls, token, _connection_key(configuration), refresh_at)

    with tempfile.TemporaryDirectory(prefix="mlfleet-kubernetes-") as folder:
        # In a loop of its own: the library's coroutines block in between, on files.
        return asyncio.run(make(Path(folder)))


async def _load_in_cluster(account: Path, configuration: Any, folder: Path) -> None:
    from kubernetes_asyncio.config import load_incluster_config

    # Its own refresh would read the token file on the event loop.
    load_incluster_config(
        configuration,
        try_refresh_token=False,
        token_filename=str(account / "token"),
        cert_filename=str(account / "ca.crt"),
    )


def _read_context(cluster: Cluster) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entries of the server and the user of a context. Blocking."""
    config = _read(cluster.paths)
    context = _entry(config.contexts, "context", cluster.context)
    server = _entry(config.clusters, "cluster", str(context.get("cluster") or ""))
    if not server.get("server"):
        raise BackendError(f"the cluster of the context {cluster.context!r} has no server", backend="kubernetes")
    return dict(server), dict(config.users.get(str(context.get("user") or ""), {}))


async def _load_context(
    cluster: Cluster, server: Mapping[str, Any], user: Mapping[str, Any], configuration: Any, folder: Path
) -> None:
    from kubernetes_asyncio.config import load_kube_config, load_kube_config_from_dict

    provider = user.get("auth-provider")
    if provider:
        if provider.get("name") not in ("gcp", "oidc"):
            text = f"its auth-provider {provider.get('name')!r} is not known: use the credential plugin of the provider"
            raise BackendError(text, backend="kubernetes")
        # From the files: a provider gives each refresh token once, and the next one is kept there.
        await load_kube_config(cluster.paths, cluster.context, client_configuration=configuration)
    else:
        single = {
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
            "clusters": [{"name": "it", "cluster": _with_files(server, folder)}],
            "users": [{"name": "it", "user": _with_files(user, folder)}],
        }
        await load_kube_config_from_dict(single, "it", client_configuration=configuration)
    if not configuration.proxy:
        configuration.proxy = proxy_for(configuration.host, os.environ)


def _with_files(entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return an entry of the kubeconfig with files in the place of embedded certificates and keys.

    kubernetes-asyncio would leave them on the disk until this process ends.
    """
    made = dict(entry)
    for key in ("certificate-authority", "client-certificate", "client-key"):
        if data := made.pop(f"{key}-data", None):
            file = folder / key
            file.write_bytes(base64.b64decode(data))
            made[key] = str(file)
    return made


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


async def _run_plugin(
    plugin: Mapping[str, Any], server: Mapping[str, Any], context: str
) -> tuple[dict[str, str], float | None]:
    """Run a credential plugin, without a terminal. A cancelled call ends it.

    kubernetes-asyncio lets the plugin inherit standard input, and has no way to end it.

    Args:
        plugin: The ``exec`` entry of the user.
        server: The cluster's entry, for plugins with ``provideClusterInfo``.
        context: The name of the context, for errors.

    Returns:
        The credentials as the entry of a user has them, and the time on the monotonic clock from which new ones are
        needed; None: when they are refused.

    Raises:
        BackendError: It failed.
    """
    command = str(plugin["command"])
    name = f"the credential plugin {command!r} of the context {context!r}"
    info = await LOGINS.run(partial(_exec_info, plugin, server))
    environ = {**os.environ, **{str(each["name"]): str(each["value"]) for each in plugin.get("env") or ()}}
    argv = [command, *(str(each) for each in plugin.get("args") or ())]
    try:
        with anyio.fail_after(_PLUGIN_TIME):
            done = await run_process(argv, env={**environ, "KUBERNETES_EXEC_INFO": info})
    except TimeoutError:
        raise BackendError(f"{name} gave nothing within {_PLUGIN_TIME:g} s", backend="kubernetes") from None
    except OSError as error:
        hint = str(plugin.get("installHint") or "").strip()
        text = f"{name} cannot be started: {error.strerror}"
        raise BackendError(f"{text}. {hint}" if hint else text, backend="kubernetes") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-500:]
        raise BackendError(f"{name} failed (exit code {done.returncode}): {said}", backend="kubernetes")
    try:
        status = json.loads(done.stdout)["status"]
        until = status.get("expirationTimestamp")
        seconds = None if until is None else (datetime.fromisoformat(until).timestamp() - time.time()) * 0.8
        given = {"token": str(status["token"])} if "token" in status else {}
        if "clientCertificateData" in status or not given:
            fields = {"client-certificate": "clientCertificateData", "client-key": "clientKeyData"}
            given |= {f"{key}-data": base64.b64encode(status[data].encode()).decode() for key, data in fields.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        text = f"{name} gave no usable ExecCredential: {type(error).__name__}: {error}"
        raise BackendError(text, backend="kubernetes") from error
    return given, None if seconds is None else time.monotonic() + max(_SHORTEST, seconds)


def _exec_info(plugin: Mapping[str, Any], server: Mapping[str, Any]) -> str:
    """Return the ``ExecCredential`` that a plugin is given. Blocking: reads the certificate of the cluster."""
    spec: dict[str, Any] = {"interactive": False}
    if plugin.get("provideClusterInfo"):
        spec["cluster"] = _cluster_info(server)
    return json.dumps({"apiVersion": plugin["apiVersion"], "kind": "ExecCredential", "spec": spec})


def _cluster_info(server: Mapping[str, Any]) -> dict[str, Any]:
    info = {name: server[name] for name in _CLUSTER_INFO if name in server}
    if "certificate-authority" in server and "certificate-authority-data" not in server:
        authority = Path(server["certificate-authority"]).read_bytes()
        info["certificate-authority-data"] = base64.b64encode(authority).decode()
    for each in server.get("extensions") or ():
        if each.get("name") == "client.authentication.k8s.io/exec":
            info["config"] = each.get("extension")
    return info


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

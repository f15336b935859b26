"""How to show the API server who we are, and to renew that when it expires."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import logging
import os
import ssl
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
from kubernetes_asyncio.client.configuration import Configuration
from kubernetes_asyncio.config.kube_config import KubeConfigLoader, KubeConfigMerger

from mlfleet.backends.kubernetes.cluster import IN_CLUSTER, SERVICE_ACCOUNT, Cluster
from mlfleet.backends.kubernetes.plugin import PluginLogin, ask_plugin, exec_of
from mlfleet.concurrency.threads import Threads
from mlfleet.errors import BackendError
from mlfleet.masking import mask

__all__ = ["Credentials", "Login", "proxy_for"]

_log = logging.getLogger("mlfleet.kubernetes")
_loading = Threads("kubernetes credentials", 4)
_PROVIDER_TIME = 60.0  # seconds
_REREAD = 60.0  # seconds


@dataclass(frozen=True, slots=True)
class Login:
    """What a connection needs.

    Attributes:
        host: ``https://address:port``.
        authorization: the header; None where a client certificate says it all.
        tls: for https; the same object for as long as its certificates stay the same.
        tls_key: tells certificates apart.
        server_name: that the certificate must have, if not the address.
        proxy: of the kubeconfig, else of the environment; never from within the cluster.
        renew_at: on the monotonic clock; None: only when the server refuses it.
    """

    host: str
    authorization: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    tls_key: str = field(default="", repr=False)
    server_name: str | None = None
    proxy: str | None = field(default=None, repr=False)
    renew_at: float | None = None


class Credentials:
    """The current `Login` of one cluster. Hundreds of requests share one renewal.

    Args:
        cluster: to log in to.
        account: the folder of the pod's service account.
        reread: seconds after which a token file is read again: the kubelet, for one, renews it in place.
    """

    def __init__(self, cluster: Cluster, account: Path = SERVICE_ACCOUNT, *, reread: float = _REREAD) -> None:
        self._cluster = cluster
        self._account = account
        self._reread = reread
        self._login: Login | None = None
        self._lock = asyncio.Lock()

    async def login(self, *, refused: Login | None = None) -> Login:
        """What to show now.

        Args:
            refused: what the server has just refused: then another one is fetched, unless that was done meanwhile.

        Raises:
            BackendError: it cannot be had; the text says why.
        """
        login = self._login
        if login is not None and login is not refused and not _is_due(login):
            return login
        async with self._lock:
            login = self._login
            if login is None or login is refused or _is_due(login):
                login = await self._load(login)
                self._login = login
            return login

    async def _load(self, old: Login | None) -> Login:
        try:
            if self._cluster.context == IN_CLUSTER:
                return await _loading(partial(_around_us, self._account, old, self._reread))
            plugin = None
            command = await _loading(partial(exec_of, self._cluster))
            if command is not None:
                plugin = await ask_plugin(command, self._cluster.context)
            return await _loading(partial(_load, self._cluster, plugin, old, self._reread))
        except BackendError:
            raise
        except Exception as error:
            # The libraries of the providers raise whatever they like.
            where = f"the context {self._cluster.context!r}"
            text = f"the credentials of {where} cannot be had: {mask(str(error) or type(error).__name__, ())[:500]}"
            raise BackendError(text, backend="kubernetes") from error


def _is_due(login: Login) -> bool:
    return login.renew_at is not None and time.monotonic() >= login.renew_at


def _load(cluster: Cluster, plugin: PluginLogin | None, old: Login | None, reread: float) -> Login:
    """From the kubeconfig. Blocking.

    Args:
        cluster: names its context.
        plugin: what the context's credential plugin has said, if it has one.
        old: the login before.
        reread: seconds after which a token file is read again.
    """
    merger = KubeConfigMerger(cluster.paths)
    loader = KubeConfigLoader(
        config_dict=merger.config,
        active_context=cluster.context,
        config_base_path=None,
        config_persister=merger.save_changes,  # OpenID providers give each refresh token once
    )
    user = loader._user.value if loader._user is not None else {}
    if plugin is not None:
        user.pop("exec")
        user.update(plugin.user)
    configuration = Configuration()
    _drive(loader.load_and_set(configuration), waits="auth-provider" in user)
    host = str(configuration.host).rstrip("/")
    tls, tls_key = None, ""
    if host.startswith("https"):
        tls_key = _tls_key(configuration)
        tls = old.tls if old is not None and old.tls_key == tls_key else _tls(configuration)
    renew_at = plugin.renew_at if plugin is not None else None
    if "tokenFile" in user and "token" not in user:
        renew_at = time.monotonic() + reread
    authorization = configuration.api_key.get("BearerToken")
    return Login(
        host=host,
        # Files end with a newline, which no header may have.
        authorization=authorization.strip() if authorization else None,
        tls=tls,
        tls_key=tls_key,
        server_name=configuration.tls_server_name,
        proxy=configuration.proxy or proxy_for(host, os.environ),
        renew_at=renew_at,
    )


def proxy_for(host: str, environ: Mapping[str, str]) -> str | None:
    """The proxy of the environment for an address, as kubectl chooses it: ``NO_PROXY`` may have CIDRs, too.

    Args:
        host: ``scheme://address:port``.
        environ: ``HTTPS_PROXY``, ``HTTP_PROXY`` and ``NO_PROXY``, or the same in small letters.
    """
    parts = urlsplit(host)
    name = parts.hostname or ""
    proxy = _variable(environ, f"{parts.scheme}_proxy")
    if not proxy or name == "localhost":
        return None
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        address = None
    if address is not None and address.is_loopback:
        return None
    given = [each.strip().lower() for each in _variable(environ, "no_proxy").split(",")]
    return None if any(_spares(each, name, parts.port, address) for each in given if each) else proxy


def _variable(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name) or environ.get(name.upper()) or ""


def _spares(
    pattern: str, host: str, port: int | None, address: ipaddress.IPv4Address | ipaddress.IPv6Address | None
) -> bool:
    """Whether one part of ``NO_PROXY`` means this host."""
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


def _drive(work: Coroutine[Any, Any, None], *, waits: bool) -> None:
    """Run what the library has as a coroutine although it only reads files, unless it asks a provider (`waits`)."""
    if not waits:
        try:
            work.send(None)
        except StopIteration:
            return
        raise BackendError("the kubeconfig asks for something that takes a provider", backend="kubernetes")

    async def bounded() -> None:
        with anyio.fail_after(_PROVIDER_TIME):
            await work

    asyncio.run(bounded())


def _tls_key(configuration: Any) -> str:
    """Of the certificates, not of their files: they are renewed in place."""
    digest = hashlib.sha256(repr(configuration.verify_ssl).encode())
    for path in (configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file):
        digest.update(hashlib.sha256(Path(path).read_bytes() if path else b"").digest())
    return digest.hexdigest()


def _tls(configuration: Any) -> ssl.SSLContext:
    context = _trusting(configuration.ssl_ca_cert)
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, keyfile=configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _trusting(authority: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority)
    # Python 3.13 asks for extensions that the authorities of many clusters lack.
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    return context


def _around_us(account: Path, old: Login | None, reread: float) -> Login:
    """The service account of the pod that this process is in. Blocking."""
    address, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    token = (account / "token").read_text().strip()
    authority = account / "ca.crt"
    tls_key = hashlib.sha256(authority.read_bytes()).hexdigest()
    host = f"[{address}]" if ":" in address else address
    return Login(
        host=f"https://{host}:{port}",
        authorization=f"Bearer {token}",
        tls=old.tls if old is not None and old.tls_key == tls_key else _trusting(str(authority)),
        tls_key=tls_key,
        renew_at=time.monotonic() + reread,
    )

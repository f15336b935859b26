"""How to show the API server who we are, and to renew that when it expires."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import logging
import os
import ssl
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from mlfleet._concurrency.threads import LOGINS
from mlfleet._hosts import is_loopback
from mlfleet._text.masking import mask
from mlfleet.backends.kubernetes.cluster import IN_CLUSTER, SERVICE_ACCOUNT, Cluster
from mlfleet.backends.kubernetes.kubeconfig import Entry, read_kubeconfig
from mlfleet.backends.kubernetes.plugin import PluginLogin, ask_plugin, exec_of
from mlfleet.backends.kubernetes.provider import ask_provider
from mlfleet.errors import BackendError

__all__ = ["Credentials", "Login", "proxy_for"]

_log = logging.getLogger("mlfleet.kubernetes")
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
                return await LOGINS.run(partial(_around_us, self._account, old, self._reread))
            config = await LOGINS.run(partial(read_kubeconfig, self._cluster.paths))
            server, user = config.of_context(self._cluster.context)
            command = await LOGINS.run(partial(exec_of, server, user))
            plugin = await ask_plugin(command, self._cluster.context) if command is not None else None
            return await LOGINS.run(partial(_load, self._cluster, server, user, plugin, old, self._reread))
        except BackendError:
            raise
        except Exception as error:
            # The libraries of the providers raise whatever they like.
            where = f"the context {self._cluster.context!r}"
            text = f"the credentials of {where} cannot be had: {mask(str(error) or type(error).__name__, ())[:500]}"
            raise BackendError(text, backend="kubernetes") from error


def _is_due(login: Login) -> bool:
    return login.renew_at is not None and time.monotonic() >= login.renew_at


def _load(
    cluster: Cluster, server: Entry, user: Entry, plugin: PluginLogin | None, old: Login | None, reread: float
) -> Login:
    """From the kubeconfig. Blocking.

    Args:
        cluster: to log in to.
        server: its entry in the kubeconfig.
        user: likewise.
        plugin: what the user's credential plugin has said, if it has one.
        old: the login before.
        reread: seconds after which a token file is read again.
    """
    renew_at = None
    if plugin is not None:
        user, renew_at = replace(user, value={**user.value, **plugin.user}), plugin.renew_at
    elif "tokenFile" in user.value and not user.value.get("token"):
        renew_at = time.monotonic() + reread
    host = str(server.value.get("server") or "").rstrip("/")
    if not host:
        raise BackendError(f"the cluster of the context {cluster.context!r} has no server", backend="kubernetes")
    tls, tls_key = _tls(server, user, old) if host.startswith("https") else (None, "")
    return Login(
        host=host,
        authorization=_authorization(cluster, user),
        tls=tls,
        tls_key=tls_key,
        server_name=server.value.get("tls-server-name"),
        proxy=server.value.get("proxy-url") or proxy_for(host, os.environ),
        renew_at=renew_at,
    )


def _authorization(cluster: Cluster, user: Entry) -> str | None:
    value = user.value
    if "auth-provider" in value:
        return ask_provider(cluster, str(value["auth-provider"].get("name")))
    token = value.get("token")
    if not token and "tokenFile" in value:
        token = (user.folder / value["tokenFile"]).read_text()
    if token:
        # Files end with a newline, which no header may have.
        return f"Bearer {str(token).strip()}"
    if "username" in value and "password" in value:
        return "Basic " + base64.b64encode(f"{value['username']}:{value['password']}".encode()).decode()
    return None


def proxy_for(host: str, environ: Mapping[str, str]) -> str | None:
    """The proxy of the environment for an address, as kubectl chooses it: ``NO_PROXY`` may have CIDRs, too.

    Args:
        host: ``scheme://address:port``.
        environ: ``HTTPS_PROXY``, ``HTTP_PROXY`` and ``NO_PROXY``, or the same in small letters.
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


def _tls(server: Entry, user: Entry, old: Login | None) -> tuple[ssl.SSLContext, str]:
    """For that cluster and user, with its key: the old one if the certificates are the same.

    Not if their files are the same: those are renewed in place.
    """
    authority = server.content("certificate-authority")
    certificate, key = user.content("client-certificate"), user.content("client-key")
    verified = not server.value.get("insecure-skip-tls-verify")
    tls_key = hashlib.sha256(repr((authority, certificate, key, verified)).encode()).hexdigest()
    if old is not None and old.tls is not None and old.tls_key == tls_key:
        return old.tls, tls_key
    context = _trusting(authority)
    if certificate is not None:
        # OpenSSL takes these from a file only. It is for nobody else, and gone at once.
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"\n".join((certificate, key or b"")))
            file.flush()
            context.load_cert_chain(file.name)
    if not verified:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context, tls_key


def _trusting(authority: bytes | None) -> ssl.SSLContext:
    # Not ASCII may only be the remarks between the certificates.
    context = ssl.create_default_context(cadata=authority.decode("ascii", "ignore") if authority is not None else None)
    # Python 3.13 asks for extensions that the authorities of many clusters lack.
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    return context


def _around_us(account: Path, old: Login | None, reread: float) -> Login:
    """The service account of the pod that this process is in. Blocking."""
    address, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    token = (account / "token").read_text().strip()
    authority = (account / "ca.crt").read_bytes()
    tls_key = hashlib.sha256(authority).hexdigest()
    host = f"[{address}]" if ":" in address else address
    return Login(
        host=f"https://{host}:{port}",
        authorization=f"Bearer {token}",
        tls=old.tls if old is not None and old.tls_key == tls_key else _trusting(authority),
        tls_key=tls_key,
        renew_at=time.monotonic() + reread,
    )

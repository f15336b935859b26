"""Where requests go: a server, and the way to it."""

from __future__ import annotations

import base64
import ssl
import urllib.request
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import unquote, urlsplit

__all__ = ["Origin", "environment_proxy"]

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Origin:
    """A server; requests to the same one share connections.

    Attributes:
        scheme: http or https.
        authority: its host, and its port if it is no usual one.
        tls: how certificates are checked and shown.
        server_name: in its certificate, where that is not the host.
        proxy: the URL of one to go through.
    """

    scheme: str
    authority: str
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    server_name: str | None = None
    proxy: str | None = field(default=None, repr=False)

    @cached_property
    def address(self) -> tuple[str, int]:
        """Host and port.

        Raises:
            ValueError: there is none.
        """
        return _address(f"{self.scheme}://{self.authority}")

    @cached_property
    def host_header(self) -> str:
        """What the server is called in requests."""
        host, port = self.address
        name = f"[{host}]" if ":" in host else host.encode("idna").decode()
        return name if port == _PORTS[self.scheme] else f"{name}:{port}"

    @cached_property
    def proxy_address(self) -> tuple[str, int] | None:
        """Host and port of the proxy.

        Raises:
            ValueError: it is not one that speaks HTTP.
        """
        return None if self.proxy is None else _address(self.proxy)

    @cached_property
    def proxy_authorization(self) -> str | None:
        """The header that proves who we are to the proxy."""
        parts = urlsplit(self.proxy or "")
        if not parts.username:
            return None
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        return "Basic " + base64.b64encode(pair.encode()).decode("ascii")


def environment_proxy(url: str) -> str | None:
    """The proxy that ``HTTP_PROXY``, ``HTTPS_PROXY`` and ``NO_PROXY`` name for a URL, read as urllib does.

    Args:
        url: of a server.
    """
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    return None if not proxy or urllib.request.proxy_bypass(parts.netloc) else proxy


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.scheme not in _PORTS:
        raise ValueError(f"this is no address of http:// or https://: {parts.scheme}://…")
    if not parts.hostname:
        raise ValueError("the URL names no host")
    return parts.hostname, parts.port or _PORTS[parts.scheme]

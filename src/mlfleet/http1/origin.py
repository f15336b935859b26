"""Where requests go: a server, and the way to it."""

from __future__ import annotations

import base64
import re
import ssl
import urllib.request
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import unquote, urlsplit

__all__ = ["Origin", "environment_proxy"]

_PORTS = {"http": 80, "https": 443}
_not_in_urls = re.compile(r"[\x00-\x20\x7f]").search  # urlsplit takes some of these out, and leaves others


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheme", self.scheme.lower())

    def __hash__(self) -> int:
        # Each request looks for an idle connection by it.
        return hash(self.authority)

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
        name, _, port = self.host_and_port.rpartition(":")
        return name if int(port) == _PORTS[self.scheme] else self.host_and_port

    @cached_property
    def host_and_port(self) -> str:
        """What a proxy is asked for."""
        host, port = self.address
        return f"[{host}]:{port}" if ":" in host else f"{host.encode('idna').decode()}:{port}"

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
    if not proxy or urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.scheme not in _PORTS:
        raise ValueError(f"this is no address of http:// or https://: {parts.scheme}://…")
    if not parts.hostname or _not_in_urls(url):
        raise ValueError("the URL names no host")
    return parts.hostname, parts.port or _PORTS[parts.scheme]

"""Decides whether a host name or URL means this machine."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

__all__ = ["has_loopback_host", "is_loopback"]


def is_loopback(host: str | None) -> bool:
    """Return True if a host can only be this machine.

    True for ``localhost`` and every name that ends with ``.localhost`` (RFC 6761, 6.3), and for the addresses of
    127.0.0.0/8 and ::1 (RFC 1122, RFC 4291). No name is looked up. False for 0.0.0.0 and ::, which are addresses to
    listen on and not to connect to.

    Args:
        host: A name or an address without a port; an IPv6 address with or without brackets. None and the empty string
            name no host.
    """
    name = (host or "").lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    # Only Python 3.13 and later see through an IPv4-mapped address (RFC 4291, 2.5.5.2).
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def has_loopback_host(url: str) -> bool:
    """Return True if the host of a URL, or of ``//host:port``, can only be this machine; see `is_loopback`."""
    try:
        return is_loopback(urlsplit(url).hostname)
    except ValueError:  # an address that is not valid
        return False

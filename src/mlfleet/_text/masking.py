"""Masks secrets in text that is shown to people or written to log files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import unquote

__all__ = ["MASK", "is_secret_name", "mask", "mask_query", "mask_uri", "mask_values"]

MASK = "***"

# Two forms of user:password@ or token@ after a scheme:
# 1. As RFC 3986, 3.2.1 has it: the userinfo ends at the last @ before the path.
# 2. A password with an unescaped "/", "?" or "#". Of host:port/path@tag it differs in that a port has digits only.
_USERINFO = re.compile(
    r"""
    (?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)
    (?P<userinfo> [^/?#\s]* | [^/?#@:\s"']* : (?!\d*(?:[/?#\s]|\Z)) (?:(?!://)\S)* )
    @
    """,
    re.X,
)
_PARAMETER = re.compile(r"(?P<before>[?&;#])(?P<name>[^=?&;#\s]+)=(?P<value>[^&;#\s\"']*)")
_SECRET_PARAMETER = re.compile(
    r"(.*[^a-z])?(key|sig|pwd|pass|auth|sas)|.*(password|passwd|passphrase|secret|token|signature|credential|apikey"
    r"|access_?key(_?id)?|account_?key|private_?key)s?",
    re.I,
)
# What follows the ? of a URI: presigned URLs carry their signature there.
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s?#]*)\?\S*")
_SHORTEST_VALUE = 8  # characters
_SECRET_NAME = re.compile(
    r"PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_?KEY|ACCOUNT_?KEY|CONNECTION_STRING", re.I
)


def mask_uri(text: str) -> str:
    """Replace the secrets of every URI in a text.

    These are the user information, except for a bare user name of ssh (``ssh://git@host``), and the values of query
    parameters whose names say so: ``password``, ``token``, ``sig``, ``key``, ``X-Amz-Signature`` and the like.
    """
    return _PARAMETER.sub(_mask_parameter, _USERINFO.sub(_mask_userinfo, text))


def mask_query(text: str) -> str:
    """Replace the user information and the whole query of every URI in a text."""
    return _QUERY.sub(rf"\1?{MASK}", mask_uri(text))


def mask(text: str, secrets: Iterable[str]) -> str:
    """Replace each of `secrets`, and the secrets of every URI, in a text."""
    for secret in sorted({s for s in secrets if s}, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return mask_uri(text)


def mask_values(text: str, values: Iterable[str]) -> str:
    """Replace secret values of any kind, whole or by line, and the secrets of every URI, in a text.

    Args:
        text: The text.
        values: The values. Of those with less than eight characters, such as ``1``, the text may hold its own.
    """
    lines = (line for value in values for line in (value, *value.splitlines()))
    return mask(text, [line for line in lines if len(line) >= _SHORTEST_VALUE])


def is_secret_name(name: str) -> bool:
    """Return True if an environment variable of this name is expected to hold a secret."""
    return _SECRET_NAME.search(name) is not None


def _mask_userinfo(match: re.Match[str]) -> str:
    is_ssh = match["scheme"].lower().startswith(("ssh://", "git+ssh://"))
    if is_ssh and ":" not in match["userinfo"]:
        return match[0]
    return f"{match['scheme']}{MASK}@"


def _mask_parameter(match: re.Match[str]) -> str:
    if not match["value"] or not _SECRET_PARAMETER.fullmatch(unquote(match["name"])):
        return match[0]
    return f"{match['before']}{match['name']}={MASK}"

"""Keeps secrets out of what people and log files see."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["MASK", "is_secret_name", "mask", "mask_query", "mask_uri"]

MASK = "***"

# user:password@ or token@ behind a scheme. The userinfo ends at the last @ before the path (RFC 3986, 3.2.1).
_USERINFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<userinfo>[^/?#\s]*)@")
# What follows the ? of a URI: presigned URLs carry their signature there.
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s?#]*)\?\S*")
_SECRET_NAME = re.compile(
    r"PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_?KEY|ACCOUNT_?KEY|CONNECTION_STRING", re.I
)


def mask_uri(text: str) -> str:
    """`text` with the user information of every URI in it replaced, except for a bare ``git@``-like user name."""

    def hide(match: re.Match[str]) -> str:
        userinfo = match["userinfo"]
        if match["scheme"].lower().startswith(("ssh://", "git+ssh://")) and ":" not in userinfo:
            return match[0]
        return f"{match['scheme']}{MASK}@"

    return _USERINFO.sub(hide, text)


def mask_query(text: str) -> str:
    """`text` with the user information and the query of every URI replaced."""
    return _QUERY.sub(rf"\1?{MASK}", mask_uri(text))


def mask(text: str, secrets: Iterable[str]) -> str:
    """`text` with every one of `secrets` and the user information of every URI replaced."""
    for secret in sorted({s for s in secrets if s}, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return mask_uri(text)


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name is expected to hold a secret."""
    return _SECRET_NAME.search(name) is not None

"""Databricks as a tracking server: the workspace of a ``databricks`` URI, and the login."""

from __future__ import annotations

import configparser
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio

from mlfleet._concurrency.threads import LOGINS
from mlfleet.errors import TrackingError, UsageError
from mlfleet.tracking.auth import Login

__all__ = ["DatabricksLogin", "check_profile", "is_databricks", "profile_of"]


_HEADERS_LAST = 30.0
"""Seconds for which headers are used again. The SDK renews a token 40 s or more before it expires."""

# Databricks answers 403 to an expired personal access token, as it does to a missing permission.
_EXPIRED = re.compile(r"(invalid|expired)\b.*\btoken|token\b.*\b(invalid|expired)", re.I)


def is_databricks(uri: str) -> bool:
    """Return True if `uri` is ``databricks`` or ``databricks://profile``."""
    return uri == "databricks" or uri.startswith("databricks://")


def check_profile(name: str) -> None:
    """Check that ``~/.databrickscfg`` has a profile of that name. It reads the file: call it in a thread.

    Raises:
        UsageError: There is no such profile.
    """
    try:
        found = _profile_settings(name)
    except TrackingError as error:
        raise UsageError(str(error)) from error
    if not found:
        raise UsageError(f"{_config_file()} has no profile {name!r}: make it with 'databricks configure'")


class DatabricksLogin(Login):
    """A Databricks workspace.

    A personal access token (``DATABRICKS_HOST`` and ``DATABRICKS_TOKEN``, or host and token of a profile in
    ``~/.databrickscfg``) needs nothing else; every other kind of login is left to databricks-sdk.
    """

    hint = "check DATABRICKS_HOST and DATABRICKS_TOKEN, or the profile in ~/.databrickscfg"
    noun = "Databricks workspace"
    remedy = "check DATABRICKS_HOST, or the host of the profile in ~/.databrickscfg"

    def __init__(self, uri: str) -> None:
        self.url = ""
        self._uri = uri
        self._profile = profile_of(uri)
        self._settings: Mapping[str, str] = {}
        self._sdk: Any = None
        self._headers: dict[str, str] = {}
        self._former = ""
        self._until = 0.0
        self._lock = anyio.Lock()

    def prepare(self) -> None:  # noqa: D102
        profile = self._profile or os.environ.get("DATABRICKS_CONFIG_PROFILE")
        settings = _profile_settings(profile) if profile else (_environment_settings() or _profile_settings("DEFAULT"))
        self._settings = settings
        if settings.get("host") and settings.get("token") and settings.get("auth_type", "pat") == "pat":
            self.url = settings["host"].strip().rstrip("/")
            if "://" not in self.url:
                self.url = f"https://{self.url}"
            self._headers, self._until = {"Authorization": f"Bearer {settings['token']}"}, float("inf")
        else:
            self._sdk = _sdk_config(profile, self._uri)
            self.url = str(self._sdk.host).rstrip("/")

    async def headers(self) -> Mapping[str, str]:  # noqa: D102
        if time.monotonic() >= self._until:
            async with self._lock:
                if time.monotonic() >= self._until:
                    self._headers = await LOGINS.run(self._authenticate)
                    self._until = time.monotonic() + _HEADERS_LAST
        return self._headers

    def may_have_expired(self, error: TrackingError) -> bool:  # noqa: D102
        return error.status == 401 or (error.status == 403 and _EXPIRED.search(str(error)) is not None)

    async def renew(self, refused: Mapping[str, str]) -> bool:
        """Log in again from the settings: the token in ``~/.databrickscfg`` may have been replaced."""
        async with self._lock:
            if refused.get("Authorization") != self._headers.get("Authorization"):
                return True  # another request has renewed it
            fresh = DatabricksLogin(self._uri)
            await LOGINS.run(fresh.prepare)
            headers = dict(await fresh.headers())
            # Credentials for another workspace must not be sent to this one.
            if fresh.url != self.url or headers == self._headers:
                return False
            self._former = _bearer(self._headers)
            self._settings, self._sdk = fresh._settings, fresh._sdk
            self._headers, self._until = headers, fresh._until
        return True

    def environ(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return host and token, for runs without ``~/.databrickscfg``; without a token, the URI itself."""
        token = self._settings.get("token")
        if self._sdk is None and token:
            return {"MLFLOW_TRACKING_URI": "databricks", "DATABRICKS_HOST": self.url}, {"DATABRICKS_TOKEN": token}
        client, secret = (None, None) if self._sdk is None else (self._sdk.client_id, self._sdk.client_secret)
        if client and secret:
            plain = {"MLFLOW_TRACKING_URI": "databricks", "DATABRICKS_HOST": self.url, "DATABRICKS_CLIENT_ID": client}
            return plain, {"DATABRICKS_CLIENT_SECRET": secret}
        return {"MLFLOW_TRACKING_URI": self._uri}, {}

    def secrets(self) -> tuple[str, ...]:  # noqa: D102
        from_sdk = (self._sdk.token, self._sdk.client_secret, self._sdk.password) if self._sdk is not None else ()
        ours = (self._settings.get("token"), _bearer(self._headers), self._former)
        return tuple(text for text in (*ours, *from_sdk) if text)

    def _authenticate(self) -> dict[str, str]:
        try:
            headers = dict(self._sdk.authenticate())
        except Exception as error:
            raise TrackingError(f"Databricks login failed: {error}; {self.hint}", uri=self._uri) from error
        if workspace := getattr(self._sdk, "workspace_id", None):
            headers["X-Databricks-Org-Id"] = str(workspace)
        return headers


def profile_of(uri: str) -> str | None:
    """Return the profile that ``databricks://<profile>`` names; None if it names none.

    Raises:
        UsageError: The URI names a secret scope.
    """
    name = uri.removeprefix("databricks").removeprefix("://").strip("/")
    if ":" in name:
        raise UsageError(
            f"the tracking URI {uri!r} names a Databricks secret scope, which only a Databricks notebook can read: "
            "use databricks://<profile> with a profile of ~/.databrickscfg"
        )
    return name or None


def _bearer(headers: Mapping[str, str]) -> str:
    return headers.get("Authorization", "").partition(" ")[2]


def _environment_settings() -> dict[str, str]:
    names = {"host": "DATABRICKS_HOST", "token": "DATABRICKS_TOKEN", "auth_type": "DATABRICKS_AUTH_TYPE"}
    settings = {key: os.environ[name] for key, name in names.items() if os.environ.get(name)}
    return settings if "host" in settings else {}


def _config_file() -> Path:
    return Path(os.environ.get("DATABRICKS_CONFIG_FILE") or "~/.databrickscfg").expanduser()


def _profile_settings(profile: str) -> dict[str, str]:
    path = _config_file()
    parser = configparser.ConfigParser(interpolation=None, default_section="-")
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        # The parser's own text quotes the line, and a token with it.
        raise TrackingError(f"{path} cannot be read: {type(error).__name__}") from None
    if parser.has_section(profile):
        return dict(parser[profile])
    if profile == "DEFAULT":
        return {}
    names = ", ".join(parser.sections()) or "none"
    raise TrackingError(f"{path} has no profile {profile!r}; it has: {names}")


def _sdk_config(profile: str | None, uri: str) -> Any:
    try:
        from databricks.sdk.core import Config
    except ImportError as error:
        raise TrackingError(
            f"no host and token were found for the tracking URI {uri!r}: set DATABRICKS_HOST and DATABRICKS_TOKEN, "
            "or name a profile of ~/.databrickscfg (databricks://<profile>); other kinds of login need databricks-sdk: "
            "pip install 'mlfleet[databricks]'",
            uri=uri,
        ) from error
    try:
        return Config(profile=profile) if profile else Config()
    except Exception as error:
        text = f"no way to log in to Databricks was found for the tracking URI {uri!r}: {error}"
        raise TrackingError(text, uri=uri) from error

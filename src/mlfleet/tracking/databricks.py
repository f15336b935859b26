"""Databricks as a tracking server: the workspace of a ``databricks`` URI, and the login."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio

from mlfleet._concurrency.threads import LOGINS
from mlfleet._hosts import has_loopback_host
from mlfleet._request_log import unlogged_requests
from mlfleet.errors import TrackingError, UsageError
from mlfleet.tracking.auth import Login

__all__ = [
    "EXPERIMENT_ADVICE",
    "RATES",
    "DatabricksLogin",
    "check_profile",
    "experiment_path",
    "is_databricks",
    "profile_of",
]

RATES = {"mlflow/runs/log-batch": 40.0, "mlflow/runs/search": 6.0, "api/2.0/mlflow": 110.0}
"""Requests per second by kind, for `Pace`. A workspace takes 47, 7 and 127 of them, runs' own requests included:
https://docs.databricks.com/aws/en/resources/limits"""

EXPERIMENT_ADVICE = (
    "an experiment's name is a path in the workspace: --experiment-name /Users/<you>/<name> (experiment_name=…,"
    " MLFLOW_EXPERIMENT_NAME)"
)

_HEADERS_LAST = 30.0
"""Seconds for which headers are used again. The SDK renews a token 40 s or more before it expires."""

_LOGIN_SECONDS = 10
"""Seconds for one request of databricks-sdk, and for its retries, which nothing can interrupt."""

# Databricks answers 403 to an expired personal access token, as it does to a missing permission.
_EXPIRED = re.compile(r"(invalid|expired)\b.*\btoken|token\b.*\b(invalid|expired)", re.I)


def is_databricks(uri: str) -> bool:
    """Return True if `uri` is ``databricks`` or ``databricks://profile``."""
    return uri == "databricks" or uri.startswith("databricks://")


def experiment_path(name: str) -> str:
    """Return an experiment's name as Databricks keeps it: without ``/Workspace``, which other tools show before it."""
    return name.removeprefix("/Workspace") if name.startswith("/Workspace/") else name


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
    """The login to a Databricks workspace, as databricks-sdk's `Config` decides it.

    A personal access token needs no request. Every other kind of login happens in a thread at the first request.

    Args:
        uri: The tracking URI: ``databricks`` or ``databricks://<profile>``.
    """

    hint = "check DATABRICKS_HOST and DATABRICKS_TOKEN, or the profile in ~/.databrickscfg"
    noun = "Databricks workspace"
    remedy = "check DATABRICKS_HOST, or the host of the profile in ~/.databrickscfg"

    def __init__(self, uri: str) -> None:
        self.url = ""
        self._uri = uri
        self._profile = profile_of(uri)
        self._settings: Any = None
        self._sdk: Any = None
        self._headers: dict[str, str] = {}
        self._former = ""
        self._until = 0.0
        self._lock = anyio.Lock()

    def prepare(self) -> None:  # noqa: D102
        if profile := self._profile or os.environ.get("DATABRICKS_CONFIG_PROFILE"):
            _profile_settings(profile)  # names the profiles that there are
        self._settings = _read_settings(self._profile, self._uri)
        if not self._settings.host:
            # Azure finds the host by the workspace's resource id.
            self._settings = self._sdk = _log_in(self._profile, self._uri)
        self.url = str(self._settings.host).strip().rstrip("/")
        if "://" not in self.url:
            self.url = f"https://{self.url}"
        if self._has_token:
            self._headers, self._until = {"Authorization": f"Bearer {self._settings.token}"}, float("inf")

    @property
    def _has_token(self) -> bool:
        return bool(self._settings.token) and (self._settings.auth_type or "pat") == "pat"

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
        """Log in from the beginning: the token in ``~/.databrickscfg`` may have changed."""
        import httpx

        async with self._lock:
            if refused.get("Authorization") != self._headers.get("Authorization"):
                return True  # another request has renewed it already
            fresh = DatabricksLogin(self._uri)
            await LOGINS.run(fresh.prepare)
            try:
                headers = dict(await fresh.headers())
            except httpx.HTTPError as error:
                raise TrackingError(f"Databricks login failed: {error}; {self.hint}", uri=self._uri) from error
            # A token for another workspace must not be sent to this one.
            if fresh.url != self.url or headers == self._headers:
                return False
            self._former = _bearer(self._headers)
            self._settings, self._sdk = fresh._settings, fresh._sdk
            self._headers, self._until = headers, fresh._until
        return True

    def environ(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return host and token, so that a run elsewhere needs no ``~/.databrickscfg``; without a token, the URI."""
        settings = self._settings
        plain = {"MLFLOW_TRACKING_URI": "databricks", "DATABRICKS_HOST": self.url}
        if self._has_token:
            return plain, {"DATABRICKS_TOKEN": settings.token}
        if settings.client_id and settings.client_secret:
            plain["DATABRICKS_CLIENT_ID"] = settings.client_id
            return plain, {"DATABRICKS_CLIENT_SECRET": settings.client_secret}
        return {"MLFLOW_TRACKING_URI": self._uri}, {}

    def secrets(self) -> tuple[str, ...]:  # noqa: D102
        names = ("token", "client_secret", "password", "azure_client_secret")
        configured = (getattr(self._settings, name, None) for name in names)
        return tuple(text for text in (*configured, _bearer(self._headers), self._former) if text)

    def _authenticate(self) -> dict[str, str]:
        """Return fresh headers. Blocking.

        Raises:
            httpx.HTTPError: The workspace cannot be reached.
            TrackingError: The login is refused.
        """
        if self._sdk is None:
            _check_reachable(self.url)
            self._sdk = _log_in(self._profile, self._uri)
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


def _config_file() -> Path:
    return Path(os.environ.get("DATABRICKS_CONFIG_FILE") or "~/.databrickscfg").expanduser()


def _profile_settings(profile: str) -> dict[str, str]:
    import configparser

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


def _read_settings(profile: str | None, uri: str) -> Any:
    """Return the settings that databricks-sdk would log in with. Sends no request."""
    try:
        from databricks.sdk.config import Config
    except ImportError:
        return _settings_without_sdk(profile, uri)

    class Settings(Config):  # type: ignore[misc]
        # Config's constructor asks the host about itself and logs in, with retries of its own.
        def _resolve_host_metadata(self) -> None:
            pass

        def init_auth(self) -> None:
            pass

    Config.attributes()  # looks only at its own class, and keeps the result for its subclasses
    return _configure(Settings, profile, uri)


def _log_in(profile: str | None, uri: str) -> Any:
    """Return databricks-sdk's `Config`, logged in. Blocking, for some seconds where the host does not answer."""
    try:
        from databricks.sdk.config import Config
    except ImportError as error:
        raise TrackingError(
            f"no host and token were found for the tracking URI {uri!r}: set DATABRICKS_HOST and DATABRICKS_TOKEN, "
            "or name a profile of ~/.databrickscfg (databricks://<profile>); other kinds of login need databricks-sdk: "
            "pip install 'mlfleet[databricks]'",
            uri=uri,
        ) from error
    return _configure(Config, profile, uri)


def _configure(kind: Any, profile: str | None, uri: str) -> Any:
    import configparser

    try:
        given: dict[str, Any] = {}
        if profile is not None:
            # A profile that the tracking URI or the configuration names counts more than the environment, as in mlflow.
            given = dict(_profile_settings(profile))
            if given.get("token"):
                given.setdefault("auth_type", "pat")
        limits = {"retry_timeout_seconds": _LOGIN_SECONDS, "http_timeout_seconds": _LOGIN_SECONDS}
        return kind(**{**given, **limits, "profile": profile})
    except TrackingError:
        raise
    except (configparser.Error, UnicodeDecodeError) as error:
        # The parser's own text quotes the line, and a token with it.
        raise TrackingError(f"{_config_file()} cannot be read: {type(error).__name__}", uri=uri) from None
    except Exception as error:
        text = f"no way to log in to Databricks was found for the tracking URI {uri!r}: {error}"
        raise TrackingError(text, uri=uri) from error


def _settings_without_sdk(profile: str | None, uri: str) -> Any:
    """Return host and token in the order of databricks-sdk: the environment first, then the profile."""
    names = {"host": "DATABRICKS_HOST", "token": "DATABRICKS_TOKEN", "auth_type": "DATABRICKS_AUTH_TYPE"}
    found = {key: os.environ[name] for key, name in names.items() if os.environ.get(name)}
    chosen = profile or os.environ.get("DATABRICKS_CONFIG_PROFILE")
    if profile is not None:
        found |= _profile_settings(profile)
    elif chosen or "host" not in found:
        found = {**_profile_settings(chosen or "DEFAULT"), **found}
    settings = SimpleNamespace(**{"host": None, "token": None, "auth_type": None, **found})
    settings.client_id = settings.client_secret = None
    return settings


def _check_reachable(url: str) -> None:
    """Connect to a workspace once, since databricks-sdk hides the cause when it cannot. Blocking.

    Raises:
        httpx.HTTPError: It cannot be reached.
    """
    import httpx

    # The certificate does not matter: nothing is sent that is secret, and nothing of the answer is used.
    client = httpx.Client(verify=False, timeout=_LOGIN_SECONDS, trust_env=not has_loopback_host(url))  # noqa: S501
    with unlogged_requests(), client:
        client.get(f"{url}/.well-known/databricks-config")

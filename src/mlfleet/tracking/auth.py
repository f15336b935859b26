"""Credentials and certificates for a tracking server, from its URI, arguments, the environment and MLflow's file."""

from __future__ import annotations

import base64
import netrc
import os
import ssl
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlunsplit

from mlfleet._text.masking import mask_uri
from mlfleet.errors import TrackingError, UsageError
from mlfleet.tracking.locations import split_uri

__all__ = ["Credentials", "Login", "ServerLogin", "Tls", "split_userinfo"]

_TRUE = frozenset({"true", "1"})


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user name with its password, or a token. A password wins over a token, as in MLflow.

    Attributes:
        username: The user name for HTTP basic authentication.
        password: The password for HTTP basic authentication.
        token: A bearer token.
    """

    username: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)

    def __bool__(self) -> bool:
        return bool((self.username and self.password) or self.token)

    def headers(self) -> dict[str, str]:
        """Return the header ``Authorization``; no header without a password or a token."""
        if self.username and self.password:
            pair = base64.b64encode(f"{self.username}:{self.password}".encode()).decode("ascii")
            return {"Authorization": f"Basic {pair}"}
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def environ(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the variables by which mlflow in a run finds these credentials: plain ones, and secret ones."""
        if self.username and self.password:
            return {"MLFLOW_TRACKING_USERNAME": self.username}, {"MLFLOW_TRACKING_PASSWORD": self.password}
        return {}, {"MLFLOW_TRACKING_TOKEN": self.token} if self.token else {}


class Login(ABC):
    """The address of a server and our credentials for it. It is prepared in a thread, since it reads files.

    Attributes:
        url: The URL of the server, without credentials and without a slash at its end.
        hint: The advice for an answer of 401 or 403.
        noun: The kind of server, for messages.
        remedy: The advice for a server that cannot be reached.
    """

    url: str
    hint: str
    noun: str = "tracking server"
    remedy: str = "start it (mlflow server) or check the tracking URI"

    @abstractmethod
    def prepare(self) -> None:
        """Determine `url` and the credentials. Called once, in a thread."""

    @abstractmethod
    async def headers(self) -> Mapping[str, str]:
        """Return the headers for the next request."""

    def may_have_expired(self, error: TrackingError) -> bool:
        """Return True if a refusal may be due to expired credentials, so that `renew` may help."""
        return False

    async def renew(self, refused: Mapping[str, str]) -> bool:
        """Log in again; return True if the next request has other headers than `refused`."""
        return False

    @abstractmethod
    def environ(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the variables by which a run finds the server: plain ones, and secret ones."""

    @abstractmethod
    def secrets(self) -> tuple[str, ...]:
        """Return the texts that no message may show."""


class ServerLogin(Login):
    """An MLflow server at an ``http(s)`` URL.

    The credentials are the first of: those in the URL, `credentials`, ``MLFLOW_TRACKING_USERNAME`` and
    ``MLFLOW_TRACKING_PASSWORD`` (or the ``[mlflow]`` section of ``~/.mlflow/credentials``), ``MLFLOW_TRACKING_TOKEN``,
    ``~/.netrc`` (or the file that ``NETRC`` names).

    Args:
        uri: The URI of the server.
        credentials: The credentials; None: those of the environment and of MLflow's file.
        read_netrc: True to read ``~/.netrc`` if there are no other credentials.
    """

    hint = (
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), "
        "and check that this user may do it"
    )

    def __init__(self, uri: str, credentials: Credentials | None = None, *, read_netrc: bool = True) -> None:
        self.url, in_uri = split_userinfo(uri)
        self._read_netrc = read_netrc
        self._credentials = in_uri or credentials or Credentials()
        self._headers: dict[str, str] = {}

    def prepare(self) -> None:  # noqa: D102
        refuse_plugins()
        if not self._credentials:
            self._credentials = _credentials_around()
        if not self._credentials and self._read_netrc:
            self._credentials = _in_netrc(split_uri(self.url).hostname or "")
        self._headers = self._credentials.headers()

    async def headers(self) -> Mapping[str, str]:  # noqa: D102
        return self._headers

    def environ(self) -> tuple[dict[str, str], dict[str, str]]:  # noqa: D102
        plain, secret = self._credentials.environ()
        return {"MLFLOW_TRACKING_URI": self.url, **plain}, secret

    def secrets(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(text for text in (self._credentials.password, self._credentials.token) if text)


@dataclass(frozen=True, slots=True)
class Tls:
    """The check of a server's certificate, and our own certificate.

    Attributes:
        insecure: True to check nothing.
        ca: A file or folder of certificates to trust; None: those of the system.
        client: A PEM file with our certificate and its key.
    """

    insecure: bool = False
    ca: Path | None = None
    client: Path | None = None

    @classmethod
    def from_environ(cls) -> Tls:
        """Read ``MLFLOW_TRACKING_INSECURE_TLS``, ``…_SERVER_CERT_PATH`` and ``…_CLIENT_CERT_PATH``.

        Raises:
            UsageError: The first two contradict each other.
        """
        insecure = _is_true("MLFLOW_TRACKING_INSECURE_TLS")
        ca = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH")
        if insecure and ca:
            raise UsageError(
                "MLFLOW_TRACKING_INSECURE_TLS and MLFLOW_TRACKING_SERVER_CERT_PATH contradict each other: "
                "unset the first to have the server's certificate checked"
            )
        ca = ca or os.environ.get("REQUESTS_CA_BUNDLE")
        client = os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH")
        return cls(insecure=insecure, ca=Path(ca) if ca else None, client=Path(client) if client else None)

    def context(self) -> ssl.SSLContext:
        """Return the TLS context. It reads files: call it in a thread.

        Raises:
            TrackingError: A certificate file cannot be read.
        """
        import httpx

        try:
            if self.insecure or self.ca is None:
                context = httpx.create_ssl_context(verify=not self.insecure)
            elif self.ca.is_dir():
                context = ssl.create_default_context(capath=str(self.ca))
            else:
                context = ssl.create_default_context(cafile=str(self.ca))
            if self.client is not None:
                context.load_cert_chain(str(self.client))
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(str(path) for path in (self.ca, self.client) if path is not None)
            text = f"the certificates for the tracking server cannot be loaded from {files}: {error}"
            raise TrackingError(text) from error
        return context


def split_userinfo(uri: str) -> tuple[str, Credentials]:
    """Split ``user:password@`` off a URI; return the rest of the URI and the credentials.

    Raises:
        UsageError: The URI has no host or an impossible port.
    """
    parts = split_uri(uri.strip())
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"the tracking URI {mask_uri(uri)!r} is wrong: {error}") from None
    if not host:
        raise UsageError(f"the tracking URI {mask_uri(uri)!r} names no host: it should look like http://host:5000")
    netloc = (f"[{host}]" if ":" in host else host) + (f":{port}" if port is not None else "")
    clean = urlunsplit((parts.scheme.lower(), netloc, parts.path.rstrip("/"), parts.query, ""))
    username, password = unquote(parts.username or ""), unquote(parts.password or "")
    return clean, Credentials(username=username or None, password=password or None)


def refuse_plugins() -> None:
    """Refuse MLflow's settings for authentication that needs mlflow itself.

    Raises:
        TrackingError: Such a setting is made.
    """
    remedy = "give RestTracking the headers that the server wants (headers=), or unset the variable"
    if plugin := os.environ.get("MLFLOW_TRACKING_AUTH"):
        raise TrackingError(
            f"MLFLOW_TRACKING_AUTH={plugin}: mlfleet cannot use mlflow's authentication plugins; {remedy}"
        )
    if _is_true("MLFLOW_TRACKING_AWS_SIGV4"):
        raise TrackingError(f"MLFLOW_TRACKING_AWS_SIGV4: mlfleet cannot sign requests for AWS; {remedy}")


def _credentials_around() -> Credentials:
    in_file = _credentials_file(Path("~/.mlflow/credentials").expanduser())
    return Credentials(
        username=os.environ.get("MLFLOW_TRACKING_USERNAME") or in_file.get("mlflow_tracking_username"),
        password=os.environ.get("MLFLOW_TRACKING_PASSWORD") or in_file.get("mlflow_tracking_password"),
        token=os.environ.get("MLFLOW_TRACKING_TOKEN"),
    )


def _in_netrc(host: str) -> Credentials:
    """Return the credentials in ``.netrc``; as for curl and mlflow, a file that cannot be parsed has none."""
    try:
        found = netrc.netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser()).authenticators(host)
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError):
        return Credentials()
    return Credentials(username=found[0] or found[1], password=found[2]) if found else Credentials()


def _credentials_file(path: Path) -> Mapping[str, str]:
    import configparser

    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        # The parser's own text quotes the line, and a password with it.
        raise TrackingError(
            f"{path} cannot be read: {type(error).__name__}; it should hold a section [mlflow]"
        ) from None
    return dict(parser["mlflow"]) if parser.has_section("mlflow") else {}


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in _TRUE

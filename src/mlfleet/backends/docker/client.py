"""The one client of a Docker engine: where the engine is, requests, streams, and the meaning of their failures."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import anyio
from aiodocker import Docker
from aiodocker.exceptions import DockerError

from mlfleet._concurrency.threads import LOGINS
from mlfleet._hosts import has_loopback_host
from mlfleet._oci.login import config_folder, read_config
from mlfleet._retry import RetryPolicy
from mlfleet._text.masking import mask_query
from mlfleet.errors import BackendError

__all__ = ["RETRIES", "Endpoint", "Engine", "EngineError", "find_endpoint", "is_away"]

RETRIES = RetryPolicy(seconds=60.0, first_pause=0.1, longest_pause=2.0)
"""The policy for every request that is repeated while the engine is away, because it restarts for example."""

# Seconds. A busy engine may take long to create and start a hundred containers; it always accepts connections at once.
_CONNECT, _ANSWER = 10.0, 300.0
_DEFAULT = "unix:///var/run/docker.sock"
_UNREACHABLE = 900  # aiodocker's status for it
_LONGEST_MESSAGE = 1000
_LONGEST_LINE = 2**22  # of a stream of JSON lines
_CERTIFICATES = "DOCKER_CERT_PATH to the folder with ca.pem, cert.pem and key.pem that it takes"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of an engine.

    Attributes:
        url: The URL, ``unix:///path`` or ``tcp://host:port``.
        tls: The TLS settings for a ``tcp`` engine that asks for it.
        certificates: The folder of the client's certificates.
    """

    url: str
    tls: ssl.SSLContext | None = field(default=None, repr=False, compare=False)
    certificates: Path | None = None

    @property
    def socket(self) -> str | None:
        """The path of the Unix socket; None if the engine is reached over the network."""
        return self.url.removeprefix("unix://") if self.url.startswith("unix://") else None

    @property
    def local(self) -> bool:
        """True if the engine is on this machine, as far as its address shows."""
        return self.socket is not None or has_loopback_host(self.url)


def find_endpoint(environ: Mapping[str, str]) -> Endpoint:
    """Return the engine that ``DOCKER_HOST``, ``DOCKER_CONTEXT`` or else the current context names. Blocking.

    Args:
        environ: The environment variables of this process.

    Raises:
        BackendError: The engine named there cannot be used; the text says why.
    """
    url = environ.get("DOCKER_HOST")
    if url:
        folder = Path(environ.get("DOCKER_CERT_PATH") or config_folder(environ))
        verify = bool(environ.get("DOCKER_TLS_VERIFY"))
        wanted = verify or bool(environ.get("DOCKER_TLS"))
        return _endpoint(url, folder if wanted else None, "DOCKER_HOST", verify=verify)
    name = environ.get("DOCKER_CONTEXT") or read_config(environ).get("currentContext")
    if name and name != "default":
        return _context(str(name), config_folder(environ))
    return Endpoint(_DEFAULT)


class EngineError(BackendError):
    """The engine refused something, or cannot be reached.

    Attributes:
        status: The HTTP status of the engine's answer; None if there was no answer.
        message: The engine's message.
    """

    def __init__(self, text: str, *, status: int | None = None, message: str = "") -> None:
        super().__init__(text, backend="docker")
        self.status = status
        self.message = message

    @property
    def unreachable(self) -> bool:
        """True if the engine gave no answer at all."""
        return self.status is None


def is_away(error: BaseException) -> bool:
    """Return True if the engine gave no answer at all: then it may answer the same request later."""
    return isinstance(error, EngineError) and error.unreachable


class Engine:
    """A Docker engine. Opened at its first use, so that one that is down now can be used later.

    Attributes:
        endpoint: The engine's address; None before the first use.
    """

    def __init__(self) -> None:
        self.endpoint: Endpoint | None = None
        self._docker: Docker | None = None
        self._opening = anyio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        docker, self._docker = self._docker, None
        if docker is not None:
            await docker.close()
            await docker.session.close()  # a session that was handed in is left open by aiodocker

    async def locate(self) -> Endpoint:
        """Return the engine's address, from the environment and Docker's configuration. Sends nothing.

        Raises:
            BackendError: The engine named there cannot be used.
        """
        if self.endpoint is None:
            self.endpoint = await LOGINS.run(lambda: find_endpoint(os.environ))
        return self.endpoint

    async def open(self) -> Docker:
        """Return the client, whose API version is that of the engine.

        Raises:
            EngineError: The engine is not there, or this user has no permission to use it.
        """
        if self._docker is None:
            async with self._opening:
                if self._docker is None:
                    self._docker = await self._connect(await self.locate())
        return self._docker

    async def _connect(self, endpoint: Endpoint) -> Docker:
        # Without a limit on connections: every running container holds one for its output.
        connector: aiohttp.BaseConnector
        if endpoint.socket is not None:
            connector = aiohttp.UnixConnector(endpoint.socket, limit=0)
        else:
            connector = aiohttp.TCPConnector(limit=0, ssl=endpoint.tls if endpoint.tls is not None else True)
        session = aiohttp.ClientSession(connector=connector, read_bufsize=_LONGEST_LINE)
        url = endpoint.url if endpoint.tls is None else endpoint.url.replace("tcp://", "https://", 1)
        docker = Docker(
            url=url.replace("tcp://", "http://", 1),
            connector=connector,
            session=session,
            timeout=aiohttp.ClientTimeout(total=_ANSWER, sock_connect=_CONNECT),
        )
        if endpoint.socket is not None:
            docker.docker_host = "http://localhost"
        try:
            with self._explained("asked for its version"):
                await docker.version()  # also sets the version of the API
        except BaseException:
            await docker.close()
            await session.close()
            raise
        return docker

    async def call(self, doing: str, work: Callable[[Docker], Awaitable[T]], *, seconds: float = _ANSWER) -> T:
        """Make a request.

        Args:
            doing: The words that complete "the Docker engine was …" in an error.
            work: A function that makes the request with the client.
            seconds: The time for the answer, 300 by default.

        Raises:
            EngineError: The engine refuses, or cannot be reached.
        """
        docker = await self.open()
        with self._explained(doing), anyio.fail_after(seconds):
            return await work(docker)

    @asynccontextmanager
    async def stream(
        self,
        doing: str,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        data: AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[aiohttp.StreamReader]:
        """Make a request with an endless answer, and close its connection at the end of the ``async with``.

        aiodocker has no public methods for such answers: ``events.run`` does not say when the stream is open,
        ``container.log`` decodes the bytes, ``container.attach`` cannot be told from a connection that broke,
        ``images.pull`` and ``images.push`` take credentials only for names with a host, and ``images.build`` reads its
        file in the event loop.

        Args:
            doing: The words that complete "the Docker engine was …" in an error.
            method: The HTTP method.
            path: The path below the API's version.
            params: The parameters of the query; those that are None are left out.
            headers: The headers to send.
            data: The body to send.

        Raises:
            EngineError: The engine refuses or cannot be reached. Errors of the body of the ``async with`` become this,
                too.
        """
        docker = await self.open()
        endless = aiohttp.ClientTimeout(sock_connect=_CONNECT)
        with self._explained(doing):
            async with docker._query(
                path, method, params=_query(params), headers=headers, data=data, timeout=endless
            ) as response:
                try:
                    yield response.content
                finally:
                    response.close()

    async def json_lines(
        self,
        doing: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        data: AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the objects of the answer to a POST, which is JSON lines; for the arguments see `stream`.

        Raises:
            EngineError: Also for an error that a line reports.
        """
        async with self.stream(doing, "POST", path, params=params, headers=headers, data=data) as content:
            async for line in content:
                if not line.strip():
                    continue
                item = json.loads(line)
                if "error" in item:
                    detail = item.get("errorDetail") or {}
                    raise DockerError(500, str(detail.get("message") or item["error"]))
                yield item

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        endpoint = self.endpoint
        assert endpoint is not None  # noqa: S101 - set before the first request
        try:
            yield
        except DockerError as error:
            if error.status == _UNREACHABLE:
                raise _unreachable(endpoint, error.__context__) from error
            message = _short(_plain(error.message))
            if "no space left on device" in message:
                message += " (the engine's disk is full: 'docker system df' tells of what)"
            text = f"the Docker engine was {doing}, and refused: {message}"
            if "to an HTTPS server" in message:
                text = f"the Docker engine at {endpoint.url} asks for TLS: set DOCKER_TLS_VERIFY=1, and {_CERTIFICATES}"
            raise EngineError(text, status=error.status, message=message) from error
        except TimeoutError as error:
            text = f"the Docker engine at {endpoint.url} was {doing}, and gave no answer in time"
            raise EngineError(text, message=text) from error
        except (aiohttp.ClientError, asyncio.IncompleteReadError, OSError) as error:
            raise _unreachable(endpoint, error) from error
        except ValueError as error:
            text = f"the Docker engine at {endpoint.url} was {doing}, and its answer makes no sense: {error}"
            raise EngineError(text, status=500, message=text) from error


def _query(params: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the parameters of a URL: without those that are None, and with mappings as JSON."""
    given = {name: value for name, value in (params or {}).items() if value is not None}
    return {name: json.dumps(value) if isinstance(value, dict | bool) else str(value) for name, value in given.items()}


def _unreachable(endpoint: Endpoint, error: BaseException | None) -> EngineError:
    url, folder = endpoint.url, endpoint.certificates
    system = getattr(error, "certificate_error", None) or getattr(error, "os_error", error)
    if isinstance(system, OSError) and isinstance(system.__cause__, ssl.SSLError):
        system = system.__cause__
    number = system.errno if isinstance(system, OSError) else None
    if isinstance(system, ssl.SSLCertVerificationError):
        text = (
            f"the certificate of the Docker engine at {url} is not trusted ({system.verify_message}): is"
            f" {folder}/ca.pem that of its authority, and the address the one that it is for?"
        )
    elif isinstance(system, ssl.SSLError):
        refusal = f"the Docker engine at {url} does not take the certificate in {folder}"
        text = f"{refusal} ({system.reason}): set {_CERTIFICATES}"
    elif number in (errno.EACCES, errno.EPERM):
        text = (
            f"there is no permission to use the Docker engine at {url}: add this user to the group of the socket"
            " (usually 'docker') and log in again, or set DOCKER_HOST to an engine of this user's own"
        )
    elif number in (errno.ENOENT, errno.ECONNREFUSED):
        text = f"there is no Docker engine at {url}: start it, or set DOCKER_HOST to where it is"
    elif isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError | asyncio.IncompleteReadError):
        text = f"the connection to the Docker engine at {url} broke off"
    else:
        text = f"the Docker engine at {url} cannot be reached: {_short(str(error))}"
    return EngineError(text, message=text)


def _plain(message: str) -> str:
    """Return the text of an answer, also of engines that label their JSON differently from Docker."""
    try:
        return str(json.loads(message)["message"])
    except (ValueError, KeyError, TypeError):
        return message


def _short(message: str) -> str:
    message = mask_query(message.strip())
    return message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + " …"


def _context(name: str, folder: Path) -> Endpoint:
    # https://github.com/docker/cli/blob/master/cli/context/store/doc.go
    key = hashlib.sha256(name.encode()).hexdigest()
    path = folder / "contexts" / "meta" / key / "meta.json"
    try:
        endpoint = json.loads(path.read_bytes())["Endpoints"]["docker"]
        url, verify = str(endpoint["Host"]), not endpoint.get("SkipTLSVerify", False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"the Docker context {name!r} cannot be read from {path}: choose another with 'docker context use'"
        raise BackendError(text, backend="docker") from error
    certificates = folder / "contexts" / "tls" / key / "docker"
    given = certificates if certificates.is_dir() else None
    return _endpoint(url, given, f"the Docker context {name!r}", verify=verify)


def _endpoint(url: str, certificates: Path | None, source: str, *, verify: bool) -> Endpoint:
    if not url.startswith(("unix://", "tcp://", "http://", "https://")):
        hint = "; for a machine behind ssh, forward its socket: ssh -L /tmp/docker.sock:/var/run/docker.sock HOST"
        text = f"{source} is {url!r}: unix:///path and tcp://host:port are understood{hint}"
        raise BackendError(text, backend="docker")
    # A socket of this machine has no use for them, whatever else is set.
    if certificates is None or url.startswith("unix://"):
        return Endpoint(url)
    return Endpoint(url, _tls(certificates, verify=verify), certificates)


def _tls(folder: Path, *, verify: bool) -> ssl.SSLContext:
    files = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
    try:
        authority, certificate, key = (path if path.exists() else None for path in files)
        context = ssl.create_default_context(cafile=authority)
        if not verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if certificate is not None and key is not None:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        text = f"the certificates for the Docker engine in {folder} cannot be used: {error}"
        raise BackendError(text, backend="docker") from error
    if (certificate is None) != (key is None):
        text = f"the certificates for the Docker engine in {folder} need both, cert.pem and key.pem"
        raise BackendError(text, backend="docker")
    return context

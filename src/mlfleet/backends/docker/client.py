"""The one connection to a Docker engine: requests, streams, and what their failures mean."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, Self

import aiohttp
import anyio
from aiodocker import Docker
from aiodocker.exceptions import DockerError

from mlfleet._concurrency.threads import LOGINS
from mlfleet._text.masking import mask_query
from mlfleet.backends.docker.endpoint import Endpoint, find_endpoint
from mlfleet.errors import BackendError

__all__ = ["Engine", "EngineError"]

# Seconds. A busy engine may take long to create and start a hundred containers; it always takes a connection at once.
_CONNECT, _ANSWER = 10.0, 300.0
_UNREACHABLE = 900  # aiodocker's status for it
_LONGEST_MESSAGE = 1000
_LONGEST_LINE = 2**22  # of a stream of JSON lines
_CERTIFICATES = "DOCKER_CERT_PATH to the folder with ca.pem, cert.pem and key.pem that it takes"


class EngineError(BackendError):
    """The engine refused something, or cannot be reached.

    Attributes:
        status: the HTTP status of its answer; None if there was none.
        message: what it said.
    """

    def __init__(self, text: str, *, status: int | None = None, message: str = "") -> None:
        super().__init__(text, backend="docker")
        self.status = status
        self.message = message

    @property
    def unreachable(self) -> bool:
        """Whether the engine gave no answer at all."""
        return self.status is None


class Engine:
    """A Docker engine. Opened at its first use, so that one that is down now can be used later.

    Attributes:
        endpoint: where it is, once it was opened.
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
            await docker.session.close()

    async def located(self) -> Endpoint:
        """Where the engine is. Asks nobody but the environment and Docker's configuration."""
        if self.endpoint is None:
            self.endpoint = await LOGINS.run(lambda: find_endpoint(os.environ))
        return self.endpoint

    async def opened(self) -> Docker:
        """The client, whose API version is that of the engine.

        Raises:
            EngineError: there is no engine, or no permission to use it.
        """
        if self._docker is None:
            async with self._opening:
                if self._docker is None:
                    self._docker = await self._open(await self.located())
        return self._docker

    async def _open(self, endpoint: Endpoint) -> Docker:
        # Without a limit of connections: every running container holds one for its output.
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
            with self._explained("asked for its version", endpoint):
                await docker._check_version()
        except BaseException:
            await docker.close()
            await session.close()
            raise
        return docker

    async def call(
        self,
        doing: str,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: object = None,
    ) -> Any:
        """Ask the engine for something; its answer, from JSON.

        Args:
            doing: completes "the Docker engine was …", for the error.
            method: of HTTP.
            path: below the API's version.
            params: of the query.
            body: becomes JSON.

        Raises:
            EngineError: it refuses or cannot be reached.
        """
        docker = await self.opened()
        with self._explained(doing):
            return await docker._query_json(path, method, params=_query(params), data=body)

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
        """Like `call`, for an answer that goes on and on. Its connection is closed at the end.

        Errors of the body of the ``async with`` are translated, too.
        """
        docker = await self.opened()
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
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        data: AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream of JSON lines.

        Raises:
            EngineError: also for an error that the stream tells of.
        """
        async with self.stream(doing, method, path, params=params, headers=headers, data=data) as content:
            async for line in content:
                if not line.strip():
                    continue
                item = json.loads(line)
                if "error" in item:
                    detail = item.get("errorDetail") or {}
                    raise DockerError(500, str(detail.get("message") or item["error"]))
                yield item

    @contextmanager
    def _explained(self, doing: str, endpoint: Endpoint | None = None) -> Iterator[None]:
        endpoint = endpoint or self.endpoint or Endpoint("(unknown)")
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
    """Parameters of a URL: what is None is left out, what is a mapping becomes JSON."""
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
    """The text of an answer, also of engines that declare their JSON otherwise than Docker does."""
    try:
        return str(json.loads(message)["message"])
    except (ValueError, KeyError, TypeError):
        return message


def _short(message: str) -> str:
    message = mask_query(message.strip())
    return message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + " …"

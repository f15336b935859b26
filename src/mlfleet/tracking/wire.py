"""Our own connections under httpx: they cost a fifth of the time that httpx's own take.

A fan-out of hundreds of runs spends most of its driver's time on requests, and most of that in httpx's HTTP/1.1 in pure
Python. Everything above the wire stays httpx's.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import NamedTuple

import httpx

from mlfleet.http1.client import Client
from mlfleet.http1.connection import Connection
from mlfleet.http1.errors import BrokenAnswer, CannotConnect, SilentServer
from mlfleet.http1.origin import Origin, environment_proxy

__all__ = ["Answer", "Wire"]

# What says whether a request may have reached the server must not be mixed up.
_MEANINGS: tuple[tuple[type[Exception], type[httpx.TransportError]], ...] = (
    (CannotConnect, httpx.ConnectError),
    (SilentServer, httpx.ReadTimeout),
    (BrokenAnswer, httpx.RemoteProtocolError),
    (ValueError, httpx.LocalProtocolError),
)
_PROBLEMS = tuple(theirs for theirs, _ in _MEANINGS)


class Answer(NamedTuple):
    """A small answer, read to its end.

    Attributes:
        status: of HTTP.
        headers: names and values.
        body: its content.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @property
    def is_success(self) -> bool:
        """Whether the server did what it was asked."""
        return 200 <= self.status < 300

    def to_httpx(self) -> httpx.Response:
        """For all who look closer, which takes some time."""
        return httpx.Response(self.status, headers=self.headers, content=self.body)


class Wire(httpx.AsyncBaseTransport):
    """Sends httpx's requests. Made anywhere; connects in the event loop that first uses it.

    Args:
        server: its URL, for `exchange`.
        tls: for https.
        keepalive: seconds that an idle connection is kept.
        connect: seconds to connect.
        silence: seconds without a byte of an answer.
        trust_env: take proxies from the environment.
    """

    def __init__(
        self, server: str, *, tls: ssl.SSLContext, keepalive: float, connect: float, silence: float, trust_env: bool
    ) -> None:
        self._client = Client(keepalive=keepalive, connect=connect)
        self._tls = tls
        self._silence = silence
        self._trust_env = trust_env
        self._origins: dict[str, Origin] = {}
        scheme, _, rest = server.partition("://")
        authority, slash, path = rest.partition("/")
        self._server = self._origin(f"{scheme}://{authority}"), slash + path

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the answer's body is read as it is asked for."""
        stream, url = request.stream, request.url
        content: bytes | AsyncIterable[bytes] | None
        ours: tuple[bytes, ...] = (b"host",)
        if isinstance(stream, httpx.ByteStream):
            content = b"".join(stream) or None
            ours += (b"content-length",)
        else:
            assert isinstance(stream, httpx.AsyncByteStream)  # noqa: S101 - what an AsyncClient sends
            content = stream
        try:
            connection = await self._client.request(
                self._origin(f"{url.scheme}://{url.netloc.decode('ascii')}"),
                request.method,
                url.raw_path.decode("ascii"),
                [(name.decode(), value.decode()) for name, value in request.headers.raw if name.lower() not in ours],
                content,
                silence=self._silence,
            )
        except _PROBLEMS as problem:
            raise _meaning(problem) from problem
        return httpx.Response(
            connection.status,
            headers=connection.raw_headers,
            stream=_Body(self._client, connection),
            extensions={"http_version": b"HTTP/1.1", "reason_phrase": connection.reason.encode()},
        )

    async def exchange(
        self,
        method: str,
        target: str,
        headers: Iterable[tuple[str, str]],
        content: bytes | None,
        *,
        linger: float = 0.0,
    ) -> Answer:
        """Send a request with a small answer, without what httpx itself does around it: half the time again.

        Args:
            method: of HTTP.
            target: below the server's URL, in ASCII, escaped.
            headers: all of them.
            content: the body.
            linger: seconds for which a cancelled call still waits for the answer.
        """
        client, (origin, path) = self._client, self._server
        try:
            connection = await client.request(
                origin, method, path + target, headers, content, silence=self._silence, whole=True, linger=linger
            )
            answer = Answer(connection.status, connection.raw_headers, await connection.chunk())
        except _PROBLEMS as problem:
            raise _meaning(problem) from problem
        client.release(connection)
        return answer

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.close()

    def _origin(self, place: str) -> Origin:
        origin = self._origins.get(place)
        if origin is None:
            scheme, _, authority = place.partition("://")
            proxy = environment_proxy(place) if self._trust_env else None
            origin = self._origins[place] = Origin(scheme, authority, self._tls, proxy=proxy)
        return origin


class _Body(httpx.AsyncByteStream):
    """The body of an answer."""

    def __init__(self, client: Client, connection: Connection) -> None:
        self._client = client
        self._connection: Connection | None = connection

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while self._connection is not None and (chunk := await self._connection.chunk()):
                yield chunk
        except _PROBLEMS as problem:
            raise _meaning(problem) from problem

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._client.release(connection)


def _meaning(problem: Exception) -> httpx.TransportError:
    return next(ours(str(problem)) for theirs, ours in _MEANINGS if isinstance(problem, theirs))

"""aiohttp under httpx: its connections cost a third of the time that httpx's own take.

A fan-out of hundreds of runs spends most of its driver's time on requests, and most of that in httpx's HTTP/1.1 in pure
Python. aiohttp speaks it in C. Everything above the wire stays httpx's.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp
import httpx
from multidict import CIMultiDict
from yarl import URL

__all__ = ["AiohttpTransport", "Answer"]

_CHUNK = 64 * 1024
_NO_DEFAULTS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")

# From the particular to the general; what says whether a request may have reached the server must not be mixed up.
_MEANINGS: tuple[tuple[type[Exception], type[httpx.TransportError]], ...] = (
    (aiohttp.ClientProxyConnectionError, httpx.ProxyError),
    (aiohttp.ClientHttpProxyError, httpx.ProxyError),
    (aiohttp.ConnectionTimeoutError, httpx.ConnectTimeout),
    (aiohttp.ClientConnectorError, httpx.ConnectError),
    (aiohttp.InvalidURL, httpx.UnsupportedProtocol),
    (TimeoutError, httpx.ReadTimeout),
    (aiohttp.ServerDisconnectedError, httpx.RemoteProtocolError),
    (aiohttp.ClientResponseError, httpx.RemoteProtocolError),
    (aiohttp.ClientError, httpx.ReadError),
    (OSError, httpx.ReadError),
)


@dataclass(frozen=True, slots=True)
class Answer:
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


class AiohttpTransport(httpx.AsyncBaseTransport):
    """Sends httpx's requests by aiohttp. Made anywhere; connects in the event loop that first uses it.

    Args:
        tls: for https.
        connections: at the same time.
        keepalive: seconds that an idle connection is kept.
        connect: seconds to connect.
        read: seconds without a byte of an answer.
        trust_env: take proxies from the environment.
    """

    def __init__(
        self, *, tls: ssl.SSLContext, connections: int, keepalive: float, connect: float, read: float, trust_env: bool
    ) -> None:
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect, sock_read=read)
        self._tls = tls
        self._connections = connections
        self._keepalive = keepalive
        self._trust_env = trust_env
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the answer's body is read as it is asked for."""
        stream = request.stream
        with _translated():
            answer = await self._opened().request(
                request.method,
                URL(str(request.url), encoded=True),
                headers=CIMultiDict(request.headers.multi_items()),
                data=(b"".join(stream) or None) if isinstance(stream, httpx.ByteStream) else stream,
                allow_redirects=False,
            )
        return httpx.Response(
            answer.status,
            headers=answer.raw_headers,
            stream=_Body(answer),
            extensions={"http_version": b"HTTP/1.1", "reason_phrase": (answer.reason or "").encode()},
        )

    async def exchange(self, method: str, url: str, *, headers: Mapping[str, str], content: bytes | None) -> Answer:
        """Send a request with a small answer, without what httpx itself does around it: half the time again.

        Args:
            method: of HTTP.
            url: in ASCII, escaped.
            headers: all of them.
            content: the body.
        """
        with _translated():
            async with self._opened().request(
                method,
                URL(url, encoded=True),
                headers=headers,
                data=content,
                allow_redirects=False,
            ) as answer:
                body = await answer.read()
        return Answer(answer.status, answer.raw_headers, body)

    async def aclose(self) -> None:
        """Close all connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = self._open()
        return self._session

    def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            ssl=self._tls, limit=self._connections, keepalive_timeout=self._keepalive, use_dns_cache=True
        )
        return aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_NO_DEFAULTS,
            timeout=self._timeout,
            trust_env=self._trust_env,
        )


class _Body(httpx.AsyncByteStream):
    """The body of an answer."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _translated():
            async for chunk in self._answer.content.iter_chunked(_CHUNK):
                yield chunk

    async def aclose(self) -> None:
        # A connection whose answer was read to its end is back in the pool already; any other is of no more use.
        self._answer.close()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        for theirs, ours in _MEANINGS:
            if isinstance(error, theirs):
                raise ours(str(error)) from error
        raise

"""An HTTP server on loopback that forwards requests or fails, as a test decides: faults of a network, on demand."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from fakes.listening import listening


@dataclass(frozen=True, slots=True)
class Request:
    """A request that came in."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to send.

    Attributes:
        status: The HTTP status code.
        body: The content.
        headers: The headers besides Content-Length.
        sent: The number of bytes of the body to send before the connection is closed; None: all.
    """

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    sent: int | None = None


Forward = Callable[[], Awaitable[Answer]]
Rule = Callable[[Request, Forward], Awaitable[Answer | None]]
"""Decides about one request; None closes the connection without an answer."""


class FlakyProxy:
    """A server that forwards requests to `upstream`, or does what `rule` decides.

    Attributes:
        url: The URL on which it listens.
        rule: The rule for each request; None: forward it.
        requests: All requests that came in.
        peak: The largest number of requests that were in flight at the same time.
    """

    def __init__(self, upstream: str | None = None, *, tls: ssl.SSLContext | None = None) -> None:
        self.url = ""
        self.rule: Rule | None = None
        self.requests: list[Request] = []
        self.peak = 0
        self._under_way = 0
        self._upstream = upstream
        self._tls = tls
        self._handlers: set[asyncio.Task[None]] = set()

    def count(self, part: str) -> int:
        """Return the number of requests with `part` in their target."""
        return sum(part in request.target for request in self.requests)

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[FlakyProxy]:
        """Listen for the time of the block."""
        async with listening(self._accept, self._handlers, "127.0.0.1", self._tls) as port:
            self.url = f"{'https' if self._tls else 'http'}://127.0.0.1:{port}"
            yield self

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        try:
            while await self._serve(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        except asyncio.CancelledError:
            # Ours, at the end of `listen`; asyncio's streams would report it as an error.
            # A TLS connection that is only closed waits for the other side's goodbye.
            writer.transport.abort()
        finally:
            self._handlers.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        request = await _read_request(reader)
        self.requests.append(request)
        self._under_way += 1
        self.peak = max(self.peak, self._under_way)
        try:
            answer = await self._decide(request)
        finally:
            self._under_way -= 1
        if answer is None:
            return False
        writer.write(_head(answer) + (b"" if request.method == "HEAD" else answer.body[: answer.sent]))
        await writer.drain()
        return answer.sent is None

    async def _decide(self, request: Request) -> Answer | None:
        async def forward() -> Answer:
            # The upstream finishes a request although its client has gone.
            return await asyncio.shield(asyncio.ensure_future(self._forward(request)))

        return await (self.rule(request, forward) if self.rule is not None else forward())

    async def _forward(self, request: Request) -> Answer:
        assert self._upstream is not None, "nothing to forward to"
        parts = urlsplit(self._upstream)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            headers = {**request.headers, "host": parts.netloc, "connection": "close"}
            lines = [
                f"{request.method} {request.target} HTTP/1.1",
                *(f"{name}: {text}" for name, text in headers.items()),
            ]
            writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + request.body)
            await writer.drain()
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        status, fields = _parse_head(head)
        # The length in the answer to HEAD is that of a body which is not sent.
        dropped = ("connection",) if request.method == "HEAD" else ("connection", "content-length")
        kept = {name: text for name, text in fields.items() if name not in dropped}
        return Answer(int(status.split()[1]), body, kept)


async def _read_request(reader: asyncio.StreamReader) -> Request:
    first, headers = _parse_head((await reader.readuntil(b"\r\n\r\n"))[:-4])
    method, target, _ = first.split()
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(method, target, headers, body)


def _parse_head(head: bytes) -> tuple[str, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return first, {name.strip().lower(): text.strip() for name, _, text in pairs}


def _head(answer: Answer) -> bytes:
    headers = {"content-length": str(len(answer.body)), **answer.headers}
    lines = [f"HTTP/1.1 {answer.status} Whatever", *(f"{name}: {text}" for name, text in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")

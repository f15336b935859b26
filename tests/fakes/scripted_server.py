"""A server on loopback that sends what a test writes, byte by byte, and gives the requests to it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fakes.listening import listening

__all__ = ["Peer", "Request", "Script", "ScriptedServer", "scripted"]


@dataclass(frozen=True, slots=True)
class Request:
    """A request that came in."""

    first: str
    headers: Mapping[str, str]
    body: bytes


class Peer:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> Request:
        """Read the next request, with a body of its Content-Length."""
        head = await self.head()
        return Request(head.first, head.headers, await self.reader.readexactly(int(head.headers["content-length"])))

    async def head(self) -> Request:
        """Read the head of the next request."""
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n"))[:-4].decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return Request(first, {"content-length": "0"} | headers, b"")

    async def send(self, *pieces: bytes) -> None:
        """Send the pieces so that each is read on its own."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await turns(2)  # one in which it arrives, and one in which it is read

    async def answer(self, *pieces: bytes) -> Request:
        """Send an answer to the next request."""
        request = await self.request()
        await self.send(*pieces)
        return request

    async def closed(self) -> bytes:
        """Wait until the client closes the connection; return what it had still sent."""
        rest = bytearray()
        try:
            while more := await self.reader.read(65536):
                rest += more
        except ConnectionError:
            pass
        return bytes(rest)


Script = Callable[[Peer], Awaitable[object]]


class ScriptedServer:
    """A server whose connections are served by one script after the other, all further ones by the last.

    Attributes:
        port: The port on which it listens.
        accepted: The number of connections so far.
        ended: The number of scripts that have ended; their connections are closed.
    """

    def __init__(self, *scripts: Script) -> None:
        self.port = 0
        self.accepted = 0
        self.ended = 0
        self._scripts = scripts
        self._handlers: set[asyncio.Task[None]] = set()
        self._errors: list[Exception] = []

    @property
    def place(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    async def done(self) -> None:
        """Wait until all scripts that have begun have ended."""
        while self._handlers:
            await asyncio.wait(self._handlers)

    @asynccontextmanager
    async def _listen(self, host: str, tls: ssl.SSLContext | None) -> AsyncIterator[ScriptedServer]:
        async with listening(self._accept, self._handlers, host, tls) as self.port:
            yield self
        if self._errors:
            raise ExceptionGroup("scripts of the server failed", self._errors)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        self.accepted += 1
        try:
            await self._scripts[min(self.accepted, len(self._scripts)) - 1](Peer(reader, writer))
            self.ended += 1
        except asyncio.CancelledError:
            writer.transport.abort()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went
        except Exception as error:
            if not writer.is_closing():  # uvloop's own error when the client went
                self._errors.append(error)
            writer.transport.abort()
        finally:
            self._handlers.discard(task)
            writer.close()


@asynccontextmanager
async def scripted(
    *scripts: Script, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[ScriptedServer]:
    """Listen for the time of the block."""
    async with ScriptedServer(*scripts)._listen(host, tls) as server:
        yield server


async def turns(count: int) -> None:
    """Let the event loop run some iterations, in which it reads what the kernel has already received."""
    for _ in range(count):
        await asyncio.sleep(0)

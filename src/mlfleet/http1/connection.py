"""One connection, and the request and the answer that it carries at the moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

import httptools

from mlfleet._concurrency.cancellation import wait_done
from mlfleet.http1.errors import BrokenAnswer, SilentServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlfleet.http1.origin import Origin

__all__ = ["Connection"]

_HELD = 256 * 1024  # bytes of an answer that wait for their reader; more stay on the way
_LONGEST_HEAD = 256 * 1024


class Connection(asyncio.Protocol):
    """Carries one request after the other; what has come of the answer is in its attributes.

    It is answer, stream and protocol in one, and has no task: a thousand logs that are followed are a thousand of
    these, and every full garbage collection looks at all that they consist of.

    Attributes:
        origin: where it leads.
        status: of the answer; 0 before there is one.
        raw_headers: of the answer.
        idle_since: when its last answer ended, in the event loop's time.
        transport: set by what connects it.
    """

    __slots__ = (
        "_body", "_failure", "_headers", "_heard", "_heard_at", "_is_complete", "_is_half_sent", "_is_head", "_is_lost",
        "_is_paused", "_is_whole", "_is_writable", "_keep", "_on_lost", "_parser", "_silence", "_timer", "_waiter",
        "idle_since", "origin", "raw_headers", "status", "transport",
    )  # fmt: skip

    def __init__(self, origin: Origin, on_lost: Callable[[Connection], None]) -> None:
        self.origin = origin
        self.transport: asyncio.Transport | None = None
        self.idle_since = 0.0
        self._on_lost = on_lost
        self._is_lost = False
        self._is_writable = True
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heard_at = 0.0
        self._body = bytearray()
        # It holds this, too: there is none before the first request, which one that never gets connected has not.
        self._parser: httptools.HttpResponseParser | None = None
        self._begin(None, whole=False, head=False)
        self._is_complete = True

    def _begin(self, silence: float | None, *, whole: bool, head: bool) -> None:
        """Nothing is left of the request before."""
        self._headers: list[tuple[bytes, bytes]] | None = []
        self._silence = silence
        self._is_whole = whole
        self._is_head = head
        self._is_complete = self._is_half_sent = self._is_paused = self._keep = False
        self._heard = 0
        self._body.clear()
        self.status = 0
        self.raw_headers: tuple[tuple[bytes, bytes], ...] = ()

    # ---- for who asks -----------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether a request can be sent."""
        return not (self._is_lost or self._failure or self.transport is None or self.transport.is_closing())

    @property
    def is_reusable(self) -> bool:
        """Whether its answer has come to its end, and the server listens to another request."""
        return self._is_complete and self._keep and not self._is_half_sent and self.is_open

    @property
    def is_complete(self) -> bool:
        """Whether the answer has come to its end."""
        return self._is_complete

    @property
    def is_unanswered(self) -> bool:
        """Whether not one byte came."""
        return self._heard == 0

    @property
    def reason(self) -> str:
        """The status in words."""
        try:
            return HTTPStatus(self.status).phrase
        except ValueError:
            return ""

    def headers(self, name: str) -> list[str]:
        """The values of a header of the answer.

        Args:
            name: in small letters.
        """
        wanted = name.encode()
        return [value.decode("latin-1").rstrip(" \t") for each, value in self.raw_headers if each.lower() == wanted]

    async def ask(
        self,
        request: bytes,
        content: AsyncIterable[bytes] | None = None,
        *,
        silence: float | None,
        whole: bool = False,
        head: bool = False,
        linger: float = 0.0,
    ) -> None:
        """Send a request and wait for the head of its answer. Whatever interrupts it closes the connection.

        Args:
            request: its head, and its content where that is small.
            content: the rest of it.
            silence: seconds without a byte of an answer, after which it is given up; None: never.
            whole: wait for the end of the answer.
            head: the answer ends with its head, whatever that says of its content.
            linger: seconds for which a cancelled call still waits for the end of the answer before it closes the
                connection: a server may go on with a request whose client is gone, and only the answer tells when it is
                done.

        Raises:
            BrokenAnswer: the connection broke, or what came is no HTTP.
            SilentServer: nothing came for too long.
        """
        if self._parser is None or self._is_head or not self._is_complete:
            # It did not see the end of the answer before, or sees none where we do.
            self._parser = httptools.HttpResponseParser(self)
        self._begin(silence, whole=whole, head=head)
        try:
            self._write(request)
            if content is not None:
                await self._send(content)
            try:
                while not (self._is_complete if whole else self.status):
                    await self._change()
            except asyncio.CancelledError:
                if linger:
                    reading = asyncio.ensure_future(self.read())
                    timer = asyncio.get_running_loop().call_later(linger, reading.cancel)
                    await wait_done(reading)
                    timer.cancel()
                    _ = reading.cancelled() or reading.exception()
                raise
        except BaseException:
            self.close()
            raise

    async def chunk(self) -> bytes:
        """What has come of the content since the last time; waits for some. Empty at the end of the answer.

        Raises:
            BrokenAnswer: it does not come to its end.
            SilentServer: nothing came for too long.
        """
        while not self._body and not self._is_complete:
            await self._change()
        chunk = bytes(self._body)
        self._body.clear()
        self._resume_reading()
        return chunk

    async def read(self, limit: int | None = None) -> bytes:
        """The content to its end.

        Args:
            limit: of bytes, after which the rest is left where it is.
        """
        content = bytearray(await self.chunk())
        while not self._is_complete and (limit is None or len(content) < limit):
            content += await self.chunk()
        return bytes(content[:limit])

    def close(self) -> None:
        """Close it, now."""
        if self.transport is not None:
            self.transport.abort()

    # ---- sending and waiting ----------------------------------------------------------------------------------------

    async def _send(self, content: AsyncIterable[bytes]) -> None:
        async for chunk in content:
            while not (self._is_writable or self.status):
                await self._change()
            if self.status:
                # An answer that comes before all was sent is a refusal: nobody wants the rest.
                self._is_half_sent = True
                return
            self._write(chunk)

    def _write(self, data: bytes) -> None:
        if self._failure is not None:  # perhaps while the source of the content was waited for
            raise self._error()
        assert self.transport is not None  # noqa: S101 - it is connected
        self.transport.write(data)

    def _error(self) -> Exception:
        """A new one each time: what is raised holds the frames that it passed, and they hold the connection."""
        assert self._failure is not None  # noqa: S101
        error = type(self._failure)(*self._failure.args)
        error.__cause__ = self._failure.__cause__
        return error

    def _change(self) -> asyncio.Future[None]:
        """To be awaited until something changes. No coroutine of its own, which a thousand followed logs would keep."""
        if self._failure is not None:
            raise self._error()
        loop = asyncio.get_running_loop()
        if self._silence is not None:
            self._heard_at = loop.time()
            self._listen(loop, self._heard_at + self._silence)
        self._waiter = loop.create_future()
        return self._waiter

    def _listen(self, loop: asyncio.AbstractEventLoop, until: float) -> None:
        """Have the silence checked. The timer is not set anew for each byte: it looks when the last one came."""
        if self._timer is not None and self._timer.when() > until:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = loop.call_at(until, self._check_silence)

    def _check_silence(self) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done() or self._silence is None:
            return
        loop = asyncio.get_running_loop()
        until = self._heard_at + self._silence
        if loop.time() < until:
            self._listen(loop, until)
        else:
            self._fail(SilentServer(f"nothing came for {self._silence:g} s"))

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error
        self._wake()
        self._close_soon()

    def _close_soon(self) -> None:
        """Not within what the transport calls: asyncio's TLS fails if it is closed while it takes in the last bytes."""
        asyncio.get_running_loop().call_soon(self.close)

    def _resume_reading(self) -> None:
        if self._is_paused and self.transport is not None:
            self._is_paused = False
            self.transport.resume_reading()

    # ---- what the transport calls -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:  # noqa: D102
        if self._parser is None or self._is_complete:
            # Nobody has asked: it is no answer to the next request either.
            self._keep = False
            self._close_soon()
            return
        self._heard += len(data)
        if self._silence is not None:
            self._heard_at = asyncio.get_running_loop().time()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(BrokenAnswer("the server goes over to another protocol"))
        except httptools.HttpParserError as error:
            self._fail(BrokenAnswer(f"this is no HTTP: {error}"))
        if not self.status and self._heard > _LONGEST_HEAD:
            self._fail(BrokenAnswer(f"the headers have more than {_LONGEST_HEAD} bytes"))

    def pause_writing(self) -> None:  # noqa: D102
        self._is_writable = False

    def resume_writing(self) -> None:  # noqa: D102
        self._is_writable = True
        self._wake()

    def eof_received(self) -> None:
        """The server sends nothing more. Only this ends an answer: a connection may be lost by our own closing, too.

        uvloop does not call it if TLS did not end properly; such an answer may have been cut by anybody
        (https://www.rfc-editor.org/rfc/rfc9112#section-9.8).
        """
        self._keep = False
        if self._is_complete or self._failure is not None:
            return
        if self.status and self._ends_with_connection():
            self._is_complete = True
        else:
            self._failure = BrokenAnswer("the server closed the connection before the end of its answer")
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:  # noqa: D102
        self._is_lost = True
        if self._timer is not None:
            self._timer.cancel()
        if not self._is_complete and self._failure is None:
            self._failure = BrokenAnswer(str(error or "") or "the connection was closed before the end of the answer")
            self._failure.__cause__ = error
        self._wake()
        self._on_lost(self)
        # No garbage collection shall be needed.
        self.transport = self._timer = self._parser = None

    def _ends_with_connection(self) -> bool:
        """Whether the answer does not tell where it ends: https://www.rfc-editor.org/rfc/rfc9112#section-6.3."""
        return not (self.headers("content-length") or self.headers("transfer-encoding"))

    # ---- what the parser calls --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """The first byte of an answer."""
        if self.status:
            self._is_half_sent = True  # a second answer to one request: nothing of this server is to be trusted

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, before the content or, of no interest, after it."""
        if self._headers is not None:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head of an answer."""
        if self._parser is None or self._headers is None:  # a second answer
            return
        status = self._parser.get_status_code()
        if status < 100:
            raise ValueError("there is no such status")
        if status < 200:  # the true answer follows
            self._headers.clear()
            return
        self.status, self.raw_headers, self._headers = status, tuple(self._headers), None
        if self._is_head:
            self.on_message_complete()
        elif not self._is_whole:
            self._wake()

    def on_body(self, data: bytes) -> None:
        """A part of the content."""
        if self._is_complete:
            return
        self._body += data
        if self._is_whole:
            return
        if len(self._body) > _HELD and not self._is_paused and self.transport is not None:
            self._is_paused = True
            self.transport.pause_reading()
        self._wake()

    def on_message_complete(self) -> None:
        """The end of an answer."""
        if not self.status or self._is_complete or self._parser is None:
            return
        self._is_complete = True
        self._keep = self._parser.should_keep_alive()
        self.idle_since = asyncio.get_running_loop().time()
        self._resume_reading()  # who does not want the content releases the connection without having taken it
        self._wake()

"""Requests by connections that are kept for the next one."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncIterable, Iterable
from functools import cached_property
from urllib.parse import urlsplit

from aiohappyeyeballs import AddrInfoType, start_connection

from mlfleet.http1.connection import Connection
from mlfleet.http1.errors import BrokenAnswer, CannotConnect
from mlfleet.http1.origin import Origin

__all__ = ["Client"]

_SECOND_ADDRESS = 0.25  # seconds after which another address of the host is tried, too (RFC 8305, 5)
_LINES_KEPT = 16  # sets of headers that need not be checked and written out again
_KNOWN_FOR = 10.0  # seconds for which the addresses of a host are believed
# https://www.rfc-editor.org/rfc/rfc9110#section-9.2.2
_REPEATABLE = frozenset({"GET", "HEAD", "PUT", "DELETE", "OPTIONS"})
_METHODS = _REPEATABLE | {"POST", "PATCH"}  # an answer to CONNECT ends elsewhere
_WITH_CONTENT = frozenset({"POST", "PUT", "PATCH"})
_is_target = re.compile(r"/[^\x00-\x20\x7f]*").fullmatch
_is_value = re.compile(r"[^\x00\r\n]*").fullmatch
_is_name = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch  # https://www.rfc-editor.org/rfc/rfc9110#section-5.6.2


class Client:
    """Connects as often as there are requests at the same time: how many, its user decides.

    Used from one event loop.

    Args:
        keepalive: seconds for which an idle connection is kept.
        connect: seconds for a connection to be made.
    """

    def __init__(self, *, keepalive: float, connect: float) -> None:
        self._keepalive = keepalive
        self._connect_for = connect
        self._open: set[Connection] = set()
        self._forget = self._open.discard
        self._idle: dict[Origin, list[Connection]] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._lines: dict[tuple[tuple[str, str], ...], str] = {}
        self._addresses: dict[tuple[str, int], tuple[float, list[AddrInfoType]]] = {}

    async def request(
        self,
        origin: Origin,
        method: str,
        target: str,
        headers: Iterable[tuple[str, str]],
        content: bytes | AsyncIterable[bytes] | None = None,
        *,
        silence: float | None,
        whole: bool = False,
        linger: float = 0.0,
    ) -> Connection:
        """Send a request; what comes back holds the answer, and is to be given to `release`.

        Args:
            origin: the server.
            method: of HTTP; not CONNECT.
            target: path and query, escaped.
            headers: besides Host and Content-Length.
            content: in one piece; or in many, whose length a header must tell.
            silence: seconds without a byte of an answer, after which it is given up; None: never.
            whole: wait for the end of the answer, not only for its head.
            linger: seconds for which a cancelled call still waits for the end of the answer.

        Raises:
            CannotConnect: nothing was sent.
            BrokenAnswer: the connection broke, or what came is no HTTP.
            SilentServer: nothing came for too long.
            ValueError: this is no request that can be sent.
        """
        head = self._head(origin, method, target, headers, content)
        body = None
        if isinstance(content, bytes):
            head += content
        else:
            body = content
        connection = self._idle_one(origin)
        while True:
            is_new = connection is None
            connection = connection or await self._connect(origin)
            try:
                await connection.ask(head, body, silence=silence, whole=whole, head=method == "HEAD", linger=linger)
                return connection
            except BrokenAnswer:
                # The server may have been closing it already.
                if is_new or not connection.is_unanswered or method not in _REPEATABLE or body is not None:
                    raise
            connection = None

    def release(self, connection: Connection) -> None:
        """Keep a connection for the next request, or close it if its answer has not come to its end."""
        if not connection.is_reusable:
            connection.close()
            return
        self._idle.setdefault(connection.origin, []).append(connection)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(self._keepalive, self._close_old)

    async def close(self) -> None:
        """Close all connections."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        self._idle.clear()
        for connection in tuple(self._open):
            connection.close()
        while self._open:  # noqa: ASYNC110 - for two or three turns of the event loop
            await asyncio.sleep(0)

    def _head(
        self, origin: Origin, method: str, target: str, headers: Iterable[tuple[str, str]], content: object
    ) -> bytes:
        if method not in _METHODS:
            raise ValueError(f"requests with the method {method!r} cannot be sent")
        if not _is_target(target):
            raise ValueError("the URL has no path, or a space, a line break or the like in it")
        given = tuple(headers)
        lines = self._lines.get(given)
        if lines is None:
            if len(self._lines) >= _LINES_KEPT:
                self._lines.clear()
            lines = self._lines[given] = _lines(given)
        more = ""
        if isinstance(content, bytes):
            more = f"Content-Length: {len(content)}\r\n"
        elif content is not None and not any(name.lower() == "content-length" for name, _ in given):
            raise ValueError("no header tells the length of the content")
        elif content is None and method in _WITH_CONTENT:
            more = "Content-Length: 0\r\n"  # some servers refuse to guess: 411
        if origin.proxy_address is not None and origin.scheme == "http":
            target = f"http://{origin.host_header}{target}"
            if origin.proxy_authorization is not None:
                more += f"Proxy-Authorization: {origin.proxy_authorization}\r\n"
        return f"{method} {target} HTTP/1.1\r\nHost: {origin.host_header}\r\n{lines}{more}\r\n".encode()

    # ---- idle connections -------------------------------------------------------------------------------------------

    def _idle_one(self, origin: Origin) -> Connection | None:
        idle = self._idle.get(origin)
        oldest = asyncio.get_running_loop().time() - self._keepalive
        while idle:
            connection = idle.pop()
            if connection.idle_since > oldest and connection.is_reusable:
                return connection
            connection.close()
        return None

    def _close_old(self) -> None:
        self._sweep = None
        loop = asyncio.get_running_loop()
        oldest = loop.time() - self._keepalive
        for origin, idle in tuple(self._idle.items()):
            kept = [connection for connection in idle if connection.idle_since > oldest and connection.is_reusable]
            for connection in set(idle).difference(kept):
                connection.close()
            if kept:
                self._idle[origin] = kept
            else:
                del self._idle[origin]
        if self._idle:
            first = min(connection.idle_since for idle in self._idle.values() for connection in idle)
            self._sweep = loop.call_at(first + self._keepalive, self._close_old)

    # ---- new connections --------------------------------------------------------------------------------------------

    async def _connect(self, origin: Origin) -> Connection:
        try:
            async with asyncio.timeout(self._connect_for):
                return await self._connected(origin)
        except TimeoutError as error:
            host, port = origin.proxy_address or origin.address
            raise CannotConnect(f"no connection to {host}:{port} within {self._connect_for:g} s") from error
        except BrokenAnswer as error:
            raise CannotConnect(f"the proxy gave no answer: {error}") from error
        except CannotConnect:
            raise
        except OSError as error:
            raise CannotConnect(str(error) or type(error).__name__) from error

    async def _connected(self, origin: Origin) -> Connection:
        loop = asyncio.get_running_loop()
        proxied = origin.proxy_address is not None
        is_encrypted = (urlsplit(origin.proxy).scheme if proxied else origin.scheme) == "https"
        host, port = origin.proxy_address or origin.address
        name = host if proxied else origin.server_name or host
        raw = await start_connection(await self._resolved(host, port), happy_eyeballs_delay=_SECOND_ADDRESS)
        connection = Connection(origin, self._forget)
        try:
            tls = (None if proxied else origin.tls) or self._usual_tls if is_encrypted else None
            await loop.create_connection(
                lambda: connection, sock=raw, ssl=tls, server_hostname=name if tls is not None else None
            )
        except BaseException:
            raw.close()
            raise
        self._open.add(connection)
        try:
            if proxied and origin.scheme == "https":
                await self._tunnel(connection, origin)
            if not connection.is_open:
                raise CannotConnect("the connection was closed at once")
        except BaseException:
            connection.close()
            # asyncio does not tell it when it is lost in the middle of a handshake.
            connection.connection_lost(None)
            raise
        return connection

    async def _tunnel(self, connection: Connection, origin: Origin) -> None:
        """Through the proxy, to the server itself (https://www.rfc-editor.org/rfc/rfc9110#section-9.3.6)."""
        place = origin.host_and_port
        login = f"Proxy-Authorization: {origin.proxy_authorization}\r\n" if origin.proxy_authorization else ""
        request = f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n{login}\r\n"
        await connection.ask(request.encode("ascii"), silence=self._connect_for)
        if not 200 <= connection.status < 300:
            raise CannotConnect(f"the proxy refuses to connect to it: {connection.status} {connection.reason}")
        if connection.transport is None:
            return
        connection.transport = await asyncio.get_running_loop().start_tls(
            connection.transport,
            connection,
            origin.tls or self._usual_tls,
            server_hostname=origin.server_name or origin.address[0],
        )

    @cached_property
    def _usual_tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    async def _resolved(self, host: str, port: int) -> list[AddrInfoType]:
        try:
            is_v6 = ipaddress.ip_address(host).version == 6
        except ValueError:
            pass
        else:
            family = socket.AF_INET6 if is_v6 else socket.AF_INET
            return [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port, 0, 0) if is_v6 else (host, port))]
        loop = asyncio.get_running_loop()
        known = self._addresses.get((host, port))
        if known is None or known[0] < loop.time():
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            known = self._addresses[host, port] = loop.time() + _KNOWN_FOR, list(found)
        return known[1]


def _lines(headers: tuple[tuple[str, str], ...]) -> str:
    """The lines of headers that a caller gave."""
    for name, value in headers:
        if not _is_name(name):
            raise ValueError(f"this is no name of a header: {name!r}")
        # What is given must not add a header, or a request, of its own.
        if not _is_value(value):
            raise ValueError(f"the header {name} has a line break or the like in it")
    return "".join(f"{name}: {value}\r\n" for name, value in headers)

"""Connections to one server, handed out first come, first served."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    import httpx

__all__ = ["Connections"]


class Connections:
    """Up to `count` requests at a time, each on a connection of its own.

    httpx's own pool looks at every connection and every request before and after each request: with 16 connections that
    costs more than the request itself. A client for each connection makes the choice free.

    Args:
        count: of connections.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._turns = anyio.Semaphore(count)
        self._idle: list[httpx.AsyncClient] = []

    def prepare(self, make: Callable[[], httpx.AsyncClient]) -> None:
        """Make the clients. Nothing is connected yet."""
        self._idle = [make() for _ in range(self._count)]

    @asynccontextmanager
    async def one(self) -> AsyncIterator[httpx.AsyncClient]:
        """Wait for our turn, and hold a client for one request."""
        async with self._turns:
            # The last one that was used is the likeliest to be connected still.
            client = self._idle.pop()
            try:
                yield client
            finally:
                self._idle.append(client)

    async def close(self) -> None:
        """Close those that are connected."""
        clients, self._idle = self._idle, []
        for client in clients:
            await client.aclose()

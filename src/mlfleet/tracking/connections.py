"""Connections to one server, handed out first come, first served."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    import httpx

__all__ = ["Connections"]


class Connections:
    """Up to `count` requests at a time.

    Attributes:
        count: of connections.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._turns = anyio.Semaphore(count)
        self._client: httpx.AsyncClient | None = None

    def prepare(self, client: httpx.AsyncClient) -> None:
        """Take the client to send requests with. Nothing is connected yet."""
        self._client = client

    @asynccontextmanager
    async def one(self) -> AsyncIterator[httpx.AsyncClient]:
        """Wait for our turn, and hold the client for one request."""
        async with self._turns:
            if self._client is None:
                raise RuntimeError("the client is closed")
            yield self._client

    async def close(self) -> None:
        """Close those that are connected."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

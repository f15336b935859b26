"""Listening, for all servers that are written for tests."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager

__all__ = ["listening"]


@asynccontextmanager
async def listening(
    accept: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    handlers: Collection[asyncio.Task[None]],
    host: str,
    tls: ssl.SSLContext | None,
) -> AsyncIterator[int]:
    """Listen while the block runs, on the port that it is given; then cancel the handlers that still serve."""
    server = await asyncio.start_server(accept, host, 0, ssl=tls)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for handler in handlers:
            handler.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)

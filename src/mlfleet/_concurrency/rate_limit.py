"""Limits of requests per second."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

import anyio

__all__ = ["Pace"]


class Pace:
    """Rate limits for the requests to one server, by kind.

    Args:
        rates: Requests per second by consecutive segments of a path, such as ``runs/get``. Of several kinds that a path
            has, the first counts.
    """

    def __init__(self, rates: Mapping[str, float]) -> None:
        self._limits = [(re.compile(rf"(^|/){re.escape(kind)}(/|$)"), _Limit(rate)) for kind, rate in rates.items()]

    async def wait(self, path: str) -> None:
        """Wait until the next request to `path` may be sent, first come, first served."""
        path = path.partition("?")[0]
        for pattern, limit in self._limits:
            if pattern.search(path):
                await limit.wait()
                return


class _Limit:
    """A rate limit for requests of one kind, which allows no burst after the event loop was blocked."""

    def __init__(self, per_second: float) -> None:
        self._gap = 1.0 / per_second
        self._next = 0.0
        self._lock = anyio.Lock()

    async def wait(self) -> None:
        async with self._lock:
            if (left := self._next - time.monotonic()) > 0:
                await anyio.sleep(left)
            self._next = time.monotonic() + self._gap

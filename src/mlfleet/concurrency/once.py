"""Single flight: one piece of work for all who ask for it at the same time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["Once"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Once(Generic[K, V]):
    """Runs one piece of work per key for any number of concurrent callers of one event loop.

    A cancelled caller leaves the work to the others; when the last one is gone, the work is cancelled and awaited. An
    error goes to all who wait, and the next caller starts anew. A result is forgotten as soon as it was handed out, unless `keep`.
    """

    def __init__(self, *, keep: bool = False) -> None:
        raise NotImplementedError

    async def __call__(self, key: K, work: Callable[[], Awaitable[V]]) -> V:
        """The result of the work of that key, which is started if it is not under way."""
        raise NotImplementedError

"""A Fleet for the life of a web application: Starlette, FastAPI and others that take such a lifespan."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, ParamSpec

from mlfleet.fleet import Fleet

__all__ = ["lifespan"]

P = ParamSpec("P")
_Lifespan = Callable[[object], AbstractAsyncContextManager[dict[str, Fleet]]]


def _with_options_of(fleet: Callable[P, Fleet]) -> Callable[[Callable[..., _Lifespan]], Callable[P, _Lifespan]]:
    """Let type checkers know the keyword arguments of a function that passes them on to a Fleet."""
    return lambda function: function


@_with_options_of(Fleet)
def lifespan(**options: Any) -> _Lifespan:
    """Return a lifespan that opens a Fleet when the application starts, and cancels its runs when it stops.

    Use it as ``Starlette(lifespan=lifespan(max_concurrent=8))`` or ``FastAPI(lifespan=…)``; handlers find the Fleet in
    ``request.state.fleet``. Each start of the application, and so each worker process, has a Fleet of its own.

    Args:
        options: The keyword arguments of `Fleet`. ``on_exit`` is ``"cancel"`` by default.
    """

    @asynccontextmanager
    async def open_fleet(app: object) -> AsyncIterator[dict[str, Fleet]]:
        async with Fleet(**{"on_exit": "cancel", **options}) as fleet:
            yield {"fleet": fleet}

    return open_fleet

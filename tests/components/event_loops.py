"""Tests that run on every event loop that users may have."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

__all__ = ["LOOPS", "on_each_loop", "run_on"]

LOOPS = ["asyncio", "uvloop"]


def run_on(loop: str, main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine, and raise errors of event loop callbacks too."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    problems: list[dict[str, Any]] = []
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.get_loop().set_exception_handler(lambda _, problem: problems.append(problem))
        runner.run(_ending(main))
    gc.collect()  # what was forgotten open warns now
    assert not problems


async def _ending(main: Coroutine[Any, Any, None]) -> None:
    async with asyncio.timeout(25):  # uvloop waits in C, where the signal of pytest-timeout is not heard
        await main


def on_each_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a test of a coroutine: one run on asyncio, one on uvloop."""

    @functools.wraps(test)
    def run(*, event_loop: str, **given: object) -> None:
        run_on(event_loop, test(**given))

    parameters = inspect.signature(test).parameters.values()
    one_more = inspect.Parameter("event_loop", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = inspect.Signature([*parameters, one_more])  # type: ignore[attr-defined]
    del run.__wrapped__
    parametrized: Callable[..., None] = pytest.mark.parametrize("event_loop", LOOPS)(run)
    return parametrized

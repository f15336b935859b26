"""Event loops of Jupyter kernels."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["in_notebook", "interruptible_cells"]

_INTERVAL = 0.25  # seconds


def in_notebook() -> bool:
    """Return True if this process is the kernel of a notebook."""
    # It may be half imported, by another thread.
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


@asynccontextmanager
async def interruptible_cells() -> AsyncIterator[None]:
    """Let an interrupt of a notebook's cell reach what the cell awaits, for the time of the block.

    ipykernel (6.29 to 7.4) handles SIGINT by ``IOLoop.add_callback``, which tornado hands to ``loop.call_soon`` in the
    loop's own thread: an idle loop does not wake up for it, and ``await asyncio.sleep(60)`` sleeps on. So wake it.
    """
    if not in_notebook():
        yield
        return
    waking = asyncio.ensure_future(_wake())
    try:
        yield
    finally:
        waking.cancel()


async def _wake() -> None:
    while True:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(_INTERVAL)

"""Keep our own requests out of httpx's log, which shows whole URLs at the level INFO."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["unlogged_requests"]

_is_ours: ContextVar[bool] = ContextVar("request of mlfleet", default=False)


def _is_foreign(record: logging.LogRecord) -> bool:
    return not _is_ours.get()


@contextmanager
def unlogged_requests() -> Iterator[None]:
    """Keep what httpx logs in this block out of its log; requests of the host program are logged as before.

    URLs may hold passwords and signatures. httpx logs in the task that sends, so a context variable tells its requests
    apart (https://www.python-httpx.org/logging/).
    """
    logging.getLogger("httpx").addFilter(_is_foreign)  # adding it again has no effect
    token = _is_ours.set(True)
    try:
        yield
    finally:
        _is_ours.reset(token)

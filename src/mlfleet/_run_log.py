"""Loggers whose records know the run that they are about, in the attribute ``run_id``.

The id is kept in a context variable, which the tasks and threads of a run inherit. Tasks that serve many runs are
started in a context of their own, since they would otherwise inherit that of the first run.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

__all__ = ["about_run", "current_run", "get_logger", "set_run", "warn_once"]

_run_id: ContextVar[str | None] = ContextVar("run of mlfleet", default=None)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of that name. Its records have the attribute ``run_id``, which is None outside of runs.

    ``extra={"run_id": …}`` counts more than the context, for messages about the run of another task.
    """
    logger = logging.getLogger(name)
    logger.addFilter(_add_run_id)  # adding it again has no effect
    return logger


def _add_run_id(record: logging.LogRecord) -> bool:
    if not hasattr(record, "run_id"):
        record.run_id = _run_id.get()
    return True


@lru_cache(maxsize=1024)
def warn_once(logger: logging.Logger, text: str, *values: Hashable) -> None:
    """Log a warning once, and not for each of a thousand runs; the arguments are those of `logging.Logger.warning`."""
    logger.warning(text, *values, stacklevel=2)


def current_run() -> str | None:
    """Return the id of the run that the records of this task are about."""
    return _run_id.get()


def set_run(run_id: str) -> None:
    """Let the records of this task, and of those that it starts from now on, be about a run."""
    _run_id.set(run_id)


@contextmanager
def about_run(run_id: str) -> Iterator[None]:
    """Let the records of this block, and of the tasks that it starts, be about a run."""
    token = _run_id.set(run_id)
    try:
        yield
    finally:
        _run_id.reset(token)

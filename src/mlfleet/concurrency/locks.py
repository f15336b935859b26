"""Locks between processes."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

__all__ = ["file_lock"]


def file_lock(path: Path) -> AbstractAsyncContextManager[None]:
    """Hold the lock file at `path` (made if missing) against other processes and other tasks of this one.

    Waiting does not block the event loop and may be cancelled. The lock ends with its process at the latest.
    """
    raise NotImplementedError

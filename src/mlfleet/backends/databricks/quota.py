"""Waiting while a workspace takes no new runs: its quota of jobs per hour is used up, or too many runs are active."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable

import anyio

from mlfleet._run_log import get_logger
from mlfleet.backends.databricks.client import WorkspaceError

__all__ = ["QuotaQueue"]

_log = get_logger("mlfleet.databricks")
_LONGEST = 3900.0
"""Seconds to wait by default: the quota counts the jobs of the last hour."""

# "The quota for the number of jobs has been reached. The current quota is 10000 jobs created in past 3600 seconds."
_EXCEEDED = re.compile(r"\bquota\b.*\b(reached|exceeded)\b|\bjobs created in (the )?past \d+ seconds", re.I)


class QuotaQueue:
    """The submissions to one workspace, which wait while it takes no new jobs.

    One of them tries again now and then; the others wait until that one succeeds, first come, first served.

    Args:
        pause: Seconds between two tries.
    """

    def __init__(self, pause: float) -> None:
        self._pause = pause
        self._lock = anyio.Lock()

    async def submit(
        self, send: Callable[[], Awaitable[None]], *, limit: float | None, on_progress: Callable[[str], None]
    ) -> None:
        """Submit a run as soon as the workspace takes it. A cancelled call sends nothing more.

        Args:
            send: A coroutine function that sends the request, and awaits the answer also if it is cancelled.
            limit: Seconds to wait; None: an hour, after which the workspace takes new jobs again, and some minutes.
            on_progress: Called with one line if the run has to wait.

        Raises:
            WorkspaceError: The workspace refuses the request, or still has no quota for it when the time is over.
        """
        begin = time.monotonic()
        deadline = begin + (_LONGEST if limit is None else limit)
        if not self._lock.locked():
            try:
                await send()
            except WorkspaceError as error:
                if not _is_exceeded(error) or time.monotonic() >= deadline:
                    raise
                _log.warning("submissions wait until the workspace takes new jobs again: %s", error)
            else:
                return None
        on_progress("waiting until the workspace takes new jobs again")
        is_first = await self._acquire(deadline)
        try:
            while True:
                try:
                    return await send()
                except WorkspaceError as error:
                    left = deadline - time.monotonic()
                    if not _is_exceeded(error):
                        raise
                    if left <= 0:
                        text = f"{error} (waited {time.monotonic() - begin:.0f} s for the quota)"
                        raise WorkspaceError(text, status=error.status, code=error.code) from error
                await anyio.sleep(min(self._pause, left))
        finally:
            if is_first:
                self._lock.release()

    async def _acquire(self, deadline: float) -> bool:
        """Become the submission that tries again. Return False if the time is over before that."""
        with anyio.move_on_after(deadline - time.monotonic()):
            await self._lock.acquire()
            return True
        return False


def _is_exceeded(error: WorkspaceError) -> bool:
    """Return True if the workspace takes no new jobs, or has as many active runs as it may have.

    It answers with 429 to the second, as to too many requests, which have been tried again for some minutes before.
    """
    if error.status == 429:
        return True
    return error.status == 400 and (error.code == "QUOTA_EXCEEDED" or _EXCEEDED.search(str(error)) is not None)

"""The copy of a run's output, which its bootstrap script writes into the workspace in parts."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio

from mlfleet._concurrency.threads import FILES
from mlfleet._run_log import get_logger
from mlfleet.backends._remote.output import KeptOutput
from mlfleet.errors import SubmitError

__all__ = ["Ending", "OutputCopy"]

_log = get_logger("mlfleet.databricks")
# The API may show a file a little later than the run has written it.
_TRIES, _PAUSE = 10, 0.5  # seconds


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a run, as its bootstrap script recorded it.

    Attributes:
        exit_code: The exit code of the command.
        parts: The number of parts of the output; None: the output is only on the run's page.
        stopped: True if the command was requested to stop.
    """

    exit_code: int
    parts: int | None
    stopped: bool


class OutputCopy:
    """The copy of one run's output.

    Args:
        read: A coroutine function that returns the content of a file in the run's output folder, by its name; None if
            it does not exist.
        path: The file to copy to; None: the output of this process.
    """

    def __init__(self, read: Callable[[str], Awaitable[bytes | None]], path: Path | None) -> None:
        self._read = read
        self._path = path
        self._file = KeptOutput(path, backend="databricks")
        self._parts = 0
        self._lock = anyio.Lock()

    @property
    def empty(self) -> bool:
        """True if nothing has been copied yet."""
        return self._file.position == 0

    async def copy_new_parts(self, parts: float = math.inf) -> bool:
        """Copy the parts that have been written since the last call. Return True if there were any.

        Args:
            parts: The number of parts after which to stop.
        """
        async with self._lock:
            before = self._parts
            while self._parts < parts and (part := await self._read_complete(f"{self._parts:06}")) is not None:
                self._parts += 1
                await self._append(part)
            return self._parts > before

    async def finish(self) -> Ending | None:
        """Copy the rest of the output of a run that has ended. Return None if its bootstrap script recorded no end."""
        record = await self._read_complete("end")
        if record is None:
            await self.copy_new_parts()
            return None
        raw = json.loads(record)
        parts: int | None = raw["parts"]
        for _ in range(_TRIES):
            await self.copy_new_parts(parts or 0)
            if self._parts >= (parts or 0):
                break
            await anyio.sleep(_PAUSE)
        else:
            _log.warning(
                "only %d of %d parts of the output were found; %s is incomplete", self._parts, parts, self._path
            )
        return Ending(int(raw["exit_code"]), parts, bool(raw["stopped"]))

    async def append(self, data: bytes) -> None:
        """Append output that was read from elsewhere."""
        async with self._lock:
            await self._append(data)

    async def _read_complete(self, name: str) -> bytes | None:
        """Read a file that begins with its length; None if it does not exist or is not complete yet."""
        content = await self._read(name)
        if content is None:
            return None
        length, mark, data = content.partition(b"\n")
        return data if mark and length.isdigit() and len(data) == int(length) else None

    async def _append(self, data: bytes) -> None:
        try:
            # A cancelled caller has counted the part already: it must not be lost.
            await FILES.finish(partial(self._file.write, data))
        except OSError as error:
            text = f"the output of the run cannot be written to {self._path}: {error.strerror}"
            raise SubmitError(text, backend="databricks") from error

"""Copies a run's output from the workspace, where its bootstrap script puts it in parts."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio

from mlfleet._concurrency.threads import FILES
from mlfleet.backends._remote.output import write_output
from mlfleet.errors import SubmitError

__all__ = ["Ending", "OutputCopy"]

_log = logging.getLogger("mlfleet.databricks")
# A file that was written there may be seen here a little later.
_TRIES, _AGAIN = 10, 0.5


@dataclass(frozen=True, slots=True)
class Ending:
    """What the bootstrap script has told of the end.

    Attributes:
        exit_code: of the command.
        parts: how many parts of output there are; None: the output is on the run's page only.
        stopped: whether it was asked to stop.
    """

    exit_code: int
    parts: int | None
    stopped: bool


class OutputCopy:
    """The copy of one run's output.

    Args:
        read: gives the content of a file in the run's folder for output; None if there is none.
        path: of the copy; None: it goes to the output of this process.
    """

    def __init__(self, read: Callable[[str], Awaitable[bytes | None]], path: Path | None) -> None:
        self._read = read
        self._path = path
        self._parts = 0
        self._offset = 0
        self._one = anyio.Lock()

    @property
    def empty(self) -> bool:
        """Whether nothing was copied yet."""
        return self._offset == 0

    async def advance(self, parts: float = math.inf) -> bool:
        """Copy the parts that are there by now, of so many; whether there were any."""
        async with self._one:
            before = self._parts
            while self._parts < parts and (part := await self._whole(f"{self._parts:06}")) is not None:
                await self._append(part)
                self._parts += 1
            return self._parts > before

    async def finish(self) -> Ending | None:
        """Copy the rest of the output of a run that has ended; None if its bootstrap script told of no end."""
        told = await self._whole("end")
        if told is None:
            await self.advance()
            return None
        raw = json.loads(told)
        parts: int | None = raw["parts"]
        for _ in range(_TRIES):
            await self.advance(parts or 0)
            if self._parts >= (parts or 0):
                break
            await anyio.sleep(_AGAIN)
        else:
            _log.warning("of the %d parts of the output in %s only %d were seen", parts, self._path, self._parts)
        return Ending(int(raw["exit_code"]), parts, bool(raw["stopped"]))

    async def put(self, data: bytes) -> None:
        """Copy output that was had in another way."""
        async with self._one:
            await self._append(data)

    async def _whole(self, name: str) -> bytes | None:
        content = await self._read(name)
        if content is None:
            return None
        length, mark, data = content.partition(b"\n")
        return data if mark and length.isdigit() and len(data) == int(length) else None

    async def _append(self, data: bytes) -> None:
        try:
            # At a position: another process that has attached to the run may copy the same output.
            await FILES.run(partial(write_output, self._path, data, backend="databricks", at=self._offset))
        except OSError as error:
            text = f"the output of the run cannot be written to {self._path}: {error.strerror}"
            raise SubmitError(text, backend="databricks") from error
        self._offset += len(data)

"""Reads runs from a server; those that wait for their turn at the same time by one request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

from mlfleet.errors import TrackingError
from mlfleet.tracking.base import RunInfo
from mlfleet.tracking.models import run_info
from mlfleet.tracking.retry import Transient
from mlfleet.tracking.transport import Transport, encoded

__all__ = ["Reads"]

log = logging.getLogger("mlfleet.tracking")

_TOGETHER = 100
_KNOWN = 10_000
_NEWEST = 0.2  # of the time of a read, the part that the newest one has
_NOISE = 1.5  # times the time of as many reads, which a search may take
_WON_BACK = 10  # reads for the time of each that was lost
# Servers whose search does not know what it is asked answer so, always.
_REFUSALS = frozenset({400, 501})


class Reads:
    """Asks for runs. A search for three costs a server less than half of three requests, one for twenty a tenth.

    Nobody waits to be asked for with others: only those who wait for their turn anyway are. Whatever becomes of the one
    who asks, the others are no worse off than if nobody had asked for them.

    Args:
        transport: to the server.
        together: whether its search may be asked.
    """

    def __init__(self, transport: Transport, *, together: bool) -> None:
        self._transport = transport
        self._together = together
        self._worth = _Worth()
        self._experiments: dict[str, str] = {}
        self._waiting: dict[_Reader, None] = {}

    async def get(self, run_id: str, *, retry_for: float | None = None) -> RunInfo:
        """What the server knows of a run, at some time after this call."""
        reader = _Reader(run_id, self._experiments.get(run_id))
        info = await self._transport.again(partial(self._attempt, reader), retry_for)
        self.note(info)
        return info

    def note(self, info: RunInfo) -> None:
        """Remember the experiment of a run that goes on, for a search is told where to look."""
        if info.status.is_terminal:
            self.forget(info.run_id)
        elif self._together and info.run_id.isalnum():
            self._experiments[info.run_id] = info.experiment_id
            if len(self._experiments) > _KNOWN:
                self.forget(next(iter(self._experiments)))

    def forget(self, run_id: str) -> None:
        """Forget a run that has ended."""
        self._experiments.pop(run_id, None)

    async def _attempt(self, reader: _Reader) -> RunInfo:
        self._transport.failures  # noqa: B018 - raises if this is not open
        connections = self._transport.connections
        reader.turn = asyncio.get_running_loop().create_future()
        if self._sociable(reader):
            self._waiting[reader] = None
        try:
            told = await connections.wait(reader.turn)
        finally:
            self._waiting.pop(reader, None)
        if told is not None:
            return told
        try:
            return await self._ask(reader)
        finally:
            connections.release()

    def _sociable(self, reader: _Reader) -> bool:
        return self._together and reader.experiment_id is not None

    async def _ask(self, reader: _Reader) -> RunInfo:
        """Ask, in our turn, for us and for those who wait."""
        others = self._take() if self._sociable(reader) and self._worth else []
        if others and (found := await self._ask_for_all(reader, others)):
            return found
        begin = time.monotonic()
        line = self._transport.connections.line
        answer = await self._transport.exchange(line, "GET", "runs/get", params={"run_id": reader.run_id})
        self._worth.read_one(time.monotonic() - begin)
        return run_info(answer.get("run", {}))

    def _take(self) -> list[_Reader]:
        """Those who wait, who do so no longer."""
        # Who has got a turn already, and will see so in a moment, asks itself.
        taken = list(islice((reader for reader in self._waiting if not reader.turn.done()), _TOGETHER - 1))
        for reader in taken:
            del self._waiting[reader]
            self._transport.connections.leave(reader.turn)
        return taken

    async def _ask_for_all(self, reader: _Reader, others: Sequence[_Reader]) -> RunInfo | None:
        """Ask for all of them, tell the others, or let them wait again. None: we have to ask alone."""
        found: Mapping[str, RunInfo] = {}
        alone = False
        try:
            with self._worth.trial() as trial:
                found = await self._search((reader, *others))
                trial.read = len(found)
            alone = True  # who was not found
        except Transient as failure:
            # It may be the search that the server cannot do: nobody is to wait for it twice.
            alone = failure.executed
            if alone:
                reader.experiment_id = None
            raise
        except TrackingError as error:
            alone = True
            if error.status in _REFUSALS:
                self._together = False
                self._experiments.clear()
                log.debug("runs are read one by one from now on: %s", error)
        finally:
            self._tell(others, found, alone=alone)
        return found.get(reader.run_id)

    async def _search(self, readers: Iterable[_Reader]) -> dict[str, RunInfo]:
        ids = {reader.run_id: reader.experiment_id for reader in readers}
        body = {
            "experiment_ids": list(set(ids.values())),
            "filter": "attributes.run_id IN ({})".format(", ".join(f"'{run_id}'" for run_id in ids)),
            "run_view_type": "ALL",
            "max_results": len(ids),
        }
        line = self._transport.connections.line
        answer = await self._transport.exchange(line, "POST", "runs/search", encoded(body))
        return {info.run_id: info for info in map(run_info, answer.get("runs") or ())}

    def _tell(self, readers: Iterable[_Reader], found: Mapping[str, RunInfo], *, alone: bool) -> None:
        untold: list[_Reader] = []
        for reader in readers:
            if reader.turn.done():
                continue  # it was cancelled
            if info := found.get(reader.run_id):
                reader.turn.set_result(info)
            else:
                untold.append(reader)
        # They have waited longer than all who wait now.
        for reader in reversed(untold):
            if alone:
                reader.experiment_id = None
            if self._sociable(reader):
                self._waiting[reader] = None
            self._transport.connections.queue(reader.turn, first=True)


class _Worth:
    """Whether a search is worth it: a server that keeps runs in files looks through all of an experiment for it.

    What a search has lost, compared with reads of one run, is won back by many of those before the next search. Until a
    search has won, there is one at a time.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._won = False
        self._trials = 0
        self._debt = 0.0

    def __bool__(self) -> bool:
        return self._seconds > 0 and self._debt <= 0 and (self._won or not self._trials)

    def read_one(self, seconds: float) -> None:
        """A run was read alone."""
        self._seconds += (seconds - self._seconds) * (_NEWEST if self._seconds else 1)
        self._debt = max(0.0, self._debt - 1)

    @contextmanager
    def trial(self) -> Iterator[_Trial]:
        """Judge the search of the block, unless it is cancelled."""
        trial = _Trial()
        begin = time.monotonic()
        self._trials += 1
        try:
            yield trial
        except Exception:
            self._judge(trial, time.monotonic() - begin)
            raise
        else:
            self._judge(trial, time.monotonic() - begin)
        finally:
            self._trials -= 1

    def _judge(self, trial: _Trial, seconds: float) -> None:
        reads = seconds / self._seconds
        self._won = reads <= trial.read * _NOISE
        if not self._won:
            self._debt += reads * _WON_BACK


@dataclass(slots=True)
class _Trial:
    """One search.

    Attributes:
        read: how many runs it gave.
    """

    read: int = 0


class _Reader:
    """One who wants to know of a run.

    Attributes:
        run_id: of the run.
        experiment_id: of its experiment; None: it must be asked for alone.
        turn: None: it is its turn to ask. Else what another one was told.
    """

    __slots__ = ("experiment_id", "run_id", "turn")

    turn: asyncio.Future[RunInfo | None]

    def __init__(self, run_id: str, experiment_id: str | None) -> None:
        self.run_id = run_id
        self.experiment_id = experiment_id

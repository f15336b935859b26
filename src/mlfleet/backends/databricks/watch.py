"""The poller of a workspace's runs, which asks for all of them together, and for old ones seldom."""

from __future__ import annotations

import math
import re
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from typing import Any

import anyio

from mlfleet._concurrency.single_flight import Coalescing
from mlfleet._run_log import get_logger
from mlfleet.backends._remote.polling import PolledStates
from mlfleet.backends._remote.state_cache import StateCache
from mlfleet.backends.databricks.client import PAGE, RETRY_SECONDS, Timing, Workspace, WorkspaceError, unless_missing
from mlfleet.backends.databricks.states import LOST, State, read_state
from mlfleet.errors import BackendError

__all__ = ["Poller", "RecentRuns"]

_log = get_logger("mlfleet.databricks")

_FEW = 10  # runs that are polled one by one; more are polled by lists
_AT_ONCE = 8  # requests of one round
_SHORTEST_GAP = 1.0  # seconds between the starts of two rounds
_YOUNG = 60.0  # seconds up to which a run is polled often
_AGE_PER_INTERVAL = 30  # a run of 300 s is polled every 10 s
_LONGEST_INTERVAL = 30.0  # seconds
_REQUESTS_PER_MINUTE = 50  # for all runs that are not young


class Poller(PolledStates[State]):
    """A cache of the states of runs, by their ids in Databricks.

    Args:
        workspace: The client of the workspace.
        timing: The intervals of polls.
    """

    def __init__(self, workspace: Workspace, timing: Timing) -> None:
        # Runs submitted in a row share a round, so that there are at most 60 rounds a minute.
        gap = min(_SHORTEST_GAP, timing.fast)
        super().__init__(name="mlfleet Databricks poll", fast=timing.fast, early=0.3, shortest_gap=gap)
        self._workspace = workspace
        self._timing = timing

    async def _follow(self, watch: StateCache[State]) -> None:
        failing_since: float | None = None
        while True:
            await self.wanted()
            due = await self._due()
            try:
                await self._poll(due)
                failing_since = None
            except WorkspaceError as error:
                now = time.monotonic()
                failing_since = failing_since or now
                _log.warning("the states of %d Databricks runs cannot be read: %s", len(self._active_keys()), error)
                if now - failing_since > RETRY_SECONDS:
                    text = f"the states of Databricks runs could not be read for {now - failing_since:.0f} s: {error}"
                    raise BackendError(text, backend="databricks") from error
                await anyio.sleep(self._timing.after_failure)

    def _has_ended(self, state: State) -> bool:
        return state.is_terminal

    def _interval(self, key: str) -> float:
        """Return the seconds until the next poll of a run. Runs that are not young share the requests of a minute."""
        age = self._schedules[key].age
        if age < _YOUNG:
            return self._timing.fast
        requests = self._count if self._count <= _FEW else math.ceil(self._count / PAGE)
        return max(min(age / _AGE_PER_INTERVAL, _LONGEST_INTERVAL), requests * 60 / _REQUESTS_PER_MINUTE)

    def _put(self, key: str, state: State) -> None:
        self._schedule_next(key)
        self.put(key, state)

    async def _poll(self, due: Collection[str]) -> None:
        missing = set(due)
        if self._count > _FEW:
            missing -= await self._list(missing)
        errors: list[WorkspaceError] = []
        limiter = anyio.CapacityLimiter(_AT_ONCE)
        async with anyio.create_task_group() as group:
            for key in missing:
                group.start_soon(self._poll_one, key, limiter, errors)
        if errors:
            raise errors[0]

    async def _poll_one(self, key: str, limiter: anyio.CapacityLimiter, errors: list[WorkspaceError]) -> None:
        """Poll one run by ``runs/get``."""
        async with limiter:
            try:
                run = await self._workspace.get_run(key)
            except WorkspaceError as error:
                schedule = self._schedules.get(key)
                if not error.missing:
                    errors.append(error)
                elif schedule is not None and schedule.age > self._timing.visibility_delay:
                    self._put(key, LOST)
                elif schedule is not None:
                    schedule.due = time.monotonic() + self._timing.fast
                return
        self._put(key, read_state(run))

    async def _list(self, wanted: Collection[str]) -> set[str]:
        """Poll runs by listing the active ones, newest first, as far as needed. Return the tracked runs in the list."""
        left, seen = set(wanted), set[str]()
        oldest = min((state.start_time for key in wanted if (state := self.get(key)) is not None), default=0)
        async for runs in self._workspace.list_runs({"active_only": "true"}):
            for run in runs:
                key = str(run.get("run_id"))
                state = read_state(run)
                if key in self._schedules and not state.is_terminal:
                    self._put(key, self._merged(key, state))
                    seen.add(key)
                    left.discard(key)
            passed = bool(oldest and runs and int(runs[-1].get("start_time") or oldest) < oldest)
            if not left or passed:
                break
        return seen

    def _merged(self, key: str, state: State) -> State:
        """Return the known state if only the list, which has fewer fields, is newer; else the state from the list."""
        known = self.get(key)
        return state if known is None or known.phase is not state.phase else known


_FRESH = 20.0  # seconds for which a run that was not found counts as missing
_CLOCK_DIFFERENCE = 600_000  # milliseconds by which the clock of this machine may differ from the workspace's
_FIRST_WINDOW = 3_600_000  # milliseconds of the first listing for a run; each further one is twice as long
_NAME = re.compile(r"\(([0-9a-f]{32})\)$")


class RecentRuns:
    """The runs of a workspace that mlfleet submitted, found by their ids or by a listing that concurrent calls share.

    Args:
        workspace: The client of the workspace.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._listing: Coalescing[str, None] = Coalescing()
        self._wanted: list[tuple[str, int]] = []  # as the arguments of `_is_found`
        self._found: dict[str, tuple[int, int]] = {}  # start time and id in Databricks, by the id of the MLflow run
        self._missing: dict[str, float] = {}  # the time of the listing, by `time.monotonic`

    async def find(self, run_id: str, *, number: str = "", since: int = 0) -> dict[str, Any] | None:
        """Return the entry of ``runs/get`` for the run of an MLflow run; None if there is none.

        1. The driver has logged the run's id in Databricks as a tag: ask for that run.
        2. The driver was killed before that, or the tag is that of an earlier run of the same MLflow run: list the
           runs from the time of the submission on, until all runs are found that concurrent calls look for.

        Args:
            run_id: The id of the MLflow run, which the run's name ends with.
            number: The id in Databricks that the driver has logged; empty: it has logged none.
            since: The earliest time of the submission by the clock of the driver, in milliseconds since the epoch; 0:
                unknown, so that all runs that Databricks keeps are listed.
        """
        since = max(0, since - _CLOCK_DIFFERENCE)
        if number.isdecimal() and (run := await unless_missing(self._workspace.get_run(number))) is not None:
            name = _NAME.search(str(run.get("run_name") or ""))
            if name is not None and name[1] == run_id and _start_time(run) >= since:
                return run
        if not self._is_found(run_id, since):
            if time.monotonic() - self._missing.get(run_id, -math.inf) < _FRESH:
                return None
            await self._search(run_id, since)
        if not self._is_found(run_id, since):
            self._missing[run_id] = time.monotonic()
            return None
        return await unless_missing(self._workspace.get_run(str(self._found[run_id][1])))

    async def list_active(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the runs that have not ended, each as the id of its MLflow run and its entry of ``runs/list``."""
        return [each async for each in self._entries({"active_only": "true"})]

    def _is_found(self, run_id: str, since: int) -> bool:
        return run_id in self._found and self._found[run_id][0] >= since

    def _are_found(self) -> bool:
        return all(self._is_found(*wanted) for wanted in self._wanted)

    async def _search(self, run_id: str, since: int) -> None:
        wanted = (run_id, since)
        self._wanted.append(wanted)
        try:
            await self._listing("", self._list)
        finally:
            self._wanted.remove(wanted)

    async def _list(self) -> None:
        """List runs until all wanted ones are found. The runs of the first hours come first, newest first in each."""
        if self._are_found():
            return
        for first, last in _windows(min(since for _, since in self._wanted)):
            filters = {"start_time_from": first, "start_time_to": last}
            async for run_id, run in self._entries({name: str(value) for name, value in filters.items() if value}):
                seen = (_start_time(run), int(run.get("run_id") or 0))
                self._found[run_id] = max(seen, self._found.get(run_id, seen))
                if self._are_found():
                    return

    async def _entries(self, filters: Mapping[str, str]) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Yield the id of the MLflow run and the entry of ``runs/list`` for each run, newest first."""
        async for runs in self._workspace.list_runs(filters):
            for run in runs:
                match = _NAME.search(str(run.get("run_name") or ""))
                if match is not None:
                    yield match[1], run


def _start_time(run: Mapping[str, Any]) -> int:
    """Return the start of a run in milliseconds since the epoch."""
    return int(run.get("start_time") or 0)


def _windows(since: int) -> Iterator[tuple[int, int]]:
    """Yield spans of time from `since` to the future, in milliseconds since the epoch; 0 is an open end.

    Most runs are submitted soon after their reference was logged, but Databricks lists the newest runs first.
    """
    length = _FIRST_WINDOW
    while since and since + length < time.time() * 1000:
        yield since, since + length - 1
        since, length = since + length, 2 * length
    yield since, 0

"""Asks a workspace for the states of all its runs together, seldom for old ones."""

from __future__ import annotations

import logging
import math
import random
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet.backends._remote.state_cache import CachedState, StateCache
from mlfleet.backends.databricks.client import PATIENCE, Timing, Workspace, WorkspaceError
from mlfleet.backends.databricks.states import LOST, State, read_state
from mlfleet.errors import BackendError

__all__ = ["Poller", "RecentRuns"]

_log = logging.getLogger("mlfleet.databricks")

_FEW = 10  # runs that are asked for one by one
_PAGE = 25  # runs that runs/list gives at once
_AT_ONCE = 8
_SHORTEST_GAP = 1.0  # seconds between the beginnings of two rounds
_PER_RUN_SECOND = 30  # a run of 300 s is asked for every 10 s
_A_MINUTE = 50  # requests that polls of runs which are not young cost


@dataclass(slots=True)
class _Schedule:
    """When a run was begun to be watched, and when it is due."""

    since: float
    due: float


class Poller(StateCache[State]):
    """The states of runs by their ids in Databricks.

    Args:
        workspace: whose runs they are.
        timing: how often to ask.
    """

    def __init__(self, workspace: Workspace, timing: Timing) -> None:
        super().__init__(self._follow, name="mlfleet Databricks poll")
        self._workspace = workspace
        self._timing = timing
        self._timings: dict[str, _Schedule] = {}
        self._count = 0  # of the runs that had not ended when the last poll began
        self._changed = anyio.Event()
        self._last_round = -math.inf

    def track(self, key: str) -> CachedState[State]:
        """See `StateCache.track`."""
        cell = super().track(key)
        self.hurry(key)
        return cell

    def untrack(self, key: str) -> None:
        """See `StateCache.untrack`."""
        super().untrack(key)
        if key not in self.keys:
            self._timings.pop(key, None)

    def hurry(self, key: str) -> None:
        """Treat a run as a young one from now on: somebody waits for its end, or something was done to it."""
        now = time.monotonic()
        self._timings[key] = _Schedule(now, now + self._timing.fast / 2)
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

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
                _log.warning("the states of %d Databricks runs are not known: %s", len(self._live()), error)
                if now - failing_since > PATIENCE:
                    text = f"the states of Databricks runs could not be read for {now - failing_since:.0f} s: {error}"
                    raise BackendError(text, backend="databricks") from error
                await anyio.sleep(self._timing.after_failure)

    def _live(self) -> list[str]:
        return [key for key in self.keys if (state := self.get(key)) is None or not state.over]

    async def _due(self) -> list[str]:
        """Wait until a run is due; it, and those that are almost due as well."""
        while True:
            changed = self._changed
            live = self._live()
            self._count = len(live)
            now = time.monotonic()
            first = min((self._timings[key].due for key in live), default=math.inf)
            # New runs that come one after the other share a round, so that there are 60 rounds a minute at most.
            first = max(first, self._last_round + min(_SHORTEST_GAP, self._timing.fast))
            if first <= now:
                self._last_round = now
                return [key for key in live if self._timings[key].due <= now + 0.3 * self._interval(key)]
            with anyio.move_on_after(first - now):
                await changed.wait()

    def _interval(self, key: str) -> float:
        """Seconds until the next poll for a run; all those that are not young share a number of requests a minute."""
        age = time.monotonic() - self._timings[key].since
        if age < self._timing.young:
            return self._timing.fast
        requests = self._count if self._count <= _FEW else math.ceil(self._count / _PAGE)
        return max(min(age / _PER_RUN_SECOND, self._timing.slow), requests * 60 / _A_MINUTE)

    def _put(self, key: str, state: State) -> None:
        timing = self._timings.get(key)
        if timing is not None:
            timing.due = time.monotonic() + self._interval(key) * random.uniform(0.9, 1.1)  # noqa: S311
        self.put(key, state)

    async def _poll(self, due: Collection[str]) -> None:
        missing = set(due)
        if self._count > _FEW:
            missing -= await self._list(missing)
        errors: list[WorkspaceError] = []
        room = anyio.CapacityLimiter(_AT_ONCE)
        async with anyio.create_task_group() as group:
            for key in missing:
                group.start_soon(self._ask, key, room, errors)
        if errors:
            raise errors[0]

    async def _ask(self, key: str, room: anyio.CapacityLimiter, errors: list[WorkspaceError]) -> None:
        """Ask for one run."""
        async with room:
            try:
                run = await self._workspace.jobs("GET", "runs/get", params={"run_id": key})
            except WorkspaceError as error:
                timing = self._timings.get(key)
                if not error.missing:
                    errors.append(error)
                elif timing is not None and time.monotonic() - timing.since > self._timing.not_yet:
                    self._put(key, LOST)
                elif timing is not None:
                    timing.due = time.monotonic() + self._timing.fast
                return
        self._put(key, read_state(run))

    async def _list(self, wanted: Collection[str]) -> set[str]:
        """List the active runs, newest first, as far as needed; those of ours that were in the list."""
        left, seen = set(wanted), set[str]()
        oldest = min((state.start_time for key in wanted if (state := self.get(key)) is not None), default=0)
        ask = partial(self._workspace.jobs, "GET", "runs/list")
        params = {"active_only": "true", "run_type": "SUBMIT_RUN", "limit": str(_PAGE), "expand_tasks": "false"}
        while True:
            page = await ask(params=params)
            runs: list[dict[str, Any]] = page.get("runs") or []
            for run in runs:
                key = str(run.get("run_id"))
                state = read_state(run)
                if key in self._timings and not state.over:
                    self._put(key, self._merged(key, state))
                    seen.add(key)
                    left.discard(key)
            token = page.get("next_page_token")
            passed = bool(oldest and runs and int(runs[-1].get("start_time") or oldest) < oldest)
            if not token or not left or passed:
                return seen
            params = {**params, "page_token": str(token)}

    def _merged(self, key: str, state: State) -> State:
        """The list tells less of a run than was known of it."""
        known = self.get(key)
        return state if known is None or known.phase is not state.phase else known


_FRESH = 20.0  # seconds for which a listing serves all who attach
_MOST = 400  # pages of a listing: Databricks keeps runs for 60 days
_NAME = re.compile(r"\(([0-9a-f]{32})\)$")


class RecentRuns:
    """What ``runs/list`` tells of the runs that mlfleet submitted. One listing serves many who look at a time."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._listing: SingleFlight[str, None] = SingleFlight()
        self._found: dict[str, dict[str, Any]] = {}
        self._listed_at = float("-inf")

    async def find(self, run_id: str) -> dict[str, Any] | None:
        """The latest run of that MLflow run, as ``runs/get`` tells it; None if there is none."""
        if run_id not in self._found or time.monotonic() - self._listed_at > _FRESH:
            await self._listing("", self._list)
        listed = self._found.get(run_id)
        if listed is None:
            return None
        return await self._workspace.jobs("GET", "runs/get", params={"run_id": str(listed["run_id"])})

    async def _list(self) -> None:
        params = {"run_type": "SUBMIT_RUN", "limit": "25", "expand_tasks": "false"}
        found: dict[str, dict[str, Any]] = {}
        for _ in range(_MOST):
            page = await self._workspace.jobs("GET", "runs/list", params=params)
            for run in page.get("runs") or []:
                match = _NAME.search(str(run.get("run_name") or ""))
                if match is not None:
                    latest = found.setdefault(match[1], run)
                    if int(run.get("run_id") or 0) > int(latest["run_id"]):
                        found[match[1]] = run
            token = page.get("next_page_token")
            if not token:
                break
            params = {**params, "page_token": str(token)}
        self._found, self._listed_at = found, time.monotonic()

"""The poller of a workspace's runs, which asks for all of them together, and for old ones seldom."""

from __future__ import annotations

import logging
import math
import random
import re
import time
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet.backends._remote.state_cache import CachedState, StateCache
from mlfleet.backends.databricks.client import RETRY_SECONDS, Timing, Workspace, WorkspaceError
from mlfleet.backends.databricks.states import LOST, State, read_state
from mlfleet.errors import BackendError

__all__ = ["Poller", "RecentRuns"]

_log = logging.getLogger("mlfleet.databricks")

_FEW = 10  # runs that are polled one by one; more are polled by lists
_PAGE = 25  # runs on a page of runs/list
_AT_ONCE = 8  # requests of one round
_SHORTEST_GAP = 1.0  # seconds between the starts of two rounds
_AGE_PER_INTERVAL = 30  # a run of 300 s is polled every 10 s
_REQUESTS_PER_MINUTE = 50  # for all runs that are not young


@dataclass(slots=True)
class _Schedule:
    """The polls of one run.

    Attributes:
        since: The time since which the run counts as young, by ``time.monotonic``.
        due: The time of the next poll, by ``time.monotonic``.
    """

    since: float
    due: float


class Poller(StateCache[State]):
    """A cache of the states of runs, by their ids in Databricks.

    Args:
        workspace: The client of the workspace.
        timing: The intervals of polls.
    """

    def __init__(self, workspace: Workspace, timing: Timing) -> None:
        super().__init__(self._follow, name="mlfleet Databricks poll")
        self._workspace = workspace
        self._timing = timing
        self._schedules: dict[str, _Schedule] = {}
        self._count = 0  # runs that had not ended when the last round began
        self._changed = anyio.Event()
        self._last_round = -math.inf

    def track(self, key: str) -> CachedState[State]:
        """Keep the state of a run from now on, and poll it soon; see `StateCache.track`."""
        state = super().track(key)
        self.poll_soon(key)
        return state

    def untrack(self, key: str) -> None:
        """Undo one call of `track`; see `StateCache.untrack`."""
        super().untrack(key)
        if key not in self.keys:
            self._schedules.pop(key, None)

    def poll_soon(self, key: str) -> None:
        """Poll a run as often as a young one from now on."""
        now = time.monotonic()
        self._schedules[key] = _Schedule(now, now + self._timing.fast / 2)
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
                _log.warning("the states of %d Databricks runs cannot be read: %s", len(self._active_keys()), error)
                if now - failing_since > RETRY_SECONDS:
                    text = f"the states of Databricks runs could not be read for {now - failing_since:.0f} s: {error}"
                    raise BackendError(text, backend="databricks") from error
                await anyio.sleep(self._timing.after_failure)

    def _active_keys(self) -> list[str]:
        return [key for key in self.keys if (state := self.get(key)) is None or not state.is_terminal]

    async def _due(self) -> list[str]:
        """Wait until the poll of a run is due. Return that run and those whose poll is almost due."""
        while True:
            changed = self._changed
            active = self._active_keys()
            self._count = len(active)
            now = time.monotonic()
            first = min((self._schedules[key].due for key in active), default=math.inf)
            # Runs submitted in a row share a round, so that there are at most 60 rounds a minute.
            first = max(first, self._last_round + min(_SHORTEST_GAP, self._timing.fast))
            if first <= now:
                self._last_round = now
                return [key for key in active if self._schedules[key].due <= now + 0.3 * self._interval(key)]
            with anyio.move_on_after(first - now):
                await changed.wait()

    def _interval(self, key: str) -> float:
        """Return the seconds until the next poll of a run. Runs that are not young share the requests of a minute."""
        age = time.monotonic() - self._schedules[key].since
        if age < self._timing.young_age:
            return self._timing.fast
        requests = self._count if self._count <= _FEW else math.ceil(self._count / _PAGE)
        return max(min(age / _AGE_PER_INTERVAL, self._timing.slow), requests * 60 / _REQUESTS_PER_MINUTE)

    def _put(self, key: str, state: State) -> None:
        timing = self._schedules.get(key)
        if timing is not None:
            timing.due = time.monotonic() + self._interval(key) * random.uniform(0.9, 1.1)  # noqa: S311
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
                run = await self._workspace.call_jobs("GET", "runs/get", params={"run_id": key})
            except WorkspaceError as error:
                timing = self._schedules.get(key)
                if not error.missing:
                    errors.append(error)
                elif timing is not None and time.monotonic() - timing.since > self._timing.visibility_delay:
                    self._put(key, LOST)
                elif timing is not None:
                    timing.due = time.monotonic() + self._timing.fast
                return
        self._put(key, read_state(run))

    async def _list(self, wanted: Collection[str]) -> set[str]:
        """Poll runs by listing the active ones, newest first, as far as needed. Return the tracked runs in the list."""
        left, seen = set(wanted), set[str]()
        oldest = min((state.start_time for key in wanted if (state := self.get(key)) is not None), default=0)
        ask = partial(self._workspace.call_jobs, "GET", "runs/list")
        params = {"active_only": "true", "run_type": "SUBMIT_RUN", "limit": str(_PAGE), "expand_tasks": "false"}
        while True:
            page = await ask(params=params)
            runs: list[dict[str, Any]] = page.get("runs") or []
            for run in runs:
                key = str(run.get("run_id"))
                state = read_state(run)
                if key in self._schedules and not state.is_terminal:
                    self._put(key, self._merged(key, state))
                    seen.add(key)
                    left.discard(key)
            token = page.get("next_page_token")
            passed = bool(oldest and runs and int(runs[-1].get("start_time") or oldest) < oldest)
            if not token or not left or passed:
                return seen
            params = {**params, "page_token": str(token)}

    def _merged(self, key: str, state: State) -> State:
        """Return the known state if only the list, which has fewer fields, is newer; else the state from the list."""
        known = self.get(key)
        return state if known is None or known.phase is not state.phase else known


_FRESH = 20.0  # seconds for which a listing is used
_MOST = 400  # pages of a listing: Databricks keeps runs for 60 days
_NAME = re.compile(r"\(([0-9a-f]{32})\)$")


class RecentRuns:
    """The recent runs of a workspace that mlfleet submitted. Concurrent calls share a listing.

    Args:
        workspace: The client of the workspace.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._listing: SingleFlight[str, None] = SingleFlight()
        self._found: dict[str, dict[str, Any]] = {}
        self._listed_at = float("-inf")

    async def find(self, run_id: str) -> dict[str, Any] | None:
        """Return the entry of ``runs/get`` for the latest run of an MLflow run; None if there is none."""
        if run_id not in self._found or time.monotonic() - self._listed_at > _FRESH:
            await self._listing("", self._list)
        listed = self._found.get(run_id)
        if listed is None:
            return None
        return await self._workspace.call_jobs("GET", "runs/get", params={"run_id": str(listed["run_id"])})

    async def list_active(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the runs that have not ended, each as the id of its MLflow run and its entry of ``runs/list``."""
        return [each async for each in self._entries({"active_only": "true"})]

    async def _list(self) -> None:
        found: dict[str, dict[str, Any]] = {}
        async for run_id, run in self._entries({}):
            latest = found.setdefault(run_id, run)
            if int(run.get("run_id") or 0) > int(latest["run_id"]):
                found[run_id] = run
        self._found, self._listed_at = found, time.monotonic()

    async def _entries(self, filters: Mapping[str, str]) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Yield the id of the MLflow run and the entry of ``runs/list`` for each run, newest first."""
        params = {"run_type": "SUBMIT_RUN", "limit": str(_PAGE), "expand_tasks": "false", **filters}
        for _ in range(_MOST):
            page = await self._workspace.call_jobs("GET", "runs/list", params=params)
            for run in page.get("runs") or []:
                match = _NAME.search(str(run.get("run_name") or ""))
                if match is not None:
                    yield match[1], run
            token = page.get("next_page_token")
            if not token:
                return
            params = {**params, "page_token": str(token)}

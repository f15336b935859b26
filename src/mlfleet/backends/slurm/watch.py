"""The poller of a cluster's jobs, which asks for all of them with one process."""

from __future__ import annotations

import logging
import math
import random
import time
from dataclasses import dataclass

import anyio

from mlfleet.backends._remote.state_cache import CachedState, StateCache
from mlfleet.backends.slurm.client import SlurmClient, SlurmError, Timing
from mlfleet.backends.slurm.states import JobState

__all__ = ["Poller"]

_log = logging.getLogger("mlfleet.slurm")

_YOUNG = 60.0  # seconds for which a job counts as young
_AGE_PER_INTERVAL = 30  # a job of 300 s is polled every 10 s
_WARNING_INTERVAL = 60.0  # seconds between two warnings that the controller does not answer


@dataclass(slots=True)
class _Schedule:
    """The polls of one job.

    Attributes:
        since: The time since which the job counts as young, by ``time.monotonic``.
        due: The time of the next poll.
    """

    since: float
    due: float


class Poller(StateCache[JobState]):
    """A cache of the states of jobs, by their ids.

    A controller that does not answer says nothing about the jobs: they keep their states, however long it takes.

    Args:
        client: The client of the cluster.
        timing: The intervals of polls.
    """

    def __init__(self, client: SlurmClient, timing: Timing) -> None:
        super().__init__(self._follow, name="mlfleet Slurm poll")
        self._client = client
        self._timing = timing
        self._schedules: dict[str, _Schedule] = {}
        self._changed = anyio.Event()
        self._warned = -math.inf
        self._words: set[str] = set()

    def track(self, key: str) -> CachedState[JobState]:
        """Keep the state of a job from now on, and poll it soon; see `StateCache.track`."""
        state = super().track(key)
        self.poll_soon(key)
        return state

    def untrack(self, key: str) -> None:
        """Undo one call of `track`; see `StateCache.untrack`."""
        super().untrack(key)
        if key not in self.keys:
            self._schedules.pop(key, None)

    def poll_soon(self, key: str) -> None:
        """Poll a job as often as a young one from now on."""
        now = time.monotonic()
        self._schedules[key] = _Schedule(now, now + self._timing.fast / 2)
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    async def _follow(self, watch: StateCache[JobState]) -> None:
        while True:
            await self.wanted()
            due = await self._due()
            if not due:
                continue
            try:
                states = await self._client.states(due)
            except SlurmError as error:
                self._warn(error)
                states = {}
                await anyio.sleep(self._timing.fast)
            for key in due:
                schedule = self._schedules.get(key)
                if schedule is not None:
                    schedule.due = time.monotonic() + self._interval(schedule) * random.uniform(0.9, 1.1)  # noqa: S311
                if key in states:
                    self._warn_of_word(states[key])
                    self.put(key, states[key])

    async def _due(self) -> list[str]:
        """Wait until the poll of a job is due, and return that job and those whose poll is almost due."""
        while True:
            changed = self._changed
            active = [key for key in self.keys if (state := self.get(key)) is None or not state.is_over]
            now = time.monotonic()
            first = min((self._schedules[key].due for key in active), default=math.inf)
            if first <= now:
                return [key for key in active if self._is_due(self._schedules[key], now)]
            with anyio.move_on_after(first - now):
                await changed.wait()

    def _is_due(self, schedule: _Schedule, now: float) -> bool:
        return schedule.due <= now + 0.5 * self._interval(schedule)

    def _interval(self, schedule: _Schedule) -> float:
        age = time.monotonic() - schedule.since
        if age < _YOUNG:
            return self._timing.fast
        return min(max(age / _AGE_PER_INTERVAL, self._timing.fast), self._timing.slow)

    def _warn(self, error: SlurmError) -> None:
        now = time.monotonic()
        if now - self._warned > _WARNING_INTERVAL:
            self._warned = now
            _log.warning(
                "the states of %d Slurm jobs cannot be read, which ends none of them: %s", len(self.keys), error
            )

    def _warn_of_word(self, state: JobState) -> None:
        if state.is_unknown and state.word not in self._words:
            self._words.add(state.word)
            _log.warning("Slurm has a state that mlfleet does not know, %r: the job is taken for running", state.word)

"""States that are polled: often while a thing is young, then ever more seldom, and many in one round."""

from __future__ import annotations

import math
import random
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

import anyio

from mlfleet.backends._remote.state_cache import CachedState, StateCache, V

__all__ = ["PolledStates"]


@dataclass(slots=True)
class PollSchedule:
    """The polls of one thing.

    Attributes:
        since: The time since which it counts as young, by ``time.monotonic``.
        due: The time of the next poll, by ``time.monotonic``.
    """

    since: float
    due: float

    @property
    def age(self) -> float:
        """The seconds since which it counts as young."""
        return time.monotonic() - self.since


class PolledStates(StateCache[V], ABC):
    """A `StateCache` that a poller feeds.

    A subclass polls in `_follow`: it waits for `_due`, asks for the states, and calls `_schedule_next` for each key.

    Args:
        name: The name of the poller's task.
        fast: Seconds between two polls of a thing that is young.
        early: The part of its interval by which a poll may come early, to share a round with others.
        shortest_gap: Seconds between the beginnings of two rounds.
    """

    def __init__(self, *, name: str, fast: float, early: float, shortest_gap: float = 0.0) -> None:
        super().__init__(self._follow, name=name)
        self._fast = fast
        self._early = early
        self._shortest_gap = shortest_gap
        self._schedules: dict[str, PollSchedule] = {}
        self._count = 0  # things that had not ended when the last round began
        self._changed = anyio.Event()
        self._last_round = -math.inf

    def track(self, key: str) -> CachedState[V]:
        """Keep the state of `key` from now on, and poll it soon; see `StateCache.track`."""
        state = super().track(key)
        self.poll_soon(key)
        return state

    def untrack(self, key: str) -> None:
        """Undo one call of `track`; see `StateCache.untrack`."""
        super().untrack(key)
        if key not in self.keys:
            self._schedules.pop(key, None)

    def poll_soon(self, key: str) -> None:
        """Poll `key` as often as a young thing from now on."""
        now = time.monotonic()
        self._schedules[key] = PollSchedule(now, now + self._fast / 2)
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    def _active_keys(self) -> list[str]:
        return [key for key in self.keys if (state := self.get(key)) is None or not self._has_ended(state)]

    async def _due(self) -> list[str]:
        """Wait until a poll is due. Return its key and those whose poll is almost due."""
        while True:
            changed = self._changed
            active = self._active_keys()
            self._count = len(active)
            now = time.monotonic()
            first = min((self._schedules[key].due for key in active), default=math.inf)
            first = max(first, self._last_round + self._shortest_gap)
            if first <= now:
                self._last_round = now
                return [key for key in active if self._schedules[key].due <= now + self._early * self._interval(key)]
            with anyio.move_on_after(first - now):
                await changed.wait()

    def _schedule_next(self, key: str) -> None:
        """Set the time of the next poll of `key`, if it is tracked."""
        schedule = self._schedules.get(key)
        if schedule is not None:
            schedule.due = time.monotonic() + self._interval(key) * random.uniform(0.9, 1.1)  # noqa: S311

    @abstractmethod
    def _interval(self, key: str) -> float:
        """Return the seconds until the next poll of a tracked key."""

    @abstractmethod
    def _has_ended(self, state: V) -> bool:
        """Return True for a state after which there is no further one."""

    @abstractmethod
    async def _follow(self, watch: StateCache[V]) -> None:
        """Poll until this is cancelled; see `StateCache`."""

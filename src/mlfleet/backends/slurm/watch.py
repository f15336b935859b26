"""The poller of a cluster's jobs, which asks for all of them with one process."""

from __future__ import annotations

import math
import time

import anyio

from mlfleet._run_log import get_logger
from mlfleet.backends._remote.polling import PolledStates
from mlfleet.backends._remote.state_cache import StateCache
from mlfleet.backends.slurm.client import SlurmClient, SlurmError, Timing
from mlfleet.backends.slurm.states import JobState

__all__ = ["Poller"]

_log = get_logger("mlfleet.slurm")

_YOUNG = 60.0  # seconds for which a job counts as young
_AGE_PER_INTERVAL = 30  # a job of 300 s is polled every 10 s
_WARNING_INTERVAL = 60.0  # seconds between two warnings that the controller does not answer


class Poller(PolledStates[JobState]):
    """A cache of the states of jobs, by their ids.

    A controller that does not answer says nothing about the jobs: they keep their states, however long it takes.

    Args:
        client: The client of the cluster.
        timing: The intervals of polls.
    """

    def __init__(self, client: SlurmClient, timing: Timing) -> None:
        super().__init__(name="mlfleet Slurm poll", fast=timing.fast, early=0.5)
        self._client = client
        self._timing = timing
        self._warned = -math.inf
        self._words: set[str] = set()

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
                self._schedule_next(key)
                if key in states:
                    self._warn_of_word(states[key])
                    self.put(key, states[key])

    def _interval(self, key: str) -> float:
        age = self._schedules[key].age
        if age < _YOUNG:
            return self._timing.fast
        return min(max(age / _AGE_PER_INTERVAL, self._timing.fast), self._timing.slow)

    def _has_ended(self, state: JobState) -> bool:
        return state.is_over

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

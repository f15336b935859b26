"""One stream of the engine's events for all containers, rather than one waiting request for each."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import anyio

from mlfleet.backends._remote.state_cache import StateCache
from mlfleet.backends.docker.client import Engine, EngineError
from mlfleet.errors import RunLost

__all__ = [
    "DRIVER_LABEL",
    "EXPERIMENT_LABEL",
    "OUTPUT_LABEL",
    "PROJECT_LABEL",
    "RUN_LABEL",
    "Containers",
    "Phase",
    "State",
]

RUN_LABEL = "mlfleet.run-id"
PROJECT_LABEL = "mlfleet.project"
OUTPUT_LABEL = "mlfleet.output"
DRIVER_LABEL = "mlfleet.driver"
EXPERIMENT_LABEL = "mlfleet.experiment-id"
PATIENCE = 60.0
"""Seconds that an engine may be away (it restarts) before its runs count as lost."""

_FIRST_DELAY, _LAST_DELAY = 0.1, 2.0  # seconds between attempts to reach it again
_REFRESH = 300.0
_log = logging.getLogger("mlfleet.docker")


class Phase(StrEnum):
    """What a container is at, as far as a run is concerned."""

    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class State:
    """A container as the engine last told of it.

    Attributes:
        phase: what it is at.
        exit_code: once it has exited, if that was seen.
        oom: whether something in it was ended for want of memory.
        unseen: whether it ended while the engine could not be reached.
        signal: the last one that the engine sent to it, whoever asked for that.
    """

    phase: Phase
    exit_code: int | None = None
    oom: bool = False
    unseen: bool = False
    signal: int | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.phase in (Phase.EXITED, Phase.GONE)


class Containers(StateCache[State]):
    """The states of containers by id, fed by the engine's event stream.

    The stream is opened before the containers are listed, so that no end falls between the two. When it breaks, it is
    opened again and the list compared with what was known: an engine that restarts loses nobody.

    Args:
        engine: whose events they are.
        patience: seconds that it may be away.

    Attributes:
        breaks: how often the stream has broken off.
    """

    def __init__(self, engine: Engine, *, patience: float = PATIENCE) -> None:
        super().__init__(self._follow, name="mlfleet Docker events")
        self._engine = engine
        self._patience = patience
        self.breaks = 0

    async def _follow(self, watch: StateCache[State]) -> None:
        await watch.wanted()  # an engine that no run asks for need not be there
        broken_since: float | None = None
        delay = _FIRST_DELAY
        while True:
            problem: EngineError | None = None
            refresh = anyio.CancelScope()
            try:
                async with self._engine.stream("asked for its events", "GET", "events", params=_events()) as content:
                    await self._list(away=broken_since is not None)
                    broken_since, delay = None, _FIRST_DELAY
                    # A connection can die without a word (a laptop that slept): look anew from time to time.
                    refresh.deadline = anyio.current_time() + _REFRESH
                    with refresh:
                        async for line in content:
                            self._apply(line)
            except EngineError as error:
                problem = error
            if refresh.cancelled_caught:
                continue
            self.breaks += 1
            if broken_since is None:
                broken_since = time.monotonic()
            elif problem is not None and time.monotonic() - broken_since > self._patience:
                text = f"the Docker engine was away for {self._patience:g} s: {problem}"
                raise RunLost(text, backend="docker") from problem
            if problem is not None and delay == _FIRST_DELAY:
                _log.warning("the Docker engine's events have broken off: %s", problem)
            await anyio.sleep(delay)
            delay = min(delay * 2, _LAST_DELAY)

    async def _list(self, *, away: bool) -> None:
        """Take the list for the truth; `away`: it is the first one since the engine could not be reached."""
        asked_at = self.now()
        params = {"all": True, "filters": {"label": [RUN_LABEL]}}
        listed = await self._engine.call("asked for its containers", "GET", "containers/json", params=params)
        states: dict[str, State] = {}
        for item in listed:
            key, phase = str(item["Id"]), _phase(item["State"])
            known = self.get(key)
            if known is None:
                states[key] = State(phase)
            elif known.ended:
                states[key] = known
            else:
                states[key] = replace(known, phase=phase, unseen=away and phase is Phase.EXITED)
        self.replace(states, asked_at=asked_at, gone=_gone)

    def _apply(self, line: bytes) -> None:
        event = json.loads(line)
        actor: Mapping[str, Any] = event.get("Actor") or {}
        key = str(actor.get("ID"))
        state = self.get(key) or State(Phase.CREATED)
        match event.get("Action"):
            case "start":
                state = replace(state, phase=Phase.RUNNING)
            case "oom":
                state = replace(state, oom=True)
            case "kill":
                state = replace(state, signal=_number(actor, "signal"))
            case "die":
                state = replace(state, phase=Phase.EXITED, exit_code=_number(actor, "exitCode"))
            case "destroy":
                state = _gone(state)
            case _:
                return
        self.put(key, state)


def _events() -> dict[str, Any]:
    return {
        "filters": {"type": ["container"], "label": [RUN_LABEL], "event": ["start", "oom", "kill", "die", "destroy"]},
    }


def _gone(state: State | None) -> State:
    """What has exited stays so when it is removed."""
    return replace(state, phase=Phase.GONE) if state is not None else State(Phase.GONE)


def _phase(text: str) -> Phase:
    match text:
        case "created":
            return Phase.CREATED
        case "exited" | "dead":
            return Phase.EXITED
        case _:  # running, paused, restarting, removing
            return Phase.RUNNING


def _number(actor: Mapping[str, Any], name: str) -> int | None:
    try:
        return int(actor["Attributes"][name])
    except (KeyError, TypeError, ValueError):
        return None

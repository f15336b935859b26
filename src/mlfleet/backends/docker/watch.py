"""The containers of runs: one event stream for all that run, and lists of what an engine has."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import anyio

from mlfleet._concurrency.threads import FILES
from mlfleet._process.reattach import machine
from mlfleet._retry import RetryPolicy
from mlfleet._run_log import get_logger
from mlfleet._store.lease import unleased
from mlfleet.backends._remote.state_cache import StateCache
from mlfleet.backends.base import ListedRun
from mlfleet.backends.docker.client import RETRIES, Engine, EngineError, is_away
from mlfleet.errors import RunLost

__all__ = [
    "DRIVER_LABEL",
    "EXPERIMENT_LABEL",
    "OUTPUT_LABEL",
    "PROJECT_LABEL",
    "RUN_LABEL",
    "ContainerState",
    "ContainerWatch",
    "Phase",
    "list_containers",
    "prune_containers",
    "remove_container",
]

RUN_LABEL = "mlfleet.run-id"
PROJECT_LABEL = "mlfleet.project"
OUTPUT_LABEL = "mlfleet.output"
DRIVER_LABEL = "mlfleet.driver"
EXPERIMENT_LABEL = "mlfleet.experiment-id"

_REFRESH = 300.0  # seconds until the list is fetched again although no event came
_log = get_logger("mlfleet.docker")


class Phase(StrEnum):
    """The phase of a container's life, as far as a run is concerned."""

    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class ContainerState:
    """The latest known state of a container.

    Attributes:
        phase: The phase of its life.
        exit_code: The exit code, once it has exited and if that was seen.
        oom: True if a process in it was ended because memory ran out.
        unseen: True if it ended while the engine could not be reached.
        signal: The last signal that the engine sent to it, for whatever reason.
    """

    phase: Phase
    exit_code: int | None = None
    oom: bool = False
    unseen: bool = False
    signal: int | None = None

    @property
    def ended(self) -> bool:
        """True if nothing in it runs any more."""
        return self.phase in (Phase.EXITED, Phase.GONE)


class ContainerWatch(StateCache[ContainerState]):
    """The states of containers by id, fed by the engine's event stream.

    The stream is opened before the containers are listed, so that no end falls between the two. When it breaks, it is
    opened again and the list compared with the known states, so that the restart of an engine loses no run.

    Args:
        engine: The engine to watch.
        retries: The policy for reconnecting; after its time the runs count as lost.

    Attributes:
        breaks: The number of times that the stream broke.
    """

    def __init__(self, engine: Engine, *, retries: RetryPolicy = RETRIES) -> None:
        super().__init__(self._follow, name="mlfleet Docker events")
        self._engine = engine
        self._retries = retries
        self._away = False
        self.breaks = 0

    async def _follow(self, watch: StateCache[ContainerState]) -> None:
        await watch.wanted()  # without runs, the engine need not be there
        while True:
            try:
                async with AsyncExitStack() as stack:
                    content = await self._connect(stack)
                    # A connection can die silently (a laptop that slept): list again from time to time.
                    with anyio.move_on_after(_REFRESH) as refresh:
                        async for line in content:
                            self._apply(line)
                if refresh.cancelled_caught:
                    continue
            except EngineError as error:
                _log.warning("the Docker engine's events have broken off: %s", error)
            self.breaks += 1
            self._away = True
            await anyio.sleep(self._retries.first_pause)

    async def _connect(self, stack: AsyncExitStack) -> aiohttp.StreamReader:
        """Open the stream, then list the containers; again and again while the engine is away."""

        async def connect() -> aiohttp.StreamReader:
            async with AsyncExitStack() as opened:
                stream = self._engine.stream("asked for its events", "GET", "events", params=_events())
                content = await opened.enter_async_context(stream)
                await self._list()
                stack.push_async_exit(opened.pop_all())
            return content

        try:
            content = await self._retries.call(
                connect, retry_if=lambda error: isinstance(error, EngineError), before_pause=self._note_break
            )
        except EngineError as error:
            text = f"the Docker engine was away for {self._retries.seconds:g} s: {error}"
            raise RunLost(text, backend="docker") from error
        self._away = False
        return content

    def _note_break(self, error: BaseException, pause: float) -> None:
        if not self._away:
            self._away = True
            self.breaks += 1
            _log.warning("the Docker engine cannot be reached: %s", error)

    async def _list(self) -> None:
        """Replace the known states by a list of all containers."""
        before = self.keys  # a container that is tracked from now on may be younger than the list
        states: dict[str, ContainerState] = {}
        for item in await _list(self._engine):
            key, phase = str(item["Id"]), _phase(item["State"])
            known = self.get(key)
            if known is None:
                states[key] = ContainerState(phase)
            elif known.ended:
                states[key] = known
            else:
                states[key] = replace(known, phase=phase, unseen=self._away and phase is Phase.EXITED)
        states.update({key: _gone(self.get(key)) for key in before if key not in states})
        for key, state in states.items():
            self.put(key, state)

    def _apply(self, line: bytes) -> None:
        event = json.loads(line)
        actor: Mapping[str, Any] = event.get("Actor") or {}
        key = str(actor.get("ID"))
        state = self.get(key) or ContainerState(Phase.CREATED)
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


def _gone(state: ContainerState | None) -> ContainerState:
    """Return the state of a removed container: its exit code stays known."""
    return replace(state, phase=Phase.GONE) if state is not None else ContainerState(Phase.GONE)


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


# ---- lists ----------------------------------------------------------------------------------------------------------


async def list_containers(engine: Engine, run_id: str | None = None) -> list[ListedRun]:
    """Return the runs that have a container, the newest first.

    Args:
        engine: The engine to ask.
        run_id: The only run to look for; None: all.

    Raises:
        EngineError: The engine cannot be asked.
    """
    return [await _listed(item) for item in await _list(engine, run_id)]


async def prune_containers(
    engine: Engine, run_ids: Collection[str], *, running: bool, dry_run: bool
) -> list[ListedRun]:
    """Remove the containers that no process looks after; see `Backend.prune`."""
    chosen: list[ListedRun] = []
    for item in await _list(engine):
        run = await _listed(item)
        if run.supervised or (run_ids and run.run_id not in run_ids):
            continue
        if running or run.state in ("created", "exited", "dead"):
            if not dry_run:
                await remove_container(engine, str(item["Id"]))
            chosen.append(run)
    return chosen


async def remove_container(engine: Engine, container: str, *, wait: bool = False) -> None:
    """Remove a container, running or not. One that is gone already is fine; other failures are only logged.

    Args:
        engine: The engine that has it.
        container: The container's id.
        wait: True to wait for an engine that is away, by the policy `RETRIES`.
    """

    async def remove() -> None:
        await engine.call(
            "asked to remove a container",
            lambda docker: docker.containers.container(container).delete(force=True, v=True),
        )

    try:
        await (RETRIES.call(remove, retry_if=is_away) if wait else remove())
    except EngineError as error:
        if error.status not in (404, 409):  # 409: somebody else is removing it
            _log.warning("the container %s is left behind: %s ('mlfleet prune' removes it)", container[:12], error)


async def _list(engine: Engine, run_id: str | None = None) -> list[Any]:
    """Return the engine's entries for the containers of runs, the newest first."""
    filters = json.dumps({"label": [RUN_LABEL if run_id is None else f"{RUN_LABEL}={run_id}"]})
    found = await engine.call(
        "asked for its containers", lambda docker: docker.containers.list(all=True, filters=filters)
    )
    return sorted(found, key=lambda item: int(item["Created"]), reverse=True)


async def _listed(item: Any) -> ListedRun:
    labels = item["Labels"]
    return ListedRun(
        run_id=str(labels[RUN_LABEL]),
        backend="docker",
        created=datetime.fromtimestamp(int(item["Created"]), UTC),
        state=str(item["State"]),
        supervised=await FILES.run(partial(_is_supervised, str(labels.get(DRIVER_LABEL, "")))),
        detail={
            "project": str(labels.get(PROJECT_LABEL, "")),
            "image": str(item["Image"]),
            "container": str((item["Names"] or ["/?"])[0]).removeprefix("/"),
        },
    )


def _is_supervised(label: str) -> bool:
    host, _, path = label.partition(":")
    if host != machine():
        return True  # processes of another machine cannot be seen from here
    with unleased(Path(path)) as is_free:
        return not is_free

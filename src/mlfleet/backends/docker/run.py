"""The handle of a run in a container: one task copies its output, waits for its end, stops and removes it."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio

from mlfleet._concurrency.threads import FILES
from mlfleet._run_log import get_logger
from mlfleet.backends._remote.run import SupervisedRun, exit_text, tasks_beside
from mlfleet.backends.docker.client import RETRIES, Engine, EngineError, is_away
from mlfleet.backends.docker.output import ContainerLock, OutputCopy
from mlfleet.backends.docker.watch import ContainerState, ContainerWatch, Phase, remove_container
from mlfleet.errors import RunLost
from mlfleet.runs import FailureKind, Outcome, RunStatus

__all__ = ["Container", "DockerRun"]

_log = get_logger("mlfleet.docker")
_STALLED = 10.0  # seconds without output of a container that has ended
_PAUSE = 0.5  # seconds between two looks at what no event announces
_KILLING = 15.0  # seconds for which the request to stop a container is repeated
_SIGNALLED = 128  # exit codes above it are signals
# The signals that are sent to end programs.
_ENDING = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL, signal.SIGTERM}


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A container that was made for a run.

    Attributes:
        id: The engine's id.
        name: The name: ``mlfleet-<run id>``, unless the caller chose another.
        run_id: The id of the MLflow run.
        tty: True if it has a terminal.
        memory: The memory limit in bytes; 0: no limit.
        output: The file for its output; None: the output of this process.
        grace: Seconds between SIGTERM and SIGKILL.
        tags: Tags for the MLflow run, which name the image.
        stop_signal: The signal that asks it to stop.
        rotates: True if the engine may discard the older part of its output.
    """

    id: str
    name: str
    run_id: str
    tty: bool = False
    memory: int = 0
    output: Path | None = None
    grace: float = 10.0
    tags: Mapping[str, str] = field(default_factory=dict)
    stop_signal: str = "SIGTERM"
    rotates: bool = False


class DockerRun(SupervisedRun):
    """The handle of a container: SIGTERM, the grace and SIGKILL stop it, and it has ended when it is removed.

    Args:
        container: The container.
        engine: The engine that has it.
        watch: The states of the engine's containers.
        lock: The ownership lock of the container, which need not be held.
        submitted: True if this process submitted the run.
        patience: Seconds for the engine's answer to a request to stop the container.
        ended_as: The status of a run whose container had ended before; None if it goes on.
    """

    backend = "docker"
    noun = "container"

    def __init__(
        self,
        container: Container,
        engine: Engine,
        watch: ContainerWatch,
        lock: ContainerLock,
        *,
        submitted: bool,
        patience: float,
        ended_as: RunStatus | None = None,
    ) -> None:
        super().__init__(
            container.run_id, container.output, submitted=submitted, grace=container.grace, ended_as=ended_as
        )
        self._was_signalled = False  # True if the container ran when it was asked to stop
        self._container = container
        self._patience = patience
        self._engine = engine
        self._watch = watch
        self._state = watch.track(container.id)
        self._lock = lock
        self._copy = OutputCopy(
            engine, container.id, container.output, tty=container.tty, keep=container.rotates and not submitted
        )
        self._attached = anyio.Event()
        self._caught_up = anyio.Event()  # the file has what the container had printed when this object was made
        if submitted or not lock.is_held:
            self._caught_up.set()

    # ---- the handle -------------------------------------------------------------------------------------------------

    @property
    def tags(self) -> Mapping[str, str]:
        """The tags for the MLflow run, which name the image."""
        return self._container.tags

    async def started(self) -> None:
        """Return at once: a container runs when the engine has answered its start."""

    # ---- its task ---------------------------------------------------------------------------------------------------

    async def attached(self) -> None:
        """Wait until the container's output is being read, so that the container can be started.

        Raises:
            MlfleetError: The output cannot be read or written.
        """
        await self._attached.wait()
        if self._outcome is not None and self._outcome.error is not None:
            raise self._outcome.error

    async def _tidy(self) -> None:
        await FILES.run(self._lock.release)
        self._watch.untrack(self._container.id)
        self._attached.set()
        self._caught_up.set()

    async def _catch_up(self) -> None:
        await self._caught_up.wait()

    async def _live(self) -> Outcome:
        async with tasks_beside(self._stop) as group:
            copied = anyio.Event()
            if self._lock.is_held:
                group.start_soon(self._copy_output, copied)
            state = await self._state.until(lambda state: state.ended)
            outcome = await self._conclude(state)
            if not self._lock.is_held and await self._take_over():
                group.start_soon(self._copy_output, copied)
            if self._lock.is_held:
                await self._drain(copied)
                await self._remove()
        return replace(outcome, output=await self._last_lines())

    async def _take_over(self) -> bool:
        """Wait until the container is gone, or its owner is. Return True if this process must copy and remove it."""
        while not await FILES.run(self._lock.acquire):
            with anyio.move_on_after(_PAUSE):
                await self._state.until(lambda state: state.phase is Phase.GONE)
                return False
        try:
            await self._inspect()
        except EngineError as error:
            if error.status != 404:
                raise
            await FILES.run(self._lock.release)
            return False
        return True

    async def _copy_output(self, copied: anyio.Event) -> None:
        complete = False
        await self._copy.open()
        if self.submitted and not self._attached.is_set():
            breaks = self._watch.breaks
            await self._copy.attach(self._attached.set)
            self._attached.set()  # also if the engine refused: the container may start without it
            # The end of this stream may be the container's or the connection's: only the container's state tells.
            with anyio.move_on_after(_PAUSE):
                await self._state.until(lambda state: state.ended)
                # If the engine was away since, the stream has missed the output before the end.
                complete = self._watch.breaks == breaks
        while not complete:
            state = self._state.value
            ended = state is not None and state.ended
            if not await self._copy.replay(follow=not ended and self._caught_up.is_set()):
                await anyio.sleep(_PAUSE)
                continue
            self._caught_up.set()
            complete = ended  # a replay that began after the end has everything
        copied.set()

    async def _drain(self, copied: anyio.Event) -> None:
        """Wait for the rest of the output, as long as some of it arrives."""
        seen = -1
        while not copied.is_set() and seen != self._copy.copied:
            seen = self._copy.copied
            with anyio.move_on_after(_STALLED):
                await copied.wait()

    async def _stop(self) -> None:
        """When requested, send SIGTERM, wait for the grace, and send SIGKILL. Cancelled at the container's end."""
        await self._stop_request.requested()
        await self._kill(self._container.stop_signal)
        await self._stop_request.expired()
        await self._kill("SIGKILL")
        await anyio.sleep(_STALLED)
        await self._remove()  # the engine ends by force what it removes, also what is paused
        await anyio.sleep(_STALLED)
        text = f"the container {self._container.name} does not end, although it was killed"
        raise RunLost(text, backend="docker")

    async def _kill(self, signal_name: str) -> None:
        async def kill() -> None:
            await self._engine.call(
                "asked to stop a container",
                lambda docker: docker.containers.container(self._container.id).kill(signal=signal_name),
                seconds=self._patience,
            )

        def runs_still(error: BaseException) -> bool:
            return isinstance(error, EngineError) and error.status not in (404, 409)

        try:
            policy = replace(RETRIES, seconds=min(_KILLING, self._patience))  # no longer than for one answer
            await policy.call(kill, retry_if=runs_still)
            self._was_signalled = True
        except EngineError as error:
            if runs_still(error):
                text = f"the container {self._container.name} may still run, it could not be stopped: {error}"
                raise RunLost(text, backend="docker") from error

    async def _remove(self) -> None:
        # An engine that is being stopped ends its containers first, and is away when they should be removed.
        await remove_container(self._engine, self._container.id, wait=True)

    # ---- how it ended -----------------------------------------------------------------------------------------------

    async def _conclude(self, state: ContainerState) -> Outcome:
        text = ""
        try:
            inspected = (await self._inspect())["State"]
            text = str(inspected.get("Error") or "")
            oom = state.oom or bool(inspected.get("OOMKilled"))
            state = replace(state, exit_code=int(inspected["ExitCode"]), oom=oom)
        except EngineError as error:
            if error.status != 404:
                raise
        code = state.exit_code
        if self._stop_request.is_requested and (self._was_signalled or code is None):
            return Outcome(RunStatus.KILLED, code, "cancelled")
        if code is None:
            text = f"the container {self._container.name} was removed by somebody else before its end was seen"
            raise RunLost(text, backend="docker")
        if code == 0:
            return Outcome(RunStatus.FINISHED, 0)
        return Outcome(RunStatus.FAILED, code, self._reason(code, state, text), cause=_cause(state))

    async def _inspect(self) -> Mapping[str, Any]:
        async def inspect() -> Mapping[str, Any]:
            return await self._engine.call(
                "asked how a container ended", lambda docker: docker.containers.container(self._container.id).show()
            )

        try:
            return await RETRIES.call(inspect, retry_if=is_away)
        except EngineError as error:
            if error.unreachable:
                raise RunLost(f"how the run ended is not known: {error}", backend="docker") from error
            raise

    def _reason(self, code: int, state: ContainerState, text: str) -> str:
        if state.oom:
            limit = f" (its limit is {self._container.memory // 2**20} MiB)" if self._container.memory else ""
            return f"out of memory{limit}"
        reason = exit_text(code)
        if state.unseen:
            reason += ": the Docker engine was stopped or restarted while the run was in it"
        elif state.signal in _ENDING:
            sent = signal.Signals(state.signal).name
            reason += (
                f": the Docker engine sent it {sent}, since it was stopped itself, or was asked to (docker stop or rm)"
            )
        return f"{reason}: {text}" if text else reason


def _cause(state: ContainerState) -> FailureKind | None:
    if state.oom:
        return FailureKind.OOM
    # A command that ended by itself while the engine was away has an exit code of its own.
    taken_down = state.signal in _ENDING or (state.unseen and (state.exit_code or 0) >= _SIGNALLED)
    return FailureKind.INFRASTRUCTURE if taken_down else None

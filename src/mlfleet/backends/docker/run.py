"""The handle of a run in a container: its one task sees to output, end, cancellation and removal."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio

from mlfleet._concurrency.cancellation import wait_done
from mlfleet._concurrency.threads import FILES
from mlfleet.backends._remote.run import SupervisedRun
from mlfleet.backends.docker.client import Engine, EngineError
from mlfleet.backends.docker.output import Copier, Custody
from mlfleet.backends.docker.watch import PATIENCE, Containers, Phase, State
from mlfleet.errors import MlfleetError, RunLost
from mlfleet.runs import FailureKind, Outcome, RunStatus

__all__ = ["Container", "DockerRun", "remove_container"]

_log = logging.getLogger("mlfleet.docker")
_STALLED = 10.0  # seconds without output of a container that has ended
_AGAIN = 0.5  # seconds between attempts to reach an engine that is away
_LOST = 15.0  # seconds for which an engine that is away is asked to end a container
_CLEANUP = 60.0  # seconds to remove a container
_SIGNALLED = 128  # exit codes above it are signals
_ENDING = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL, signal.SIGTERM}  # what is sent to end programs


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A container that was made for a run.

    Attributes:
        id: the engine's.
        name: ``mlfleet-<run id>``, unless the caller chose another.
        run_id: of the MLflow run.
        tty: whether it has a terminal.
        memory: its limit in bytes; 0 is none.
        output: the file for its output; None: that of this process.
        grace: seconds between SIGTERM and SIGKILL.
        tags: for the MLflow run: what image it is of.
        stop_signal: what asks it to stop.
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


class DockerRun(SupervisedRun):
    """The handle: SIGTERM, the grace and SIGKILL end it, and it has ended when its container is removed."""

    backend = "docker"
    noun = "container"

    def __init__(
        self, container: Container, engine: Engine, containers: Containers, custody: Custody, *, submitted: bool
    ) -> None:
        super().__init__(container.run_id, container.output, submitted=submitted)
        self._container = container
        self._engine = engine
        self._containers = containers
        self._cell = containers.track(container.id)
        self._custody = custody
        self._copier = Copier(engine, container.id, container.output, tty=container.tty)
        self._attached = anyio.Event()
        self._stop_at: float | None = None
        self._stop_changed = anyio.Event()

    # ---- the handle -------------------------------------------------------------------------------------------------

    @property
    def tags(self) -> Mapping[str, str]:
        """For the MLflow run: what image it is of."""
        return self._container.tags

    async def started(self) -> None:
        """A container runs when its start was answered."""

    def _begin_stop(self, grace: float | None) -> None:
        deadline = anyio.current_time() + (self._container.grace if grace is None else grace)
        if self._stop_at is None or deadline < self._stop_at:
            self._stop_at = deadline
            changed, self._stop_changed = self._stop_changed, anyio.Event()
            changed.set()

    async def get_status(self) -> RunStatus:
        """RUNNING until the container is removed, then how it ended."""
        return RunStatus.RUNNING if self._outcome is None else self._outcome.status

    # ---- its task ---------------------------------------------------------------------------------------------------

    async def attached(self) -> None:
        """Wait until the output of the container is read, so that it can be started.

        Raises:
            MlfleetError: it cannot be.
        """
        await self._attached.wait()
        if self._outcome is not None and self._outcome.error is not None:
            raise self._outcome.error

    async def _tidy(self) -> None:
        await wait_done(asyncio.ensure_future(self._let_go()))
        self._containers.untrack(self._container.id)
        self._attached.set()

    async def _let_go(self) -> None:
        await self._copier.close()
        await FILES.run(self._custody.release)

    async def _live(self) -> Outcome:
        try:
            async with anyio.create_task_group() as group:
                copied = anyio.Event()
                if self._custody.held:
                    group.start_soon(self._copy, copied)
                group.start_soon(self._stop_when_asked)
                state = await self._cell.until(lambda state: state.ended)
                outcome = await self._ended(state)
                if not self._custody.held and await self._succeed():
                    group.start_soon(self._copy, copied)
                if self._custody.held:
                    await self._drain(copied)
                    await self._remove()
                group.cancel_scope.cancel()
        except* MlfleetError as errors:
            raise errors.exceptions[0] from None
        return replace(outcome, output=await self._last_lines())

    async def _succeed(self) -> bool:
        """Whether this process must copy and remove, since the one that looked after the container is gone."""
        while not await FILES.run(self._custody.take):
            with anyio.move_on_after(_AGAIN):
                await self._cell.until(lambda state: state.phase is Phase.GONE)
                return False
        try:
            await self._inspect()
        except EngineError as error:
            if error.status != 404:
                raise
            self._custody.release()
            return False
        return True

    async def _copy(self, copied: anyio.Event) -> None:
        complete = False
        await self._copier.open()
        if self.submitted and not self._attached.is_set():
            breaks = self._containers.breaks
            await self._copier.attach(self._attached.set)
            self._attached.set()  # also when the engine refused: the container may start without it
            # This connection has no end of its own: when it breaks, it looks as if the container had ended.
            with anyio.move_on_after(_AGAIN):
                await self._cell.until(lambda state: state.ended)
                # An engine that was away since tells of the end, but this connection missed what came before it.
                complete = self._containers.breaks == breaks
        while not complete:
            state = self._cell.value
            ended = state is not None and state.ended
            if not await self._copier.replay(follow=not ended):
                await anyio.sleep(_AGAIN)
                continue
            complete = ended  # what was asked for after the end is everything
        copied.set()

    async def _drain(self, copied: anyio.Event) -> None:
        """Wait for the rest of the output, as long as some comes."""
        seen = -1
        while not copied.is_set() and seen != self._copier.copied:
            seen = self._copier.copied
            with anyio.move_on_after(_STALLED):
                await copied.wait()

    async def _stop_when_asked(self) -> None:
        """SIGTERM, the grace time, SIGKILL; ends with the group when the container has ended."""
        while self._stop_at is None:
            await self._stop_changed.wait()
        await self._kill(self._container.stop_signal)
        while (left := self._stop_at - anyio.current_time()) > 0:
            with anyio.move_on_after(left):
                await self._stop_changed.wait()
        await self._kill("SIGKILL")
        await anyio.sleep(_STALLED)
        await self._remove()  # the engine ends by force what it removes, also what is paused
        await anyio.sleep(_STALLED)
        text = f"the container {self._container.name} does not end, although it was killed"
        raise RunLost(text, backend="docker")

    async def _kill(self, name: str) -> None:
        container = self._container
        given_up_at = anyio.current_time() + _LOST
        while True:
            try:
                params = {"signal": name}
                await self._engine.call(
                    "asked to stop a container", "POST", f"containers/{container.id}/kill", params=params
                )
            except EngineError as error:
                if error.status in (404, 409):  # it has ended by itself
                    return
                if anyio.current_time() > given_up_at:
                    text = f"the container {container.name} may still run, it could not be stopped: {error}"
                    raise RunLost(text, backend="docker") from error
                await anyio.sleep(_AGAIN)
            else:
                return

    async def _remove(self) -> None:
        # An engine that is being stopped ends its containers first, and is away when they should be removed.
        await remove_container(self._engine, self._container.id, patience=_CLEANUP)

    # ---- how it ended -----------------------------------------------------------------------------------------------

    async def _ended(self, state: State) -> Outcome:
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
        if self._stop_at is not None:
            return Outcome(RunStatus.KILLED, code, "cancelled")
        if code is None:
            text = f"the container {self._container.name} was removed by somebody else before its end was seen"
            raise RunLost(text, backend="docker")
        if code == 0:
            return Outcome(RunStatus.FINISHED, 0)
        return Outcome(RunStatus.FAILED, code, self._reason(code, state, text), cause=_cause(state))

    async def _inspect(self) -> dict[str, Any]:
        given_up_at = anyio.current_time() + PATIENCE
        while True:
            try:
                answer: dict[str, Any] = await self._engine.call(
                    "asked how a container ended", "GET", f"containers/{self._container.id}/json"
                )
            except EngineError as error:
                if not error.unreachable:
                    raise
                if anyio.current_time() > given_up_at:
                    raise RunLost(f"how the run ended is not known: {error}", backend="docker") from error
                await anyio.sleep(_AGAIN)
            else:
                return answer

    def _reason(self, code: int, state: State, text: str) -> str:
        if state.oom:
            limit = f" (its limit is {self._container.memory // 2**20} MiB)" if self._container.memory else ""
            return f"out of memory{limit}"
        reason = f"exit code {code}"
        if code - _SIGNALLED in set(signal.Signals):
            reason += f" ({signal.Signals(code - _SIGNALLED).name})"
        if state.unseen:
            reason += ": the Docker engine was stopped or restarted while the run was in it"
        elif state.signal in _ENDING:
            sent = signal.Signals(state.signal).name
            reason += f": the Docker engine sent it {sent}, since it was stopped itself, or was asked to (docker stop)"
        return f"{reason}: {text}" if text else reason


def _cause(state: State) -> FailureKind | None:
    if state.oom:
        return FailureKind.OOM
    # What ended by itself while nobody saw it has an exit code of its own.
    taken_down = state.signal in _ENDING or (state.unseen and (state.exit_code or 0) >= _SIGNALLED)
    return FailureKind.INFRASTRUCTURE if taken_down else None


async def remove_container(engine: Engine, container: str, *, patience: float = 0.0) -> None:
    """Remove a container, running or not. That it is gone already is fine; another failure is only logged.

    Args:
        engine: that has it.
        container: its id.
        patience: seconds to wait for an engine that is away.
    """
    given_up_at = anyio.current_time() + patience
    while True:
        try:
            params = {"force": True, "v": True}
            await engine.call("asked to remove a container", "DELETE", f"containers/{container}", params=params)
        except EngineError as error:
            if error.unreachable and anyio.current_time() < given_up_at:
                await anyio.sleep(_AGAIN)
                continue
            if error.status not in (404, 409):  # 409: somebody else is removing it
                _log.warning("the container %s is left behind: %s ('mlfleet prune' removes it)", container[:12], error)
        return

"""The process that supervises one detached run, from its request to its terminal status.

It is the driver of that run, as any process with a `Fleet` is the driver of its runs. As long as the process that
submitted the run lives, it gets the events of the run and may cancel it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import socket
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio
import anyio.abc

from mlfleet._concurrency.threads import FILES
from mlfleet._engine.detached import Order
from mlfleet._engine.run import FleetRun
from mlfleet._engine.supervisor import RunDescription, RunObserver, Supervisor
from mlfleet._paths import run_folder
from mlfleet._process.detached import Connection
from mlfleet._run_log import get_logger
from mlfleet._signals import Interrupts, run_until_interrupted
from mlfleet._store.private_folders import secure_state
from mlfleet.errors import MlfleetError, RunCancelled
from mlfleet.fleet import Fleet, context_of
from mlfleet.runs import RunEvent

__all__ = ["supervise"]

_log = get_logger("mlfleet.fleet")


def supervise(end: socket.socket) -> None:
    """Supervise the run that the process at the other end asks for, and return when its status is written."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    run_until_interrupted(_Supervision(end).execute, lambda text: _log.warning("%s", text))


class _Supervision:
    """The supervision of one run.

    Args:
        end: This end of the connection to the process that submits the run.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._run: FleetRun | None = None
        self._is_known = False
        """True once the other process was told the run's id: from then on its end is not that of the run."""

    async def execute(self, interrupts: Interrupts) -> None:
        """Receive the request, and run it to its end."""
        connection = await Connection.of(self._end)
        try:
            message = await connection.receive()
        except Exception as error:  # an argument of a class that this process does not have
            connection.send("failed", f"its arguments must be plain values: {error}")
            message = None
        if message is not None:
            relay = _Relay(connection, asyncio.get_running_loop())
            order: Order = message[1]
            logger = logging.getLogger("mlfleet")
            logger.setLevel(order.log_level)
            logger.addHandler(relay)
            async with anyio.create_task_group() as group:
                group.start_soon(self._listen, connection, interrupts, group)
                connection.send(*await self._supervise(order, connection, interrupts))
                group.cancel_scope.cancel()
            logger.removeHandler(relay)
        await connection.close()

    async def _listen(self, connection: Connection, interrupts: Interrupts, group: anyio.abc.TaskGroup) -> None:
        while (message := await connection.receive()) is not None:
            grace: float | None = message[1]
            if not self._is_known:
                interrupts.scope.cancel()
            if self._run is not None:
                group.start_soon(partial(self._run.cancel, grace=grace))
        if not self._is_known:
            interrupts.scope.cancel()

    async def _supervise(self, order: Order, connection: Connection, interrupts: Interrupts) -> tuple[object, ...]:
        """Run the request to its end, and return the last message for the other process."""

        def follow(event: RunEvent) -> None:
            # Not the return value of `launch`: a cancellation may arrive before it returns.
            if event.run_id is not None and self._run is None and fleet.runs:
                self._run = fleet.runs[0]
                connection.send("created", self._run.info, replace(RunDescription.of(plan), parameters={}))
                self._is_known = True
            connection.send("event", event, droppable=True)

        error: Exception = RunCancelled("the run was cancelled before its MLflow run was created")
        with interrupts.scope:
            try:
                async with Fleet(
                    tracking_uri=order.tracking_uri,
                    tracking_patience=order.tracking_patience,
                    resources=order.resources,
                    on_event=follow,
                ) as fleet:
                    interrupts.fleet = fleet
                    context = context_of(fleet)
                    context.fleet.instrumentation = _Variables(order.variables) if order.variables else None
                    plan = await context.plan(order.request)
                    run = await context.launch(plan)
                    await FILES.run(partial(_log_to, run_folder(run.run_id)))
                    await run.outcome()
            except Exception as failure:
                error = failure
        if self._run is None:
            return ("refused", _sendable(error))
        outcome = await self._run.outcome()
        if outcome.error is not None:
            outcome = replace(outcome, error=_sendable(outcome.error))
        return ("ended", outcome, dict(self._run.metrics))


class _Variables:
    """Gives the run the variables of the observer in the process that submits it.

    Args:
        variables: Names and values.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = variables
        self.names = tuple(variables)

    def observe(self, supervisor: Supervisor) -> RunObserver:
        return self

    def follow(self, event: RunEvent) -> None:
        """Do nothing: the process that submits the run gets the events."""

    def end(self) -> None:
        """Do nothing."""


class _Relay(logging.Handler):
    """A handler that sends records to the process that submits the run."""

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._connection = connection
        self._loop = loop

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        send = partial(self._connection.send, "log", record.name, record.levelno, text, droppable=True)
        self._loop.call_soon_threadsafe(send)  # it may come from any thread


def _log_to(folder: Path) -> None:
    """Let standard output and standard error of this process go to a file beside the output of the run."""
    secure_state()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = os.open(folder / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)


def _sendable(error: BaseException) -> BaseException:
    """Return an error that the other process can read; errors of other packages need not be such."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception:
        return MlfleetError(f"{type(error).__name__}: {error}")
    return error

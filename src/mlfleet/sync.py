"""The blocking functions `run` and `sweep`, for callers without an event loop.

One event loop in a thread of its own serves all calls of the process, from any thread. The exit of the interpreter
waits for the active runs; an interrupt ends them.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from concurrent.futures import CancelledError, Future, InvalidStateError, wait
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar, Unpack

from mlfleet import api
from mlfleet._engine.options import Goal
from mlfleet._engine.request import Output, active_run_id
from mlfleet._engine.run import FleetRun
from mlfleet._run_log import get_logger
from mlfleet._signals import before_exit, is_interrupt
from mlfleet._sweeps import SweepOptions, SweepResult
from mlfleet._text.lines import LogLine
from mlfleet.errors import UsageError
from mlfleet.resources import Resources
from mlfleet.runs import RunStatus, Timeouts
from mlfleet.spaces import Points

__all__ = ["BlockingRun", "run", "sweep"]

logger = get_logger("mlfleet.sync")

T = TypeVar("T")


class BlockingRun:
    """The handle that `run` returns, with the methods of mlflow's ``SubmittedRun`` and the output.

    Every method may be called from any thread.
    """

    def __init__(self, run: FleetRun, loop: _Loop) -> None:
        self._run = run
        self._loop = loop

    def __repr__(self) -> str:
        return f"<BlockingRun {self.run_id}>"

    def _repr_html_(self) -> str:
        return self._run._repr_html_()

    @property
    def run_id(self) -> str:
        """The id of the MLflow run."""
        return self._run.run_id

    def wait(self) -> bool:
        """Wait for the end of the run. Return True if it finished well."""
        return self._loop.call(self._run.wait)

    def get_status(self) -> str:
        """Return the present status of the run, as MLflow shows it: RUNNING, FINISHED, FAILED or KILLED."""
        status = self._loop.call(self._run.get_status)
        # mlflow's runs begin as RUNNING, and programs wait with `while run.get_status() == "RUNNING"`.
        return (RunStatus.RUNNING if status is RunStatus.SCHEDULED else status).value

    def cancel(self) -> None:
        """End the run. Return once all of its processes have ended."""
        self._loop.call(self._run.cancel)

    def logs(self, *, follow: bool = True, tail: int | None = None, start: int = 0) -> Iterator[LogLine]:
        """Read the lines of the run's output.

        Args:
            follow: Go on until the run has ended. False returns the lines that exist now.
            tail: The largest number of lines from before this call: older ones are left out. None: no limit.
            start: The offset in bytes to begin at. `LogLine.end` of the last line that was read continues there.
        """
        lines = self._run.logs(follow=follow, tail=tail, start=start)
        try:
            while (line := self._loop.call(partial(anext, lines, None))) is not None:
                yield line
        finally:
            self._loop.call(lines.aclose)


def run(
    uri: str | os.PathLike[str],
    entry_point: str = "main",
    version: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    docker_args: Mapping[str, Any] | None = None,
    experiment_name: str | None = None,
    experiment_id: str | None = None,
    backend: str = "local",
    backend_config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    storage_dir: str | os.PathLike[str] | None = None,
    synchronous: bool = True,
    run_id: str | None = None,
    run_name: str | None = None,
    env_manager: str | None = None,
    build_image: bool = False,
    docker_auth: Mapping[str, Any] | None = None,
    *,
    tracking_uri: str | None = None,
    parent_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    timeouts: Timeouts | None = None,
    output: Output | None = None,
    log_output: bool = False,
    resources: Resources | None = None,
    env: Mapping[str, str] | None = None,
    inherit_env: bool | Collection[str] | None = None,
    detach: bool = False,
    progress: bool = False,
) -> BlockingRun:
    """Run a project and block until it has ended, with the arguments and the meaning of ``mlflow.projects.run``.

    It works in a script, in any thread, and inside a running event loop, which it blocks: prefer `mlfleet.run_async`
    there. The arguments are those of `mlfleet.run_async`, except for two:

    - ``synchronous=False`` returns as soon as the MLflow run exists. At its exit the process waits for active runs.
    - ``output=None`` lets a synchronous run inherit the stdout and stderr of this process, as mlflow does, and captures
      the output of other runs, and of those with ``progress=True``.

    Raises:
        ExecutionException: The run failed (only if `synchronous`).
        MlfleetError: The request or the project is wrong, or tracking cannot be reached. No run was made.
        KeyboardInterrupt: The run was interrupted; it has ended and is KILLED. SIGTERM and SIGHUP end all runs in the
            same way and then the process, if the program does not handle them and the first call came from the main
            thread.
    """
    loop = _loop()
    if output is None:
        output = "inherit" if synchronous and not log_output and not progress else "capture"
    # One call: an interrupt between two of them would leave the run to itself.
    submitted = loop.call(
        partial(
            api.run_async,
            uri,
            entry_point,
            version,
            parameters,
            tracking_uri=tracking_uri,
            docker_args=docker_args,
            experiment_name=experiment_name,
            experiment_id=experiment_id,
            backend=backend,
            backend_config=backend_config,
            storage_dir=storage_dir,
            synchronous=synchronous,
            run_id=run_id,
            run_name=run_name,
            env_manager=env_manager,
            build_image=build_image,
            docker_auth=docker_auth,
            # mlflow's active run belongs to the calling thread.
            parent_run_id=parent_run_id or active_run_id(),
            tags=tags,
            timeouts=timeouts,
            output=output,
            log_output=log_output,
            resources=resources,
            env=env,
            inherit_env=inherit_env,
            detach=detach,
            progress=progress,
        ),
        starts=True,
    )
    return BlockingRun(submitted, loop)


def sweep(
    uri: str | os.PathLike[str],
    space: Points,
    *,
    tracking_uri: str | None = None,
    progress: bool = False,
    metric: str | None = None,
    goal: Goal = "min",
    **options: Unpack[SweepOptions],
) -> SweepResult:
    """Run a project at every point of a space and block until all runs have ended. See `mlfleet.sweep_async`.

    Raises:
        MlfleetError: The request, the project or the first point is wrong, or tracking cannot be reached. No run was
            made.
        KeyboardInterrupt: The sweep was interrupted; all its runs have ended and are KILLED.
    """
    if options.get("parent_run_id") is None:
        # mlflow's active run belongs to the calling thread.
        options["parent_run_id"] = active_run_id()
    work = partial(
        api.sweep_async, uri, space, tracking_uri=tracking_uri, progress=progress, metric=metric, goal=goal, **options
    )
    return _loop().call(work, starts=True)


class _Loop:
    """The event loop for the blocking calls of this process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._starts: set[asyncio.Task[Any]] = set()
        self._is_closing = False
        self._results: set[Future[Any]] = set()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="mlfleet", daemon=True)
        self._thread.start()
        # Exit hooks of threading run while threads can still be started, those of atexit do not: from Python 3.12 on
        # they could not write to the tracking server (python/cpython#104690). concurrent.futures uses the same hook.
        register = getattr(threading, "_register_atexit", atexit.register)
        register(self._at_exit)
        before_exit(lambda: self._call_while_open(self._close), lambda: self._call_while_open(api.write_killed))

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def call(self, work: Callable[[], Awaitable[T]], *, starts: bool = False) -> T:
        """Run `work` on the loop and wait. An interrupt cancels it and waits until it has cleaned up.

        A second interrupt kills the run or the sweep that it waits for. A third one leaves it to the loop.

        Args:
            work: The coroutine function to run.
            starts: True if it starts runs: it is ended with them, and the exit of the process waits for it.

        Raises:
            UsageError: The program is exiting, and does not run the loop any more.
        """
        result: Future[T] = Future()
        self._results.add(result)
        result.add_done_callback(self._results.discard)
        tasks: list[asyncio.Task[Any]] = []

        def begin() -> None:
            if starts and self._is_closing:
                self._refuse(result)
                return
            tasks.append(self._loop.create_task(_await(work)))
            tasks[0].add_done_callback(partial(_copy, result))
            if starts:
                self._starts.add(tasks[0])
                tasks[0].add_done_callback(self._starts.discard)

        def stop() -> None:
            if tasks:
                tasks[0].cancel()
            else:  # the interrupt came before the work had begun
                result.set_exception(CancelledError())

        def kill() -> None:
            if tasks:
                tasks.append(self._loop.create_task(api.kill_awaited(tasks[0])))  # the loop keeps no reference

        # anyio's portal waits for the loop before it returns a future: an interrupt in between would leave the work
        # running. The future of run_coroutine_threadsafe is cancelled before the work has ended.
        try:
            if self._loop.is_closed():
                self._refuse(result)
            else:
                self._loop.call_soon_threadsafe(begin)
            return result.result()
        except BaseException:
            if not result.done():
                self._loop.call_soon_threadsafe(stop)
                try:
                    wait([result])
                except KeyboardInterrupt:
                    self._loop.call_soon_threadsafe(kill)
                    wait([result])
            raise

    def _call_while_open(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work` for a signal, unless the program has ended its runs already and is exiting."""
        if not self._loop.is_closed():
            self.call(work)

    def _at_exit(self) -> None:
        """Wait for the active runs. If the interpreter exits because of an interrupt, end them.

        A forked child inherits this hook, but neither the runs nor the thread that would answer.
        """
        if os.getpid() != self._pid:
            return
        try:
            if not is_interrupt(getattr(sys, "last_value", None)):
                self.call(self._join)
        except KeyboardInterrupt:
            logger.warning("interrupted: ending the active runs")
        closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
        try:
            closing.result()
        except KeyboardInterrupt:
            self.call(api.write_killed)
            raise
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        # Threads that are no daemons go on: these calls came too late.
        for result in tuple(self._results):
            self._refuse(result)

    def _refuse(self, result: Future[Any]) -> None:
        with suppress(InvalidStateError):  # it was given by another thread
            result.set_exception(UsageError("the program is exiting: it can neither start runs nor reach them"))

    async def _join(self) -> None:
        """Wait for all runs, and for the calls of other threads that start some."""
        await api.join_default_fleets()
        while self._starts:
            await asyncio.wait(self._starts)
            await api.join_default_fleets()
        self._is_closing = True

    async def _close(self) -> None:
        """End all runs, and the calls of all threads that start some."""
        self._is_closing = True
        starts = tuple(self._starts)
        for call in starts:
            call.cancel()
        if starts:
            await asyncio.wait(starts)
        await api.close_default_fleets()


async def _await(work: Callable[[], Awaitable[T]]) -> T:
    return await work()


def _copy(result: Future[T], task: asyncio.Task[T]) -> None:
    if task.cancelled():
        result.set_exception(CancelledError())
    elif (error := task.exception()) is not None:
        result.set_exception(error)
    else:
        result.set_result(task.result())


_lock = threading.Lock()
_the_loop: _Loop | None = None


def _loop() -> _Loop:
    global _the_loop
    with _lock:
        if _the_loop is None:
            _the_loop = _Loop()
        return _the_loop


def _forget() -> None:
    """Forget the loop in a forked child, which does not have its thread. The runs belong to the parent."""
    global _the_loop, _lock
    _lock = threading.Lock()
    _the_loop = None


os.register_at_fork(after_in_child=_forget)

"""Plugins that were written for ``mlflow run``: their blocking code in threads, behind our protocol.

https://mlflow.org/docs/latest/ml/plugins/#project-execution-backends

Such a plugin reads the project and prepares the environment by itself. Some use the run id in their ``backend_config``,
as MLflow's own local backend does: they log to the MLflow run that exists already. Others make a run of their own; then
there are two, and the Fleet puts theirs below ours (`Backend.second_run`).
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import sys
import threading
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol

import anyio

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.grace import StopRequest
from mlfleet._concurrency.tasks import TaskOwner
from mlfleet._concurrency.threads import PLUGIN_QUESTIONS, PLUGIN_SUBMITS
from mlfleet._run_log import get_logger
from mlfleet._text.masking import is_secret_name, mask
from mlfleet.backends._remote.run import AwaitedRun
from mlfleet.backends.base import Backend, BackendRun, Job, ProjectCall
from mlfleet.errors import BackendError, SubmitError, UsageError
from mlfleet.runs import FailureKind, Outcome, RunStatus
from mlfleet.tracking import open_tracking
from mlfleet.tracking.locations import absolute_uri

__all__ = ["PluginBackend"]

_log = get_logger("mlfleet.plugins")
_CONFIRMS = 10.0  # seconds beyond the grace in which a plugin must confirm the end of a run that it was told to cancel
# The numbers of mlflow's own statuses, which some plugins give rather than their names.
_NUMBERS = {
    1: RunStatus.RUNNING,
    2: RunStatus.SCHEDULED,
    3: RunStatus.FINISHED,
    4: RunStatus.FAILED,
    5: RunStatus.KILLED,
}


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A plugin that is ready for one run.

    Attributes:
        plugin: The object that the entry point returned; it has ``run``.
        config: The caller's ``backend_config``.
        mlflow_uri: The URI of the tracking that mlflow uses in this process; empty if mlflow is not imported.
        mlflow_store: The same URI, in the form of `Tracking.uri`.
    """

    plugin: Any
    config: Mapping[str, Any] = field(repr=False)
    mlflow_uri: str = field(default="", repr=False)
    mlflow_store: str = ""


class PluginBackend(Backend[_Prepared]):
    """A backend that runs jobs by a plugin of mlflow. `named` makes the class of one plugin.

    Attributes:
        builder: The function or class that the entry point names; called without arguments, it returns the plugin.
    """

    name: ClassVar[str]
    builder: ClassVar[staticmethod[[], Any]]

    @classmethod
    def named(cls, name: str, builder: Callable[[], Any]) -> type[PluginBackend]:
        """Return the class of the backend of one plugin."""
        return type(cls.__name__, (cls,), {"name": name, "builder": staticmethod(builder), "__doc__": cls.__doc__})

    def place(self, path: str, index: int, folder: Path) -> str | None:
        """Leave URIs to the plugin, which downloads them itself and reads `Job.call`."""
        return None if path.startswith("/") else path

    def __init__(self) -> None:
        self._tasks = TaskOwner()
        self._runs: set[PluginRun] = set()
        self._open = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        await complete(self._cancel_all)

    async def _cancel_all(self) -> None:
        async with anyio.create_task_group() as group:
            for run in tuple(self._runs):
                group.start_soon(run.cancel)
        await self._tasks.join()

    def configure(self, config: Mapping[str, Any]) -> _Prepared:
        """Make the plugin for one run. Its keys are not checked, since only the plugin knows them.

        Raises:
            BackendError: The plugin cannot be made.
        """
        try:
            plugin = self.builder()
        except (Exception, SystemExit) as error:
            raise BackendError(f"the plugin {self.name!r} cannot be used: {_text(error)}", backend=self.name) from error
        if not callable(getattr(plugin, "run", None)):
            text = f"the plugin {self.name!r} is {type(plugin).__name__}, which has no method run"
            raise BackendError(
                f"{text}: its entry point in 'mlflow.project_backend' must name what makes a backend", backend=self.name
            )
        # The plugin has imported mlflow, if it needs it.
        where = getattr(sys.modules.get("mlflow"), "get_tracking_uri", None)
        if where is None:
            return _Prepared(plugin, dict(config))
        uri = str(where())
        return _Prepared(plugin, dict(config), uri, open_tracking(absolute_uri(uri)).uri)

    def check_tracking(self, uri: str, config: _Prepared | None = None) -> None:
        """Check that mlflow's setting for the whole process, by which plugins find tracking, is that of the Fleet.

        Raises:
            UsageError: It is another one.
        """
        theirs = "" if config is None else config.mlflow_store
        if theirs and theirs != uri:
            raise UsageError(
                f"the plugin {self.name!r} would log to {theirs}, which mlflow uses in this process, but the run is to"
                f" be on {uri}. Set MLFLOW_TRACKING_URI to that, or call mlflow.set_tracking_uri"
            )

    def check_variables(self, names: Collection[str], config: _Prepared | None = None) -> None:
        """Refuse variables: the interface of plugins has no place for them; see `Backend.check_variables`."""
        raise UsageError(
            f"the plugin {self.name!r} cannot be given environment variables ({', '.join(sorted(names))}): mlflow"
            " passes none to plugins. Set them where its runs are, or by its own keys in backend_config"
        )

    async def submit(self, job: Job) -> PluginRun:
        """Call the plugin's ``run`` in a thread.

        A cancelled call waits until ``run`` has returned, and then cancels the run that it returned.

        Raises:
            SubmitError: The plugin failed.
            BackendError: The call was cancelled, and the plugin cannot cancel the run.
        """
        handle = await PLUGIN_SUBMITS.run(partial(self._submit, job), undo=partial(self._take_back, job))
        run = PluginRun(job.run_id, handle, self.name, job.cancel_grace, self._tasks, then=self._runs.discard)
        self._runs.add(run)
        if not self._open:
            await run.cancel(grace=0)
            raise SubmitError(f"the backend {self.name!r} was closed before the run could start", backend=self.name)
        return run

    def second_run(self, run: BackendRun) -> str | None:
        """Return the id of the MLflow run that the plugin made, if it made one."""
        return run.second_run if isinstance(run, PluginRun) else None

    def _submit(self, job: Job) -> BlockingHandle:
        """Call the plugin. Blocking."""
        assert job.call is not None  # noqa: S101 - the Fleet gives it to every job
        call, prepared = job.call(), job.config
        assert isinstance(prepared, _Prepared)  # noqa: S101 - what `configure` gave
        try:
            handle = prepared.plugin.run(
                str(job.project_dir) if call.uri is None else call.uri,
                call.entry_point,
                dict(call.parameters),
                call.version,
                _config(prepared.config, call, job.run_id),
                prepared.mlflow_uri or job.tracking_uri,
                job.experiment_id,
            )
        except (Exception, SystemExit) as error:
            text = mask(_text(error), [*job.secrets.values(), *_secrets(call.docker_auth)])
            raise SubmitError(f"the plugin {self.name!r} did not take the run: {text}", backend=self.name) from error
        lacks = [name for name in ("wait", "cancel", "get_status", "run_id") if not hasattr(handle, name)]
        if lacks:
            raise SubmitError(
                f"the plugin {self.name!r} did not take the run: it returned {type(handle).__name__}, which has no"
                f" {', '.join(lacks)}. What it printed or logged may say why",
                backend=self.name,
            )
        return handle  # type: ignore[no-any-return]

    async def _take_back(self, job: Job, handle: BlockingHandle) -> None:
        """End a run whose submission was cancelled."""
        run = PluginRun(job.run_id, handle, self.name, job.cancel_grace, self._tasks)
        await run.cancel()
        if error := (await run.outcome()).error:
            raise error  # it may still go on: then it is not said to be cancelled


def _config(given: Mapping[str, Any], call: ProjectCall, run_id: str) -> dict[str, Any]:
    """Return a copy of ``backend_config`` with the keys that mlflow adds to it (mlflow/projects/utils.py)."""
    # mlflow's own handles wait for the command only after a synchronous call. Ours always wait.
    return copy.deepcopy(dict(given)) | {
        "ENV_MANAGER": call.env_manager,
        "SYNCHRONOUS": True,
        "DOCKER_ARGS": None if call.docker_args is None else copy.deepcopy(dict(call.docker_args)),
        "STORAGE_DIR": call.storage_dir,
        "build_image": call.build_image,
        "docker_auth": None if call.docker_auth is None else copy.deepcopy(dict(call.docker_auth)),
        "_mlflow_local_backend_run_id": run_id,
    }


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _secrets(auth: Mapping[str, Any] | None) -> list[str]:
    return [str(value) for name, value in (auth or {}).items() if is_secret_name(name)]


# ---- the handle ------------------------------------------------------------------------------------------------------


class BlockingHandle(Protocol):
    """The handle that a plugin's ``run`` returns (mlflow/projects/submitted_run.py)."""

    @property
    def run_id(self) -> Any:
        """The id of the MLflow run that it logs to."""
        ...

    def wait(self) -> Any:
        """Block until the end. Return a true value if the run finished well."""
        ...

    def cancel(self) -> Any:
        """End the run."""
        ...

    def get_status(self) -> Any:
        """Return a name or a number of mlflow's statuses."""
        ...


@dataclass(frozen=True, slots=True)
class _Answer:
    """The result or the error of a call of the plugin."""

    value: Any = None
    error: BaseException | None = None


class PluginRun(AwaitedRun):
    """The handle of a run that a blocking plugin made.

    A thread of its own waits for the run: in a pool, a queued wait would not see the end. Plugins give no exit code.

    Args:
        run_id: The id of the Fleet's MLflow run.
        handle: The plugin's handle.
        plugin: The plugin's name.
        grace: Seconds that a cancelled run has until its end.
        tasks: The owner of the task that cancels.
        then: Called with this handle at the end of the run.
    """

    def __init__(
        self,
        run_id: str,
        handle: BlockingHandle,
        plugin: str,
        grace: float,
        tasks: TaskOwner,
        *,
        then: Callable[[PluginRun], None] = lambda run: None,
    ) -> None:
        super().__init__(run_id)
        self._handle = handle
        self._plugin = plugin
        self._tasks = tasks
        self._stop_request = StopRequest(grace + _CONFIRMS)
        self._then = then
        self._ended = self._in_own_thread(handle.wait)
        self._ended.add_done_callback(self._when_ended)

    @property
    def second_run(self) -> str | None:
        """The id of the MLflow run that the plugin made, if it did not use the Fleet's."""
        its = self._handle.run_id
        return None if its is None or str(its) == self._run_id else str(its)

    async def started(self) -> None:
        """Return at once: plugins do not report when the command begins, so a submitted run counts as started."""

    async def cancel(self, *, grace: float | None = None) -> None:
        """Let the plugin cancel the run, and wait for the end of its ``wait``.

        The plugin gets the grace and ten seconds more. After that the run is FAILED, with a reason that says that it
        may still go on: only the plugin could end it.
        """
        # A task of the backend does the work, so that it is done although this caller is cancelled.
        if self._outcome is None:
            first = not self._stop_request.is_requested
            self._stop_request.request(None if grace is None else grace + _CONFIRMS)
            if first:
                self._tasks.start(self._stop(), name=f"mlfleet cancel of {self._plugin}", then=self._give_up)
        await self._done.wait()

    async def get_status(self) -> RunStatus:
        """Return the plugin's status of the run; after the end the terminal status.

        Raises:
            BackendError: The plugin fails to answer.
        """
        if self._outcome is not None:
            return self._outcome.status
        try:
            status = _status(await PLUGIN_QUESTIONS.run(self._handle.get_status))
        except Exception as error:
            text = f"the plugin {self._plugin!r} cannot tell the status of its run: {_text(error)}"
            raise BackendError(text, backend=self._plugin) from error
        return RunStatus.RUNNING if status is None or status.is_terminal else status

    async def logs(self, *, follow: bool = True) -> AsyncIterator[str]:
        """Yield nothing: plugins keep the output, or let it go where the output of this process goes.

        Args:
            follow: True to wait for the end all the same.
        """
        if follow:
            await self._done.wait()
        nothing: tuple[str, ...] = ()
        for line in nothing:
            yield line

    # ---- its end ----------------------------------------------------------------------------------------------------

    def _in_own_thread(self, function: Callable[[], Any]) -> asyncio.Future[_Answer]:
        """Call `function` in a daemon thread: one that hangs delays neither others nor the end of this process."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_Answer] = loop.create_future()

        def call() -> None:
            try:
                given = _Answer(function())
            except BaseException as error:
                given = _Answer(error=error)
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(_set, answer, given)

        threading.Thread(target=call, name=f"mlfleet plugin {self._plugin}", daemon=True).start()
        return answer

    def _when_ended(self, ended: asyncio.Future[_Answer]) -> None:
        if not self._stop_request.is_requested and not ended.cancelled():
            self._finish(self._seen(ended.result()))

    async def _stop(self) -> None:
        cancelled = self._in_own_thread(self._handle.cancel)

        async def give_up() -> None:
            await self._stop_request.expired()
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(give_up)
            await asyncio.wait([cancelled, self._ended])
            group.cancel_scope.cancel()
        failed = cancelled.result().error if cancelled.done() else None
        if failed is not None:
            _log.warning("the plugin %r failed to cancel the run %s: %s", self._plugin, self._run_id, _text(failed))
        if not self._ended.done():
            self._finish(self._still_there(failed))
            return
        answer = self._ended.result()
        well = answer.error is None and bool(answer.value)
        confirmed = failed is None or answer.error is None
        self._finish(Outcome(RunStatus.KILLED, reason="cancelled") if confirmed and not well else self._seen(answer))

    def _give_up(self) -> None:
        """Release waiters if the task that cancels was itself cancelled, at the end of the event loop."""
        self._finish(self._still_there(None))

    def _finish(self, outcome: Outcome) -> None:
        if self._outcome is not None:
            return
        self._outcome = outcome
        self._done.set()
        self._then(self)

    def _seen(self, answer: _Answer) -> Outcome:
        if answer.error is not None:
            error = BackendError(
                f"the plugin {self._plugin!r} lost the run while it waited: {_text(answer.error)}",
                backend=self._plugin,
            )
            error.__cause__ = answer.error
            return Outcome(RunStatus.FAILED, reason=str(error), error=error)
        if answer.value:
            return Outcome(RunStatus.FINISHED)
        return Outcome(RunStatus.FAILED, reason=f"the plugin {self._plugin!r} says that it failed")

    def _still_there(self, failed: BaseException | None) -> Outcome:
        why = (
            f"cancelling failed: {_text(failed)}"
            if failed is not None
            else "it was cancelled, but has not ended in time"
        )
        error = BackendError(f"the run may still go on at the plugin {self._plugin!r}: {why}", backend=self._plugin)
        error.__cause__ = failed
        return Outcome(RunStatus.FAILED, reason=str(error), error=error, cause=FailureKind.INFRASTRUCTURE)


def _set(answer: asyncio.Future[_Answer], given: _Answer) -> None:
    if not answer.done():
        answer.set_result(given)


def _status(given: object) -> RunStatus | None:
    """Return the status for the name or number that a plugin gave; None if it is unknown."""
    if isinstance(given, int):
        return _NUMBERS.get(given)
    try:
        return RunStatus(str(given))
    except ValueError:
        return None

"""Plugins that were written for ``mlflow run``: their blocking code in threads, behind our protocol.

https://mlflow.org/docs/latest/ml/plugins/#project-execution-backends

Such a plugin reads the project and sees to the environment by itself. Those that go by the run id in their
``backend_config``, as MLflow's own local backend does, log to the MLflow run that is there already. The others make one
of their own; then there are two, and the Fleet puts theirs below ours (`Backend.second_run`).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import anyio

from mlfleet._concurrency.tasks import TaskOwner
from mlfleet._concurrency.threads import PLUGIN_SUBMITS
from mlfleet._text.masking import is_secret_name, mask
from mlfleet.backends.base import Backend, BackendRun, Job, ProjectCall
from mlfleet.backends.mlflow_plugin_run import BlockingHandle, PluginRun
from mlfleet.errors import BackendError, SubmitError, UsageError
from mlfleet.tracking import open_tracking
from mlfleet.tracking.locations import absolute_uri

__all__ = ["GROUP", "PluginBackend"]

GROUP = "mlflow.project_backend"
"""The entry-point group in which these plugins announce themselves."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A plugin that is ready for one run.

    Attributes:
        plugin: what its entry point gave; it has ``run``.
        config: the caller's ``backend_config``.
        mlflow_uri: of the tracking that mlflow uses in this process; empty if the plugin has not imported it.
        mlflow_store: the same, as a Fleet on it tells it.
    """

    plugin: Any
    config: Mapping[str, Any] = field(repr=False)
    mlflow_uri: str = field(default="", repr=False)
    mlflow_store: str = ""


class PluginBackend(Backend):
    """Runs jobs by a plugin of mlflow. `named` makes the class of one plugin.

    Attributes:
        builder: what its entry point names; called without arguments, it gives the plugin.
    """

    name: ClassVar[str]
    builder: ClassVar[staticmethod[[], Any]]

    @classmethod
    def named(cls, name: str, builder: Callable[[], Any]) -> type[PluginBackend]:
        """The backend of one plugin."""
        return type(cls.__name__, (cls,), {"name": name, "builder": staticmethod(builder), "__doc__": cls.__doc__})

    def place(self, path: str, index: int, folder: Path) -> str | None:
        """URIs are downloaded by the plugin, which goes by `Job.call`."""
        return None if path.startswith("/") else path

    def __init__(self) -> None:
        self._tasks = TaskOwner()
        self._runs: set[PluginRun] = set()
        self._open = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        async with anyio.create_task_group() as group:
            for run in tuple(self._runs):
                group.start_soon(run.cancel)
        await self._tasks.join()

    def configure(self, config: Mapping[str, Any]) -> object:
        """Make the plugin for one run; only the plugin knows its keys.

        Raises:
            BackendError: it cannot be made.
        """
        try:
            plugin = self.builder()
        except (Exception, SystemExit) as error:
            raise BackendError(f"the plugin {self.name!r} cannot be used: {_told(error)}", backend=self.name) from error
        if not callable(getattr(plugin, "run", None)):
            text = f"the plugin {self.name!r} is {type(plugin).__name__}, which has no method run"
            raise BackendError(
                f"{text}: its entry point in {GROUP!r} must name what makes a backend", backend=self.name
            )
        # The plugin has imported mlflow, if it needs it.
        where = getattr(sys.modules.get("mlflow"), "get_tracking_uri", None)
        if where is None:
            return _Prepared(plugin, dict(config))
        uri = str(where())
        return _Prepared(plugin, dict(config), uri, open_tracking(absolute_uri(uri)).uri)

    def check_tracking(self, uri: str, config: object = None) -> None:
        """Plugins find the tracking server by mlflow's setting for the whole process, which must be that of the Fleet.

        Raises:
            UsageError: it is another one.
        """
        theirs = config.mlflow_store if isinstance(config, _Prepared) else ""
        if theirs and theirs != uri:
            raise UsageError(
                f"the plugin {self.name!r} would log to {theirs}, which mlflow uses in this process, but the run is to"
                f" be on {uri}. Set MLFLOW_TRACKING_URI to that, or call mlflow.set_tracking_uri"
            )

    async def submit(self, job: Job) -> PluginRun:
        """Call the plugin's ``run`` in a thread.

        A cancelled call waits until ``run`` has returned, and then cancels what it gave.

        Raises:
            SubmitError: the plugin failed.
            BackendError: the call was cancelled, and the plugin cannot cancel what it gave.
        """
        handle = await PLUGIN_SUBMITS.run(partial(self._submit, job), undo=partial(self._take_back, job))
        run = PluginRun(job.run_id, handle, self.name, job.cancel_grace, self._tasks)
        self._runs.add(run)
        run.add_done_callback(partial(self._runs.discard, run))
        if not self._open:
            await run.cancel(grace=0)
            raise SubmitError(f"the backend {self.name!r} was closed before the run could start", backend=self.name)
        return run

    def second_run(self, run: BackendRun) -> str | None:
        """The MLflow run that the plugin made."""
        return run.second_run if isinstance(run, PluginRun) else None

    def _submit(self, job: Job) -> BlockingHandle:
        """Blocking."""
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
            text = mask(_told(error), [*job.secrets.values(), *_secrets(call.docker_auth)])
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
        """End what nobody will get any more."""
        run = PluginRun(job.run_id, handle, self.name, job.cancel_grace, self._tasks)
        await run.cancel()
        if error := (await run.outcome()).error:
            raise error  # it may still go on: then it is not said to be cancelled


def _config(given: Mapping[str, Any], call: ProjectCall, run_id: str) -> dict[str, Any]:
    """``backend_config`` with what the reference puts there (mlflow/projects/utils.py), all of it the plugin's own."""
    # The reference's own handles wait for the command only if the call is a synchronous one. Ours always waits.
    return copy.deepcopy(dict(given)) | {
        "ENV_MANAGER": call.env_manager,
        "SYNCHRONOUS": True,
        "DOCKER_ARGS": None if call.docker_args is None else copy.deepcopy(dict(call.docker_args)),
        "STORAGE_DIR": call.storage_dir,
        "build_image": call.build_image,
        "docker_auth": None if call.docker_auth is None else copy.deepcopy(dict(call.docker_auth)),
        "_mlflow_local_backend_run_id": run_id,
    }


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _secrets(auth: Mapping[str, Any] | None) -> list[str]:
    return [str(value) for name, value in (auth or {}).items() if is_secret_name(name)]

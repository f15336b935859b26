"""The functions that need no `Fleet`: they use default Fleets of the running event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack
from weakref import WeakKeyDictionary, WeakSet

import anyio

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.tasks import ServiceOwner, TaskOwner
from mlfleet._engine.options import Goal
from mlfleet._engine.request import Output, RunOptions, RunRequest
from mlfleet._engine.run import FleetRun
from mlfleet._engine.tracked import TrackedRun
from mlfleet._sweeps import Sweep, SweepOptions, SweepResult
from mlfleet.errors import MlfleetError, UsageError
from mlfleet.fleet import Fleet, context_of
from mlfleet.resources import Resources
from mlfleet.runs import Timeouts
from mlfleet.spaces import Points
from mlfleet.tracking import default_uri

if TYPE_CHECKING:
    from mlfleet._progress import RunScreen, SweepScreen

__all__ = [
    "attach",
    "close_default_fleets",
    "default_fleet",
    "get",
    "join_default_fleets",
    "kill_awaited",
    "run_async",
    "submit",
    "sweep_async",
    "write_killed",
]


async def run_async(
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
    output: Output = "capture",
    log_output: bool = False,
    resources: Resources | None = None,
    env: Mapping[str, str] | None = None,
    inherit_env: bool | Collection[str] | None = None,
    detach: bool = False,
    progress: bool = False,
) -> FleetRun:
    """Run a project and wait for its end.

    The first sixteen arguments are those of ``mlflow.projects.run``, in its order and with its defaults. A cancelled
    call ends the run before it raises: all of its processes have ended, and MLflow shows it as KILLED.

    Args:
        uri: The project: a folder, a ``file://`` URI, a Git URI (https, ssh, ``git@host:path``, a bare repository by
            ``file://``) or a ``.zip`` (local or http). ``#sub/folder`` names a folder inside.
        entry_point: The entry point: a name from MLproject, or a ``.py``, ``.sh`` or ``.R`` script of the project.
        version: The commit (full or short), branch or tag of a Git project. Default: the newest commit.
        parameters: Name → value. Parameters that the entry point declares replace ``{name}`` in its command; others
            are appended as ``--name value``.
        docker_args: The flags of ``docker run`` for a project with ``docker_env``.
        experiment_name: The name of the experiment, which is created if it does not exist.
        experiment_id: The id of the experiment, instead of its name. If neither is given: ``MLFLOW_EXPERIMENT_NAME``,
            ``MLFLOW_EXPERIMENT_ID``, else "0".
        backend: ``local``, ``docker``, ``kubernetes``, ``databricks`` or the name of a plugin.
        backend_config: The configuration of the backend: a mapping, or the path of a ``.json`` file.
        storage_dir: The folder for downloads of ``path`` parameters that name a remote URI. Each run uses a new folder
            inside, which is removed when it ends. Default: the folder for temporary files.
        synchronous: Wait for the end of the run. False returns as soon as the MLflow run exists, like `submit`.
        run_id: The id of an existing MLflow run to use. Default: a new run.
        run_name: The name of the MLflow run. Default: chosen by MLflow.
        env_manager: ``local``, ``virtualenv``, ``uv`` or ``conda``. Default: chosen by the project's files.
        build_image: Build a Docker image with the project's files. False runs the base image itself.
        docker_auth: The credentials of the image registry.
        tracking_uri: The URI of the tracking server or store. Default: ``MLFLOW_TRACKING_URI``, else MLflow's default.
        parent_run_id: The id of the MLflow run to nest this one under. Default: mlflow's active run in this thread, if
            there is one.
        tags: More tags for the MLflow run.
        timeouts: The time limits of the stages, in seconds.
        output: ``capture`` writes the output to a file of the run, for ``run.logs()``; ``inherit`` uses the stdout and
            stderr of this process.
        log_output: Log the captured output as the artifact ``output.log``.
        resources: The resources that the run needs. On this machine it waits until they are free; in containers they
            are its limits.
        env: Environment variables for the command, over those that it inherits. Their values are secret: they appear in
            no tag, log, command line or error. The variables that mlfleet sets itself cannot be given.
        inherit_env: The environment variables of this process that the command gets: True for all; False for a minimal
            set (``PATH``, ``HOME``, ``LANG``, …); names for these as well, as in ``["AWS_*", "HTTPS_PROXY"]``. None:
            as the Fleet says, whose default is True.
        detach: Let a process of its own supervise the run, which so outlives this one, on every backend. Needs
            ``synchronous=False``.
        progress: Show the stage of the run and the last line of its output while this call waits: on a terminal and in
            a notebook as a view that is updated, elsewhere as a few lines on stderr. Needs ``synchronous=True`` and
            ``output="capture"``.

    Returns:
        The handle of the run, which has ended if `synchronous`.

    Raises:
        ExecutionException: The run failed. The error has its exit code and the last lines of its output; `RunTimeout`
            and `RunCancelled` are subclasses.
        MlfleetError: The request or the project is wrong, or tracking cannot be reached. No run was made.
    """
    if detach and synchronous:
        raise UsageError("detach=True does not wait for the end of the run: give synchronous=False with it")
    if progress:
        _check_progress(synchronous, output)
    async with AsyncExitStack() as stack:
        screen = await stack.enter_async_context(_run_screen(uri, tracking_uri)) if progress else None
        run = await submit(
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
            run_id=run_id,
            run_name=run_name,
            env_manager=env_manager,
            build_image=build_image,
            docker_auth=docker_auth,
            parent_run_id=parent_run_id,
            tags=tags,
            timeouts=timeouts,
            output=output,
            log_output=log_output,
            resources=resources,
            env=env,
            inherit_env=inherit_env,
            detach=detach,
        )
        if screen is not None:
            screen.entered(run)
        if synchronous:
            _awaited[_this_task()] = run
            try:
                await run.check()
            except asyncio.CancelledError:
                await complete(run.cancel, restart=True)
                raise
    return run


async def submit(
    uri: str | os.PathLike[str],
    entry_point: str = "main",
    version: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    tracking_uri: str | None = None,
    **options: Unpack[RunOptions],
) -> FleetRun:
    """Submit a run and return its handle as soon as its MLflow run exists.

    The run belongs to a default Fleet of the running event loop, which cancels its active runs when ``asyncio.run``
    ends. The arguments are those of `run_async`. A cancelled call cancels the run. With ``detach=True`` the run belongs
    to a process of its own, and goes on at the end of this one; its handle is of use until the loop ends.

    Args:
        uri: The project.
        entry_point: The entry point: a name from MLproject, or a script of the project.
        version: The commit, branch or tag of a Git project.
        parameters: The parameters of the entry point.
        tracking_uri: The URI of the tracking server or store. Default: ``MLFLOW_TRACKING_URI``, else MLflow's default.
        options: The other arguments of `run_async`: the keys of `RunOptions`.

    Raises:
        MlfleetError: The request or the project is wrong, or tracking cannot be reached. No run was made.
    """
    request = RunRequest.of(uri, entry_point, version, parameters, **options)
    return await context_of(await default_fleet(tracking_uri)).start(request)


async def attach(run_id: str, *, tracking_uri: str | None = None, timeouts: Timeouts | None = None) -> FleetRun:
    """Find a run again that an earlier process submitted, and supervise it to its end.

    The run belongs to a default Fleet of the running event loop from then on, as with `submit`. A cancelled call leaves
    the run as it is.

    Args:
        run_id: The id of the MLflow run.
        tracking_uri: The URI of the tracking server or store. Default: ``MLFLOW_TRACKING_URI``, else MLflow's default.
        timeouts: The time limits from now on, of which ``run`` and ``cancel_grace`` count.

    Raises:
        UsageError: The run has ended already, or ends with the process that started it.
        MlfleetError: Tracking or the backend cannot be reached.
    """
    return await (await default_fleet(tracking_uri)).attach(run_id, timeouts=timeouts)


async def get(run_id: str, *, tracking_uri: str | None = None) -> FleetRun | TrackedRun:
    """Return a handle for any run, active or ended, whichever process submitted it.

    The run is left as it is; `attach` supervises it. The connections belong to a default Fleet of the running event
    loop, as with `submit`: the handle is of use until the loop ends.

    Args:
        run_id: The id of the MLflow run, also that of a sweep.
        tracking_uri: The URI of the tracking server or store. Default: ``MLFLOW_TRACKING_URI``, else MLflow's default.

    Returns:
        The `FleetRun` if the run was started by a function of this module in this loop and has not ended, else a
        `TrackedRun`. Both can be asked for `get_status`, `wait`, `outcome`, `cancel` and `logs`.

    Raises:
        TrackingError: There is no such run, or tracking cannot be reached.
    """
    return await (await default_fleet(tracking_uri)).get(run_id)


async def sweep_async(
    uri: str | os.PathLike[str],
    space: Points,
    *,
    tracking_uri: str | None = None,
    progress: bool = False,
    metric: str | None = None,
    goal: Goal = "min",
    **options: Unpack[SweepOptions],
) -> SweepResult:
    """Run a project at every point of a space and wait for all of them.

    A cancelled call ends the runs before it raises. Use `Fleet.sweep` to get the results as the points end, or to run
    several sweeps within common limits.

    Args:
        uri: The project.
        space: `mlfleet.grid`, `mlfleet.sample`, `mlfleet.zip_`, `mlfleet.rows`, or any iterable of mappings.
        tracking_uri: The URI of the tracking server or store. Default: ``MLFLOW_TRACKING_URI``, else MLflow's default.
        progress: Show the counts, the active points and the failures meanwhile: on a terminal and in a notebook as a
            view that is updated, elsewhere as a few lines on stderr.
        metric: The metric by which the view, the result in a notebook and its report order the points.
        goal: ``min`` or ``max``: the good values of that metric.
        options: The other arguments of `Fleet.sweep`.

    Returns:
        The results of all points, also of those that failed. `SweepResult.check` raises if there are any.

    Raises:
        MlfleetError: The request, the project or the first point is wrong, or tracking cannot be reached. No run was
            made.
    """
    if goal not in ("min", "max"):
        raise UsageError(f"goal is {goal!r}: give 'min' or 'max'")
    async with AsyncExitStack() as stack:
        screen = None
        if progress:
            screen = await stack.enter_async_context(_sweep_screen(metric, goal, options.get("parameters")))
        follow = None if screen is None else screen.follow
        fleet = await stack.enter_async_context(Fleet(tracking_uri=tracking_uri, on_event=follow))
        _remember(fleet)
        async with fleet.sweep(uri, space, **options) as sweep:
            _awaited[_this_task()] = sweep
            seen = () if screen is None else await screen.results(sweep)
            result = await sweep.result(seen)
    return replace(result, metric=metric, goal=goal)


def _check_progress(synchronous: bool, output: Output) -> None:
    if not synchronous:
        raise UsageError("progress=True follows a run to its end: give synchronous=True with it")
    if output == "inherit":
        raise UsageError("progress=True shows the captured output: give output='capture' with it")


@asynccontextmanager
async def _run_screen(uri: str | os.PathLike[str], tracking_uri: str | None) -> AsyncIterator[RunScreen]:
    # Only a caller who wants it pays for the import.
    from mlfleet._progress import RunScreen, choose_painter, shown

    events = (await default_fleet(tracking_uri)).events()
    screen = RunScreen(choose_painter(), os.fspath(uri), events)
    async with shown(screen, screen.finish):
        yield screen


@asynccontextmanager
async def _sweep_screen(metric: str | None, goal: Goal, fixed: Mapping[str, Any] | None) -> AsyncIterator[SweepScreen]:
    from mlfleet._progress import BestRuns, SweepScreen, choose_painter, shown

    screen = SweepScreen(choose_painter(), BestRuns(metric, goal, 1), fixed or {})
    async with shown(screen, screen.finish):
        yield screen


class _Fleets:
    """The default Fleets of one event loop, one for each tracking URI and workspace."""

    def __init__(self) -> None:
        self._fleets: dict[tuple[str, str], Fleet] = {}
        self._services = ServiceOwner(TaskOwner())

    async def get(self, uri: str) -> Fleet:
        # `mlflow.set_workspace` sets the variable, too.
        key = (uri, os.environ.get("MLFLOW_WORKSPACE", ""))
        fleet = self._fleets.get(key)
        if fleet is None:
            # Runs without a Fleet of their own start at once, as with mlflow.projects.run.
            fleet = self._fleets[key] = Fleet(tracking_uri=uri, max_concurrent=_UNLIMITED, on_exit="cancel")
            _remember(fleet)
        try:
            await self._services.open(fleet)
        except Exception:
            if self._fleets.get(key) is fleet:
                del self._fleets[key]
            self._services.forget(fleet)
            raise
        return fleet

    async def join(self) -> None:
        for fleet in tuple(self._fleets.values()):
            with suppress(MlfleetError):  # opening failed, and the caller that submitted a run got the error
                await self._services.open(fleet)
                await fleet.join()

    async def close(self) -> None:
        await self._services.close()


_UNLIMITED = 2**31
_fleets: WeakKeyDictionary[asyncio.AbstractEventLoop, _Fleets] = WeakKeyDictionary()
_awaited: WeakKeyDictionary[asyncio.Task[Any], FleetRun | Sweep] = WeakKeyDictionary()
"""What the calls of `run_async` and `sweep_async` wait for."""
_all_fleets: WeakKeyDictionary[asyncio.AbstractEventLoop, WeakSet[Fleet]] = WeakKeyDictionary()
"""The Fleets of the functions here, default ones and those of sweeps, also while they are being closed."""


def _remember(fleet: Fleet) -> None:
    _all_fleets.setdefault(asyncio.get_running_loop(), WeakSet()).add(fleet)


async def default_fleet(tracking_uri: str | None = None) -> Fleet:
    """Return the default Fleet of the running event loop for a tracking URI, opened at its first use."""
    loop = asyncio.get_running_loop()
    fleets = _fleets.get(loop) or _fleets.setdefault(loop, _Fleets())
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        uri = await anyio.to_thread.run_sync(default_uri)
    return await fleets.get(uri)


async def join_default_fleets() -> None:
    """Wait for all runs of the default Fleets of the running event loop."""
    fleets = _fleets.get(asyncio.get_running_loop())
    if fleets is not None:
        await fleets.join()


async def close_default_fleets() -> None:
    """Cancel all runs of the default Fleets of the running event loop, and close the Fleets."""
    fleets = _fleets.pop(asyncio.get_running_loop(), None)
    if fleets is not None:
        await complete(fleets.close, restart=True)


async def write_killed() -> None:
    """Write KILLED for all active runs and sweeps of the functions here, also of those being ended, within a second."""
    async with anyio.create_task_group() as group:
        for fleet in _all_fleets.get(asyncio.get_running_loop(), ()):
            group.start_soon(context_of(fleet).fleet.write_killed)


async def kill_awaited(task: asyncio.Task[Any]) -> None:
    """End the run or the sweep that a call waits for without its grace. Return once it has ended."""
    awaited = _awaited.get(task)
    if awaited is not None:
        await awaited.cancel(grace=0)


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - coroutines run in tasks
    return task

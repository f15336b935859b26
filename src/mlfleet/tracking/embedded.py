"""Tracking in a store that mlflow opens in this process (a database, a folder), by its client in threads."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Self, TypeVar

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import STORES
from mlfleet._paths import cache_folder
from mlfleet._run_log import get_logger
from mlfleet._store.locks import file_lock
from mlfleet._store.private_folders import secure_cache
from mlfleet._text.masking import mask_uri
from mlfleet.errors import TrackingError
from mlfleet.runs import RunStatus, check_seconds
from mlfleet.tracking.base import RunInfo, Tracking
from mlfleet.tracking.errors import Transient
from mlfleet.tracking.http import POLICY, exhausted
from mlfleet.tracking.locations import absolute_uri, local_path
from mlfleet.tracking.models import SUBMISSION_TAG, batches, checked_id, deleted_experiment

__all__ = ["EmbeddedTracking", "default_uri"]

log = get_logger("mlfleet.tracking")

_NOISY = ("mlflow.store.db.utils", "alembic")
_LIMIT = 500

T = TypeVar("T")


def default_uri() -> str:
    """Return MLflow 3's default store: ``./mlruns`` if it holds experiments, else ``./mlflow.db``.

    It reads the working directory: call it in a thread.
    """
    folder = Path("mlruns").absolute()
    try:
        holds = any(entry.name.isdigit() and (entry / "meta.yaml").exists() for entry in folder.iterdir())
    except OSError:
        holds = False
    return folder.as_uri() if holds else f"sqlite:///{folder.with_name('mlflow.db')}"


class EmbeddedTracking(Tracking):
    """A store that mlflow opens in this process: ``sqlite:///…``, another database, a folder, or a plugin's URI.

    It needs the extra ``mlfleet[mlflow]``. Use it inside ``async with``, which makes a relative path absolute. The
    first call imports mlflow and makes the tables, in a thread; this takes some seconds the first time. A mistake in
    the arguments of a run is reported before it, and leaves no new database. The process-wide tracking URI of mlflow is
    neither used nor changed.

    Args:
        uri: The URI of the store; None: `default_uri`.
        retry_for: Seconds for which a call keeps trying while a database is locked or cannot be reached.

    Raises:
        UsageError: `retry_for` is negative or not a number.
    """

    def __init__(self, uri: str | None = None, *, retry_for: float = POLICY.seconds) -> None:
        check_seconds("retry_for", retry_for)
        self.uri = mask_uri(uri) if uri is not None else "sqlite:///mlflow.db"
        self._given = uri
        self._real = uri or ""
        self._policy = replace(POLICY, seconds=retry_for)
        self._lock: Path | None = None
        self._opening: SingleFlight[str, Any] = SingleFlight(keep=True)
        self._experiments: SingleFlight[str, str] = SingleFlight(keep=True)

    async def __aenter__(self) -> Self:
        def settle() -> tuple[str, Path]:
            secure_cache()
            uri = absolute_uri(self._given) if self._given is not None else default_uri()
            name = hashlib.sha256(uri.encode()).hexdigest()[:16]
            return uri, cache_folder() / "locks" / f"store-{name}.lock"

        self._real, self._lock = await STORES.run(settle)
        self.uri = mask_uri(self._real)
        return self

    async def _open(self) -> Any:
        if self._lock is None:
            raise TrackingError(
                "the tracking store is not open: use it, or a handle of the Fleet that has it, inside `async with`",
                uri=self.uri,
            )
        # One process at a time makes the tables of a database: two at the same time fail.
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(file_lock(self._lock))
            except OSError as error:
                text = f"the lock of the tracking store cannot be written to {self._lock}: {error.strerror or error}"
                raise TrackingError(text, uri=self.uri) from error
            return await self._again(partial(_open_store, self._real))

    async def environ(self) -> tuple[dict[str, str], dict[str, str]]:  # noqa: D102 - told by Tracking
        variables = {"MLFLOW_TRACKING_URI": self._real}
        return (variables, {}) if self.uri == self._real else ({}, variables)

    async def experiment_id(self, name: str) -> str:  # noqa: D102
        return await self._experiments(name, partial(self._call, partial(_experiment_id, name)))

    async def create_run(  # noqa: D102
        self, experiment_id: str, *, name: str | None, tags: Mapping[str, str], start_time: int | None = None
    ) -> RunInfo:
        submission = tags.get(SUBMISSION_TAG) or os.urandom(16).hex()
        all_tags = {**tags, SUBMISSION_TAG: submission}
        tries = 0

        def create(client: Any) -> RunInfo:
            nonlocal tries
            tries += 1
            if tries > 1:
                # The connection to the database may have broken after the run was stored.
                wanted = f"tags.`{SUBMISSION_TAG}` = '{submission}'"
                if made := client.search_runs([experiment_id], wanted, max_results=1):
                    return _run_info(made[0])
            return _run_info(client.create_run(experiment_id, start_time=start_time, tags=all_tags, run_name=name))

        def undo(client: Any, run: RunInfo) -> None:
            client.set_terminated(run.run_id, RunStatus.KILLED.value)

        return await self._call(create, undo=undo)

    async def get_run(self, run_id: str, *, retry_for: float | None = None) -> RunInfo:  # noqa: D102
        return await self._call(lambda client: _run_info(client.get_run(run_id)), retry_for=retry_for)

    async def search_runs(  # noqa: D102
        self, experiment_ids: Sequence[str], filter_string: str = "", *, max_results: int = 1000
    ) -> list[RunInfo]:
        def search(client: Any) -> list[RunInfo]:
            found = client.search_runs(list(experiment_ids), filter_string, max_results=max_results)
            return [_run_info(run) for run in found]

        return await self._call(search)

    async def log(  # noqa: D102
        self, run_id: str, *, params: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        def write(client: Any) -> None:
            from mlflow.entities import Param, RunTag

            for some_params, some_tags in batches(params or {}, tags or {}):
                client.log_batch(
                    run_id,
                    params=[Param(*pair) for pair in some_params.items()],
                    tags=[RunTag(*pair) for pair in some_tags.items()],
                )

        await self._call(write)

    async def update_run(  # noqa: D102
        self, run_id: str, status: RunStatus, *, end_time: int | None = None, retry_for: float | None = None
    ) -> None:
        def update(client: Any) -> None:
            if status.is_terminal:
                ended = time.time_ns() // 1_000_000 if end_time is None else end_time
                client.set_terminated(run_id, status.value, end_time=ended)
            else:
                client.update_run(run_id, status=status.value)

        await self._call(update, retry_for=retry_for)

    async def log_artifact(self, run: RunInfo, path: Path, artifact_path: str | None = None) -> None:  # noqa: D102
        await self._call(lambda client: client.log_artifact(run.run_id, str(path), artifact_path))

    async def download(self, uri: str, folder: Path) -> Path:  # noqa: D102
        return await self._call(lambda _: _download(uri, folder, self._real))

    async def _call(
        self,
        work: Callable[[Any], T],
        *,
        retry_for: float | None = None,
        undo: Callable[[Any, T], None] | None = None,
    ) -> T:
        client = await self._opening("", self._open)

        async def take_back(result: T) -> None:
            if undo is not None:
                await STORES.run(partial(undo, client, result))

        return await self._again(partial(work, client), retry_for=retry_for, undo=take_back)

    async def _again(
        self,
        work: Callable[[], T],
        *,
        retry_for: float | None = None,
        undo: Callable[[T], Awaitable[None]] | None = None,
    ) -> T:
        def attempt() -> T:
            with _translated(self._real):
                return work()

        policy = self._policy if retry_for is None else replace(self._policy, seconds=retry_for)
        try:
            return await policy.call(
                lambda: STORES.run(attempt, undo=undo),
                retry_if=lambda error: isinstance(error, Transient),
                before_pause=lambda failure, seconds: log.warning("%s; trying again in %.1f s", failure, seconds),
                on_exhausted=exhausted,
            )
        except Transient as failure:
            raise failure.error from failure.error.__cause__


def _open_store(uri: str) -> Any:
    with _quiet():
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise TrackingError(
                f"the tracking store {mask_uri(uri)} needs mlflow in this environment: pip install 'mlfleet[mlflow]'; "
                "or use an MLflow server (http://…), which does not",
                uri=mask_uri(uri),
            ) from error
        client = MlflowClient(tracking_uri=uri)
        # The first call makes the database and its tables.
        client.search_experiments(max_results=1)
    return client


def _experiment_id(name: str, client: Any) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            # Another process may have created it first.
            found = client.get_experiment_by_name(name) if error.error_code == "RESOURCE_ALREADY_EXISTS" else None
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise deleted_experiment(name, str(found.experiment_id))
    return str(found.experiment_id)


def _run_info(run: Any) -> RunInfo:
    return RunInfo(
        run_id=checked_id(run.info.run_id),
        experiment_id=checked_id(run.info.experiment_id),
        name=run.info.run_name or "",
        status=RunStatus(run.info.status),
        artifact_uri=run.info.artifact_uri,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        start_time=run.info.start_time or None,
        end_time=run.info.end_time or None,
        deleted=run.info.lifecycle_stage == "deleted",
    )


def _download(uri: str, folder: Path, store: str) -> Path:
    from mlflow.artifacts import download_artifacts

    half = folder / f".{os.urandom(4).hex()}.part"
    try:
        half.mkdir()
        got = Path(download_artifacts(artifact_uri=uri, dst_path=str(half), tracking_uri=store, registry_uri=store))
        whole = got.resolve() == half.resolve()
        name = PurePosixPath(uri).name if ":/" in uri and not whole else got.name
        target = folder / ("artifacts" if whole else name)
        got.rename(target)
        return target
    finally:
        shutil.rmtree(half, ignore_errors=True)


_quieting = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the messages of mlflow and its libraries about a new database and about each other's deprecations."""
    # One thread at a time: a second one would save and restore the levels that the first one has set.
    with _quieting:
        loggers = [logging.getLogger(name) for name in _NOISY]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(max(logger.level, logging.WARNING))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    """Turn every exception of mlflow, a database or a disk into a `TrackingError`."""
    try:
        yield
    except TrackingError:
        raise
    except ModuleNotFoundError as error:
        text = f"the tracking store {mask_uri(uri)} needs the Python package {error.name}: install it next to mlfleet"
        raise TrackingError(text, uri=mask_uri(uri)) from error
    except Exception as error:
        code = getattr(error, "error_code", None)
        message = mask_uri(" ".join(str(error).partition("\n[SQL:")[0].split()))[:_LIMIT]
        text = f"the tracking store {mask_uri(uri)} refused: {message or type(error).__name__}"
        if local_path(uri) is not None and "MLFLOW_ALLOW_FILE_STORE" in str(error):
            text = (
                f"mlflow no longer keeps runs in folders ({local_path(uri)}): set MLFLOW_ALLOW_FILE_STORE=true, or "
                "use a database (MLFLOW_TRACKING_URI=sqlite:///mlflow.db; `mlflow migrate-filestore` moves it)"
            )
        problem = TrackingError(text, uri=mask_uri(uri), code=str(code) if code else None)
        # A cause that quotes the URI with its password is left out, since logs show causes, too.
        problem.__cause__ = error if mask_uri(str(error)) == str(error) else None
        if code == "TEMPORARILY_UNAVAILABLE":
            raise Transient(problem) from problem.__cause__
        raise problem from problem.__cause__

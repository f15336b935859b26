"""The interface of tracking servers and stores: the few requests that the life of a run needs."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from mlfleet._run_log import get_logger
from mlfleet._text.masking import mask_values
from mlfleet._text.plain import plain_text
from mlfleet.errors import TrackingError
from mlfleet.runs import FAILURE_KIND_TAG, REASON_TAG, Outcome, RunStatus
from mlfleet.tracking.models import RunInfo

__all__ = ["RunInfo", "Tracking", "clean_reason", "end_run", "failure_tags", "log_tags", "worse"]

logger = get_logger("mlfleet.tracking")

_LAST_ATTEMPT_SECONDS = 30.0
"""Seconds for a last attempt that began before the end of the patience."""

_TAGS_SECONDS = 5.0
"""Seconds for the tags about an end beyond the patience, so that the status comes soon after."""

_LONGEST_REASON = 500  # characters; Databricks and old MLflow servers take 5,000, and a table shows one line


class Tracking(ABC):
    """One tracking server or store, shared by all runs of a Fleet.

    Every method repeats requests that may succeed the next time, and raises `TrackingError` otherwise. A cancelled call
    leaves at most what the server had done before it was cancelled.

    Attributes:
        uri: The tracking URI, without credentials.
    """

    uri: str

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @abstractmethod
    async def environ(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the variables by which code in the run finds this server: plain ones, and those that hold secrets."""

    @abstractmethod
    async def experiment_id(self, name: str) -> str:
        """Return the id of the experiment of that name; create it if there is none.

        Raises:
            TrackingError: The request failed, or the experiment was deleted; the text says how to restore it.
        """

    @abstractmethod
    async def create_run(
        self, experiment_id: str, *, name: str | None, tags: Mapping[str, str], start_time: int | None = None
    ) -> RunInfo:
        """Create exactly one run by one request, also when an answer is lost.

        A call that is cancelled before it returns marks the run KILLED if the server has made it by then.

        Args:
            experiment_id: The id of the experiment.
            name: The name of the run; None lets the server choose one.
            tags: All tags of the run.
            start_time: The start of the run, in milliseconds since the epoch; None: now.
        """

    @abstractmethod
    async def get_run(self, run_id: str, *, retry_for: float | None = None) -> RunInfo:
        """Return a run as the server knows it.

        Args:
            run_id: The id of the run.
            retry_for: Seconds to keep trying while the server cannot be reached; None: the setting of this `Tracking`.
        """

    @abstractmethod
    async def search_runs(
        self, experiment_ids: Sequence[str], filter_string: str = "", *, max_results: int = 1000
    ) -> list[RunInfo]:
        """Return the runs that match, newest first.

        Args:
            experiment_ids: The ids of the experiments to search.
            filter_string: A filter in MLflow's search language (``tags.sweep = 'a' and metrics.loss < 1``); empty: all.
            max_results: The largest number of runs to return.
        """

    @abstractmethod
    async def log(
        self, run_id: str, *, params: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        """Log parameters and tags by one request (by more only above the server's limit of 100 each in one).

        A value that the server refuses as too long is cut and logged; a warning names it.
        """

    @abstractmethod
    async def update_run(
        self, run_id: str, status: RunStatus, *, end_time: int | None = None, retry_for: float | None = None
    ) -> None:
        """Set the status, and with a terminal one the end time.

        Args:
            run_id: The id of the run.
            status: The new status.
            end_time: The end of the run, in milliseconds since the epoch; None: now.
            retry_for: Seconds to keep trying while the server cannot be reached; None: the setting of this `Tracking`.
        """

    @abstractmethod
    async def log_artifact(self, run: RunInfo, path: Path, artifact_path: str | None = None) -> None:
        """Store a local file as an artifact of the run, streamed.

        Args:
            run: The run that gets the artifact.
            path: The file.
            artifact_path: The folder inside the run's artifacts; None: their root.
        """

    @abstractmethod
    async def download(self, uri: str, folder: Path) -> Path:
        """Download a file or a whole folder of artifacts.

        Args:
            uri: A URI that begins with ``runs:/``, ``models:/`` or ``mlflow-artifacts:/``.
            folder: An existing empty folder to download into.

        Returns:
            The path of the file or folder inside `folder`.
        """


def clean_reason(text: str, secrets: Iterable[str] = ()) -> str:
    """Return the reason of a failure as one line of bounded length, without control characters and secrets.

    It may hold text from elsewhere, such as a message of the cluster or the last words of the run.

    Args:
        text: The reason.
        secrets: Texts that it must not show, whole or by line; those of less than eight characters are not looked for.
    """
    # Masked before anything is cut or removed, which would leave parts of a secret.
    line = " ".join(plain_text(mask_values(text, secrets)).split())
    # Names of files that are no UTF-8 have surrogates in Python, which no store takes.
    line = line.encode("utf-8", "replace").decode()
    return line if len(line) <= _LONGEST_REASON else f"{line[: _LONGEST_REASON - 1]}…"


def failure_tags(outcome: Outcome, secrets: Iterable[str] = ()) -> dict[str, str]:
    """Return the tags that say why a run did not finish well; empty if it did, or was only cancelled.

    Args:
        outcome: The outcome of the run.
        secrets: Texts that the tags must not show, as for `clean_reason`.
    """
    if outcome.status is RunStatus.FINISHED:
        return {}
    reason = clean_reason(outcome.reason or "", secrets)
    tags = {}
    if reason and (outcome.status is RunStatus.FAILED or reason != "cancelled"):
        tags[REASON_TAG] = reason
    if outcome.kind is not None:
        tags[FAILURE_KIND_TAG] = outcome.kind.value
    return tags


_SEVERITY = (RunStatus.FINISHED, RunStatus.FAILED, RunStatus.KILLED)


def worse(one: RunStatus, other: RunStatus) -> RunStatus:
    """Return the worse of two terminal statuses: KILLED before FAILED before FINISHED."""
    return max(one, other, key=_SEVERITY.index)


async def end_run(
    tracking: Tracking,
    run_id: str,
    status: RunStatus,
    *,
    patience: float,
    overwrite: bool = True,
    tags: Mapping[str, str] | None = None,
) -> RunInfo:
    """Write a terminal status, unless the run has this status or a worse one already.

    A run that has ended already was ended by its own code, or by a process that cancels it.

    Args:
        tracking: The server or store that holds the run.
        run_id: The id of the run.
        status: The terminal status.
        patience: Seconds for which each request is repeated while tracking cannot be reached.
        overwrite: Overwrite a better terminal status.
        tags: Tags about this end. They are written before the status, so that whoever sees the status sees them; not
            if the run has ended with another status. If they cannot be written, a warning says so.

    Returns:
        The run as it was right before: with its own tags, parameters and metrics.

    Raises:
        TrackingError: The status could not be written in time, or the run was deleted.
    """
    end_time = int(time.time() * 1000)
    try:
        async with asyncio.timeout((3 if tags else 2) * patience + _LAST_ATTEMPT_SECONDS):
            info = await tracking.get_run(run_id, retry_for=patience)
            if info.deleted:
                raise TrackingError(f"the run {run_id} was deleted", uri=tracking.uri, code="INVALID_STATE")
            is_open = not info.status.is_terminal
            is_written = is_open or (overwrite and worse(info.status, status) is not info.status)
            if tags and (is_written or info.status is status):
                await log_tags(tracking, run_id, tags, patience=patience)
            if is_written:
                await tracking.update_run(run_id, status, end_time=end_time, retry_for=patience)
            return info
    except TimeoutError as error:
        raise TrackingError("no answer in time", uri=tracking.uri) from error


async def log_tags(tracking: Tracking, run_id: str, tags: Mapping[str, str], *, patience: float) -> None:
    """Write the tags about an end. Not being able to is no reason to leave out the status."""
    try:
        async with asyncio.timeout(patience + _TAGS_SECONDS):
            await tracking.log(run_id, tags=tags)
    except (TrackingError, TimeoutError) as error:
        said = str(error) or "no answer in time"
        logger.warning("the tags %s of the run %s could not be written: %s", ", ".join(tags), run_id, said)

"""What mlfleet asks of a tracking server or store. It is little: a fan-out of hundreds of runs hangs on this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from mlfleet.runs import RunStatus

__all__ = ["RunInfo", "Tracking"]


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A run as the tracking server knows it.

    Attributes:
        run_id: its id.
        experiment_id: of its experiment.
        name: its name.
        status: as the server tells it.
        artifact_uri: where its artifacts are.
        tags: all its tags.
        params: all its parameters.
        metrics: the latest value of each of its metrics.
        start_time: when it was created, in milliseconds since the epoch; None if that is not known.
        end_time: when it ended, likewise; None as long as it has not.
    """

    run_id: str
    experiment_id: str
    name: str
    status: RunStatus
    artifact_uri: str
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    start_time: int | None = None
    end_time: int | None = None


class Tracking(ABC):
    """One tracking server or store, shared by all runs of a Fleet.

    Every method retries what is worth it and raises `TrackingError` otherwise. A cancelled call leaves nothing behind
    but, at worst, what the server had done before it was cancelled.

    Attributes:
        uri: the tracking URI.
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
        """The variables by which code in the run finds this server: plain ones, and those that hold secrets."""

    @abstractmethod
    async def experiment_id(self, name: str) -> str:
        """The id of the experiment of that name, which is created if there is none (a race for it is no error).

        Raises:
            TrackingError: also if the experiment was deleted; the text says how to restore it.
        """

    @abstractmethod
    async def create_run(
        self, experiment_id: str, *, name: str | None, tags: Mapping[str, str], start_time: int | None = None
    ) -> RunInfo:
        """Create a run, exactly one also when an answer is lost. One request.

        A call that is cancelled before it returns marks the run KILLED if the server has made it by then.

        Args:
            experiment_id: of the experiment.
            name: of the run; None lets the server choose one.
            tags: all its tags.
            start_time: milliseconds since the epoch; None is now.
        """

    @abstractmethod
    async def get_run(self, run_id: str, *, retry_for: float | None = None) -> RunInfo:
        """What the server knows of a run.

        Args:
            run_id: of the run.
            retry_for: seconds to keep trying while the server cannot be reached; None: as this `Tracking` was made.
        """

    @abstractmethod
    async def search_runs(
        self, experiment_ids: Sequence[str], filter_string: str = "", *, max_results: int = 1000
    ) -> list[RunInfo]:
        """The runs that match, newest first.

        Args:
            experiment_ids: where to look.
            filter_string: in MLflow's search language (``tags.sweep = 'a' and metrics.loss < 1``); empty: all.
            max_results: no more than these.
        """

    @abstractmethod
    async def log(
        self, run_id: str, *, params: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        """Log parameters and tags. One request (more only above the server's limit of 100 each in one).

        A value that the server refuses as too long is cut and logged; a warning says which.
        """

    @abstractmethod
    async def update_run(
        self, run_id: str, status: RunStatus, *, end_time: int | None = None, retry_for: float | None = None
    ) -> None:
        """Set the status, and with a terminal one the end time.

        Args:
            run_id: of the run.
            status: the new one.
            end_time: milliseconds since the epoch; None is now.
            retry_for: seconds to keep trying while the server cannot be reached; None: as this `Tracking` was made.
        """

    @abstractmethod
    async def log_artifact(self, run: RunInfo, path: Path, artifact_path: str | None = None) -> None:
        """Store a local file as an artifact of the run, streamed.

        Args:
            run: whose artifact it is to be.
            path: the file.
            artifact_path: the folder inside the run's artifacts; None is their root.
        """

    @abstractmethod
    async def download(self, uri: str, folder: Path) -> Path:
        """Download what ``runs:/``, ``models:/`` or ``mlflow-artifacts:/`` names, a file or a whole folder.

        Args:
            uri: what to download.
            folder: an existing empty folder to put it into.

        Returns:
            The path of the file or folder inside `folder`.
        """

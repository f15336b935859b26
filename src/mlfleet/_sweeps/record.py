"""The record of a sweep in tracking, with the runs of earlier sessions, and the notes of sweeps on this machine."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.threads import FILES
from mlfleet._engine.plan import Plan
from mlfleet._engine.request import NAME_TAG, SPACE_TAG, STOPPED_TAG, SweepMember, tagged_number
from mlfleet._paths import sweeps_folder
from mlfleet._project.content import content_hash
from mlfleet._run_log import get_logger
from mlfleet._store.lease import unleased
from mlfleet._store.locks import file_lock
from mlfleet._sweeps.members import LIST_TAG, Members
from mlfleet._sweeps.results import SweepCounts
from mlfleet._sweeps.settings import SweepSettings
from mlfleet._text.masking import mask_uri
from mlfleet.errors import TrackingError, UsageError
from mlfleet.runs import RunStatus
from mlfleet.tracking.base import RunInfo, Tracking, clean_reason, end_run
from mlfleet.tracking.models import SUBMISSION_TAG

__all__ = ["History", "SweepRecord", "is_driven", "open_record"]

logger = get_logger("mlfleet.sweep")

_CONTENT_TAG = "mlfleet.sweep.content"
_ENV_TAG = "mlfleet.sweep.env"
_COUNTS_TAG = "mlfleet.sweep.counts"
_MOST_NAMED = 20  # runs that claim to be a sweep of one name
_LOCK_WAIT = 1.0  # seconds
_LONGEST_NAMES = 4000  # characters; MLflow 2 keeps 5,000 of a tag
_MOST_CHILDREN = 50_000  # runs; the limit of mlflow's stores (SEARCH_MAX_RESULTS_THRESHOLD)


@dataclass(frozen=True, slots=True)
class History:
    """The attempts of earlier sessions at one point, the newest first."""

    runs: tuple[RunInfo, ...] = ()

    @classmethod
    def of(cls, runs: Sequence[RunInfo]) -> Self:
        """Make the history of a point from its runs, in any order."""
        return cls(tuple(sorted(runs, key=_attempt, reverse=True)))

    @property
    def finished(self) -> RunInfo | None:
        """The run that finished well; None if none did."""
        return next((run for run in self.runs if run.status is RunStatus.FINISHED), None)

    @property
    def open(self) -> tuple[RunInfo, ...]:
        """The runs that have not ended, as far as tracking knows."""
        return tuple(run for run in self.runs if not run.status.is_terminal)

    @property
    def latest(self) -> RunInfo | None:
        """The last attempt; None if there was none."""
        return self.runs[0] if self.runs else None

    @property
    def attempts(self) -> int:
        """The number of attempts."""
        return _attempt(self.runs[0]) if self.runs else 0


@dataclass(slots=True)
class SweepRecord:
    """The MLflow run of a sweep, and the runs of its earlier sessions.

    Attributes:
        info: The MLflow run as it was when the sweep began.
        content: The commit or the content hash of the project; None if the sweep has no name.
        status: The status that the MLflow run gets at the end.
        counts: The counts that are written at the end.
        stopped: The reason why the sweep ended early; None if it did not.
        members: The list of the sweep's runs; None if the sweep has no name.
        is_written: True once the terminal status is written.
    """

    info: RunInfo
    content: str | None
    status: RunStatus = RunStatus.KILLED
    counts: SweepCounts = field(default_factory=SweepCounts)
    stopped: str | None = None
    members: Members | None = None
    is_written: bool = False
    _earlier: dict[str, dict[str, list[RunInfo]]] = field(default_factory=dict)

    def remember(self, children: Sequence[RunInfo]) -> None:
        """Remember the runs of earlier sessions."""
        for child in children:
            key = child.tags.get(SweepMember.KEY_TAG, "")
            points = self._earlier.setdefault(key, defaultdict(list))
            points[child.tags.get(SweepMember.INDEX_TAG, "")].append(child)

    def recall(self, key: str, index: int) -> History:
        """Return the history of a point and forget it: a space may hold the same point twice."""
        points = self._earlier.get(key)
        if not points:
            return History()
        # Equal points may have several histories. Prefer the one of the same index, which may be gone: the space may
        # have changed.
        place = str(index) if str(index) in points else next(iter(points))
        history = History.of(points.pop(place))
        if not points:
            del self._earlier[key]
        return history

    def run_ids(self) -> list[str]:
        """Return the ids of the runs that are remembered."""
        return [run.run_id for points in self._earlier.values() for runs in points.values() for run in runs]

    def unclaimed(self) -> list[RunInfo]:
        """Return the runs that have not ended, of points that the space does not have any more."""
        left = [History.of(runs) for points in self._earlier.values() for runs in points.values()]
        return [run for history in left for run in history.open]


@asynccontextmanager
async def open_record(
    tracking: Tracking,
    settings: SweepSettings,
    plan: Plan,
    experiment_id: str,
    space: Mapping[str, Any],
    *,
    patience: float,
    submission: str | None = None,
) -> AsyncIterator[SweepRecord]:
    """Open the record of a sweep for the time of the block. After it the MLflow run has its terminal status.

    Args:
        tracking: The tracking server or store.
        settings: The settings of the sweep.
        plan: The plan of the first run.
        experiment_id: The id of the experiment of all runs.
        space: The description of the space.
        submission: A tag by which the MLflow run is found if this process dies before the run has a record; None: none.
        patience: Seconds for which the last requests are tried again.

    Raises:
        UsageError: The name is taken, or the project has changed.
        MlfleetError: The project cannot be read, or tracking cannot be reached.
    """
    async with AsyncExitStack() as stack:
        lock: Path | None = None
        if settings.name is not None:
            lock = lock_path(tracking, experiment_id, settings.name)
            await _lock(stack, lock, settings.name)
        content = None if settings.name is None else await _content(plan)
        tags = {**plan.tags, SPACE_TAG: json.dumps(space), **_names_of_variables(settings)}
        old = None if lock is None else await FILES.run(partial(Members.read, lock))
        members = None if lock is None else Members.new(lock)
        if members is not None:
            tags[LIST_TAG] = members.number
        record = await _earlier(tracking, settings, experiment_id, content, old)
        is_new = record is None
        if record is None:
            marked = tags if submission is None else {**tags, SUBMISSION_TAG: submission}
            record = await _create(tracking, settings, experiment_id, content, marked)
        has_begun = is_new
        record.members = members
        try:
            if lock is not None and members is not None and settings.name is not None:
                try:
                    await FILES.run(partial(members.write, record.info.run_id, record.run_ids()))
                    await FILES.run(partial(write_note, lock, tracking, record.info, settings.name, plan.project.uri))
                except OSError as error:
                    raise _unwritable(settings.name, error) from error
            if not is_new:
                await _reopen(tracking, record, tags)
                has_begun = True
            yield record
        finally:

            async def end() -> None:
                await _close(tracking, record, patience, with_counts=has_begun)
                if lock is not None:
                    await FILES.run(partial(forget, lock))

            await complete(end, restart=True)


async def _lock(stack: AsyncExitStack, path: Path, name: str) -> None:
    """Lock a sweep: two drivers would run each point twice. The lock reaches only as far as this machine."""
    try:
        await stack.enter_async_context(file_lock(path, patience=_LOCK_WAIT))
    except TimeoutError:
        text = f"another process drives the sweep {name!r} right now: wait for it, or end it first"
        raise UsageError(text) from None
    except OSError as error:
        raise _unwritable(name, error) from error


async def is_driven(tracking: Tracking, info: RunInfo) -> bool:
    """Return True if a process of this machine drives a sweep now; False if not, or if the sweep has no name."""
    name = info.tags.get(NAME_TAG)
    if name is None:
        return False
    try:
        async with file_lock(lock_path(tracking, info.experiment_id, name), patience=_LOCK_WAIT):
            return False
    except TimeoutError:
        return True
    except OSError as error:
        raise _unwritable(name, error) from error


def _unwritable(name: str, error: OSError) -> UsageError:
    return UsageError(
        f"the lock of the sweep {name!r} cannot be written in {sweeps_folder()}: {error.strerror or error}. Make room"
        " there, or set MLFLEET_STATE_DIR to a folder that can be written"
    )


async def _content(plan: Plan) -> str:
    """Return the commit of a cached project, or the hash of a folder of the user, which may have been edited since."""
    project = plan.project
    return project.commit if project.cached and project.commit else await content_hash(plan.spec.folder)


async def _earlier(
    tracking: Tracking, settings: SweepSettings, experiment_id: str, content: str | None, members: Members | None
) -> SweepRecord | None:
    """Return the record of the earlier sweep of that name, with all its runs; None if it does not exist."""
    if settings.name is None:
        return None
    found = await tracking.search_runs(
        [experiment_id], f"tags.`{NAME_TAG}` = '{settings.name}'", max_results=_MOST_NAMED
    )
    if not found:
        return None
    # Anybody may have given another run this name.
    info = next((run for run in found if members is not None and members.is_of(run)), found[0])
    if not settings.resume:
        raise UsageError(
            f"there is a sweep {settings.name!r} already (run {info.run_id}): pass resume=True (--resume) to go on "
            "with it, or take another name"
        )
    before = info.tags.get(_CONTENT_TAG)
    if before != content and settings.resume != "changed":
        raise UsageError(
            f"the project has changed since the sweep {settings.name!r} began. If that is fine, pass resume='changed' "
            "(--resume-changed): what has finished stays so. To run every point again, take another name. If it was "
            "the runs that wrote into the project's folder, list those files in its .dockerignore"
        )
    _check_variables(settings, info)
    record = SweepRecord(info, before)
    children = await tracking.search_runs(
        [experiment_id], f"tags.`{SweepMember.ID_TAG}` = '{info.run_id}'", max_results=_MOST_CHILDREN
    )
    record.remember(members.choose(children) if members is not None and members.is_of(info) else children)
    return record


def _names_of_variables(settings: SweepSettings) -> dict[str, str]:
    """Return the tag with the names of the caller's variables. Their values are kept nowhere."""
    names = " ".join(sorted(settings.request.env or ()))
    # MLflow would cut a longer tag within a name.
    names = names if len(names) <= _LONGEST_NAMES else names[:_LONGEST_NAMES].rpartition(" ")[0]
    return {_ENV_TAG: names} if names else {}


def _check_variables(settings: SweepSettings, info: RunInfo) -> None:
    """Check that a resumed sweep gets the variables again that its earlier runs had.

    Raises:
        UsageError: Some are missing.
    """
    missing = [name for name in info.tags.get(_ENV_TAG, "").split() if name not in (settings.request.env or ())]
    if missing:
        first, names = missing[0], ", ".join(missing)
        raise UsageError(
            f"the runs of the sweep {settings.name!r} have the environment variables {names}, whose values are not"
            f" kept: give them again, as env={{{first!r}: …}} (--env {first} copies the variable that is set here)"
        )


async def _create(
    tracking: Tracking, settings: SweepSettings, experiment_id: str, content: str | None, tags: Mapping[str, str]
) -> SweepRecord:
    named = {NAME_TAG: settings.name, _CONTENT_TAG: content}
    tags = {**tags, **{name: value for name, value in named.items() if value is not None}}
    name = settings.name or settings.request.run_name
    # If this is cancelled, tracking ends what it has created (see `Tracking.create_run`).
    return SweepRecord(await tracking.create_run(experiment_id, name=name, tags=tags), content)


async def _reopen(tracking: Tracking, record: SweepRecord, tags: Mapping[str, str]) -> None:
    await tracking.log(record.info.run_id, tags={**tags, STOPPED_TAG: ""})
    if record.info.status is not RunStatus.RUNNING:
        await tracking.update_run(record.info.run_id, RunStatus.RUNNING)


async def _close(tracking: Tracking, record: SweepRecord, patience: float, *, with_counts: bool) -> None:
    counts = record.counts
    tags = {
        _COUNTS_TAG: json.dumps({"finished": counts.finished, "failed": counts.failed, "killed": counts.killed}),
        **({} if record.stopped is None else {STOPPED_TAG: clean_reason(record.stopped)}),
    }
    try:
        if with_counts:
            await tracking.log(record.info.run_id, tags=tags)
    except TrackingError as error:
        logger.warning("the counts of the sweep %s could not be written: %s", record.info.run_id, error)
    try:
        seen = await end_run(tracking, record.info.run_id, record.status, patience=patience)
        record.is_written = True
        if seen.status is RunStatus.KILLED:
            record.status = RunStatus.KILLED  # by another process
    except TrackingError as error:
        logger.error(
            "the sweep %s is %s, but its status could not be written to MLflow: %s",
            record.info.run_id, record.status, error,
        )  # fmt: skip


def _attempt(run: RunInfo) -> int:
    return tagged_number(run.tags, SweepMember.ATTEMPT_TAG) or 1


# ---- notes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SweepEntry:
    """A sweep of this machine that has not ended.

    Attributes:
        run_id: The id of the sweep's MLflow run.
        name: The name of the sweep.
        project: The URI of the project.
        tracking: The URI of the tracking server or store.
        began: The time at which the sweep was begun or resumed.
        driven: True if a process drives the sweep now. False means that the process was killed, and the sweep can be
            resumed.
    """

    run_id: str
    name: str
    project: str
    tracking: str
    began: datetime
    driven: bool


def lock_path(tracking: Tracking, experiment_id: str, name: str) -> Path:
    """Return the path of the lock that the process that drives a sweep holds."""
    digest = hashlib.sha256(json.dumps([tracking.uri, experiment_id, name]).encode()).hexdigest()[:32]
    return sweeps_folder() / f"{digest}.lock"


def write_note(lock: Path, tracking: Tracking, info: RunInfo, name: str, project: str) -> None:
    """Write the note of a sweep whose lock is held. Blocking."""
    facts = {"run_id": info.run_id, "name": name, "project": mask_uri(project), "tracking": mask_uri(tracking.uri)}
    unfinished = lock.with_suffix(".new")
    unfinished.write_text(json.dumps(facts), encoding="utf-8")
    unfinished.replace(lock.with_suffix(".json"))


def forget(lock: Path) -> None:
    """Remove the note of a sweep that has ended. Blocking."""
    with suppress(OSError):
        lock.with_suffix(".json").unlink()


def list_sweeps() -> list[SweepEntry]:
    """Return the sweeps of this machine that have not ended, the newest first. Blocking."""
    found = []
    for note in sweeps_folder().glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError), unleased(note.with_suffix(".lock")) as free:
            facts: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
            began = datetime.fromtimestamp(note.stat().st_mtime, UTC)
            named = {key: str(facts[key]) for key in ("run_id", "name", "project", "tracking")}
            found.append(SweepEntry(**named, began=began, driven=not free))
    return sorted(found, key=lambda entry: entry.began, reverse=True)

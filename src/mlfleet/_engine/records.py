"""The records of active runs on this machine, from which other processes conclude the runs of a driver that died.

A record is a small file for each run, in ``active`` of the state folder. It is made when the MLflow run exists, and
removed when its terminal status is written. Every driver holds the lock of a file beside them, which ends with its
process however that ends: a record whose driver's lock is free has been left.

A driver may die between the creation of an MLflow run and its record. Such runs are found by a tag, their submission,
which begins with the name of the driver; the file of its lock holds the experiments in which it creates runs.

Beside the lock is a named pipe. Through it other processes ask the driver to cancel runs whose commands have not begun.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import itertools
import json
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from mlfleet._concurrency.cancellation import wait_done
from mlfleet._concurrency.threads import FILES
from mlfleet._paths import active_folder
from mlfleet._process.reattach import boot_id, machine
from mlfleet._run_log import get_logger
from mlfleet._store.lease import unleased
from mlfleet.errors import RunLost, UsageError
from mlfleet.runs import DEFAULT_CANCEL_GRACE, FailureKind, Outcome, RunStatus

__all__ = [
    "RunRecord",
    "RunRecords",
    "ask_to_cancel",
    "find_record",
    "forget_driver",
    "list_left_drivers",
    "list_records",
    "look_up",
    "remove_record",
    "tracking_key",
]

_log = get_logger("mlfleet.runs")

_GAP = 0.1  # seconds in which ends and removals gather, which nobody waits for


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The record of a run.

    Attributes:
        run_id: The id of the MLflow run.
        backend: The name of the backend.
        project: The name of the project.
        tracking: The `tracking_key` of the tracking server or store.
        began: The time at which the record was made, in seconds since the epoch.
        grace: Seconds between the request to stop and the end by force.
        durable: True if the run outlives its driver on this machine, so that its sweep goes on with it.
        captured: True if the output of the run is kept in its folder.
        sweep_id: The MLflow run of the sweep that the run belongs to.
        driver: The name of the driver's lock.
        host: The machine of the driver.
        boot: The id of that machine's boot, by which containers of one machine know each other.
        outcome: The end of the run as its driver saw it; None before the end.
    """

    run_id: str
    backend: str
    project: str
    tracking: str
    began: float = field(default_factory=time.time)
    grace: float = DEFAULT_CANCEL_GRACE
    durable: bool = False
    captured: bool = True
    sweep_id: str | None = None
    driver: str = ""
    host: str = ""
    boot: str = ""
    outcome: Outcome | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the lines of a file: the record, and after the run's end its outcome.

        Raises:
            ValueError: The text is not a record. KeyError and TypeError likewise.
        """
        first, _, rest = text.partition("\n")
        facts: dict[str, Any] = json.loads(first)
        record = cls(**{name: facts[name] for name in cls.__dataclass_fields__ if name in facts})
        if rest.endswith("\n"):
            record = replace(record, outcome=_read_outcome(json.loads(rest)))
        return record

    def to_text(self) -> str:
        """Return the line of a record without its outcome."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__ if name != "outcome"}) + "\n"

    def driver_lives(self) -> bool | None:
        """Return True if the process that supervises the run lives; None if that cannot be seen here. Blocking."""
        if self.host != machine() and self.boot != boot_id():
            return None  # a state folder that machines share
        with unleased(_lock_path(self.driver)) as is_free:
            return not is_free


class RunRecords:
    """The records of the runs that one Fleet supervises.

    A record that cannot be written is left out, with one warning: the run goes on without it.

    Args:
        on_cancel: Called on the event loop with the id of a run that another process asks to cancel, and the grace.
            None: nobody listens.
    """

    def __init__(self, on_cancel: Callable[[str, float | None], None] | None = None) -> None:
        self._on_cancel = on_cancel
        self._listening: int | None = None
        self._pending: dict[str, list[RunRecord | Outcome]] = {}  # run id → what to write; nothing: remove the file
        self._mine: set[str] = set()
        self._guard = threading.Lock()
        self._waiting: list[asyncio.Future[None]] = []
        self._added = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None
        self._lock = _DriverLock(listens=on_cancel is not None)
        self._count = itertools.count(1)
        self._notes: set[tuple[str, str]] = set()
        self._warned = False

    async def begin(self, tracking: str, experiment_id: str) -> str:
        """Return the submission of a run that is about to be created, a tag by which it is found without a record.

        Args:
            tracking: The `tracking_key` of the tracking server or store.
            experiment_id: The id of the experiment.
        """
        note = (tracking, experiment_id)
        if note not in self._notes:
            await FILES.run(partial(self._note, note))
        return f"{self._lock.name}.{next(self._count)}"

    async def add(self, record: RunRecord) -> None:
        """Write the record of a run, which this process supervises from now on."""
        self._mine.add(record.run_id)
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(written)
        self._added.set()
        self._write(record.run_id, [record])
        await written

    def end(self, run_id: str, outcome: Outcome) -> None:
        """Write the outcome of a run into its record soon: its status may take a while to be written."""
        if run_id in self._mine:
            self._write(run_id, [*self._pending.get(run_id, ()), outcome])

    def remove(self, run_id: str) -> None:
        """Remove the record of a run soon, because its status is written."""
        if run_id in self._mine:
            self._mine.discard(run_id)
            self._write(run_id, [])

    async def close(self) -> None:
        """Give up the lock. Records that are left are concluded by the next process."""
        if self._listening is not None:
            asyncio.get_running_loop().remove_reader(self._listening)
        if self._writing is not None:
            self._writing.cancel()
            await wait_done(self._writing)
        await FILES.finish(self._close)

    def _write(self, run_id: str, contents: list[RunRecord | Outcome]) -> None:
        with self._guard:
            self._pending[run_id] = contents
        if self._writing is None or self._writing.done():
            loop = asyncio.get_running_loop()
            self._writing = loop.create_task(self._write_soon(), name="mlfleet records", context=Context())

    async def _write_soon(self) -> None:
        """Write what is pending, again and again: hundreds of runs at the same time take few turns in a thread.

        A new record is written at once, with all that has gathered; so are those that come during a turn, after it.
        """
        while self._pending or self._waiting:  # a turn may have written what was added after it began
            with suppress(TimeoutError):
                async with asyncio.timeout(_GAP):
                    await self._added.wait()
            self._added.clear()
            waiting, self._waiting = self._waiting, []
            try:
                await FILES.run(self._write_pending)
                self._listen()
            finally:
                for written in waiting:
                    if not written.done():
                        written.set_result(None)

    def _write_pending(self) -> None:
        with self._guard:
            pending, self._pending = self._pending, {}
            for run_id, contents in pending.items():
                try:
                    self._lock.acquire()
                    _apply(run_id, contents, self._lock)
                except OSError as error:
                    self._warn(error)

    def _listen(self) -> None:
        """Listen for requests of other processes from the first record on."""
        descriptor, on_cancel = self._lock.requests, self._on_cancel
        if descriptor is None or on_cancel is None or self._listening is not None:
            return

        def read_requests() -> None:
            with suppress(BlockingIOError):
                for line in os.read(descriptor, 65536).splitlines():  # the pipe holds whole lines
                    on_cancel(*json.loads(line))

        self._listening = descriptor
        asyncio.get_running_loop().add_reader(descriptor, read_requests)

    def _note(self, note: tuple[str, str]) -> None:
        with self._guard:
            try:
                self._lock.acquire()
                self._lock.write(json.dumps(note) + "\n")
                self._notes.add(note)
            except OSError as error:
                self._warn(error)

    def _close(self) -> None:
        self._write_pending()
        self._lock.release()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            text = "runs are not recorded in %s, so nobody can conclude them if this process dies: %s"
            _log.warning(text, active_folder(), error.strerror or error)


def tracking_key(uri: str) -> str:
    """Return the name under which records keep a tracking server or store, which hides its address."""
    return hashlib.sha256(uri.encode()).hexdigest()[:16]


def find_record(run_id: str) -> RunRecord | None:
    """Return the record of a run on this machine; None if there is none. Blocking."""
    with suppress(OSError, ValueError, KeyError, TypeError, UsageError):
        record = _read(_record_path(run_id))
        return record if record.run_id == run_id else None
    return None


def look_up(run_id: str) -> tuple[RunRecord | None, bool | None]:
    """Return the record of a run on this machine, and `RunRecord.driver_lives`; None and None without one. Blocking."""
    record = find_record(run_id)
    return record, None if record is None else record.driver_lives()


def ask_to_cancel(record: RunRecord, grace: float | None) -> bool:
    """Ask the driver of a run, if it is on this machine, to cancel it. Blocking.

    Returns:
        False if the driver does not listen.
    """
    try:
        path = _requests_path(_lock_path(record.driver))
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        os.write(descriptor, json.dumps([record.run_id, grace]).encode() + b"\n")
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def list_records() -> list[RunRecord]:
    """Return the records of all runs on this machine, and remove locks that nothing needs any more. Blocking."""
    found: list[RunRecord] = []
    folder = active_folder()
    names = _names(folder)
    for name in names:
        if name.endswith(".json"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                record = _read(folder / name)
                if name == f"{record.run_id}.json":
                    found.append(record)
    used = {record.driver for record in found}
    for name in names:
        if name.endswith(".lock") and name.removesuffix(".lock") not in used:
            with unleased(folder / name) as is_free:
                # The lock of a driver has its name only once it is held: a free one belongs to no process.
                if is_free and not _notes(folder / name):
                    _remove_lock(folder / name)
    return found


def list_left_drivers(tracking: str) -> list[tuple[str, list[str]]]:
    """Return the names of drivers that died, each with the experiments in which it created runs. Blocking.

    Args:
        tracking: The `tracking_key` of the tracking server or store in which they did.
    """
    found = []
    folder = active_folder()
    for name in _names(folder):
        if name.endswith(".lock"):
            with unleased(folder / name) as is_free:
                experiments = [each for key, each in _notes(folder / name) if key == tracking] if is_free else []
            if experiments:
                found.append((name.removesuffix(".lock"), experiments))
    return found


def forget_driver(driver: str) -> None:
    """Remove the lock of a driver whose runs were concluded. Blocking."""
    with suppress(OSError):
        _remove_lock(_lock_path(driver))


def remove_record(run_id: str) -> None:
    """Remove the record of a run that was concluded. Blocking."""
    with suppress(OSError, UsageError):
        _record_path(run_id).unlink(missing_ok=True)


# ---- files ----------------------------------------------------------------------------------------------------------


_held: weakref.WeakSet[_DriverLock] = weakref.WeakSet()


class _DriverLock:
    """The lock that a Fleet holds as long as its process lives. It is taken with the first record.

    Args:
        listens: True to make the named pipe, too.

    Attributes:
        folder: The folder of the lock and the records; None before it is taken.
        requests: The descriptor of the named pipe, for reading; None if there is none.
    """

    def __init__(self, *, listens: bool) -> None:
        self._listens = listens
        self.name = f"{os.getpid()}-{secrets.token_hex(8)}"
        self.host = self.boot = ""
        self.folder: Path | None = None
        self.requests: int | None = None
        self._descriptor: int | None = None

    def acquire(self) -> None:
        if self._descriptor is not None:
            return
        path = _lock_path(self.name)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        unfinished = path.with_suffix(".new")
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._listens:
                with suppress(OSError):  # a file system without named pipes
                    os.mkfifo(_requests_path(path), 0o600)
                    # For writing, too: without a writer the pipe would be at its end, and always readable.
                    self.requests = os.open(_requests_path(path), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            unfinished.rename(path)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor, self.folder, self.host, self.boot = descriptor, path.parent, machine(), boot_id()
        _held.add(self)

    def write(self, line: str) -> None:
        """Append a line to the file of the lock, which is held."""
        if self._descriptor is not None:
            os.write(self._descriptor, line.encode())

    def release(self) -> None:
        if self._descriptor is not None:
            _remove_lock(_lock_path(self.name))
        self.close()

    def close(self) -> None:
        descriptors = self._descriptor, self.requests
        self._descriptor = self.requests = None
        for descriptor in descriptors:
            if descriptor is not None:
                os.close(descriptor)


def _close_in_child() -> None:
    """Close the locks in a forked child, which would hold them beyond the death of its parent."""
    for lock in tuple(_held):
        lock.close()


os.register_at_fork(after_in_child=_close_in_child)


def _apply(run_id: str, contents: Sequence[RunRecord | Outcome], driver: _DriverLock) -> None:
    path = _record_path(run_id, driver.folder)
    if not contents:
        path.unlink(missing_ok=True)
        return
    texts = []
    for content in contents:
        if isinstance(content, RunRecord):
            content = replace(content, driver=driver.name, host=driver.host, boot=driver.boot, outcome=None)
        texts.append(content.to_text() if isinstance(content, RunRecord) else _outcome_text(content))
    how = os.O_CREAT | os.O_TRUNC if isinstance(contents[0], RunRecord) else os.O_APPEND
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | how, 0o600)
    except FileNotFoundError:
        if how == os.O_APPEND:
            return  # another process has concluded the run meanwhile
        raise
    try:
        os.write(descriptor, "".join(texts).encode())
    finally:
        os.close(descriptor)


def _read(path: Path) -> RunRecord:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise ValueError(f"{path} is another user's")
        return RunRecord.parse(file.read().decode())


def _notes(lock: Path) -> list[tuple[str, str]]:
    """Return the trackings and experiments in which the driver with this lock creates runs."""
    found = []
    with suppress(OSError):
        for line in lock.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                tracking, experiment = json.loads(line)
                found.append((str(tracking), str(experiment)))
    return found


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder)]
    except OSError:
        return []


def _record_path(run_id: str, folder: Path | None = None) -> Path:
    if "/" in run_id or "\0" in run_id:
        raise UsageError(f"{run_id!r} is not the id of a run")
    return (folder or active_folder()) / f"{run_id}.json"


def _lock_path(driver: str) -> Path:
    return active_folder() / f"{Path(driver).name}.lock"


def _requests_path(lock: Path) -> Path:
    return lock.with_suffix(".requests")


def _remove_lock(path: Path) -> None:
    _requests_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _outcome_text(outcome: Outcome) -> str:
    kind = outcome.kind
    facts = {
        "status": outcome.status.value,
        "exit_code": outcome.exit_code,
        "reason": outcome.reason,
        "kind": None if kind is None else kind.value,
        "lost": isinstance(outcome.error, RunLost),
    }
    return json.dumps(facts) + "\n"


def _read_outcome(facts: Mapping[str, Any]) -> Outcome:
    kind = facts.get("kind")
    return Outcome(
        RunStatus(facts["status"]),
        facts["exit_code"],
        facts["reason"],
        # A sweep that is resumed runs a point again whose run was lost.
        error=RunLost(facts["reason"] or "the run was lost") if facts.get("lost") else None,
        cause=None if kind is None else FailureKind(kind),
    )

"""The folders of durable runs, which outlive the process that started them and are found again.

A small shell stands between mlfleet and the command. Before it starts the command it records itself in the run's
folder, and after the command's end it records the exit code there: so nothing is lost whenever mlfleet is killed. The
shell claims the run by creating the file ``process``, which only one process can create. A process that looks for a run
without a claim creates the file itself; the shell, if it still starts later, then leaves the command alone: no run
starts after it was given up.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mlfleet._paths import run_folder, runs_folder
from mlfleet._process.reattach import Identity, ProcessRecord, boot_id, identify, machine, open_process, pid_namespace
from mlfleet._process.sessions import kill_session
from mlfleet.backends.base import Job, ListedRun, Presence
from mlfleet.errors import BackendError, RunLost, SpecError
from mlfleet.runs import JobRef

__all__ = [
    "Ended",
    "Living",
    "argv",
    "conclude",
    "find",
    "is_abandoned",
    "list_runs",
    "output_file",
    "presence",
    "reference",
    "this_process",
    "withdraw",
]

# $0 is the folder of the run, $1 the command. The trap lets the shell outlive a signal to the whole group, and the
# command inherits no trap. The shell's own messages ("Terminated") do not go into the command's output. All of it is
# built into the shell, so that it costs one process. The record is for `ProcessRecord`. A variable of the environment
# stays exported when the shell assigns to it: the names are those that nobody else uses.
_SCRIPT = """\
{ read -r __mlfleet_record < /proc/$$/stat; } 2> /dev/null || __mlfleet_record="$$ $PPID"
set -C
exec 3>&2 2> /dev/null
echo "$__mlfleet_record" > "$0/process" || exit 125
set +C
trap : HUP INT QUIT TERM
(exec bash -c "$1" 2>&3 3>&-)
__mlfleet_code=$?
echo "$__mlfleet_code" > "$0/exit-code"
exit "$__mlfleet_code"
"""
_LOST = "lost"
_WRITE_TIMEOUT = 2.0  # seconds that a shell gets between creating its file and writing it


@dataclass(frozen=True, slots=True)
class Living:
    """A run that goes on.

    Attributes:
        identity: The run's shell.
        pidfd: A descriptor of the shell, where the system has them.
    """

    identity: Identity
    pidfd: int | None

    def close(self) -> None:
        """Close the descriptor."""
        if self.pidfd is not None:
            os.close(self.pidfd)


@dataclass(frozen=True, slots=True)
class Ended:
    """A run that has ended by itself.

    Attributes:
        code: The exit code of the command.
    """

    code: int


def argv(job: Job) -> tuple[str, ...]:
    """Return the program and arguments to start for a durable job."""
    return ("sh", "-c", _SCRIPT, str(run_folder(job.run_id)), job.command)


def reference(job: Job, here: Mapping[str, object]) -> JobRef | None:
    """Return where the job can be found; None if it is not durable.

    Args:
        job: The job.
        here: The result of `this_process`.
    """
    if not job.durable:
        return None
    data: dict[str, object] = {
        "folder": str(run_folder(job.run_id)),
        "output": None if job.output is None else str(job.output),
        **here,
        "grace": job.cancel_grace,
    }
    return JobRef("local", job.run_id, data)


def this_process() -> dict[str, object]:
    """Return the facts by which runs of this process are found again. Blocking."""
    me = identify(os.getpid())
    return {
        "host": machine(),
        "boot": boot_id(),
        "pid_namespace": pid_namespace(),
        "driver": os.getpid(),
        "driver_started": None if me is None else me.started,
    }


def find(ref: JobRef, *, give_up: bool) -> Living | Ended | None:
    """Look for a run. Blocking.

    Args:
        ref: The reference of the run.
        give_up: True to stop waiting for a run that has not begun although its driver lives, if that is this process.

    Returns:
        None if it has not begun, and its driver may still start it.

    Raises:
        RunLost: It cannot end well any more. Nothing of it runs, unless on another machine.
        BackendError: Its folder is not where this user keeps runs.
    """
    if not _is_here(ref):
        raise _lost(ref, f"it was started on {ref.data.get('host')}, which is another machine or was booted since")
    folder = _folder_of(ref)
    if not (folder / "process").exists() and _driver_lives(ref) and not (give_up and _driver(ref) == os.getpid()):
        return None
    try:
        record = _claimed(folder)
    except (OSError, ValueError, IndexError) as error:
        raise BackendError(f"the run {ref.run_id} cannot be found again: {error}", backend="local") from error
    if record is None:
        raise _lost(ref, "it was never started")
    identity = record.identity()
    if identity is not None:
        lives, pidfd = open_process(identity)
        if lives:
            return Living(identity, pidfd)
    code = conclude(folder)
    if code is None:
        raise _lost(ref, "its process was killed")
    return Ended(code)


def conclude(folder: Path) -> int | None:
    """Return the exit code of the command, after its shell has ended. Blocking.

    Returns:
        None if the shell was killed before it could record the code. The processes that it left are killed then.
    """
    code = _read(folder / "exit-code")
    if code.endswith("\n") and code.strip().isdigit():
        return int(code)
    with suppress(OSError, ValueError, IndexError):
        record = _read_record(folder)
        # The id of a session is not given to another process while a process is in it: if another one has it now, the
        # session has ended.
        if not record.pid_was_reused():
            kill_session(record.pid)
    return None


def _is_here(ref: JobRef, *, this_boot: bool = True) -> bool:
    """Return True if a run was submitted on this machine. Blocking.

    Args:
        ref: The reference of the run.
        this_boot: True to ask also that it was submitted since the machine was booted, where its processes are seen.
    """
    if ref.data.get("host") != machine():
        return False
    # References of earlier versions have no PID namespace.
    return not this_boot or (
        ref.data.get("boot") == boot_id() and ref.data.get("pid_namespace", pid_namespace()) == pid_namespace()
    )


def is_abandoned(ref: JobRef) -> bool:
    """Return True if a run of this machine is over and the process that submitted it is gone. Blocking."""
    if "folder" not in ref.data or not _is_here(ref, this_boot=False):
        return False
    if _is_here(ref) and _driver_lives(ref):
        return False
    return presence(ref) is not Presence.ACTIVE


def presence(ref: JobRef) -> Presence | None:
    """Return the state of a run; None if it was started on another machine. Blocking."""
    if not _is_here(ref, this_boot=False):
        return None
    try:
        found = find(ref, give_up=False)
    except RunLost:
        return Presence.MISSING
    if isinstance(found, Living):
        found.close()
    return Presence.ENDED if isinstance(found, Ended) else Presence.ACTIVE


def withdraw(ref: JobRef) -> bool:
    """Keep a run of this machine from beginning. Blocking.

    Args:
        ref: The reference of the run.

    Returns:
        False if it has begun already.

    Raises:
        BackendError: It is on another machine.
    """
    if not _is_here(ref):
        text = f"the run {ref.run_id} is on {ref.data.get('host')}: cancel it there"
        raise BackendError(text, backend="local")
    return _claimed(_folder_of(ref)) is None


def _driver_lives(ref: JobRef) -> bool:
    """Return True if the process that submitted a run of this machine still lives. Blocking."""
    started = ref.data.get("driver_started")
    return isinstance(started, int | float) and Identity(_driver(ref), started).is_alive()


def output_file(ref: JobRef) -> Path | None:
    """Return the file with the output of a run; None if the output was inherited."""
    return None if ref.data.get("output") is None else run_folder(ref.run_id) / "output.log"


def _driver(ref: JobRef) -> int:
    pid = ref.data.get("driver")
    if not isinstance(pid, int):
        raise SpecError(f"the tag {JobRef.TAG} of the run {ref.run_id} is damaged: driver is {pid!r}")
    return pid


def _folder_of(ref: JobRef) -> Path:
    """Return the folder of a run of this user. The one that the reference names counts for the error only.

    Raises:
        BackendError: There is no such folder where this user keeps runs, or it is another user's.
    """
    folder = run_folder(ref.run_id)
    try:
        found = folder.lstat()
    except FileNotFoundError:
        if str(ref.data.get("folder")) == str(folder):
            return folder
        text = f"the run {ref.run_id} has no folder in {folder.parent}, where runs are kept"
        text += f", but in {ref.data.get('folder')}: set MLFLEET_STATE_DIR as it was for its driver"
        raise BackendError(text, backend="local") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        text = f"{folder} is not a folder of this user: it is not read, and nothing that it names is ended"
        raise BackendError(text, backend="local")
    return folder


def list_runs() -> list[ListedRun]:
    """Return the durable runs of this machine that still run, whichever process started them. Blocking."""
    found = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for folder in runs_folder().iterdir():
            with suppress(OSError, ValueError, IndexError):
                found += _listed(folder)
    return found


def _listed(folder: Path) -> list[ListedRun]:
    if (folder / "exit-code").exists():
        return []
    record = _read_record(folder)
    identity = record.identity()
    if identity is None or not identity.is_alive():
        return []
    return [
        ListedRun(
            run_id=folder.name,
            backend="local",
            state="running",
            detail={"pid": record.pid},
            created=datetime.fromtimestamp(record.written, UTC),
            supervised=record.has_its_parent(),
            output=folder / "output.log",
        )
    ]


def _claimed(folder: Path) -> ProcessRecord | None:
    """Claim the run; return the record of its shell, or None if the shell will never run the command."""
    file = folder / "process"
    deadline = time.monotonic() + _WRITE_TIMEOUT
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with file.open("x") as claim:
                claim.write(f"{_LOST}\n")
            return None
        except FileExistsError:
            text = file.read_text(errors="replace")
        if text.endswith("\n"):
            return None if text.strip() == _LOST else _read_record(folder)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)


def _read_record(folder: Path) -> ProcessRecord:
    file = folder / "process"
    found = file.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
        raise ValueError(f"{file} is not a file of this user")
    return ProcessRecord.parse(file.read_text(errors="replace"), found.st_mtime)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _lost(ref: JobRef, why: str) -> RunLost:
    return RunLost(f"the run {ref.run_id} is lost: {why}", backend="local")

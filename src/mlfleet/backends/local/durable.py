"""Runs on this machine that outlive the process which started them, and are found again.

A small shell stands between mlfleet and the command. Before it starts the command it writes down who it is, and after
the command's end it writes down the exit code: so whenever mlfleet is killed, nothing is forgotten. It claims the run
by making the file ``process``, which only one can make. Who looks for a run that has not been claimed makes that file
himself, and then the shell, should it still come, leaves the command alone: no run is started after it was given up.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlfleet._paths import runs_folder
from mlfleet._process.reattach import CAN_ADOPT, adopt, end_orphans, start_time
from mlfleet.backends.base import Job
from mlfleet.errors import RunLost
from mlfleet.runs import JobRef

__all__ = [
    "Ended",
    "Living",
    "applies",
    "argv",
    "conclude",
    "driver_lives",
    "find",
    "is_abandoned",
    "is_here",
    "reference",
    "run_folder",
    "this_process",
    "withdraw",
]

# $0 is the folder of the run, $1 the command. The trap lets the shell outlive a signal to the whole group, and the
# command inherits no trap. What the shell itself has to say ("Terminated") is not the command's output. All of it is
# built into the shell, so that this costs one process.
_SCRIPT = """\
read -r stat < /proc/$$/stat || exit 125
set -C
exec 3>&2 2> /dev/null
echo "$stat" > "$0/process" || exit 125
set +C
trap : HUP INT QUIT TERM
(exec bash -c "$1" 2>&3 3>&-)
code=$?
echo "$code" > "$0/exit-code"
exit "$code"
"""
_LOST = "lost"
_PATIENCE = 2.0  # seconds that a shell has from making its file to writing it
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Living:
    """A run that goes on: its shell."""

    pid: int
    pidfd: int

    def close(self) -> None:
        """Look at it no longer."""
        os.close(self.pidfd)


@dataclass(frozen=True, slots=True)
class Ended:
    """A run that has ended by itself."""

    code: int


def applies(job: Job) -> bool:
    """Whether the job is to be made durable, and can be on this system."""
    return job.durable and CAN_ADOPT


def run_folder(run_id: str) -> Path:
    """Where a run's shell writes."""
    return runs_folder() / run_id


def argv(job: Job) -> tuple[str, ...]:
    """What to start for a job."""
    return ("sh", "-c", _SCRIPT, str(run_folder(job.run_id)), job.command)


def reference(job: Job, here: Mapping[str, object]) -> JobRef | None:
    """Where the job will be found; None where the system cannot do it.

    Args:
        job: the job.
        here: what `this_process` gave.
    """
    if not applies(job):
        return None
    data: dict[str, object] = {
        "folder": str(run_folder(job.run_id)),
        "output": None if job.output is None else str(job.output),
        **here,
        "grace": job.cancel_grace,
    }
    return JobRef("local", job.run_id, data)


def this_process() -> dict[str, object]:
    """The machine, which of its boots this is, and the process that starts runs. Blocking."""
    here: dict[str, object] = {"host": socket.gethostname(), "boot": _boot(), "driver": os.getpid()}
    if CAN_ADOPT:
        here["driver_started"] = start_time(Path("/proc/self/stat").read_text())
    return here


def find(ref: JobRef, *, give_up: bool) -> Living | Ended | None:
    """Look for a run. Blocking.

    Args:
        ref: of the run.
        give_up: a run that has not begun although its driver lives is not waited for any more, if that is this process.

    Returns:
        None: it has not begun, and its driver may still start it.

    Raises:
        RunLost: it will not end well any more; nothing of it runs, unless on another machine.
    """
    if not is_here(ref):
        raise _lost(ref, f"it was started on {ref.data.get('host')}, which is another machine or was booted since")
    folder = Path(str(ref.data["folder"]))
    if not (folder / "process").exists() and driver_lives(ref) and not (give_up and ref.data["driver"] == os.getpid()):
        return None
    stat = _claimed(folder)
    if stat is None:
        raise _lost(ref, "it was never started")
    pid, started = int(stat.split()[0]), start_time(stat)
    pidfd = adopt(pid, started)
    if pidfd is not None:
        return Living(pid, pidfd)
    code = conclude(folder)
    if code is None:
        raise _lost(ref, "its process was killed")
    return Ended(code)


def conclude(folder: Path) -> int | None:
    """The exit code of the command, now that its shell has ended. Blocking.

    Returns:
        None: the shell was killed before it could write it; now what it left behind is killed, too.
    """
    code = _read(folder / "exit-code")
    if code.endswith("\n") and code.strip().isdigit():
        return int(code)
    stat = _read(folder / "process")
    if ")" in stat:
        end_orphans(int(stat.split()[0]), start_time(stat))
    return None


def _claimed(folder: Path) -> str | None:
    """What the shell has written; None if it will never run the command."""
    file = folder / "process"
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with file.open("x") as claim:
                claim.write(f"{_LOST}\n")
            return None
        except FileExistsError:
            text = file.read_text()
        if text.endswith("\n") or time.monotonic() > deadline:
            return text if text.endswith("\n") and text.strip() != _LOST else None
        time.sleep(0.02)


def is_here(ref: JobRef, *, this_boot: bool = True) -> bool:
    """Whether a run was submitted on this machine, and since it was booted. Blocking.

    Args:
        ref: of the run.
        this_boot: False: it may have been booted since.
    """
    return ref.data.get("host") == socket.gethostname() and (not this_boot or ref.data.get("boot") == _boot())


def is_abandoned(ref: JobRef) -> bool:
    """Return True if a run of this machine is over and the process that submitted it is gone. Blocking."""
    if "folder" not in ref.data or not is_here(ref, this_boot=False):
        return False
    if is_here(ref) and driver_lives(ref):
        return False
    try:
        found = find(ref, give_up=False)
    except RunLost:
        return True
    if isinstance(found, Living):
        found.close()
    return isinstance(found, Ended)


def withdraw(ref: JobRef) -> bool:
    """Keep a run from beginning. Blocking.

    Args:
        ref: of a run that was submitted on this machine.

    Returns:
        False: it has begun already.
    """
    return _claimed(Path(str(ref.data["folder"]))) is None


def driver_lives(ref: JobRef) -> bool:
    """Whether the process that submitted a run of this machine still lives. Blocking."""
    pidfd = adopt(int(ref.data["driver"]), int(ref.data["driver_started"]))
    if pidfd is not None:
        os.close(pidfd)
    return pidfd is not None


def _boot() -> str:
    return _read(_BOOT).strip()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _lost(ref: JobRef, why: str) -> RunLost:
    return RunLost(f"the run {ref.run_id} is lost: {why}", backend="local")

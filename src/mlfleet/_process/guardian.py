"""The driver's side of the guardian: one process that ends this process's local runs if this process dies."""

from __future__ import annotations

import importlib.util
import os
import secrets
import subprocess
import sys
import threading
from pathlib import Path

from mlfleet._run_log import get_logger

__all__ = ["MARKER_VARIABLE", "RUN_VARIABLE", "Guardian", "find_python", "guardian"]

_log = get_logger("mlfleet.process")

MARKER_VARIABLE = "MLFLEET_DRIVER"
"""The environment variable that tells which driver a command belongs to; its value is `Guardian.marker`."""

RUN_VARIABLE = "MLFLEET_RUN"
"""The environment variable that tells which run a process belongs to; its value is the id of the MLflow run."""

_SCRIPT = Path(__file__).with_name("guardian_main.py")


class Guardian:
    """Registers the sessions of this process with its guardian, which is started with the first one.

    All methods may be called from any thread. They block for about two milliseconds when the guardian is started, and
    not measurably otherwise. The guardian ends soon after this process. Where it cannot be started, commands run
    without one, and a warning says so once.

    Attributes:
        marker: The value of `MARKER_VARIABLE` for commands that must not outlive this process.
    """

    def __init__(self) -> None:
        self.marker = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._lock = threading.Lock()
        self._sessions: dict[int, float] = {}
        self._pid: int | None = None
        self._pipe: int | None = None  # not a file, which Python would warn of at the end of this process
        self._warned: set[str] = set()

    def start(self) -> None:
        """Start the guardian if it does not run. Call it before a command is started with the marker."""
        with self._lock:
            self._ensure()

    def add(self, session: int, grace: float) -> None:
        """Have a session ended if this process dies.

        Args:
            session: The id of the session, which is the process id of its leader.
            grace: Seconds between SIGTERM and SIGKILL.
        """
        with self._lock:
            self._sessions[session] = grace
            self._send(f"+ {session} {grace}\n")

    def remove(self, session: int) -> None:
        """Forget a session that has ended."""
        with self._lock:
            if self._sessions.pop(session, None) is not None:
                self._send(f"- {session}\n")

    def _ensure(self) -> None:
        if self._pid is not None:
            if _is_running(self._pid):
                return
            self._warn("the guardian of local runs, process %d, was killed; starting another one", self._pid)
            self._close()
        try:
            self._spawn()
            for session, grace in self._sessions.items():
                self._write(f"+ {session} {grace}\n")
        except OSError as error:
            self._close()
            self._warn("local runs will go on if this process is killed: their guardian cannot be started: %s", error)

    def _spawn(self) -> None:
        # Without the driver's own marks, by which the driver or the guardian above it look for processes to end.
        environ = os.environ.copy()
        environ.pop(MARKER_VARIABLE, None)
        environ.pop(RUN_VARIABLE, None)
        # The guardian imports nothing else; the driver may have found it in a folder that is not on the default path.
        psutil = importlib.util.find_spec("psutil")
        if psutil is not None and psutil.origin is not None:
            environ["PYTHONPATH"] = str(Path(psutil.origin).parent.parent)
        command = [find_python(_SCRIPT), "-P", str(_SCRIPT), str(os.getpid()), f"{MARKER_VARIABLE}={self.marker}"]
        reading, self._pipe = os.pipe()
        try:
            popen = subprocess.Popen(
                command,
                stdin=reading,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environ,
                cwd="/",  # its working folder must not keep a file system busy
                start_new_session=True,
            )
        finally:
            os.close(reading)
        popen.returncode = 0  # it outlives this object; Popen would complain of a process that it leaves behind
        self._pid = popen.pid

    def _send(self, message: str) -> None:
        try:
            self._write(message)
        except BrokenPipeError:
            self._ensure()  # registers all sessions

    def _close(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
        self._pid = self._pipe = None

    def _warn(self, text: str, detail: object) -> None:
        if text not in self._warned:
            self._warned.add(text)
            _log.warning(text, detail)

    def _write(self, message: str) -> None:
        # A line is shorter than PIPE_BUF, so that it is written whole. The pipe holds thousands of them.
        if self._pipe is not None:
            os.write(self._pipe, message.encode())


def find_python(script: Path) -> str:
    """Return the path of the Python that runs this program, to run a script of mlfleet with.

    Raises:
        FileNotFoundError: This program is no script of a Python (it is frozen, or embeds one), or mlfleet is in a zip.
    """
    # uWSGI and programs that embed Python set sys.executable to themselves: with it they would start once more.
    for path in (Path(sys.executable or ""), Path(sys.exec_prefix, "bin", "python3")):
        if path.name.startswith(("python", "pypy")) and path.is_file() and script.is_file():
            return str(path)
    raise FileNotFoundError("no Python was found to run it with")


def _is_running(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == 0
    except ChildProcessError:  # reaped by another part of this program
        return False


_guardian = Guardian()


def guardian() -> Guardian:
    """Return the guardian of this process. A forked child gets one of its own."""
    return _guardian


def _leave_to_parent() -> None:
    """Leave the parent's guardian alone in a forked child, which may fork again or run projects itself."""
    global _guardian
    _guardian._close()
    _guardian = Guardian()


os.register_at_fork(after_in_child=_leave_to_parent)

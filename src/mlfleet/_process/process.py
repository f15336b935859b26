"""The only place where mlfleet starts processes. Nothing here blocks the event loop.

Processes are started in two threads of their own (``vfork`` takes about a millisecond) and their ends are awaited
through pidfds in the event loop itself, so that hundreds in flight cost neither threads nor tasks.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlfleet._concurrency.cancellation import wait_done
from mlfleet._concurrency.threads import PROCESSES
from mlfleet._process.sessions import SessionWatch
from mlfleet._process.streams import Stream

__all__ = ["Command", "Completed", "Process", "run_process", "start", "start_process"]

_log = logging.getLogger("mlfleet.process")
_CANCEL_GRACE = 2.0  # seconds that a short command gets to tidy up
_LINGER = 1.0  # seconds that the output of what outlives a short command is waited for
_UNKNOWN = 255  # what asyncio's child watchers say, too
_HINTS = {
    errno.EAGAIN: "the limit of processes is reached (ulimit -u, or the container's pids limit)",
    errno.EMFILE: "this process has too many open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files",
    errno.ENOMEM: "the machine is out of memory",
    errno.E2BIG: "the command with its environment variables is longer than the system allows",
}


@dataclass(frozen=True, slots=True)
class Command:
    """What is to be started, with stdin from /dev/null.

    Attributes:
        argv: the program and its arguments. Everybody on the machine can read them: never a secret.
        cwd: its working directory.
        env: all its variables; None: this process's.
        stdout: a file descriptor; None: it is inherited.
        stderr: likewise.
        program: the file to run, where it is known; None: it is looked for as ``argv[0]``.
    """

    argv: Sequence[str]
    cwd: Path | None = None
    env: Mapping[str, str] | None = None
    stdout: int | None = None
    stderr: int | None = None
    program: str | None = None


@dataclass(frozen=True, slots=True)
class Completed:
    """What a short command left.

    Attributes:
        returncode: negative for a signal.
        stdout: all of it (up to a limit).
        stderr: likewise; the same as stdout if they were merged.
    """

    returncode: int
    stdout: bytes
    stderr: bytes


class Process:
    """A running process that leads a session and process group of its own.

    Made by `start_process`; whoever started it sees to its end by `wait` or `stop`.

    Attributes:
        pid: of the process, and of its session and group.
        stopped: whether `stop` came before its end.
    """

    # How a pid is kept from being signalled after the system has given it to somebody else: while a stop is under way,
    # the ended leader is not reaped, and as long as it is a zombie neither its pid nor its group can be given away.
    # It is reaped when all of its session is gone. Nothing is signalled after that.

    __slots__ = (
        "_callbacks",
        "_code",
        "_forced",
        "_gone",
        "_kill",
        "_loop",
        "_pidfd",
        "_reaped",
        "_told",
        "pid",
        "stopped",
    )

    def __init__(self, pid: int, pidfd: int | None) -> None:
        self.pid = pid
        self.stopped = False
        self._pidfd = pidfd
        self._loop = asyncio.get_running_loop()
        self._code: int | None = None
        self._gone = asyncio.Event()
        self._callbacks: list[Callable[[], object]] = []
        self._reaped = False
        self._kill: asyncio.TimerHandle | None = None
        self._told: set[int] = set()
        self._forced = False
        if pidfd is None:
            threading.Thread(target=self._block, name=f"mlfleet wait {pid}", daemon=True).start()
        else:
            self._loop.add_reader(pidfd, self._poll)

    def __repr__(self) -> str:
        return f"<Process {self.pid} returncode={self.returncode}>"

    @property
    def returncode(self) -> int | None:
        """The exit code once `wait` would return it; negative for a signal."""
        return self._code if self._gone.is_set() else None

    def add_done_callback(self, callback: Callable[[], object]) -> None:
        """Call `callback` in the event loop when `wait` would return. It must not raise."""
        if self._gone.is_set():
            self._loop.call_soon(callback)
        else:
            self._callbacks.append(callback)

    async def wait(self) -> int:
        """Wait for the end of the process; any number of tasks may. A cancelled waiter changes nothing.

        Once `stop` was called this means the end of its whole group.
        """
        await self._gone.wait()
        assert self._code is not None  # noqa: S101 - set before the event
        return self._code

    async def stop(self, grace: float) -> None:
        """SIGTERM to the whole group, up to `grace` seconds, SIGKILL to what is left; returns once all of it is gone.

        Runs to its end also when the calling task is cancelled. Any number of tasks may call it; the shortest grace
        counts. A process that has ended by itself is left as it is, together with what it left behind.

        Args:
            grace: seconds.
        """
        self.begin_stop(grace)
        if self._gone.is_set():
            return
        # No task, which asyncio.run would cancel at its end with all others.
        gone: asyncio.Future[None] = self._loop.create_future()
        self.add_done_callback(partial(gone.set_result, None))
        cancelled = await wait_done(gone)
        if cancelled is not None:
            raise cancelled

    def begin_stop(self, grace: float) -> None:
        """What `stop` does, without waiting for it."""
        self._poll()
        if self._gone.is_set():
            return
        deadline = self._loop.time() + grace
        watch = SessionWatch.of_running_loop()
        if self._kill is None:
            watch.in_turn(self._terminate)
        elif self._kill.when() <= deadline:
            return
        else:
            self._kill.cancel()
        self._kill = self._loop.call_at(deadline, watch.in_turn, self._force)

    def _terminate(self) -> None:
        self._poll()
        if self._code is None:
            self.stopped = True
            self._ask(self.pid)
            SessionWatch.of_running_loop().add(self.pid, self._look)

    def _ask(self, group: int) -> None:
        self._told.add(group)
        _signal(group, signal.SIGTERM)
        _signal(group, signal.SIGCONT)  # one that is stopped (SIGSTOP, SIGTTIN) does not see SIGTERM before

    def _force(self) -> None:
        self._forced = True
        if self._gone.is_set():
            return
        for group in self._told:
            _signal(group, signal.SIGKILL)

    def _look(self, groups: set[int]) -> None:
        """What the watch has seen of the session."""
        self._poll()
        if self._gone.is_set():
            return
        for group in groups:
            if self._forced:
                _signal(group, signal.SIGKILL)
            elif group not in self._told:
                self._ask(group)
        self._told = groups | {self.pid} if not self._reaped else groups
        if not groups and self._code is not None:
            self._finish()

    def _poll(self) -> None:
        """Notice the end of the process, if it has come."""
        if self._code is not None or self._pidfd is None:
            return
        try:
            code = self._look_at() if self._kill is not None else self._reap()
        except ChildProcessError:
            self._reaped = True
            _log.warning("the exit status of process %d was taken by another part of this program", self.pid)
            code = _UNKNOWN
        if code is not None:
            self._end(code)

    def _look_at(self) -> int | None:
        """The exit code, if there is one; the process stays a zombie."""
        state = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if state is None:
            return None
        return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status

    def _reap(self) -> int | None:
        """The exit code, if there is one; then the process is no more."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        self._reaped = True
        return os.waitstatus_to_exitcode(status)

    def _end(self, code: int) -> None:
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        self._code = code
        if self.stopped:
            SessionWatch.of_running_loop().hurry()
        else:
            self._finish()

    def _finish(self) -> None:
        if not self._reaped:
            self._reaped = True
            with suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)
        if self._kill is not None:
            self._kill.cancel()
            SessionWatch.of_running_loop().remove(self.pid)
        self._gone.set()
        for callback in self._callbacks:
            callback()

    def _block(self) -> None:
        """Wait in a thread, where the system has no pidfds."""
        try:
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:
            code = _UNKNOWN
        self._reaped = True
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._end, code)


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


async def start(make: Callable[[], AbstractContextManager[Command]]) -> Process:
    """Start a long-running command that takes blocking work to make. A cancelled call leaves nothing running.

    Args:
        make: is called in a thread, and left there as soon as the process runs or cannot be started: so all that a
            start needs costs one turn in a thread.

    Raises:
        OSError: the program (``filename`` is its name) or the folder (``filename`` is ``str(cwd)``) is not there, or
            the system has no room for another process.
        ValueError: a NUL character in the arguments or the variables.
    """

    def spawn() -> tuple[int, int | None]:
        with make() as command:
            return _spawn(command)

    return Process(*await PROCESSES.run(spawn, undo=_take_back))


async def start_process(
    argv: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, output: int | None = None
) -> Process:
    """Start a long-running command, as `start` does.

    Args:
        argv: the program and its arguments. Everybody on the machine can read them: never a secret.
        cwd: its working directory.
        env: all its variables; None: this process's.
        output: a file descriptor for stdout and stderr; None: they are inherited.
    """
    command = Command(list(argv), cwd, env, output, output)
    return await start(lambda: nullcontext(command))


async def run_process(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    merge: bool = False,
    on_line: Callable[[str], None] | None = None,
    limit: int = 16 * 2**20,
) -> Completed:
    """Run a short command to its end and collect what it prints. A cancelled call ends its whole group and reaps it.

    Args:
        argv: the program and its arguments. Everybody on the machine can read them: never a secret.
        cwd: its working directory.
        env: all its variables; None: this process's.
        merge: send stderr into stdout.
        on_line: is called with every line of output as it comes. What it raises ends the command.
        limit: of the bytes kept of each stream; of more, the end is kept.

    Raises:
        OSError: the program (``filename`` is its name) or the folder (``filename`` is ``str(cwd)``) is not there, or
            the system has no room for another process.
        ValueError: a NUL character in the arguments or the variables.
    """
    with ExitStack() as stack:
        streams = [stack.enter_context(Stream(limit, on_line)) for _ in range(1 if merge else 2)]
        command = Command(list(argv), cwd, env, streams[0].writer, streams[-1].writer)
        process = await start(lambda: nullcontext(command))
        try:
            for stream in streams:
                stream.read(lambda: process.begin_stop(_CANCEL_GRACE))
            code = await process.wait()
            await asyncio.wait([stream.ended for stream in streams], timeout=_LINGER)
        finally:
            await process.stop(_CANCEL_GRACE)
        for stream in streams:
            stream.flush()
            if stream.error is not None:
                raise stream.error
        return Completed(code, streams[0].content(), streams[-1].content())


async def _take_back(spawned: tuple[int, int | None]) -> None:
    await Process(*spawned).stop(0)


def _spawn(command: Command) -> tuple[int, int | None]:
    """Start the process; its pid, and a pidfd where the system has them. Blocking."""
    try:
        # Never preexec_fn: without it Popen uses vfork, whose cost does not grow with this process's memory.
        popen = subprocess.Popen(
            command.argv,
            executable=command.program,
            cwd=None if command.cwd is None else str(command.cwd),
            env=command.env,
            stdin=subprocess.DEVNULL,
            stdout=command.stdout,
            stderr=command.stderr,
            start_new_session=True,
        )
    except OSError as error:
        raise _explained(error) from error
    try:
        pidfd = _open_pidfd(popen.pid)
    except OSError as error:
        popen.kill()
        popen.wait()
        raise _explained(error) from error
    popen.returncode = 0  # it is ours to reap from here on; Popen would complain of one that it leaves behind
    return popen.pid, pidfd


def _open_pidfd(pid: int) -> int | None:
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        return None  # an old kernel, or a container that forbids it


def _explained(error: OSError) -> OSError:
    hint = _HINTS.get(error.errno or 0)
    if hint is None:
        return error
    return OSError(error.errno, f"cannot start another process: {hint}", error.filename)

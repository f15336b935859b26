"""Starts and ends processes; the only place where mlfleet starts any. Nothing here blocks the event loop.

Processes are started in threads (``vfork`` takes about a millisecond). On Linux their ends are awaited through pidfds
in the event loop itself, so that hundreds in flight cost neither threads nor tasks; elsewhere each process takes a
thread that waits for its end.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from mlfleet._concurrency.cancellation import wait_done
from mlfleet._concurrency.grace import StopRequest
from mlfleet._concurrency.threads import PROCESSES
from mlfleet._process.guardian import MARKER_VARIABLE, guardian
from mlfleet._process.sessions import SessionWatch, signal_group
from mlfleet._process.streams import Stream
from mlfleet._run_log import current_run, get_logger

__all__ = ["Command", "Completed", "Process", "open_pidfd", "run_process", "start"]

_log = get_logger("mlfleet.process")
_CANCEL_GRACE = 2.0  # seconds between SIGTERM and SIGKILL for a short command
_DRAIN_TIMEOUT = 1.0  # seconds to wait for the end of a short command's output after the command's own end
_UNKNOWN = 255  # the exit code that asyncio's child watchers report, too
_HINTS = {
    errno.EAGAIN: "the limit of processes is reached (ulimit -u, or the container's pids limit)",
    errno.EMFILE: "this process has too many open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files",
    errno.ENOMEM: "the machine is out of memory",
    errno.E2BIG: "the command with its environment variables is longer than the system allows",
}


@dataclass(frozen=True, slots=True)
class Command:
    """A program with its arguments and surroundings.

    Attributes:
        argv: The program and its arguments. Every user of the machine can read them: they must not hold secrets.
        cwd: The working directory; None: this process's.
        env: All environment variables; None: this process's.
        stdout: The file descriptor for stdout; None: it is inherited.
        stderr: The file descriptor for stderr; None: it is inherited.
        program: The file to run, if it is known; None: ``argv[0]`` is searched for.
        title: What the command is, for messages.
        rest_grace: Seconds between SIGTERM and SIGKILL for processes that the command leaves in its session at its end;
            None: they are left alone.
        guarded: True if the command must not outlive this process. It needs a `rest_grace`, and has `MARKER_VARIABLE`
            in its environment.
        stdin: What the program reads from stdin, at most 64 KiB, which a pipe takes at once; None: /dev/null.
    """

    argv: Sequence[str]
    cwd: Path | None = None
    env: Mapping[str, str] | None = None
    stdout: int | None = None
    stderr: int | None = None
    program: str | None = None
    title: str = "a command"
    rest_grace: float | None = None
    guarded: bool = False
    stdin: bytes | None = None


@dataclass(frozen=True, slots=True)
class Completed:
    """The result of a short command.

    Attributes:
        returncode: The exit code; negative for a signal.
        stdout: The output, or its end if it was longer than the limit.
        stderr: The errors, or their end; the same as stdout if they were merged.
    """

    returncode: int
    stdout: bytes
    stderr: bytes


class Process:
    """A running process that leads a session and process group of its own.

    `start` makes it; its caller ensures that it ends, by `wait` or `stop`.

    Args:
        pid: The id of the process.
        pidfd: Its descriptor; None where the system has none.
        title: What the process is, for messages.
        rest_grace: Seconds between SIGTERM and SIGKILL for what it leaves in its session; None: that is left alone.

    Attributes:
        pid: The id of the process, of its session and of its group.
        stopped: True if `stop` was called before the process ended by itself.
    """

    # A pid must not be signalled after the system has given it to another process, which it does not do as long as a
    # process has it as the id of its session or group. So a leader that was to be stopped is not reaped: it stays a
    # zombie until all of its session is gone, and nothing is signalled after that. One that ends by itself is reaped at
    # once, since only then `_is_gone` can tell whether it has left something; what it has left keeps the id as well.
    # Without pidfds a thread reaps it, since macOS has os.waitid (and so WNOWAIT) from Python 3.13 on only.

    __slots__ = (
        "_code",
        "_ended",
        "_forced",
        "_kill",
        "_loop",
        "_pidfd",
        "_reaped",
        "_rest_grace",
        "_run_id",
        "_signalled",
        "_stop",
        "_title",
        "pid",
        "stopped",
    )

    def __init__(self, pid: int, pidfd: int | None, title: str = "a command", rest_grace: float | None = None) -> None:
        self.pid = pid
        self.stopped = False
        self._title = title
        self._run_id = current_run()
        self._rest_grace = rest_grace
        self._pidfd = pidfd
        self._loop = asyncio.get_running_loop()
        self._code: int | None = None
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._reaped = False
        self._stop = StopRequest(_CANCEL_GRACE)
        self._kill: asyncio.TimerHandle | None = None
        self._signalled: set[int] = set()
        self._forced = False
        if pidfd is None:
            threading.Thread(target=self._wait_in_thread, name=f"mlfleet wait {pid}", daemon=True).start()
        else:
            self._loop.add_reader(pidfd, self._poll)

    def __repr__(self) -> str:
        return f"<Process {self.pid} returncode={self.returncode}>"

    @property
    def returncode(self) -> int | None:
        """The exit code once `wait` would return it; negative for a signal."""
        return self._ended.result() if self._ended.done() else None

    def add_done_callback(self, callback: Callable[[], object]) -> None:
        """Call `callback` in the event loop when `wait` would return. The callback must not raise."""
        self._ended.add_done_callback(lambda _: callback())

    async def wait(self) -> int:
        """Wait for the end of the process, and after `stop` or with a `rest_grace` for the end of its whole session.

        Any number of tasks may wait. A cancelled waiter changes nothing.
        """
        return await asyncio.shield(self._ended)

    async def stop(self, grace: float) -> None:
        """Send SIGTERM to the whole session, after the grace SIGKILL, and wait until all of it is gone.

        Runs to its end also when the calling task is cancelled. Any number of tasks may call it; the shortest grace
        counts. A process that has ended by itself is left as it is, together with what it left behind.

        Args:
            grace: Seconds between SIGTERM and SIGKILL.
        """
        self.begin_stop(grace)
        cancelled = await wait_done(self._ended)
        if cancelled is not None:
            raise cancelled

    def begin_stop(self, grace: float) -> None:
        """Begin what `stop` does, without waiting for it."""
        self._poll()
        if self._ended.done():
            return
        is_first = not self._stop.is_requested
        if not self._stop.request(grace):
            return
        if is_first:
            SessionWatch.of_running_loop().signal_soon(self._terminate)
        self._kill_later()

    def _terminate(self) -> None:
        self._poll()
        if self._code is None:
            self.stopped = True
            self._ask(self.pid)
            SessionWatch.of_running_loop().add(self.pid, self._look)

    def _ask(self, group: int) -> None:
        self._signalled.add(group)
        signal_group(group, signal.SIGTERM)
        signal_group(group, signal.SIGCONT)  # a stopped process (SIGSTOP, SIGTTIN) does not see SIGTERM before

    def _force(self) -> None:
        self._forced = True
        if self._ended.done():
            return
        for group in self._signalled:
            signal_group(group, signal.SIGKILL)

    def _look(self, groups: Mapping[int, Sequence[str]]) -> None:
        """Signal the living groups of the session, or conclude if there are none."""
        self._poll()
        if self._ended.done():
            return
        if groups and not self.stopped and self._rest_grace is not None and not self._signalled:
            self._end_rest(groups, self._rest_grace)
        for group in groups:
            if self._forced:
                signal_group(group, signal.SIGKILL)
            elif group not in self._signalled:
                self._ask(group)
        self._signalled = {*groups} if self._reaped else {*groups, self.pid}
        if not groups and self._code is not None:
            self._finish(self._code)

    def _end_rest(self, groups: Mapping[int, Sequence[str]], grace: float) -> None:
        """Begin to end what the process has left behind."""
        names = ", ".join(sorted(name for names in groups.values() for name in names))
        text = "%s ended and left %s, ended now; what should go on needs a session of its own (setsid)"
        _log.warning(text, self._title, names, extra={"run_id": self._run_id})
        if self._stop.request(grace):
            self._kill_later()

    def _kill_later(self) -> None:
        if self._kill is not None:
            self._kill.cancel()
        watch = SessionWatch.of_running_loop()
        self._kill = self._loop.call_later(self._stop.remaining or 0, watch.signal_soon, self._force)

    def _poll(self) -> None:
        """Notice the end of the process, if it has ended."""
        if self._code is not None or self._pidfd is None:
            return
        try:
            code = self._peek() if self._stop.is_requested else self._reap()
        except ChildProcessError:
            self._reaped = True
            _log.warning("the exit status of process %d was taken by another part of this program", self.pid)
            code = _UNKNOWN
        if code is not None:
            self._end(code)

    def _peek(self) -> int | None:
        """Return the exit code if the process has ended, and leave it a zombie."""
        state = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if state is None:
            return None
        return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status

    def _reap(self) -> int | None:
        """Return the exit code if the process has ended, and reap it."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        self._reaped = True
        return os.waitstatus_to_exitcode(status)

    def _end(self, code: int) -> None:
        is_gone = False
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            is_gone = _is_gone(self.pid, self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        self._code = code
        if self.stopped:
            SessionWatch.of_running_loop().hurry()
        elif self._rest_grace is not None and not is_gone:
            SessionWatch.of_running_loop().add(self.pid, self._look, named=True)
        else:
            self._finish(code)

    def _finish(self, code: int) -> None:
        if not self._reaped:
            self._reaped = True
            with suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)
        if self._kill is not None:
            self._kill.cancel()
        SessionWatch.of_running_loop().remove(self._look)
        guardian().remove(self.pid)
        self._ended.set_result(code)

    def _wait_in_thread(self) -> None:
        """Wait for the end, on systems without pidfds."""
        code = self._wait_blocking()
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._end, code)

    def _wait_blocking(self) -> int:
        try:
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:
            code = _UNKNOWN
        self._reaped = True
        return code


_Spawned = tuple[int, int | None, str, float | None]


async def start(make: Callable[[], AbstractContextManager[Command]]) -> Process:
    """Start a long-running command whose preparation blocks. A cancelled call leaves nothing running.

    Args:
        make: Called in a thread, and its context is left there as soon as the process runs or failed to start: so all
            that a start needs takes one turn in a thread.

    Raises:
        OSError: The program (``filename`` is its name) or the folder (``filename`` is ``str(cwd)``) does not exist, or
            the system has no room for another process.
        ValueError: There is a NUL character in the arguments or the variables.
    """

    def spawn() -> _Spawned:
        with make() as command:
            return (*_spawn(command), command.title, command.rest_grace)

    return Process(*await PROCESSES.run(spawn, undo=_take_back))


async def run_process(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    merge: bool = False,
    on_line: Callable[[str], None] | None = None,
    limit: int = 16 * 2**20,
) -> Completed:
    """Run a short command and collect its output. A cancelled call ends and reaps its whole session.

    Args:
        argv: The program and its arguments. Every user of the machine can read them: they must not hold secrets.
        cwd: The working directory; None: this process's.
        env: All environment variables; None: this process's.
        stdin: What the program reads from stdin, at most 64 KiB; None: /dev/null.
        merge: True to send stderr into stdout.
        on_line: Called with every line of output as it comes. An exception that it raises ends the command.
        limit: Bytes of each stream to keep; of longer output the end is kept.

    Raises:
        OSError: The program (``filename`` is its name) or the folder (``filename`` is ``str(cwd)``) does not exist, or
            the system has no room for another process.
        ValueError: There is a NUL character in the arguments or the variables.
    """
    with ExitStack() as stack:
        streams = [stack.enter_context(Stream(limit, on_line)) for _ in range(1 if merge else 2)]
        command = Command(list(argv), cwd, env, streams[0].writer, streams[-1].writer, stdin=stdin)
        process = await start(lambda: nullcontext(command))
        try:
            for stream in streams:
                stream.read(lambda: process.begin_stop(_CANCEL_GRACE))
            code = await process.wait()
            await asyncio.wait([stream.ended for stream in streams], timeout=_DRAIN_TIMEOUT)
        finally:
            await process.stop(_CANCEL_GRACE)
        for stream in streams:
            stream.flush()
            if stream.error is not None:
                raise stream.error
        return Completed(code, streams[0].content(), streams[-1].content())


async def _take_back(spawned: _Spawned) -> None:
    await Process(*spawned).stop(0)


def _spawn(command: Command) -> tuple[int, int | None]:
    """Start the process; return its pid, and a pidfd where the system has them. Blocking."""
    env = command.env
    if command.guarded:
        guardian().start()
        env = {**(os.environ if env is None else env), MARKER_VARIABLE: guardian().marker}
    stdin = None if command.stdin is None else _filled_pipe(command.stdin)
    try:
        # Never preexec_fn: without it Popen uses vfork, whose cost does not grow with this process's memory.
        popen = subprocess.Popen(
            command.argv,
            executable=command.program,
            cwd=None if command.cwd is None else str(command.cwd),
            env=env,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=command.stdout,
            stderr=command.stderr,
            start_new_session=True,
        )
    except OSError as error:
        raise _explained(error) from error
    finally:
        if stdin is not None:
            os.close(stdin)
    try:
        pidfd = open_pidfd(popen.pid)
    except OSError as error:
        popen.kill()
        popen.wait()
        raise _explained(error) from error
    popen.returncode = 0  # `Process` reaps it; Popen would warn about a process that it leaves behind
    if command.guarded:
        # If this process is killed before this line, the guardian finds the command by its marker.
        guardian().add(popen.pid, command.rest_grace or 0)
    return popen.pid, pidfd


def _filled_pipe(data: bytes) -> int:
    """Return the end for reading of a pipe that holds `data`. Blocking."""
    reader, writer = os.pipe()
    try:
        os.write(writer, data)
    finally:
        os.close(writer)
    return reader


def open_pidfd(pid: int) -> int | None:
    """Open a descriptor of a process, which can be waited for.

    Returns:
        The descriptor; None where the system has none: not Linux, an old kernel, or a container that forbids it.

    Raises:
        ProcessLookupError: The pid belongs to no process.
        OSError: The system has no room for another descriptor.
    """
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESRCH):
            raise
        return None


def _is_gone(session: int, descriptor: int) -> bool:
    """Return True if a session certainly has no process any more, not even a zombie.

    This spares nearly every run a look at all processes of the machine, which takes a thread and half a millisecond.

    Args:
        session: The id of the session.
        descriptor: Any open file.
    """
    # A pid is in use as long as it is the id of a process, a group or a session. Linux takes only such a one for the
    # owner of a file (f_setown in fs/fcntl.c, from 4.13 on; pidfds need 5.3), which gets no signals without O_ASYNC.
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, session)
    except ProcessLookupError:
        return True
    return False


def _explained(error: OSError) -> OSError:
    hint = _HINTS.get(error.errno or 0)
    if hint is None:
        return error
    return OSError(error.errno, f"cannot start another process: {hint}", error.filename)

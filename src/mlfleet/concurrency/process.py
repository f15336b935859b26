"""The only place where mlfleet starts processes. Nothing here blocks the event loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Completed", "Process", "run_process", "start_process"]


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
    """A running process that leads a session and process group of its own."""

    pid: int

    @property
    def returncode(self) -> int | None:
        """The exit code once it has ended; negative for a signal."""
        raise NotImplementedError

    async def wait(self) -> int:
        """Wait for the end of the process; any number of tasks may. A cancelled waiter changes nothing."""
        raise NotImplementedError

    async def stop(self, grace: float) -> None:
        """SIGTERM to the whole group, up to `grace` seconds, SIGKILL to what is left; returns once all of it is gone.

        Runs to its end also when the calling task is cancelled.
        """
        raise NotImplementedError


async def start_process(
    argv: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, output: int | None = None
) -> Process:
    """Start a long-running command, with stdin from /dev/null.

    Args:
        argv: the program and its arguments.
        cwd: its working directory.
        env: all its variables; None: this process's.
        output: a file descriptor for stdout and stderr; None: they are inherited.

    Raises:
        OSError: the program or the folder is not there.
    """
    raise NotImplementedError


async def run_process(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    merge: bool = False,
    on_line: Callable[[str], None] | None = None,
    limit: int = 16 * 2**20,
) -> Completed:
    """Run a short command to its end and collect what it prints. A cancelled call kills its whole group and reaps it.

    Args:
        argv: the program and its arguments.
        cwd: its working directory.
        env: all its variables; None: this process's.
        merge: send stderr into stdout.
        on_line: is called with every line of output as it comes.
        limit: of the bytes kept of each stream; of more, the end is kept.

    Raises:
        OSError: the program or the folder is not there.
    """
    raise NotImplementedError

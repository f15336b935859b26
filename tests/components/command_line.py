"""The real command line, in a process of its own, on pipes or on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import jsonschema

from components import stop
from components.mlflow_server import MlflowServer

__all__ = ["ARGV", "Started", "id_in", "mlfleet", "on_terminal", "read_json", "run_on", "started"]

ARGV = (sys.executable, "-m", "mlfleet")
CTRL_C = b"\x03"
_SCHEMA = Path(__file__).parents[2] / "docs" / "reference" / "json-output.schema.json"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def mlfleet(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end on pipes.

    Args:
        arguments: The arguments after the program's name.
        cwd: The working directory; None: this process's.
        env: Variables on top of this process's.
    """
    return subprocess.run(
        [*ARGV, *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        errors="surrogateescape",  # the output of a run is any bytes
        check=False,
    )


class Started:
    """A running command line whose output is read by the test.

    Attributes:
        process: The process.
        seen: All output that was read so far.
    """

    def __init__(self, process: subprocess.Popen[bytes], output: IO[bytes], keyboard: int | None) -> None:
        self.process = process
        self.seen = ""
        self._output = output
        self._keyboard = keyboard

    def read_until(self, text: str) -> str:
        """Read until the output contains `text`, and return all output so far without escape sequences."""
        while text not in self.plain:
            if not self._read():
                raise AssertionError(f"it ended without writing {text!r}, but: {self.seen!r}")
        return self.plain

    def press_ctrl_c(self) -> None:
        """Press Ctrl-C: the terminal sends SIGINT to the programs in its foreground."""
        assert self._keyboard is not None
        os.write(self._keyboard, CTRL_C)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self.process.send_signal(number)

    def finish(self) -> int:
        """Read to the end and return the exit code."""
        while self._read():
            pass
        return self.process.wait(30)

    @property
    def plain(self) -> str:
        """The output read so far, without escape sequences."""
        return _ESCAPES.sub("", self.seen)

    def _read(self) -> bool:
        try:
            data = os.read(self._output.fileno(), 65536)
        except OSError:  # how a terminal tells that the other side is closed
            return False
        self.seen += data.decode(errors="replace")
        return bool(data)


@contextmanager
def started(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, before: Sequence[str] = ()
) -> Iterator[Started]:
    """Start the command line with stdout and stderr in one pipe, and end it with the block.

    Args:
        arguments: The arguments after the program's name.
        cwd: The working directory; None: this process's.
        env: Variables on top of this process's.
        before: The program, with its arguments, that starts it.
    """
    with subprocess.Popen(
        [*before, *ARGV, *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        try:
            yield Started(process, process.stdout, None)
        finally:
            # Even if it does not end itself, no run of it may outlive the test.
            stop(process)


@contextmanager
def on_terminal(
    *arguments: str,
    argv: Sequence[str] = ARGV,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Started]:
    """Start the command line, or another program, on a controlling terminal of 100 columns, and end it with the block.

    Args:
        arguments: The arguments after the program's name.
        argv: The program.
        cwd: The working directory; None: this process's.
        env: Variables on top of this process's.
    """
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    variables = {**plain, "TERM": "xterm-256color", **(env or {})}
    with os.fdopen(ours, "rb", buffering=0) as output:
        process = subprocess.Popen(
            [*argv, *arguments],
            cwd=cwd,
            env=variables,
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(its)
        try:
            yield Started(process, output, ours)
        finally:
            stop(process)


def _take_terminal() -> None:
    """Make the terminal at stdin the controlling one, so that its keys send signals."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def id_in(text: str) -> str:
    """Return the id of the run that the command line reported."""
    found = re.search(r"\(run ([0-9a-f]{32})\)", text)
    assert found, text
    return found[1]


def run_on(server: MlflowServer, run_id: str) -> dict[str, Any]:
    """Return a run as the server reports it."""
    answer = httpx.get(f"{server.url}/api/2.0/mlflow/runs/get", params={"run_id": run_id}, trust_env=False)
    run: dict[str, Any] = answer.raise_for_status().json()["run"]
    return run


def read_json(text: str, kind: str) -> dict[str, Any]:
    """Parse what ``--json`` printed, after checking it against the published schema.

    Args:
        text: The JSON.
        kind: The definition in the schema: ``run``, or ``event`` for a line of a sweep.
    """
    found: dict[str, Any] = json.loads(text)
    jsonschema.validate(found, {**json.loads(_SCHEMA.read_text()), "$ref": f"#/$defs/{kind}"})
    return found

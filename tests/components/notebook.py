"""A Jupyter server and its kernel, as far as it starts, interrupts and ends kernels and executes cells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from components import missing, stop

__all__ = ["Cell", "NotebookServer"]

# In a process of its own: jupyter_client leaves event loops and sockets behind.
_SERVER = """\
import json, sys
from jupyter_client.manager import KernelManager

manager = KernelManager(kernel_name="python3", connection_file="kernel.json")
client = message = None

def start():
    manager.start_kernel(stdout=sys.stderr)  # it has a copy of what the cells show

def execute(code):
    global client, message
    if client is None:
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
    message = client.execute(code)

def interrupt():
    manager.interrupt_kernel()

def result():
    found = []
    while True:
        part = client.get_iopub_msg(timeout=60)
        if part["parent_header"].get("msg_id") != message:
            continue
        if part["msg_type"] == "status" and part["content"]["execution_state"] == "idle":
            break
        found.append([part["msg_type"], part["content"]])
    return found

def forget():
    global client
    if client is not None:
        client.stop_channels()
        client = None

def restart(now=False):
    forget()
    manager.restart_kernel(now=now)

def shutdown(now=False):
    forget()
    manager.shutdown_kernel(now=now)

for line in sys.stdin:
    what, arguments = json.loads(line)
    print(json.dumps(globals()[what](**arguments), default=str), flush=True)
"""


@dataclass(slots=True)
class Cell:
    """What a cell has shown when it ended.

    Attributes:
        text: Its standard output and standard error.
        displays: Its displays, each with the data of all its states in order.
        result: The data of the value of its last expression.
        error: The name of the error that ended it; None if there was none.
    """

    text: str = ""
    displays: list[list[dict[str, str]]] = field(default_factory=list)
    result: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    @classmethod
    def of(cls, messages: list[tuple[str, dict[str, Any]]]) -> Cell:
        """Read the messages of a kernel."""
        cell, named = cls(), {}
        for kind, content in messages:
            name = content.get("transient", {}).get("display_id")
            match kind:
                case "stream":
                    cell.text += content["text"]
                case "display_data":
                    cell.displays.append([content["data"]])
                    named[name] = cell.displays[-1]
                case "update_display_data":
                    named[name].append(content["data"])
                case "execute_result":
                    cell.result = content["data"]
                case "error":
                    cell.error = content["ename"]
        return cell


class NotebookServer:
    """A server with one kernel."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def start(self) -> None:
        """Start the kernel."""
        self._call("start")

    def execute(self, code: str) -> None:
        """Begin to execute a cell."""
        self._call("execute", code=code)

    def interrupt(self) -> None:
        """Interrupt the kernel, as the button with the square does."""
        self._call("interrupt")

    def result(self) -> Cell:
        """Wait until the kernel is idle again, and return what the cell has shown."""
        return Cell.of(self._call("result"))

    def restart(self, *, now: bool = False) -> None:
        """Restart the kernel: ask it to end, or kill it."""
        self._call("restart", now=now)

    def shutdown(self, *, now: bool = False) -> None:
        """End the kernel: ask it to end, or kill it."""
        self._call("shutdown", now=now)

    def _call(self, what: str, **arguments: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, arguments]).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[NotebookServer]:
    """A server whose kernel, once it is started, runs in the folder of the test."""
    if find_spec("jupyter_client") is None or find_spec("ipykernel") is None:
        missing("Jupyter", "pip install 'mlfleet[dev]'")
    # ipykernel does not show what other processes write if it finds itself in a test.
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER], cwd=tmp_path, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        yield NotebookServer(process)
        stop(process)  # with its kernel

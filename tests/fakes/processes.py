"""Processes for tests, started as mlfleet starts the commands of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from mlfleet._process.process import Command, Process, start


async def start_process(
    argv: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, output: int | None = None
) -> Process:
    """Start a long-running command, whose stdout and stderr go to the file descriptor `output`."""
    command = Command(list(argv), cwd, env, output, output)
    return await start(lambda: nullcontext(command))

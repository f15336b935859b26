"""The list of a sweep's runs that the driver keeps on its machine, since anybody may tag a run as one of the sweep."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self

from mlfleet._concurrency.threads import FILES
from mlfleet._engine.request import SweepMember
from mlfleet.errors import UsageError
from mlfleet.tracking.base import RunInfo

__all__ = ["LIST_TAG", "Members"]

LIST_TAG = "mlfleet.sweep.list"
"""The tag of a sweep with the number of its list. A session on another machine, with a list of its own, changes it."""


class Members:
    """The list of the runs of one sweep with a name.

    Its first line is the number of the list and the id of the sweep. Each other line is written before a run is made,
    with a number that becomes a tag of the run, or after it, with the id of the run.

    Args:
        path: The file.
        number: The number of the list, which is a tag of the sweep.
        sweep_id: The id of the sweep's MLflow run; empty if it does not exist yet.
    """

    def __init__(self, path: Path, number: str, sweep_id: str) -> None:
        self._path = path
        self.number = number
        self.sweep_id = sweep_id
        self._ids: set[str] = set()
        self._expected: set[str] = set()

    @classmethod
    def read(cls, lock: Path) -> Self | None:
        """Return the list of the sweep with this lock; None if there is none on this machine. Blocking."""
        path = lock.with_suffix(".members")
        try:
            if path.lstat().st_uid != os.getuid():
                return None
            first, *lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            number, sweep_id = first.split()
        except (OSError, ValueError):
            return None
        found = cls(path, number, sweep_id)
        for line in lines:
            words = line.split()
            found._expected.add(words[0]) if len(words) == 1 else found._note(*words[:2])
        return found

    @classmethod
    def new(cls, lock: Path) -> Self:
        """Return an empty list with a new number, which `write` makes."""
        return cls(lock.with_suffix(".members"), secrets.token_hex(8), "")

    def is_of(self, sweep: RunInfo) -> bool:
        """Return True if no session on another machine has driven the sweep since this list was written."""
        return self.sweep_id == sweep.run_id and sweep.tags.get(LIST_TAG) == self.number

    def choose(self, runs: Sequence[RunInfo]) -> list[RunInfo]:
        """Return those of the tagged runs that are members."""
        chosen = {run.run_id: run for run in runs if run.run_id in self._ids}
        # A driver that died between the request and its answer has not noted the id. Copies of the run are younger.
        left = set(self._expected)
        for run in sorted(runs, key=lambda run: run.start_time or 0):
            if (token := run.tags.get(SweepMember.MEMBER_TAG)) in left:
                left.discard(token)
                chosen[run.run_id] = run
        return [run for run in runs if run.run_id in chosen]

    def write(self, sweep_id: str, run_ids: Iterable[str]) -> None:
        """Write the list anew. Blocking.

        Args:
            sweep_id: The id of the sweep's MLflow run.
            run_ids: The ids of its runs.

        Raises:
            OSError: It cannot be written.
        """
        self.sweep_id, self._ids = sweep_id, set(run_ids)
        unfinished = self._path.with_suffix(".members.new")
        lines = [f"{self.number} {sweep_id}", *(f"- {run_id}" for run_id in sorted(self._ids))]
        unfinished.write_text("\n".join((*lines, "")), encoding="utf-8")
        unfinished.replace(self._path)

    async def expect(self) -> str:
        """Note that a run is about to be made, and return the number that its tags must have.

        Raises:
            UsageError: The list cannot be written.
        """
        token = secrets.token_hex(8)
        await self._append(token)
        return token

    async def add(self, token: str, run_id: str) -> None:
        """Note the id of a run that was made.

        Raises:
            UsageError: The list cannot be written.
        """
        self._note(token, run_id)
        await self._append(f"{token} {run_id}")

    def _note(self, token: str, run_id: str) -> None:
        self._expected.discard(token)
        self._ids.add(run_id)

    async def _append(self, line: str) -> None:
        try:
            await FILES.run(partial(_append, self._path, f"{line}\n".encode()))
        except OSError as error:
            text = f"the list of the sweep's runs cannot be written to {self._path}: {error.strerror}"
            raise UsageError(text) from error


def _append(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(descriptor, data)
    finally:
        with suppress(OSError):
            os.close(descriptor)

"""Working copies whose process was killed: they stay while a run goes on in them, and go after that."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.command_line import mlfleet
from components.git_repository import Repository, make_repository
from mlfleet._project.fetch import ProjectFetcher
from mlfleet._project.working_copies import list_copies

# A process that has a run in a working copy; the run outlives it, as that of a named sweep does.
_DRIVER = """\
import asyncio, subprocess, sys
from mlfleet._project.fetch import ProjectFetcher

async def main():
    fetcher = ProjectFetcher()
    async with fetcher.working_copy(await fetcher.fetch(sys.argv[1])) as folder:
        run = subprocess.Popen(["sleep", "600"], cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL)
        print(run.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return make_repository(tmp_path)


@pytest.fixture
def orphan(repository: Repository, temporary: Path) -> Iterator[int]:
    """A run whose process was killed."""
    driver = subprocess.Popen([sys.executable, "-c", _DRIVER, str(repository.bare)], stdout=subprocess.PIPE)
    assert driver.stdout is not None
    run = os.pidfd_open(int(driver.stdout.readline()))
    driver.kill()
    driver.wait()
    driver.stdout.close()
    yield run
    end(run)
    os.close(run)


def end(run: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(run, signal.SIGKILL)
    poll = select.poll()
    poll.register(run, select.POLLIN)
    poll.poll()


async def use_one(repository: Repository) -> None:
    fetcher = ProjectFetcher()
    async with fetcher.working_copy(await fetcher.fetch(str(repository.bare))) as folder:
        assert (folder / "MLproject").exists()


async def test_the_next_process_removes_an_abandoned_copy(orphan: int, repository: Repository, temporary: Path) -> None:
    (left,) = temporary.iterdir()
    await use_one(repository)
    assert list(temporary.iterdir()) == [left]
    assert [entry.in_use for entry in await asyncio.to_thread(list_copies)] == [True]
    await asyncio.to_thread(end, orphan)
    await use_one(repository)
    assert list(temporary.iterdir()) == []
    assert await asyncio.to_thread(list_copies) == []


def test_the_command_lists_and_removes_an_abandoned_copy(orphan: int, temporary: Path) -> None:
    (left,) = temporary.iterdir()
    listed = [entry for entry in json.loads(mlfleet("cache", "list", "--json").stdout) if entry["kind"] == "copy"]
    assert [(entry["path"], entry["in_use"]) for entry in listed] == [(str(left), True)]
    mlfleet("cache", "prune")
    assert left.is_dir()
    end(orphan)
    assert str(left) in mlfleet("cache", "prune").stdout
    assert not left.exists()

"""Looking at the cache and pruning it, while others use it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from components.git_repository import Repository, git, make_repository
from mlfleet._project.cache import list_entries, prune
from mlfleet._project.fetch import ProjectFetcher
from mlfleet._store.content_store import StoredEntry
from mlfleet.errors import FetchError

DAY = timedelta(days=1)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return make_repository(tmp_path)


def make_old(path: Path) -> None:
    then = (datetime.now(UTC) - 10 * DAY).timestamp()
    os.utime(path, (then, then))


async def entries() -> list[StoredEntry]:
    return await asyncio.to_thread(list_entries)


async def test_list_shows_fetched_projects(repository: Repository, tmp_path: Path) -> None:
    assert await entries() == []
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("MLproject", "name: p")
    fetcher = ProjectFetcher()
    await fetcher.fetch(f"{repository.bare}#steps")
    await fetcher.fetch(str(tmp_path / "p.zip"))
    found = {entry.kind: entry for entry in await entries()}
    assert set(found) == {"git", "mirror", "zip"}
    assert (found["git"].uri, found["git"].version) == (str(repository.bare), repository.head)
    assert found["zip"].uri == str(tmp_path / "p.zip")
    assert all(entry.size > 0 for entry in found.values())
    assert datetime.now(UTC) - found["git"].last_used < DAY
    assert [found[kind].in_use for kind in ("git", "zip")] == [True, True]
    fetcher.close()
    assert not any(entry.in_use for entry in await entries())


async def test_prune_removes_old_entries_and_keeps_used_ones(repository: Repository) -> None:
    first = repository.head
    second = repository.commit(a__txt="a")
    third = repository.commit(a__txt="b")
    fetcher, other = ProjectFetcher(), ProjectFetcher()
    for commit in (first, second):
        await fetcher.fetch(str(repository.bare), commit)
    project = await other.fetch(str(repository.bare), third)
    fetcher.close()
    for entry in await entries():
        if entry.version in (first, third):
            make_old(entry.path / "in-use")
    removed = await asyncio.to_thread(prune, DAY)
    assert [entry.version for entry in removed] == [first]
    removed = await asyncio.to_thread(prune)
    assert [entry.version for entry in removed] == [second]
    async with other.working_copy(project) as folder:
        other.close()
        assert await asyncio.to_thread(prune) == []
        assert git(folder, "log", "--format=%H", "-1") == third
    other.close()
    assert {entry.kind for entry in await asyncio.to_thread(prune)} == {"git", "mirror"}
    assert await entries() == []
    assert (await ProjectFetcher().fetch(str(repository.bare))).commit == third


async def test_use_by_another_process_counts(repository: Repository) -> None:
    script = (
        "import asyncio, sys\n"
        "from mlfleet._project.fetch import ProjectFetcher\n"
        "fetcher = ProjectFetcher()\n"
        "asyncio.run(fetcher.fetch(sys.argv[1]))\n"
        "print('fetched', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, str(repository.bare)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"fetched\n"
    assert await asyncio.to_thread(prune) == []
    process.kill()
    await process.communicate()
    assert len(await asyncio.to_thread(prune)) == 2


async def test_project_pruned_between_fetch_and_run_is_an_error_that_says_so(repository: Repository) -> None:
    fetcher = ProjectFetcher()
    project = await fetcher.fetch(str(repository.bare))
    fetcher.close()
    await asyncio.to_thread(prune)
    with pytest.raises(FetchError, match="removed from the cache in the meantime: submit again"):
        async with fetcher.working_copy(project):
            pass


async def test_leftovers_of_killed_processes_are_removed_and_those_of_running_ones_kept(repository: Repository) -> None:
    project = await ProjectFetcher().fetch(str(repository.bare))
    leftover = project.folder.parents[3] / "tmp-dead"
    (leftover / "half").mkdir(parents=True)
    removed = await asyncio.to_thread(prune, DAY)
    assert [entry.kind for entry in removed] == ["leftover"]
    assert not leftover.exists()


async def test_constant_pruning_does_not_break_fetches(repository: Repository) -> None:
    async def fetch_and_run(number: int) -> str:
        fetcher = ProjectFetcher(fresh=0)
        project = await fetcher.fetch(str(repository.bare))
        async with fetcher.working_copy(project) as folder:
            return (folder / "MLproject").read_text() + git(folder, "rev-parse", "HEAD")

    fetches = [asyncio.create_task(fetch_and_run(number)) for number in range(8)]
    while not all(task.done() for task in fetches):
        await asyncio.to_thread(prune)
    assert set(await asyncio.gather(*fetches)) == {f"name: project\n{repository.head}"}

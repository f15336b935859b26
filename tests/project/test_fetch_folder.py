"""Projects in folders of the user's own: they are used in place and never written to."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from urllib.parse import quote

import pytest

from components.git_repository import Repository, git, make_repository
from mlfleet._project.fetch import ProjectFetcher
from mlfleet._project.git import ignored_by_git
from mlfleet.errors import FetchError


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return make_repository(tmp_path)


async def test_plain_folder_is_used_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my project#1"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "plain" / "sub").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fetcher = ProjectFetcher()
    plain = tmp_path / "plain"
    for uri, expected in (
        (f"file://{quote(str(folder))}", folder),
        (str(plain), plain),
        ("plain", plain),
        ("./plain/", plain),
        ("~/plain", plain),
        ("plain#sub", plain / "sub"),
        (f"file://{plain}#sub", plain / "sub"),
    ):
        project = await fetcher.fetch(uri)
        assert (project.folder, project.cached, project.commit, project.repo_url) == (expected, False, None, None)
        async with fetcher.working_copy(project) as place:
            assert place == expected
    assert (await fetcher.fetch("plain")).source_name == str(plain)
    assert (await fetcher.fetch("plain#sub")).source_name == f"{plain}#sub"


async def test_folder_in_a_checkout_has_commit_and_origin(repository: Repository) -> None:
    git(repository.work, "remote", "set-url", "origin", "https://me:t0ken@host/team/project.git")
    git(repository.work, "remote", "add", "another", "https://elsewhere/x.git")
    fetcher = ProjectFetcher()
    top, step = await fetcher.fetch(str(repository.work)), await fetcher.fetch(f"{repository.work}#steps")
    assert (top.commit, top.repo_url) == (repository.head, "https://host/team/project.git")
    assert top.source_name == f"file://{repository.work}"
    assert step.source_name == f"file://{repository.work}#steps"
    assert step.commit == repository.head
    assert top.branch is None


async def test_commit_is_the_current_one(repository: Repository) -> None:
    fetcher = ProjectFetcher()
    uri = str(repository.work)
    assert (await fetcher.fetch(uri)).commit == repository.head
    for _ in range(3):
        repository.commit(a__txt="x")
        assert (await fetcher.fetch(uri)).commit == repository.head
    git(repository.work, "switch", "--quiet", "--detach", "HEAD~2")
    assert (await fetcher.fetch(uri)).commit == repository.head
    git(repository.work, "pack-refs", "--all")
    git(repository.work, "switch", "--quiet", "main")
    assert (await fetcher.fetch(uri)).commit == repository.head


async def test_folder_without_commit_and_folder_that_git_ignores(tmp_path: Path, repository: Repository) -> None:
    (tmp_path / "new").mkdir()
    git(tmp_path / "new", "init", "--quiet")
    fetcher = ProjectFetcher()
    assert (await fetcher.fetch(str(tmp_path / "new"))).commit is None
    git(tmp_path / "new", "commit", "--quiet", "--allow-empty", "--message", "first")
    assert (await fetcher.fetch(str(tmp_path / "new"))).commit == git(tmp_path / "new", "rev-parse", "HEAD")
    (repository.work / ".gitignore").write_text("build/\n")
    (repository.work / "build").mkdir()
    assert (await fetcher.fetch(f"{repository.work}#build")).commit is None


async def test_files_that_git_ignores_in_a_folder(tmp_path: Path, repository: Repository) -> None:
    work = repository.work
    (work / ".gitignore").write_text("*.log\nbuild/\n!kept.log\n")
    (work / "steps" / ".gitignore").write_text("/cache\n")
    (work / ".git" / "info" / "exclude").write_text("mine.txt\n")
    for name in ("a.log", "kept.log", "mine.txt", "new.py", "build/x/y", "steps/cache/z", "steps/b.log", "tracked.log"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("x")
    git(work, "add", "--force", "tracked.log")
    expected = {"a.log", "mine.txt", "build", "steps/cache", "steps/b.log"}
    assert await ignored_by_git(work) == expected
    assert await ignored_by_git(work / "steps") == {"cache", "b.log"}
    assert await ignored_by_git(work / "build" / "x") == frozenset()  # all of it is ignored: that says nothing
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / ".gitignore").write_text("*\n")
    assert await ignored_by_git(tmp_path / "plain") == frozenset()


async def test_linked_worktree_is_a_checkout_too(tmp_path: Path, repository: Repository) -> None:
    git(repository.work, "worktree", "add", "--quiet", "--detach", str(tmp_path / "linked"))
    git(tmp_path / "linked", "commit", "--quiet", "--allow-empty", "--message", "there")
    project = await ProjectFetcher().fetch(str(tmp_path / "linked"))
    assert project.commit == git(tmp_path / "linked", "rev-parse", "HEAD") != repository.head


async def test_git_variables_of_a_hook_do_not_mislead(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_repository(tmp_path / "other")
    other.commit(b__txt="other")
    monkeypatch.setenv("GIT_DIR", str(other.work / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other.work / ".git" / "index"))
    project = await ProjectFetcher().fetch(str(repository.work))
    bare = await ProjectFetcher().fetch(str(repository.bare))
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.delenv("GIT_INDEX_FILE")
    assert project.commit == bare.commit == repository.head


async def test_five_hundred_fetches_start_git_a_few_times(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = next(Path(folder) / "git" for folder in os.environ["PATH"].split(":") if (Path(folder) / "git").exists())
    counting = tmp_path / "bin" / "git"
    counting.parent.mkdir()
    counting.write_text(f'#!/bin/sh\necho >> {tmp_path}/calls\nexec {real} "$@"\n')
    counting.chmod(0o755)
    fetcher = ProjectFetcher()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{counting.parent}:{os.environ['PATH']}")
        await asyncio.gather(*[fetcher.fetch(str(repository.work)) for _ in range(250)])
        for _ in range(250):
            await fetcher.fetch(str(repository.work))
    assert len((tmp_path / "calls").read_text().splitlines()) <= 4


async def test_the_users_folder_is_never_written_to(repository: Repository) -> None:
    (repository.work / "untracked").write_text("mine")
    (repository.work / "MLproject").write_text("name: edited\n")

    def look() -> dict[Path, tuple[int, int]]:
        found = {path: path.lstat() for path in (repository.work, *repository.work.rglob("*"))}
        return {path: (each.st_mtime_ns, each.st_ino) for path, each in found.items()}

    before = look()
    fetcher = ProjectFetcher()
    project = await fetcher.fetch(str(repository.work))
    async with fetcher.working_copy(project):
        pass
    with pytest.raises(FetchError, match=r"used only|only for a Git repository: the folder is run as it is"):
        await fetcher.fetch(str(repository.work), "main")
    committed = await fetcher.fetch(f"file://{repository.work}/.git", "main")
    assert (committed.folder / "MLproject").read_text() == "name: project\n"
    assert committed.folder.name == "project-work"
    assert look() == before


async def test_version_needs_a_repository(tmp_path: Path, repository: Repository) -> None:
    (tmp_path / "plain").mkdir()
    for uri in (str(tmp_path / "plain"), f"file://{tmp_path}/plain"):
        with pytest.raises(FetchError, match="only for a Git repository, and this is a folder or a zip"):
            await ProjectFetcher().fetch(uri, "main")
    with pytest.raises(FetchError, match=rf"give file://{repository.work}/\.git"):
        await ProjectFetcher().fetch(f"file://{repository.work}", "main")


async def test_missing_paths_and_files_are_refused_as_folders(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    (tmp_path / "plain" / "here").mkdir(parents=True)
    for uri, message in (
        (str(tmp_path / "nowhere"), "there is no folder, zip or Git repository"),
        (str(tmp_path / "nowhere.zip"), "there is no folder, zip or Git repository"),
        (f"file://{tmp_path}/nowhere", "there is no folder, zip or Git repository"),
        (str(tmp_path / "train.py"), "is a file: a project is a folder"),
        (str(tmp_path / "train.py" / "x"), "cannot be looked at"),
        (str(tmp_path / ("x" * 300)), "cannot be looked at"),
        (f"{tmp_path}/plain#there", "no sub-folder 'there' in .*it has here"),
        ("~nobody-of-that-name/x", "there is no folder"),
    ):
        with pytest.raises(FetchError, match=message):
            await ProjectFetcher().fetch(uri)

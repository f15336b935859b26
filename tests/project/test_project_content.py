"""The content of a project: what counts, what is left out, and the tar."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from mlfleet._project.content import content_hash, pack, read_ignore
from mlfleet.errors import FetchError, SpecError


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "a.py").write_text("a")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "link").symlink_to("src/a.py")
    (folder / "empty").mkdir()
    return folder


async def names(folder: Path, prefix: str = "") -> dict[str, tarfile.TarInfo]:
    packed = await pack(folder, prefix=prefix)
    with packed.file, tarfile.open(fileobj=packed.file) as archive:
        return {member.name: member for member in archive.getmembers()}


async def test_the_tar_keeps_modes_and_links(project: Path) -> None:
    members = await names(project, "project/")
    assert list(members) == [
        "project", "project/empty", "project/link", "project/run.sh", "project/src", "project/src/a.py",
    ]  # fmt: skip
    assert members["project/run.sh"].mode == 0o755
    assert (members["project/link"].issym(), members["project/link"].linkname) == (True, "src/a.py")


async def test_an_exception_restores_excluded_files(project: Path) -> None:
    left_out = frozenset({"src", "run.sh"})
    (project / ".dockerignore").write_text("!src/a.py\n")
    packed = await pack(project, left_out=left_out)
    with packed.file, tarfile.open(fileobj=packed.file) as archive:
        assert archive.getnames() == [".dockerignore", "empty", "link", "src/a.py"]
    assert packed.digest == await content_hash(project, left_out=left_out) != await content_hash(project)


async def test_the_same_content_has_the_same_hash_and_tar(project: Path, tmp_path: Path) -> None:
    before, first = await content_hash(project), await pack(project)
    for path in project.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    again = await pack(project)
    with first.file, again.file:
        assert before == first.digest == again.digest
        assert first.file.read() == again.file.read()


async def test_every_change_of_content_changes_the_hash(project: Path) -> None:
    seen = [await content_hash(project)]

    async def changed() -> None:
        now = await content_hash(project)
        assert now not in seen
        seen.append(now)

    (project / "src" / "a.py").write_text("b")
    await changed()
    (project / "run.sh").chmod(0o700)
    await changed()
    (project / "link").unlink()
    (project / "link").symlink_to("run.sh")
    await changed()
    (project / "empty").rmdir()
    await changed()
    (project / "src" / "a.py").rename(project / "src" / "b.py")
    await changed()


async def test_files_that_runs_leave_behind_do_not_change_the_hash(project: Path) -> None:
    before = await content_hash(project)
    for name in ("mlruns/0", ".git/objects", "src/__pycache__"):
        (project / name).mkdir(parents=True)
        (project / name / "x").write_text("x")
    (project / "mlflow.db").write_text("x")
    assert await content_hash(project) == before
    (project / ".dockerignore").write_text("!mlruns\n")
    assert "mlruns/0/x" in await names(project)


async def test_dockerignore(project: Path) -> None:
    (project / "data" / "keep").mkdir(parents=True)
    for name in ("data/big.bin", "data/keep/small.bin", "secrets.env", "src/note.tmp", "tmp"):
        (project / name).write_text("x")
    (project / ".dockerignore").write_text("# what stays here\n/data\n!data/keep\n*.env\n**/*.tmp\n")
    assert [name for name in await names(project) if name not in ("empty", "link", "run.sh")] == [
        ".dockerignore", "data/keep", "data/keep/small.bin", "src", "src/a.py", "tmp",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "path", "ignored"),
    [
        ("*.py", "a.py", True),
        ("*.py", "src/a.py", False),
        ("**/*.py", "src/deep/a.py", True),
        ("**/*.py", "a.py", True),
        ("src/", "src/deep/a.py", True),
        ("/src", "src", True),
        ("src", "deep/src", False),
        ("?.txt", "ab.txt", False),
        ("[ab].txt", "b.txt", True),
        ("docs/**", "docs/a/b", True),
        (r"\!odd", "!odd", True),
        ("./a/../b", "b", True),
        ("a*b", "a/b", False),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, path: str, ignored: bool) -> None:
    (tmp_path / ".dockerignore").write_text(pattern)
    assert read_ignore(tmp_path)(path) is ignored


async def test_mistakes_are_reported(project: Path) -> None:
    (project / ".dockerignore").write_text("fine\n[a-\n")
    with pytest.raises(SpecError, match=r"\.dockerignore, line 2: '\[a-' is not a pattern"):
        await content_hash(project)
    (project / ".dockerignore").unlink()
    os.mkfifo(project / "pipe")
    assert "pipe" not in await names(project)  # and nobody waits for a writer
    if os.getuid() != 0:
        (project / "run.sh").chmod(0)
        with pytest.raises(FetchError, match=r"run\.sh cannot be read"):
            await pack(project)

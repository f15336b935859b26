"""Real Git repositories, made by git."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path


def git(folder: Path, *args: str) -> str:
    """Run git in `folder` as a developer, and return its output."""
    who = {f"GIT_{role}_{what}": value for role in ("AUTHOR", "COMMITTER") for what, value in _WHO.items()}
    done = subprocess.run(
        ["git", "-c", "protocol.file.allow=always", *args],
        cwd=folder,
        env=os.environ | who,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


_WHO = {"NAME": "A Developer", "EMAIL": "developer@example.org"}


@dataclass(frozen=True)
class Repository:
    """A developer's working tree and the bare repository that is pushed to."""

    work: Path
    bare: Path

    def commit(self, **files: str) -> str:
        """Commit files (``__`` in a name is a dot), push all, and give the commit's hash."""
        for name, text in files.items():
            (self.work / name.replace("__", ".")).write_text(text)
        git(self.work, "add", "--all")
        git(self.work, "commit", "--quiet", "--allow-empty", "--message", "work")
        self.push()
        return self.head

    @property
    def head(self) -> str:
        return git(self.work, "rev-parse", "HEAD")

    def push(self) -> None:
        git(self.work, "push", "--quiet", "--force", "--all", "origin")
        git(self.work, "push", "--quiet", "--force", "--tags", "origin")


def make_repository(folder: Path, name: str = "project") -> Repository:
    """A repository with one commit on ``main``: MLproject, a folder ``steps`` and an executable script."""
    bare, work = folder / f"{name}.git", folder / f"{name}-work"
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "--quiet", "--bare", "--initial-branch=main", str(bare))
    git(folder, "init", "--quiet", "--initial-branch=main", str(work))
    git(work, "remote", "add", "origin", str(bare))
    (work / "steps").mkdir()
    (work / "steps" / "train.py").write_text("print('step')\n")
    script = work / "run.sh"
    script.write_text("echo run\n")
    script.chmod(0o755)
    (work / "link").symlink_to("steps/train.py")
    repository = Repository(work, bare)
    repository.commit(MLproject=f"name: {name}\n")
    return repository

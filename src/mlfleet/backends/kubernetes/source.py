"""Where the Git host has the project: for containers that clone it themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlfleet._process.process import run_process
from mlfleet._project.git import Checkouts, clean_environ
from mlfleet._text.masking import mask_uri
from mlfleet.errors import SubmitError

__all__ = ["GitSource", "git_source"]


@dataclass(frozen=True, slots=True)
class GitSource:
    """A folder of a repository at a commit.

    Attributes:
        url: of the repository, without credentials.
        commit: in full.
        inside: the folder; ``.`` for the top.
    """

    url: str
    commit: str
    inside: str


async def git_source(checkouts: Checkouts, folder: Path) -> GitSource:
    """Where a pod can clone a project from.

    Args:
        checkouts: remembers the commits of folders.
        folder: of the project.

    Raises:
        SubmitError: it is in no repository with a remote, or differs from its commit.
    """
    found = await checkouts.find(folder)
    if found is None or found.commit is None or found.repo_url is None:
        lacks = "in no Git repository" if found is None or found.commit is None else "in a repository without a remote"
        text = f"code-delivery is 'git', and the project is {lacks}: give a Git URI, or code-delivery: 'configmap'"
        raise SubmitError(text, backend="kubernetes")
    url = found.repo_url
    if url.startswith(("/", ".", "file:")):
        raise SubmitError(
            f"code-delivery is 'git', and the repository {mask_uri(url)} is on this machine, where no pod reaches it",
            backend="kubernetes",
        )
    changed = await run_process(
        ["git", "-c", "core.fsmonitor=false", "status", "--porcelain", "--", "."], cwd=folder, env=clean_environ()
    )
    if changed.returncode or changed.stdout.strip():
        names = changed.stdout.decode(errors="replace").split("\n")[:3]
        raise SubmitError(
            "code-delivery is 'git', and the project differs from its commit "
            f"{found.commit[:12]} ({', '.join(name.strip() for name in names if name)}): commit and push it, or use"
            " code-delivery: 'configmap' or 'image'",
            backend="kubernetes",
        )
    return GitSource(url, found.commit, found.inside)

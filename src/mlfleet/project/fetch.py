"""From a URI to a folder on this machine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Project", "ProjectFetcher"]


@dataclass(frozen=True, slots=True)
class Project:
    """A project that is there.

    Attributes:
        uri: as the caller gave it, without quotes and credentials.
        folder: of the project (the ``#subdir`` if one was given): the user's own, or a pristine one in the cache.
        cached: whether `folder` is in the cache, so that a run needs a `working_copy`.
        source_name: for the tag ``mlflow.source.name``: the URI, or ``<repository URL>#<path>`` for a folder inside a
            Git checkout.
        commit: full hash, if it is (in) a Git repository.
        repo_url: of its repository, without credentials, if there is one.
        branch: if `version` named a branch.
    """

    uri: str
    folder: Path
    cached: bool
    source_name: str
    commit: str | None = None
    repo_url: str | None = None
    branch: str | None = None


class ProjectFetcher:
    """Fetches projects into the cache; one instance serves any number of callers of one event loop."""

    def __init__(self, cache: Path | None = None) -> None:
        raise NotImplementedError

    async def fetch(
        self, uri: str, version: str | None = None, *, on_progress: Callable[[str], None] | None = None
    ) -> Project:
        """The project that `uri` and `version` name. One fetch for all callers that ask for the same at the same time.

        Raises:
            FetchError: it cannot be fetched, or is refused; the text says why and what to do.
        """
        raise NotImplementedError

    def working_copy(self, project: Project) -> AbstractAsyncContextManager[Path]:
        """The folder for one run to work in, a private one if the project is cached; it is removed at the end."""
        raise NotImplementedError

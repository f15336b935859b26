"""``.dockerignore``: what of a project does not go along when it is packed.

https://docs.docker.com/build/concepts/context/#dockerignore-files, as the matching code of the docker command reads it
(https://github.com/moby/patternmatcher).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from mlfleet.errors import SpecError

__all__ = ["DEFAULTS", "FILE_NAME", "Ignore", "read_ignore"]

FILE_NAME = ".dockerignore"
DEFAULTS = (
    ".git",
    "**/__pycache__",
    # Where MLflow keeps runs if nobody says otherwise: it would be other content after every run.
    "mlruns",
    "mlartifacts",
    "mlflow.db",
    "mlflow.db-journal",
    "mlflow.db-shm",
    "mlflow.db-wal",
)
_LARGEST = 2**20


@dataclass(frozen=True, slots=True)
class _Pattern:
    expression: re.Pattern[str]
    exception: bool


class Ignore:
    """Patterns, of which the last that matches a path, or a folder above it, decides.

    Args:
        lines: of a ``.dockerignore``; ``!`` begins an exception.
        left_out: files and folders that are left out unless an exception takes them back.
    """

    def __init__(self, lines: Iterable[str], left_out: Collection[str] = frozenset()) -> None:
        self._left_out = left_out
        self._patterns = [pattern for line in lines if (pattern := _pattern(line)) is not None]
        self._has_exceptions = any(pattern.exception for pattern in self._patterns)

    def __call__(self, path: str) -> bool:
        """Whether the file or folder `path` (relative, with ``/``) is left out."""
        parts = path.split("/")
        prefixes = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        ignored = any(prefix in self._left_out for prefix in prefixes)
        for pattern in self._patterns:
            if pattern.exception == ignored and any(pattern.expression.fullmatch(prefix) for prefix in prefixes):
                ignored = not pattern.exception
        return ignored

    def prunes(self, folder: str) -> bool:
        """Whether nothing below `folder` can be wanted."""
        return not self._has_exceptions and self(folder)


def read_ignore(folder: Path, left_out: Collection[str] = frozenset()) -> Ignore:
    """The patterns for a project: the defaults, then its ``.dockerignore``, which may take them back. Blocking.

    Args:
        folder: of the project.
        left_out: see `Ignore`.

    Raises:
        SpecError: the file cannot be read, or a pattern is none.
    """
    path = folder / FILE_NAME
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST).decode("utf-8-sig")
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise SpecError(f"it cannot be read: {reason}", path=path) from error
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            _pattern(line)
        except re.error as error:
            raise SpecError(f"{line!r} is no pattern: {error}", path=path, line=number) from error
    return Ignore([*DEFAULTS, *lines], left_out)


def _pattern(line: str) -> _Pattern | None:
    if line.startswith("#"):
        return None
    text = line.strip()
    exception = text.startswith("!")
    text = text[1:].strip() if exception else text
    if not text:
        return None
    text = posixpath.normpath(text).lstrip("/")
    if text in ("", "."):
        return None
    return _Pattern(re.compile(_expression(text), re.S), exception)


def _expression(text: str) -> str:
    made: list[str] = []
    at = 0
    while at < len(text):
        if text.startswith("**/", at):
            made.append("(?:.*/)?")
            at += 3
        elif text.startswith("**", at):
            made.append(".*")
            at += 2
        elif text[at] == "*":
            made.append("[^/]*")
            at += 1
        elif text[at] == "?":
            made.append("[^/]")
            at += 1
        elif text[at] == "[":
            end = text.find("]", at + 2)
            if end < 0:
                raise re.error("a bracket is not closed")
            inside = text[at + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            made.append(f"[{inside}]")
            at = end + 1
        elif text[at] == "\\" and at + 1 < len(text):
            made.append(re.escape(text[at + 1]))
            at += 2
        else:
            made.append(re.escape(text[at]))
            at += 1
    return "".join(made)

"""Where a command in Databricks finds what its ``path`` parameters name. Pure, but for a look whether files exist."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["PROJECT", "ROOT", "downloads", "files_of_project", "place"]

ROOT = "/.mlfleet-run"
"""Stands in commands for the folder of the run, whose name the bootstrap script alone knows."""

PROJECT = "project"
"""The folder of the project, in that of the run."""

_THERE = ("/Volumes/", "/Workspace/", "/dbfs/")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


def place(path: str, index: int, folder: Path) -> str | None:
    """See `mlfleet.backends.base.Backend.place`."""
    if path.startswith("dbfs:/Volumes/"):
        return path.removeprefix("dbfs:")
    if path.startswith(_THERE):
        return path
    if not path.startswith("/"):
        return f"{ROOT}/param_{index}/{_name(path)}"
    if not Path(path).exists():
        return None
    if Path(path).is_relative_to(folder):
        return posixpath.normpath(posixpath.join(ROOT, PROJECT, str(Path(path).relative_to(folder))))
    raise ValueError(
        f"{path!r} is on this machine, where Databricks cannot read it: put it into the project or a volume"
        " (/Volumes/…), or give a URI such as s3://… that can be read there"
    )


def downloads(placed: Mapping[str, str]) -> dict[str, str]:
    """What the run must download: place below its folder → URI."""
    start = f"{ROOT}/param_"
    return {there.removeprefix(f"{ROOT}/"): uri for there, uri in placed.items() if there.startswith(start)}


def files_of_project(placed: Iterable[str]) -> tuple[str, ...]:
    """Which of its own files a project is to read, relative to its folder."""
    start = f"{ROOT}/{PROJECT}/"
    return tuple(there.removeprefix(start) for there in placed if there.startswith(start))


def _name(uri: str) -> str:
    """The file's own name, for the sake of its ending; without what a shell could mistake."""
    name = posixpath.basename(unquote(urlsplit(uri).path).rstrip("/"))
    return _UNSAFE.sub("_", name).lstrip(".") or "data"

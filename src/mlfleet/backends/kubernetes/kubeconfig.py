"""The kubeconfig, as kubectl reads it: several files merged, and each path in them from the folder of its file.

Read here rather than by a client library: with that come a thousand modules of models that nobody needs, which take a
second to import, and which Python's garbage collector walks for as long as the process lives.

https://kubernetes.io/docs/concepts/configuration/organize-cluster-access-kubeconfig/
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mlfleet.errors import BackendError

__all__ = ["Entry", "Kubeconfig", "kubeconfig_files", "read_kubeconfig"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A cluster, a user or a context.

    Attributes:
        value: what the file says of it.
        folder: of that file.
    """

    value: Mapping[str, Any] = field(default_factory=dict, repr=False)
    folder: Path = Path()

    def content(self, key: str) -> bytes | None:
        """A certificate or a key, which is within the kubeconfig (``<key>-data``) or in a file; None if it is neither.

        Raises:
            OSError: the file cannot be read.
        """
        if inline := self.value.get(f"{key}-data"):
            return base64.b64decode(inline)
        given = self.value.get(key)
        return (self.folder / given).read_bytes() if given else None


@dataclass(frozen=True, slots=True)
class Kubeconfig:
    """All files together.

    Attributes:
        contexts: by their names.
        clusters: likewise.
        users: likewise.
        current: the name of the current context; empty if there is none.
    """

    contexts: Mapping[str, Entry] = field(default_factory=dict)
    clusters: Mapping[str, Entry] = field(default_factory=dict)
    users: Mapping[str, Entry] = field(default_factory=dict)
    current: str = ""

    def of_context(self, name: str) -> tuple[Entry, Entry]:
        """The cluster and the user of a context; a user without anything if it names none.

        Raises:
            BackendError: there is no such context or cluster.
        """
        context = _entry(self.contexts, "context", name).value
        cluster = _entry(self.clusters, "cluster", str(context.get("cluster") or ""))
        return cluster, self.users.get(str(context.get("user") or ""), Entry())


def _entry(entries: Mapping[str, Entry], kind: str, name: str) -> Entry:
    try:
        return entries[name]
    except KeyError:
        raise BackendError(f"the kubeconfig has no {kind} {name!r}", backend="kubernetes") from None


def kubeconfig_files(paths: str) -> list[Path]:
    """The files that exist, of those in ``KUBECONFIG``. Blocking."""
    files = [Path(path).expanduser() for path in paths.split(os.pathsep) if path]
    return [file for file in files if file.exists()]


def read_kubeconfig(paths: str) -> Kubeconfig:
    """The files of a kubeconfig merged: of entries with the same name the first counts. Blocking.

    Args:
        paths: as in ``KUBECONFIG``; those that do not exist are passed over.

    Raises:
        BackendError: a file cannot be read.
    """
    kinds: dict[str, dict[str, Entry]] = {"context": {}, "cluster": {}, "user": {}}
    current = ""
    for path in kubeconfig_files(paths):
        try:
            with path.open("rb") as file:
                config = yaml.safe_load(file) or {}
            for kind, known in kinds.items():
                for each in config.get(f"{kind}s") or ():
                    known.setdefault(str(each["name"]), Entry(dict(each.get(kind) or {}), path.absolute().parent))
            current = current or str(config.get("current-context") or "")
        except Exception as error:
            # Whatever a damaged file makes the parser, or us, stumble over.
            text = f"the kubeconfig {path} cannot be read: {type(error).__name__}: {error}"
            raise BackendError(text, backend="kubernetes") from error
    return Kubeconfig(kinds["context"], kinds["cluster"], kinds["user"], current)

"""Named sweeps of this machine: each has a note beside its lock, from its beginning until it has ended."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlfleet._paths import sweeps_folder
from mlfleet._store.lease import unleased
from mlfleet._text.masking import mask_uri
from mlfleet.tracking.base import RunInfo, Tracking

__all__ = ["SweepEntry", "forget", "list_sweeps", "lock_path", "write_note"]


@dataclass(frozen=True, slots=True)
class SweepEntry:
    """A sweep that has not ended.

    Attributes:
        run_id: of its MLflow run.
        name: that it was given.
        project: its URI.
        tracking: where its runs are.
        began: when it was begun, or gone on with.
        driven: whether a process drives it now; if not, that was killed, and the sweep can be resumed.
    """

    run_id: str
    name: str
    project: str
    tracking: str
    began: datetime
    driven: bool


def lock_path(tracking: Tracking, experiment_id: str, name: str) -> Path:
    """What the process that drives a sweep holds."""
    digest = hashlib.sha256(json.dumps([tracking.uri, experiment_id, name]).encode()).hexdigest()[:32]
    return sweeps_folder() / f"{digest}.lock"


def write_note(lock: Path, tracking: Tracking, info: RunInfo, name: str, project: str) -> None:
    """Note a sweep whose lock is held. Blocking."""
    facts = {"run_id": info.run_id, "name": name, "project": mask_uri(project), "tracking": mask_uri(tracking.uri)}
    unfinished = lock.with_suffix(".new")
    unfinished.write_text(json.dumps(facts), encoding="utf-8")
    unfinished.replace(lock.with_suffix(".json"))


def forget(lock: Path) -> None:
    """Remove the note of a sweep that has ended. Blocking."""
    with suppress(OSError):
        lock.with_suffix(".json").unlink()


def list_sweeps() -> list[SweepEntry]:
    """All of them, the newest first. Blocking."""
    found = []
    for note in sweeps_folder().glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError), unleased(note.with_suffix(".lock")) as free:
            facts: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
            began = datetime.fromtimestamp(note.stat().st_mtime, UTC)
            named = {key: str(facts[key]) for key in ("run_id", "name", "project", "tracking")}
            found.append(SweepEntry(**named, began=began, driven=not free))
    return sorted(found, key=lambda entry: entry.began, reverse=True)

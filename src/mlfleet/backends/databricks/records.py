"""Records of the runs that this machine submitted, by which `mlfleet prune` finds what killed processes left.

A record is written before anything of a run exists elsewhere, and removed when the end of the run was seen: there are
records only of active runs, and of those whose process died.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlfleet._paths import run_folder, runs_folder
from mlfleet._run_log import get_logger
from mlfleet._store.content_store import read_facts, write_facts
from mlfleet.errors import SpecError
from mlfleet.runs import JobRef

__all__ = ["Record", "change_owner", "read_records", "remove_record", "write_record"]

_log = get_logger("mlfleet.databricks")
_NAME = "databricks.json"


@dataclass(frozen=True, slots=True)
class Record:
    """The record of a run.

    Attributes:
        reference: The reference to the run.
        number: The run's id in Databricks; empty: it was not known yet.
    """

    reference: JobRef
    number: str = ""


def write_record(record: Record) -> None:
    """Write a record, in place of an earlier one of the same MLflow run. A failure is only logged. Blocking."""
    path = run_folder(record.reference.run_id) / _NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_facts(path, {"ref": record.reference.to_json(), "number": record.number})
    except OSError as error:
        _log.warning("'mlfleet prune' will not know the run %s: %s: %s", path.parent.name, path, error.strerror)


def change_owner(run_id: str, owner: Mapping[str, Any]) -> None:
    """Note in the record of a run, if there is one, that another process looks after it now. Blocking."""
    record = _read(run_folder(run_id) / _NAME)
    if record is not None:
        data = {**record.reference.data, "owner": owner}
        write_record(replace(record, reference=replace(record.reference, data=data)))


def remove_record(run_id: str) -> None:
    """Remove the record of a run, if there is one. Blocking."""
    try:
        (run_folder(run_id) / _NAME).unlink(missing_ok=True)
    except OSError as error:
        _log.warning("the record of the run %s cannot be removed: %s", run_id, error.strerror)


def read_records() -> list[Record]:
    """Return all records, without damaged ones. Blocking."""
    found = (_read(path) for path in sorted(runs_folder().glob(f"*/{_NAME}")))
    return [record for record in found if record is not None]


def _read(path: Path) -> Record | None:
    facts = read_facts(path)
    if facts is None:
        return None
    try:
        record = Record(JobRef.from_json(facts["ref"]), str(facts["number"]))
    except (LookupError, SpecError):
        return None
    return record if record.reference.run_id == path.parent.name else None

"""The runs on this machine that go on, whoever started them."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from mlfleet._paths import runs_folder
from mlfleet._process.reattach import CAN_ADOPT, start_time
from mlfleet.backends.base import ListedRun

__all__ = ["list_local"]


def list_local() -> list[ListedRun]:
    """Return all of them, the newest first. Blocking.

    Only runs that outlive their process are known: those of sweeps with a name.
    """
    if not CAN_ADOPT:
        return []
    found = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for folder in runs_folder().iterdir():
            with suppress(OSError, ValueError, IndexError):
                found += _entry(folder)
    return sorted(found, key=lambda entry: entry.created, reverse=True)


def _entry(folder: Path) -> list[ListedRun]:
    if (folder / "exit-code").exists():
        return []
    claim = folder / "process"
    stat = claim.read_text()
    pid = int(stat.split()[0])
    now = Path(f"/proc/{pid}/stat").read_text()
    if start_time(now) != start_time(stat) or _field(now, 0) == "Z":
        return []
    # A process whose parent has died gets another one: init, if nobody else asked for orphans.
    return [
        ListedRun(
            run_id=folder.name,
            backend="local",
            state="running",
            detail={"pid": pid},
            created=datetime.fromtimestamp(claim.stat().st_mtime, UTC),
            supervised=_field(now, 1) == _field(stat, 1) != "1",
            output=folder / "output.log",
        )
    ]


def _field(stat: str, number: int) -> str:
    """Of proc_pid_stat(5), counted from the state, which follows the name in brackets."""
    return stat[stat.rindex(")") + 2 :].split()[number]

"""Listing and pruning the captured output of runs."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mlfleet._paths import runs_folder
from mlfleet._store.outputs import list_outputs, prune_outputs

DAY = timedelta(days=1)


def make_old(path: Path) -> None:
    then = (datetime.now(UTC) - 10 * DAY).timestamp()
    os.utime(path, (then, then))


def test_output_of_old_runs_is_pruned_and_that_of_running_ones_kept() -> None:
    assert list_outputs() == prune_outputs() == []
    for name in ("old", "new", "running"):
        folder = runs_folder() / name
        folder.mkdir(parents=True)
        (folder / "output.log").write_text(name)
        if name != "new":
            make_old(folder / "output.log")
            make_old(folder)
    running = subprocess.Popen(
        ["flock", "--shared", str(runs_folder() / "running" / "output.log"), "sh", "-c", "echo held; cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert running.stdout is not None
    running.stdout.readline()
    assert {entry.uri for entry in list_outputs()} == {"old", "new", "running"}
    assert [entry.uri for entry in prune_outputs(DAY)] == ["old"]
    assert [entry.uri for entry in prune_outputs()] == ["new"]
    running.communicate()
    assert [entry.uri for entry in prune_outputs()] == ["running"]

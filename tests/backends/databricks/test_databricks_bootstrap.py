"""The bootstrap script, run as Databricks runs it, in a folder of this machine."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from mlfleet.backends.databricks import bootstrap


def run_script(folder: Path, command: str, **fields: Any) -> int:
    """Run the script with an archive in `folder`, whose output goes to ``folder/output/run``; return its exit code."""
    archive = folder / "project.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        entry = tarfile.TarInfo("data.txt")
        entry.size = 5
        file.addfile(entry, io.BytesIO(b"data\n"))
    spec = {
        "run": "r",
        "archive": str(archive),
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "root": "/.mlfleet-run",
        "name": "project",
        "mode": "command",
        "command": command,
        "environ": {},
        "output": str(folder / "output" / "run"),
        "grace": 1,
        **fields,
    }
    (folder / "arguments").mkdir(exist_ok=True)
    argument = folder / "arguments" / "this.json"
    argument.write_text(json.dumps(spec))
    environ = {"PATH": os.environ["PATH"], "TMPDIR": str(folder)}
    words = [sys.executable, bootstrap.__file__, json.dumps({"spec": str(argument)})]
    return subprocess.run(words, env=environ, stdout=subprocess.PIPE).returncode


def content_of(folder: Path, name: str) -> bytes:
    return (folder / "output" / "run" / name).read_bytes().partition(b"\n")[2]


def test_the_output_of_a_repeated_task_follows_that_of_its_first_attempt(tmp_path: Path) -> None:
    assert run_script(tmp_path, "echo first; exit 3") == 3
    assert run_script(tmp_path, "cat data.txt") == 0
    assert [content_of(tmp_path, name) for name in ("000000", "000001")] == [b"first\n", b"data\n"]
    assert json.loads(content_of(tmp_path, "end")) == {"exit_code": 0, "parts": 2, "stopped": False}


def test_output_and_arguments_of_old_runs_are_removed(tmp_path: Path) -> None:
    month_ago = time.time() - 30 * 86400
    for name in ("arguments/old.json", "output/old/000000", "arguments/young.json", "output/young/000000"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        if "old" in name:
            os.utime(path, (month_ago, month_ago))
    os.utime(tmp_path / "output" / "old", (month_ago, month_ago))
    assert run_script(tmp_path, "true") == 0
    assert {path.name for path in (tmp_path / "arguments").iterdir()} == {"this.json", "young.json"}
    assert {path.name for path in (tmp_path / "output").iterdir()} == {"run", "young"}


def test_a_repeated_task_that_does_not_come_to_its_command_records_no_end(tmp_path: Path) -> None:
    assert run_script(tmp_path, "exit 3") == 3
    assert run_script(tmp_path, "true", sha256="another") == 1
    assert not (tmp_path / "output" / "run" / "end").exists()

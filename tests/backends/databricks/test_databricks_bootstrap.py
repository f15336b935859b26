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
    argument = folder / "output" / "run" / "argument.json"
    argument.parent.mkdir(parents=True, exist_ok=True)
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
    for name in ("old", "young", "run"):
        folder = tmp_path / "output" / name
        folder.mkdir(parents=True)
        for file in ("argument.json", "000000"):
            (folder / file).write_text("x")
        if name != "young":
            os.utime(folder, (month_ago, month_ago))
    assert run_script(tmp_path, "true") == 0
    assert {path.name for path in (tmp_path / "output").iterdir()} == {"run", "young"}
    assert {path.name for path in (tmp_path / "output" / "run").iterdir()} == {"argument.json", "000000", "end"}


def test_a_repeated_task_that_does_not_come_to_its_command_records_no_end(tmp_path: Path) -> None:
    assert run_script(tmp_path, "exit 3") == 3
    assert run_script(tmp_path, "true", sha256="another") == 1
    assert not (tmp_path / "output" / "run" / "end").exists()

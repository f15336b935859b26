"""Small projects for tests, written to a given folder."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["pid_is_gone", "write_metric_logger", "write_project"]


def write_project(folder: Path, command: str, *, parameters: str = "", extra: str = "") -> str:
    """Write an MLproject with one entry point that needs no environment of its own.

    Args:
        folder: The folder to create.
        command: The command of the entry point ``main``, for bash.
        parameters: YAML for the inside of ``parameters:``, as in ``alpha: float``.
        extra: More top-level YAML.

    Returns:
        The project's URI.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"name: {folder.name}", "entry_points:", "  main:"]
    if parameters:
        lines += ["    parameters:"] + [f"      {line}" for line in parameters.splitlines()]
    lines += ["    command: |"] + [f"      {line}" for line in command.splitlines()]
    (folder / "MLproject").write_text("\n".join(lines) + "\n" + extra)
    return str(folder)


def pid_is_gone(pid: int) -> bool:
    """Return True if no process with that id runs any more; a zombie does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def write_metric_logger(folder: Path) -> str:
    """Write ``metric.py`` into a project: ``python metric.py NAME VALUE`` logs a metric of its run, without mlflow.

    Returns:
        The command, without its arguments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metric.py").write_text(_METRIC)
    return f"{sys.executable} metric.py"


_METRIC = """\
import json, os, sys, time, urllib.request

body = {"run_id": os.environ["MLFLOW_RUN_ID"], "key": sys.argv[1], "value": float(sys.argv[2])}
body["timestamp"] = int(time.time() * 1000)
request = urllib.request.Request(
    os.environ["MLFLOW_TRACKING_URI"] + "/api/2.0/mlflow/runs/log-metric",
    json.dumps(body).encode(),
    {"Content-Type": "application/json"},
)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
opener.open(request).read()
"""

"""The figures that the benchmarks measure, their limits, and the one form in which every script prints and saves them.

Besides: what several scripts measure with.

A script names what it measures as `LIMITS` does; other figures of its own are printed and saved without a limit::

    parser = argparse.ArgumentParser(...)
    add_options(parser, rounds=5)
    options = parser.parse_args()
    ...
    report("startup", {"import mlfleet / import mlflow.projects": 0.12}, options)

``--json PATH`` writes the figures to a file, of which ``table.py`` makes the table in README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["LIMITS", "add_options", "percentile", "report", "resident", "start_bare"]

# The figure, and what it may be at most. The names are the keys of the result files: give them as they are here.
LIMITS: Mapping[str, float] = {
    # fleet.py
    "500 no-op runs in memory, wall time / bare processes": 1.5,
    "ticker p99 while 500 runs start, ms": 5,
    "longest stall while 500 runs start, ms": 50,
    "driver memory per run in flight, KiB": 100,
    # fleet.py --server
    "driver CPU per run with a server / bare httpx": 1.2,
    "requests to tracking per run": 4,
    # embedded.py
    "embedded store, time per run / bare mlflow client": 1.2,
    # kubernetes_backend.py
    "Kubernetes: watches": 2,
    "Kubernetes: requests per run": 3,
    "Kubernetes: requests per run with a Secret": 5,
    # databricks_backend.py
    "Databricks: polling rounds a minute": 60,
    # slurm_backend.py
    "Slurm: 300 runs, time until all are done / bare sbatch": 1.3,
    "Slurm: sbatch calls for 300 runs": 300,
    "Slurm: sbatch calls at the same time": 4,
    "Slurm: sbatch calls for 300 runs in arrays": 2,
    "Slurm: squeue calls at the same time": 1,
    "Slurm: executions of a run whose submit was unclear, at most": 1,
    "Slurm: runs judged wrongly after Slurm has forgotten them": 0,
    # slurm_backend.py --silence 600
    "Slurm: runs that failed while the controller did not answer for 600 s": 0,
    # startup.py
    "import mlfleet / import mlflow.projects": 0.15,
}


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """Add the options that every script has: ``--rounds`` and ``--json``.

    Args:
        parser: The parser of the script.
        rounds: The default of ``--rounds``.
    """
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"measurements of each figure, alternating (default: {rounds})"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")


def report(name: str, figures: Mapping[str, float], options: argparse.Namespace) -> None:
    """Print the figures beside their limits, and write them to the file that ``--json`` names.

    Args:
        name: The script and its mode, as "fleet" or "fleet --server".
        figures: The figures of one call of the script, with the unit in their name.
        options: The parsed command-line options; see `add_options`.
    """
    result: dict[str, Any] = {
        "name": name,
        "figures": {figure: {"value": value, "limit": LIMITS.get(figure)} for figure, value in figures.items()},
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "rounds": options.rounds,
    }
    width = max(map(len, figures))
    print()
    for figure, each in result["figures"].items():
        limit = "" if each["limit"] is None else f"  at most {each['limit']:g}"
        print(f"{figure:<{width}}  {each['value']:>10.4g}{limit}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


async def start_bare(command: str, folder: Path) -> None:
    """Run a command of bash as plain asyncio does it, and wait for its end."""
    process = await asyncio.create_subprocess_exec("bash", "-c", command, cwd=folder, stdin=asyncio.subprocess.DEVNULL)
    if await process.wait() != 0:
        raise SystemExit("a bare process failed")


def resident() -> int:
    """Return the resident memory of this process in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def percentile(values: list[float], share: float) -> float:
    """Return the value below which that share of the values lies."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]

"""How long it takes to import mlfleet and to start its command line, as shares of the reference's.

Compares ``import mlfleet`` with ``import mlflow.projects``, and ``mlfleet --help`` with ``mlflow run --help``. Each is
a process of its own; they take turns, so that what else the machine does slows all of them alike. The time of an empty
Python process is measured as well: no program written in Python can be below it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import mlfleet": [sys.executable, "-c", "import mlfleet"],
    "import mlflow.projects": [sys.executable, "-c", "import mlflow.projects"],
    "mlfleet --help": [sys.executable, "-m", "mlfleet", "--help"],
    "mlflow run --help": [sys.executable, "-m", "mlflow", "run", "--help"],
}
RATIOS = (
    ("import mlfleet", "import mlflow.projects", 0.15),
    ("mlfleet --help", "mlflow run --help", 0.10),
)


def measure(argv: list[str]) -> float:
    """Wall seconds of one process."""
    start = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def figures(repeat: int) -> dict[str, object]:
    times: dict[str, list[float]] = {label: [] for label in COMMANDS}
    for round_number in range(repeat + 1):
        for label, argv in COMMANDS.items():
            seconds = measure(argv)
            if round_number > 0:  # the first compiles what has no .pyc, and fills the disk's cache
                times[label].append(seconds)
    return {
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "repeat": repeat,
        "seconds": {label: statistics.median(values) for label, values in times.items()},
        "fastest_seconds": {label: min(values) for label, values in times.items()},
        "ratios": {
            f"{ours} / {theirs}": statistics.median(
                mine / other for mine, other in zip(times[ours], times[theirs], strict=True)
            )
            for ours, theirs, _ in RATIOS
        },
    }


def show(result: dict[str, object]) -> None:
    seconds, fastest, ratios = result["seconds"], result["fastest_seconds"], result["ratios"]
    assert isinstance(seconds, dict)
    assert isinstance(fastest, dict)
    assert isinstance(ratios, dict)
    print(f"{'':24}{'median s':>10}{'fastest s':>12}")
    for label in COMMANDS:
        print(f"{label:24}{seconds[label]:10.3f}{fastest[label]:12.3f}")
    print()
    for (label, ratio), (_, _, limit) in zip(ratios.items(), RATIOS, strict=True):
        print(f"{label}: {ratio:.3f} (to reach: {limit:g})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9, help="processes of each kind, taking turns (default: 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args()
    result = figures(args.repeat)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

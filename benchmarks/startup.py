"""Measure the time to import mlfleet and to start its command line, as shares of mlflow's times.

Compares ``import mlfleet`` with ``import mlflow.projects``, and ``mlfleet --help`` with ``mlflow run --help``. Each is
a process of its own, and the commands alternate, so that other load on the machine slows all of them alike. The time of
an empty Python process is measured as well: no program written in Python can be below it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from _figures import add_options, report

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import mlfleet": [sys.executable, "-c", "import mlfleet"],
    "import mlflow.projects": [sys.executable, "-c", "import mlflow.projects"],
    "mlfleet --help": [sys.executable, "-m", "mlfleet", "--help"],
    "mlflow run --help": [sys.executable, "-m", "mlflow", "run", "--help"],
}
RATIOS = (("import mlfleet", "import mlflow.projects"), ("mlfleet --help", "mlflow run --help"))


def measure(argv: list[str], environ: dict[str, str]) -> float:
    """Return the wall seconds of one process."""
    start = time.perf_counter()
    subprocess.run(argv, check=True, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure_all(rounds: int) -> dict[str, list[float]]:
    """Return the wall seconds of each command in each round."""
    times: dict[str, list[float]] = {label: [] for label in COMMANDS}
    with tempfile.TemporaryDirectory() as compiled:
        # Both sides start from compiled files, whether or not their installer has compiled them and this environment
        # lets Python write them.
        environ = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        for round_number in range(rounds + 1):
            for label, argv in COMMANDS.items():
                seconds = measure(argv, environ)
                if round_number > 0:  # the first one compiles, and fills the disk's cache
                    times[label].append(seconds)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=9)
    options = parser.parse_args()
    times = measure_all(options.rounds)
    print(f"{'':24}{'median s':>10}{'fastest s':>12}")
    for label, values in times.items():
        print(f"{label:24}{statistics.median(values):10.3f}{min(values):12.3f}")
    figures = {
        f"{ours} / {theirs}": statistics.median(
            mine / other for mine, other in zip(times[ours], times[theirs], strict=True)
        )
        for ours, theirs in RATIOS
    }
    report("startup", figures, options)


if __name__ == "__main__":
    main()

"""Measure what a sweep costs on top of its processes.

No-op points of one project through `Fleet.sweep`, next to bare ``asyncio.create_subprocess_exec`` of the same command,
the same number at a time, alternately; for several lengths of the sweep, to see whether a point costs the same in all.
Tracking is a fake in memory that forgets runs which have ended, so that the driver's own memory shows. Besides: how
long it takes to cancel many running processes, and with --rival the same command through joblib and mlflow.projects.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from _figures import add_options, report, resident, start_bare
from mlfleet import Fleet, RunStatus
from mlfleet.runs import RunStatus as Status
from mlfleet.testing import FakeTracking

# The other scripts in this folder have names of packages that mlflow looks for (docker, databricks, …).
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

PROJECT = "name: noop\nentry_points:\n  main:\n    parameters: {n: {type: float, default: 0}}\n    command: '%s'\n"


class Forgetful(FakeTracking):
    """A fake that keeps only the runs that have not ended."""

    async def update_run(
        self, run_id: str, status: Status, *, end_time: int | None = None, retry_for: float | None = None
    ) -> None:
        await super().update_run(run_id, status, end_time=end_time, retry_for=retry_for)
        if status.is_terminal:
            del self.runs[run_id]


def points(count: int) -> Iterator[dict[str, int]]:
    return ({"n": n} for n in range(count))


async def through_a_sweep(folder: Path, count: int, jobs: int, *, name: str | None = None) -> tuple[float, float, int]:
    """Return the wall seconds, the CPU seconds and the largest memory growth in bytes of this process."""
    async with Fleet(tracking=Forgetful(), max_concurrent=jobs) as fleet:
        gc.collect()
        before, most = resident(), 0
        wall, cpu = time.perf_counter(), time.process_time()
        async with fleet.sweep(folder, points(count), name=name, env_manager="local") as sweep:
            ended = 0
            async for result in sweep:
                ended += result.status is RunStatus.FINISHED
                if result.index % 50 == 0:
                    most = max(most, resident() - before)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if ended != count:
        raise SystemExit(f"{count - ended} points did not finish")
    return wall, cpu, most


async def bare_processes(folder: Path, count: int, jobs: int) -> float:
    slots = asyncio.Semaphore(jobs)

    async def one() -> None:
        async with slots:
            await start_bare(":", folder)

    begun = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(count)))
    return time.perf_counter() - begun


async def cancel_many(folder: Path, count: int) -> tuple[float, int]:
    """Return the seconds to cancel all running processes, and the number of processes left."""
    mark = f"mlfleet-benchmark-{os.getpid()}"
    (folder / "MLproject").write_text(PROJECT % f"exec -a {mark} sleep 1000")
    started = 0
    async with Fleet(tracking=Forgetful(), max_concurrent=count) as fleet:
        events = fleet.events()
        async with fleet.sweep(folder, points(count), env_manager="local") as sweep:
            async for event in events:
                started += event.stage == "started"
                if started == count:
                    break
            begun = time.perf_counter()
            await sweep.cancel()
            took = time.perf_counter() - begun
    left = subprocess.run(["pgrep", "-fc", mark], capture_output=True, text=True).stdout.strip()
    return took, int(left or 0)


RIVAL = """\
import sys, time
import joblib, mlflow
mlflow.set_tracking_uri(sys.argv[3])
begun = time.perf_counter()
def one(n):
    import mlflow
    mlflow.set_tracking_uri(sys.argv[3])
    mlflow.projects.run(sys.argv[1], parameters={"n": n}, env_manager="local")
joblib.Parallel(n_jobs=int(sys.argv[4]))(joblib.delayed(one)(n) for n in range(int(sys.argv[2])))
print(time.perf_counter() - begun)
"""


def rival(folder: Path, count: int, jobs: int, store: str) -> float:
    """Return the seconds that joblib with mlflow.projects takes, without its imports in this process."""
    argv = [sys.executable, "-W", "ignore", "-c", RIVAL, str(folder), str(count), store, str(jobs)]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the rival failed:\n{done.stderr[-3000:]}")
    return float(done.stdout.split()[-1])


async def ours_with_a_store(folder: Path, count: int, jobs: int, store: str) -> float:
    async with Fleet(tracking_uri=store, max_concurrent=jobs) as fleet:
        begun = time.perf_counter()
        async with fleet.sweep(folder, points(count), env_manager="local") as sweep:
            async for _ in sweep:
                pass
        return time.perf_counter() - begun


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    project = folder / "project"
    project.mkdir()
    (project / "MLproject").write_text(PROJECT % ":")
    await through_a_sweep(project, 20, options.jobs)
    figures: dict[str, float] = {}
    print(f"{'points':>7} {'bare ms':>8} {'sweep ms':>9} {'ratio':>6} {'named':>6} {'cpu ms':>7} {'grown MiB':>10}")
    for count in options.points:
        rows = []
        for number in range(options.rounds):
            limit = await bare_processes(project, count, options.jobs)
            wall, cpu, most = await through_a_sweep(project, count, options.jobs)
            named, *_ = await through_a_sweep(project, count, options.jobs, name=f"n{count}-{number}")
            rows.append((limit, wall, named, cpu, most))
        limit, wall, named, cpu, most = (statistics.median(column) for column in zip(*rows, strict=True))
        ratio = statistics.median(row[1] / row[0] for row in rows)
        ratio_named = statistics.median(row[2] / row[0] for row in rows)
        figures[f"sweep of {count}, wall time / bare processes"] = ratio
        figures[f"named sweep of {count}, wall time / bare processes"] = ratio_named
        figures[f"sweep of {count}, driver CPU per point, ms"] = cpu / count * 1000
        figures[f"sweep of {count}, growth of the driver, MiB"] = most / 2**20
        print(
            f"{count:>7} {limit / count * 1000:>8.2f} {wall / count * 1000:>9.2f} {ratio:>6.2f} {ratio_named:>6.2f} "
            f"{cpu / count * 1000:>7.2f} {most / 2**20:>10.1f}"
        )
    took, left = await cancel_many(project, options.cancel)
    figures[f"cancelling {options.cancel} running processes, s"] = took
    if left:
        raise SystemExit(f"{left} of {options.cancel} processes are left after the sweep was cancelled")
    if options.rival:
        (project / "MLproject").write_text(PROJECT % ":")
        store = f"sqlite:///{folder}/mlflow.db"
        await ours_with_a_store(project, 1, 1, store)
        ours = await ours_with_a_store(project, options.rival, options.jobs, store)
        theirs = await asyncio.to_thread(rival, project, options.rival, options.jobs, store)
        figures[f"{options.rival} points in sqlite, wall time / joblib with mlflow.projects"] = ours / theirs
        print(f"{options.rival} points, sqlite: mlfleet {ours:.1f} s, joblib + mlflow.projects {theirs:.1f} s")
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="+", default=[100, 500, 1000, 2000], help="lengths of the sweeps")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="points at a time (the number of CPUs)")
    parser.add_argument("--cancel", type=int, default=500, help="how many running processes are cancelled (500)")
    parser.add_argument("--rival", type=int, default=0, metavar="POINTS", help="compare with joblib + mlflow.projects")
    add_options(parser, rounds=3)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLEET_STATE_DIR"] = f"{folder}/state"
        figures = asyncio.run(measure(options, Path(folder)))
    report("sweep", figures, options)


if __name__ == "__main__":
    main()

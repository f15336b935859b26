"""Measure the Slurm backend on a real Slurm of one node, beside a bare loop of sbatch.

Counts the client programs that runs need and how many of them run at the same time, compares the time until all runs
are done with that of bare jobs, and repeats unclear submits (the controller has the job, the answer is lost). Then it
counts the runs that are judged wrongly when their driver is gone and Slurm has forgotten their jobs (MinJobAge), and,
with --silence, those that fail because the controller does not answer for so long. Needs slurmctld, slurmd,
slurm-client and munge.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import psutil

from _figures import add_options, report
from components.slurm import run_slurm
from mlfleet.backends.base import BackendRun, Job
from mlfleet.backends.slurm import SlurmBackend
from mlfleet.backends.slurm.client import Timing
from mlfleet.runs import RunStatus

PROGRAMS = ("sbatch", "squeue", "scancel", "scontrol")
# Notes the beginning and the end of each call; an unclear sbatch has submitted the job and gives no answer.
WRAPPER = """#!/bin/bash
echo "+ {program} $*" >> {folder}/calls
if [ {program} = sbatch ] && [ -e {folder}/unclear ]; then
  /usr/bin/sbatch "$@" > /dev/null; code=1
  echo "sbatch: error: Socket timed out on send/recv operation" >&2
else
  /usr/bin/{program} "$@"; code=$?
fi
echo "- {program}" >> {folder}/calls
exit $code
"""


class Bench:
    """The backend with client programs that note their calls.

    Args:
        folder: An empty folder for all files.
        environ: The variables by which the client programs find Slurm.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        self.programs = folder / "bin"
        self.programs.mkdir()
        for program in PROGRAMS:
            (self.programs / program).write_text(WRAPPER.format(program=program, folder=folder))
            (self.programs / program).chmod(0o755)
        os.environ |= environ
        self.project = folder / "project"
        self.project.mkdir()
        (self.project / "project.txt").write_text("a project\n")

    def job(self, command: str, **config: object) -> Job:
        """Return a job; its configuration is that of the backend's keys."""
        run_id = uuid.uuid4().hex
        return Job(
            run_id=run_id,
            experiment_id="0",
            project_name="benchmark",
            project_dir=self.project,
            command=command,
            output=self.folder / "outputs" / run_id,
            config=SlurmBackend().configure({"work-dir": str(self.folder / "work"), **config}),
        )

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note the calls of client programs, which makes each of them slower."""
        before = os.environ["PATH"]
        os.environ["PATH"] = f"{self.programs}:{before}"
        try:
            yield
        finally:
            os.environ["PATH"] = before

    def noted(self) -> list[str]:
        """Return the calls since the last one of this method."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return lines


def bare(count: int) -> float:
    """Return the seconds until as many jobs of bare sbatch are done."""
    began = time.monotonic()
    for _ in range(count):
        subprocess.run(
            ["/usr/bin/sbatch", "--parsable", "--output=/dev/null", "--wrap=true"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    while squeue().strip():
        time.sleep(0.1)
    return time.monotonic() - began


async def check(runs: Sequence[BackendRun]) -> None:
    """Wait for the ends of runs, which must be good ones."""
    for run in runs:
        outcome = await run.outcome()
        if outcome.status is not RunStatus.FINISHED:
            raise SystemExit(f"a run failed: {outcome}")


async def many(bench: Bench, count: int, *, array: bool = False) -> float:
    """Return the seconds until as many runs are done."""
    async with SlurmBackend() as backend:
        began = time.monotonic()
        runs = await asyncio.gather(*(backend.submit(bench.job("true", array=array)) for _ in range(count)))
        await check(runs)
        return time.monotonic() - began


async def unclear(bench: Bench, count: int) -> float:
    """Return the largest number of executions of a run whose submit was unclear."""
    executions = bench.folder / "executions"
    executions.mkdir()
    lost = bench.folder / "unclear"
    lost.touch()
    try:
        async with SlurmBackend(timing=Timing(fast=0.5)) as backend:
            jobs = [bench.job(f"echo x >> {executions}/$SLURM_JOB_NAME") for _ in range(count)]
            runs = await asyncio.gather(*(backend.submit(job) for job in jobs))
            await check(runs)
    finally:
        lost.unlink()
    counts = [len(path.read_text().splitlines()) for path in executions.iterdir()]
    if len(counts) != count:
        raise SystemExit(f"{len(counts)} of {count} runs were executed")
    return float(max(counts))


async def forgotten(bench: Bench, count: int) -> int:
    """Return the number of runs that are judged wrongly by whoever attaches after Slurm has forgotten their jobs."""
    jobs = [bench.job(f"exit {index % 3}") for index in range(count)]
    async with SlurmBackend() as backend:
        references = [backend.reference(job) for job in jobs]
        for run in await asyncio.gather(*(backend.submit(job) for job in jobs)):
            run.detach()  # as if this process had been killed
    while (await asyncio.to_thread(squeue, "-t", "all")).strip():
        await asyncio.sleep(1)
    async with SlurmBackend() as backend:
        outcomes = [await (await backend.attach(reference)).outcome() for reference in references]
    return sum(outcome.exit_code != index % 3 for index, outcome in enumerate(outcomes))


async def silent(bench: Bench, controller: psutil.Process, seconds: float) -> int:
    """Return the number of runs that fail because the controller does not answer for so long.

    Some of them end meanwhile, some afterwards, and some are submitted meanwhile.
    """
    meanwhile, afterwards = (bench.folder / name for name in ("meanwhile", "afterwards"))
    async with SlurmBackend() as backend:
        jobs = [bench.job(f"until [ -e {file} ]; do sleep 0.5; done") for file in [meanwhile, afterwards] * 5]
        runs = [await backend.submit(job) for job in jobs]
        for run in runs:
            await run.started()
        controller.suspend()
        try:
            late = [asyncio.ensure_future(backend.submit(bench.job("true"))) for _ in range(5)]
            meanwhile.touch()
            await asyncio.sleep(seconds)
        finally:
            controller.resume()
        afterwards.touch()
        failed = 0
        for submitted in await asyncio.gather(*late, return_exceptions=True):
            if isinstance(submitted, BaseException):
                print(f"a submit failed: {submitted}")
                failed += 1
            else:
                runs.append(submitted)
        for run in runs:
            outcome = await run.outcome()
            if outcome.status is not RunStatus.FINISHED:
                print(f"a run failed: {outcome}")
                failed += 1
    return failed


def squeue(*options: str) -> str:
    """Return the jobs of Slurm."""
    return subprocess.run(["/usr/bin/squeue", "-h", *options], capture_output=True, check=True, text=True).stdout


def most_at_once(calls: list[str], program: str) -> int:
    """Return the largest number of calls of a program that ran at the same time."""
    most = now = 0
    for line in calls:
        if line.split()[1] == program:
            now += 1 if line.startswith("+") else -1
            most = max(most, now)
    return most


def began(calls: list[str], program: str) -> int:
    """Return the number of calls of a program."""
    return sum(line.startswith(f"+ {program} ") for line in calls)


async def measure(bench: Bench, controller: psutil.Process, options: argparse.Namespace) -> dict[str, float]:
    if options.silence:
        name = f"Slurm: runs that failed while the controller did not answer for {options.silence:g} s"
        return {name: await silent(bench, controller, options.silence)}
    ratios = []
    for _ in range(options.rounds):
        alone = await asyncio.to_thread(bare, options.runs)
        ratios.append(await many(bench, options.runs) / alone)
    with bench.noting():
        await many(bench, options.runs)
        calls = bench.noted()
        await many(bench, options.runs, array=True)
        of_arrays = bench.noted()
        executions = await unclear(bench, options.unclear)
    return {
        f"Slurm: {options.runs} runs, time until all are done / bare sbatch": statistics.median(ratios),
        f"Slurm: sbatch calls for {options.runs} runs": began(calls, "sbatch"),
        "Slurm: sbatch calls at the same time": most_at_once(calls, "sbatch"),
        "Slurm: squeue calls at the same time": most_at_once(calls, "squeue"),
        f"Slurm: squeue calls until {options.runs} runs are done": began(calls, "squeue"),
        f"Slurm: sbatch calls for {options.runs} runs in arrays": began(of_arrays, "sbatch"),
        "Slurm: executions of a run whose submit was unclear, at most": executions,
        "Slurm: runs judged wrongly after Slurm has forgotten them": await forgotten(bench, options.forgotten),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300, help="runs at the same time (default: 300)")
    parser.add_argument("--unclear", type=int, default=100, help="unclear submits (default: 100)")
    parser.add_argument("--forgotten", type=int, default=20, help="jobs that Slurm has forgotten (default: 20)")
    parser.add_argument(
        "--silence", type=float, default=0, metavar="SECONDS", help="instead, stop the controller for so long, as 600"
    )
    add_options(parser, rounds=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)
        daemons = folder / "slurm"
        daemons.mkdir()
        # On a busy machine a node that answers late would lose jobs: Slurm cancels what it could not start in time.
        with run_slurm(daemons, cpus=64, message_timeout=10 if options.silence else 60, min_job_age=2) as environ:
            controller = psutil.Process(int((daemons / "slurmctld.pid").read_text()))
            figures = asyncio.run(measure(Bench(folder, environ), controller, options))
    report("slurm_backend --silence" if options.silence else "slurm_backend", figures, options)


if __name__ == "__main__":
    main()

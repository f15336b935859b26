"""Measure the requests that hundreds of runs in flight cost a Databricks workspace, and the delay of their ends.

The workspace is the scripted one of the tests, on loopback: it runs nothing, so that only the requests of mlfleet are
measured. The reference (mlflow) is not run: it asks for each run every 30 s
(`DatabricksSubmittedRun.POLL_STATUS_INTERVAL`).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from _figures import add_options, report
from fakes.databricks import FakeRun, FakeWorkspace
from mlfleet.backends.base import BackendRun, Job
from mlfleet.backends.databricks import DatabricksBackend

REFERENCE_INTERVAL = 30.0  # seconds


def job_in(folder: Path, backend: DatabricksBackend) -> Job:
    return Job(
        run_id=uuid.uuid4().hex,
        experiment_id="0",
        project_name="benchmark",
        project_dir=folder / "project",
        command="python train.py",
        output=folder / "output" / uuid.uuid4().hex,
        config=backend.configure({"upload_path": "/Volumes/main/default/runs"}),
        tracking_uri="databricks",
    )


def end(workspace: FakeWorkspace, run: FakeRun) -> None:
    workspace.put_output(run, b"done\n")
    run.set_state("TERMINATED", "SUCCESS")


async def submit(backend: DatabricksBackend, folder: Path, count: int) -> list[BackendRun]:
    return await asyncio.gather(*(backend.submit(job_in(folder, backend)) for _ in range(count)))


async def latencies(workspace: FakeWorkspace, folder: Path, count: int, every: float) -> list[float]:
    """Return the seconds from the end of each of `count` young runs to the return of its ``wait()``."""
    async with DatabricksBackend() as backend:
        runs = await submit(backend, folder, count)
        by_id = {run.run_id: run for run in runs}
        returned: dict[str, float] = {}

        async def wait(run: BackendRun) -> None:
            await run.wait()
            returned[run.run_id] = time.monotonic()

        waiting = asyncio.gather(*(wait(run) for run in runs))
        ours = [run for run in workspace.runs.values() if run.spec["run"] in by_id]
        for run in ours:
            await asyncio.sleep(every)
            end(workspace, run)
        await waiting
    return [returned[run.spec["run"]] - run.ended_at for run in ours]


def rounds(workspace: FakeWorkspace, since: int) -> int:
    """Return the polling rounds that began after the first `since` requests, each of which reads the first page."""
    targets = (request.target for request in workspace.requests[since:])
    return sum("runs/list" in target and "page_token" not in target for target in targets)


async def polls(workspace: FakeWorkspace, folder: Path, count: int, minutes: float) -> dict[str, float]:
    """Return the polling rounds a minute of `count` young runs, requests a minute once they are older, and uploads."""
    async with DatabricksBackend() as backend:
        before = len(workspace.requests)
        runs = await submit(backend, folder, count)
        uploads = [request for request in workspace.requests[before:] if request.method == "PUT"]
        for run in workspace.runs.values():
            if run.active:
                run.set_state("RUNNING")
        since, began = len(workspace.requests), time.monotonic()
        await asyncio.sleep(50.0)
        young = rounds(workspace, since) * 60.0 / (time.monotonic() - began)
        await asyncio.sleep(15.0)
        before = len(workspace.requests)
        await asyncio.sleep(60.0 * minutes)
        asked = (len(workspace.requests) - before) / minutes
        for run in workspace.runs.values():
            if run.active:
                end(workspace, run)
        await asyncio.gather(*(run.cancel() for run in runs))
    return {
        "Databricks: polling rounds a minute": young,
        f"Databricks: requests a minute of {count} runs, older than a minute": asked,
        f"Databricks: requests of {count} runs / the reference": asked / (count * 60.0 / REFERENCE_INTERVAL),
        f"Databricks: uploads for {count} runs of the same content": float(len(uploads)),
    }


async def measure(options: argparse.Namespace) -> dict[str, float]:
    known: list[float] = []
    measured: list[dict[str, float]] = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "project").mkdir()
            (folder / "project" / "train.py").write_text(f"print({uuid.uuid4().hex!r})\n")
            async with FakeWorkspace().open() as workspace:
                os.environ |= {"DATABRICKS_HOST": workspace.url, "DATABRICKS_TOKEN": workspace.token}
                os.environ["DATABRICKS_CONFIG_FILE"] = os.devnull
                known += await latencies(workspace, folder, options.young, 30.0 / options.young)
                workspace.runs.clear()
                workspace.files = {path: text for path, text in workspace.files.items() if "/projects/" not in path}
                measured.append(await polls(workspace, folder, options.runs, options.minutes))
    figures = {figure: statistics.median(each[figure] for each in measured) for figure in measured[0]}
    figures["Databricks: from the end of a young run to wait(), p50, s"] = statistics.median(known)
    figures["Databricks: from the end of a young run to wait(), p95, s"] = statistics.quantiles(known, n=20)[-1]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500, help="runs in flight (default: 500)")
    parser.add_argument("--young", type=int, default=100, help="runs whose ends are waited for (default: 100)")
    parser.add_argument("--minutes", type=float, default=2.0, help="minutes to count requests for (default: 2)")
    add_options(parser, rounds=1)
    options = parser.parse_args()
    report("databricks_backend", asyncio.run(measure(options)), options)


if __name__ == "__main__":
    main()

"""What hundreds of runs in flight cost a Databricks workspace in requests, and how soon their ends are known.

The workspace is the scripted one of the tests, on loopback: it runs nothing, so that only what mlfleet asks is
measured. The reference is not run: it asks for each run every 30 s (`DatabricksSubmittedRun.POLL_STATUS_INTERVAL`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

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
    run.become("TERMINATED", "SUCCESS")


async def submit(backend: DatabricksBackend, folder: Path, count: int) -> list[BackendRun]:
    return await asyncio.gather(*(backend.submit(job_in(folder, backend)) for _ in range(count)))


async def latencies(workspace: FakeWorkspace, folder: Path, count: int, every: float) -> list[float]:
    """Seconds from the end of each of `count` young runs to the return of its ``wait()``."""
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


async def requests_a_minute(workspace: FakeWorkspace, folder: Path, count: int, minutes: float) -> tuple[float, int]:
    """Requests a minute of `count` runs that are older than a minute, and uploads of their project."""
    async with DatabricksBackend() as backend:
        before = len(workspace.requests)
        runs = await submit(backend, folder, count)
        uploads = [request for request in workspace.requests[before:] if request.method == "PUT"]
        for run in workspace.runs.values():
            if run.active:
                run.become("RUNNING")
        await asyncio.sleep(65.0)
        before = len(workspace.requests)
        await asyncio.sleep(60.0 * minutes)
        asked = len(workspace.requests) - before
        for run in workspace.runs.values():
            if run.active:
                end(workspace, run)
        await asyncio.gather(*(run.cancel() for run in runs))
    return asked / minutes, len(uploads)


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "project").mkdir()
        (folder / "project" / "train.py").write_text(f"print({uuid.uuid4().hex!r})\n")
        async with FakeWorkspace().open() as workspace:
            os.environ |= {"DATABRICKS_HOST": workspace.url, "DATABRICKS_TOKEN": workspace.token}
            os.environ["DATABRICKS_CONFIG_FILE"] = os.devnull
            known = await latencies(workspace, folder, arguments.young, 30.0 / arguments.young)
            workspace.runs.clear()
            workspace.files = {path: text for path, text in workspace.files.items() if "/projects/" not in path}
            rate, uploads = await requests_a_minute(workspace, folder, arguments.runs, arguments.minutes)
    reference = arguments.runs * 60.0 / REFERENCE_INTERVAL
    return {
        "runs": arguments.runs,
        "requests_a_minute": round(rate, 1),
        "reference_requests_a_minute": reference,
        "ratio": round(rate / reference, 3),
        "uploads": uploads,
        "young_runs": arguments.young,
        "end_to_wait_p50": round(statistics.median(known), 2),
        "end_to_wait_p95": round(statistics.quantiles(known, n=20)[-1], 2),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500, help="runs in flight")
    parser.add_argument("--young", type=int, default=100, help="runs whose ends are waited for")
    parser.add_argument("--minutes", type=float, default=2.0, help="for which requests are counted")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    figures = asyncio.run(measure(arguments))
    width = max(map(len, figures))
    for name, figure in figures.items():
        print(f"{name:<{width}}  {figure}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

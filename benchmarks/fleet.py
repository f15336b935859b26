"""What a Fleet costs on top of the processes themselves.

Runs one no-op project many times through one Fleet, and compares with bare ``asyncio.create_subprocess_exec`` of the
same command, the same number at a time. Tracking is a fake in memory, or with --server a real MLflow server on loopback
(which is then the bottleneck: what counts is the CPU time of the driver itself for each run).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from mlfleet import Fleet, RunStatus
from mlfleet.testing import FakeTracking
from mlfleet.tracking import Tracking, open_tracking
from processes import bare, percentile, resident, tick

Row = tuple[float, float, list[float]]
PROJECT = "name: noop\nentry_points:\n  main:\n    parameters: {n: {type: float, default: 0}}\n    command: ':'\n"


async def timed(work: Callable[[], Awaitable[None]]) -> Row:
    """Wall seconds, CPU seconds of this process, and the ticker's delays."""
    stalls: list[float] = []
    ticker = asyncio.create_task(tick(stalls))
    await asyncio.sleep(0.05)
    stalls.clear()
    wall, cpu = time.perf_counter(), time.process_time()
    await work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    ticker.cancel()
    return wall, cpu, stalls


async def bare_processes(count: int, concurrency: int, folder: Path) -> None:
    slots = asyncio.Semaphore(concurrency)

    async def one() -> None:
        async with slots:
            await bare(":", folder)

    await asyncio.gather(*(one() for _ in range(count)))


async def fleet_runs(fleet: Fleet, count: int, folder: Path) -> None:
    async def one(n: int) -> None:
        run = await fleet.submit(folder, parameters={"n": n}, env_manager="local")
        if (await run.outcome()).status is not RunStatus.FINISHED:
            raise RuntimeError(f"a run failed: {await run.outcome()}")

    await asyncio.gather(*(one(n) for n in range(count)))


async def memory_per_run(count: int, folder: Path) -> float:
    """Bytes of this process for each run in flight."""
    (folder / "MLproject").write_text(PROJECT.replace("':'", "exec sleep 600"))
    async with Fleet(tracking=FakeTracking(), max_concurrent=2 * count) as fleet:
        await asyncio.gather(*(fleet.submit(folder, env_manager="local") for _ in range(20)))
        before = resident()
        await asyncio.gather(*(fleet.submit(folder, env_manager="local") for _ in range(count)))
        await asyncio.sleep(1)
        grown = resident() - before
        await fleet.cancel()
    return grown / count


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    port = 5599
    environ = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--artifacts-destination", str(folder)]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait()


async def measure(args: argparse.Namespace, open_: Callable[[], Tracking], folder: Path) -> dict[str, object]:
    rows: dict[str, list[Row]] = {"bare asyncio": [], "Fleet": []}
    memory = await memory_per_run(args.count, folder) if sys.platform == "linux" and not args.server else None
    (folder / "MLproject").write_text(PROJECT)
    for n in range(args.repeat + 1):
        async with Fleet(tracking=open_(), max_concurrent=args.concurrency) as fleet:
            await fleet_runs(fleet, 5, folder)  # what is opened and imported at the first use
            limit = await timed(lambda: bare_processes(args.count, args.concurrency, folder))
            ours = await timed(lambda fleet=fleet: fleet_runs(fleet, args.count, folder))  # type: ignore[misc]
        if n:  # the first round warms up
            rows["bare asyncio"].append(limit)
            rows["Fleet"].append(ours)
    result: dict[str, object] = {
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "runs": args.count,
        "concurrency": args.concurrency,
        "repeat": args.repeat,
        "tracking": "server" if args.server else "memory",
        "memory_per_run_kib": None if memory is None else memory / 1024,
    }
    for label, runs in rows.items():
        result[label] = {
            "wall_s": statistics.median(wall for wall, _, _ in runs),
            "driver_cpu_ms_per_run": statistics.median(cpu for _, cpu, _ in runs) / args.count * 1000,
            "ticker_p99_ms": statistics.median(percentile(stalls, 0.99) for _, _, stalls in runs) * 1000,
            "ticker_max_ms": statistics.median(max(stalls) for _, _, stalls in runs) * 1000,
        }
    pairs = zip(rows["Fleet"], rows["bare asyncio"], strict=True)
    result["ratio"] = statistics.median(ours[0] / limit[0] for ours, limit in pairs)
    return result


def show(result: dict[str, object]) -> None:
    columns = ("wall_s", "driver_cpu_ms_per_run", "ticker_p99_ms", "ticker_max_ms")
    print(f"{'':14}" + "".join(f"{column:>24}" for column in columns))
    for label in ("bare asyncio", "Fleet"):
        row = result[label]
        assert isinstance(row, dict)
        print(f"{label:14}" + "".join(f"{row[column]:24.2f}" for column in columns))
    print(f"\nwall time, Fleet / bare: {result['ratio']:.2f} (to reach with tracking in memory: 1.5)")
    if result["memory_per_run_kib"] is not None:
        print(f"driver memory per run in flight: {result['memory_per_run_kib']:.1f} KiB (to reach: 200)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="runs in each measurement (default: 500)")
    parser.add_argument("--concurrency", type=int, default=16, help="how many at the same time (default: 16)")
    parser.add_argument("--repeat", type=int, default=5, help="measurements of each, alternating (default: 5)")
    parser.add_argument("--server", action="store_true", help="track to a real MLflow server (sqlite) on loopback")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        os.environ["MLFLEET_STATE_DIR"] = str(folder / "state")
        os.environ["MLFLEET_CACHE_DIR"] = str(folder / "cache")
        project = folder / "project"
        project.mkdir()
        if args.server:
            uri = stack.enter_context(mlflow_server(folder))
            result = asyncio.run(measure(args, lambda: open_tracking(uri), project))
        else:
            result = asyncio.run(measure(args, FakeTracking, project))
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What a Fleet costs on top of the processes themselves.

Runs one no-op project many times through one Fleet, and compares with bare ``asyncio.create_subprocess_exec`` of the
same command, the same number at a time. Tracking is a fake in memory, or with --server a real MLflow server on loopback
(which is then the bottleneck: what counts is the CPU time of the driver itself for each run). The limit there is the
same four requests by aiohttp around the same process, with nothing else: no retries, no logs, no status that is true;
and beside it each of the two alone, to see what the machine takes for a process and for four requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
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
from functools import partial
from pathlib import Path
from typing import Any

from mlfleet import Fleet, RunStatus
from mlfleet.testing import FakeTracking
from mlfleet.tracking import Tracking, open_tracking
from mlfleet.tracking.rest import MAX_IN_FLIGHT
from processes import bare, beside, resident, tick, ticker_figures

Row = tuple[float, float, list[float], float]
PROJECT = "name: noop\nentry_points:\n  main:\n    parameters: {n: {type: float, default: 0}}\n    command: ':'\n"


async def timed(work: Callable[[], Awaitable[None]], *, ticking: bool = True) -> Row:
    """Wall seconds, CPU seconds of this process, the ticker's delays, and the longest garbage collection.

    The ticker's own CPU time counts, too.
    """
    stalls: list[float] = [0.0]
    ticker = asyncio.create_task(tick(stalls) if ticking else asyncio.sleep(0))
    await asyncio.sleep(0.05)
    del stalls[1:]
    with collections_timed() as pauses:
        wall, cpu = time.perf_counter(), time.process_time()
        await work()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    ticker.cancel()
    return wall, cpu, stalls, max(pauses, default=0.0)


@contextlib.contextmanager
def collections_timed() -> Iterator[list[float]]:
    """How long Python's garbage collector held up everything, each time: a matter of all that the process has."""
    pauses: list[float] = []
    began = 0.0

    def note(phase: str, info: object) -> None:
        nonlocal began
        if phase == "start":
            began = time.perf_counter()
        else:
            pauses.append(time.perf_counter() - began)

    gc.callbacks.append(note)
    try:
        yield pauses
    finally:
        gc.callbacks.remove(note)


async def bare_processes(count: int, concurrency: int, folder: Path) -> None:
    slots = asyncio.Semaphore(concurrency)

    async def one() -> None:
        async with slots:
            await bare(":", folder)

    await asyncio.gather(*(one() for _ in range(count)))


async def bare_tracked_processes(uri: str, count: int, concurrency: int, folder: Path, *, start: bool = True) -> None:
    import aiohttp

    slots, turns = asyncio.Semaphore(concurrency), asyncio.Semaphore(MAX_IN_FLIGHT)
    api = f"{uri}/api/2.0/mlflow/runs"
    async with aiohttp.ClientSession() as session:

        async def ask(method: str, what: str, **arguments: Any) -> Any:
            async with turns, session.request(method, f"{api}/{what}", **arguments) as answer:
                answer.raise_for_status()
                return await answer.json()

        async def one(n: int) -> None:
            async with slots:
                made = await ask("POST", "create", json={"experiment_id": "0", "tags": [{"key": "a", "value": "b"}]})
                run_id = made["run"]["info"]["run_id"]
                await ask("POST", "log-batch", json={"run_id": run_id, "params": [{"key": "n", "value": str(n)}]})
                if start:
                    await bare(":", folder)
                await ask("GET", "get", params={"run_id": run_id})
                await ask("POST", "update", json={"run_id": run_id, "status": "FINISHED"})

        await asyncio.gather(*(one(n) for n in range(count)))


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
        server = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(3000):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            time.sleep(0.1)
        else:
            raise SystemExit("the MLflow server did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def works(args: argparse.Namespace, uri: str | None, folder: Path) -> dict[str, Callable[[], Awaitable[None]]]:
    """What is measured besides the Fleet."""
    count = args.count, args.concurrency, folder
    if uri is None:
        return {"bare asyncio": partial(bare_processes, *count)}
    return {
        "bare asyncio": partial(bare_tracked_processes, uri, *count),
        "its processes": partial(bare_processes, *count),
        "its requests": partial(bare_tracked_processes, uri, *count, start=False),
    }


async def measure(args: argparse.Namespace, uri: str | None, folder: Path) -> dict[str, object]:
    others = works(args, uri, folder)
    rows: dict[str, list[Row]] = {label: [] for label in (*others, "Fleet")}
    control: list[list[float]] = []

    def open_() -> Tracking:
        return FakeTracking() if uri is None else open_tracking(uri)

    memory = await memory_per_run(args.count, folder) if sys.platform == "linux" and not args.server else None
    (folder / "MLproject").write_text(PROJECT)
    for n in range(args.repeat + 1):
        async with Fleet(tracking=open_(), max_concurrent=args.concurrency) as fleet:
            await fleet_runs(fleet, 5, folder)  # what is opened and imported at the first use
            everything: dict[str, Callable[[], Awaitable[None]]] = {
                **others,
                "Fleet": partial(fleet_runs, fleet, args.count, folder),
            }
            found = {label: await timed(work, ticking=uri is None) for label, work in everything.items()}
        if n:  # the first round warms up
            for label, row in found.items():
                rows[label].append(row)
            if uri is None:
                control.append(await beside(args.count))
    result: dict[str, object] = {
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "runs": args.count,
        "concurrency": args.concurrency,
        "repeat": args.repeat,
        "tracking": "server" if args.server else "memory",
        "memory_per_run_kib": None if memory is None else memory / 1024,
    }
    for label, runs in rows.items():
        result[label] = {
            "wall_s": statistics.median(wall for wall, _, _, _ in runs),
            "driver_cpu_ms_per_run": statistics.median(cpu for _, cpu, _, _ in runs) / args.count * 1000,
            **(ticker_figures([stalls for _, _, stalls, _ in runs]) if uri is None else {}),
            "gc_max_ms": statistics.median(pause for _, _, _, pause in runs) * 1000,
        }
    if control:
        result["idle beside"] = ticker_figures(control)
    # Of each pair that was measured one right after the other; the machine may do something else in the next.
    for figure, column in (("ratio", 0), ("cpu_ratio", 1)):
        pairs = zip(rows["Fleet"], rows["bare asyncio"], strict=True)
        ratios = [ours[:2][column] / limit[:2][column] for ours, limit in pairs]
        result[figure] = statistics.median(ratios)
        result[f"{figure}s"] = ratios
    return result


def show(result: dict[str, object]) -> None:
    columns = ("wall_s", "driver_cpu_ms_per_run", "ticker_p99_ms", "ticker_max_ms", "ticker_worst_ms", "gc_max_ms")
    print(f"{'':14}" + "".join(f"{column:>24}" for column in columns))
    for label, row in result.items():
        if isinstance(row, dict):
            cells = (f"{row[column]:24.2f}" if column in row else f"{'-':>24}" for column in columns)
            print(f"{label:14}" + "".join(cells))
    spread = {name: f"{min(result[name]):.2f} to {max(result[name]):.2f}" for name in ("ratios", "cpu_ratios")}  # type: ignore[call-overload]
    print(f"\ndriver CPU, Fleet / bare: {result['cpu_ratio']:.2f} ({spread['cpu_ratios']})")
    if result["tracking"] == "server":
        print("driver CPU for each run, to reach: 3 ms")
        return
    print(
        "gc_max: of the delays, the longest that was a garbage collection of Python's; goals for Fleet: p99 5, max 20"
    )
    print("idle beside: the ticker of an idle loop while another program starts as many processes, two at a time")
    print(f"wall time, Fleet / bare: {result['ratio']:.2f} ({spread['ratios']}; to reach: 1.5)")
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
            result = asyncio.run(measure(args, uri, project))
        else:
            result = asyncio.run(measure(args, None, project))
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

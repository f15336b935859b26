"""Measure what the local backend costs on top of the processes themselves.

Compares no-op processes through `LocalBackend` with bare ``asyncio.create_subprocess_exec`` of the same
``bash -c`` command, watches for stalls of the event loop meanwhile, and weighs the memory of runs in flight.
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
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from _figures import add_options, report
from mlfleet.backends.base import Job
from mlfleet.backends.local.backend import LocalBackend
from mlfleet.runs import RunStatus

TICK = 0.001  # seconds


async def bare(command: str, folder: Path) -> None:
    process = await asyncio.create_subprocess_exec("bash", "-c", command, cwd=folder, stdin=asyncio.subprocess.DEVNULL)
    if await process.wait() != 0:
        raise SystemExit("a bare process failed")


def through(backend: LocalBackend) -> Callable[[str, Path], Awaitable[None]]:
    async def one(command: str, folder: Path) -> None:
        run = await backend.submit(job(command, folder))
        if (await run.outcome()).status is not RunStatus.FINISHED:
            raise SystemExit("a run of the local backend failed")

    return one


def job(command: str, folder: Path, output: Path | None = None) -> Job:
    return Job(
        run_id="0" * 32, experiment_id="0", project_name="benchmark", project_dir=folder, command=command, output=output
    )


async def tick(stalls: list[float]) -> None:
    """Wake every millisecond, and record the delay of each wake-up."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(TICK)
        stalls.append(time.perf_counter() - before - TICK)


async def timed(
    one: Callable[[str, Path], Awaitable[None]], count: int, concurrency: int, folder: Path
) -> tuple[float, float, list[float]]:
    """Return the wall seconds, the CPU seconds of this process, and the ticker's delays."""
    slots = asyncio.Semaphore(concurrency)

    async def held() -> None:
        async with slots:
            await one(":", folder)

    stalls: list[float] = []
    ticker = asyncio.create_task(tick(stalls))
    await asyncio.sleep(0.05)
    stalls.clear()
    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(held() for _ in range(count)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    ticker.cancel()
    return wall, cpu, stalls


async def beside(count: int) -> list[float]:
    """Return the ticker's delays while only another program starts as many processes, two at a time.

    What the machine itself does to any event loop: no loop that starts processes can be expected to do better.
    """
    script = f"seq {count} | xargs -P 2 -I@ setsid -w bash -c : @"
    other = subprocess.Popen(["bash", "-c", script], stdin=subprocess.DEVNULL)
    stalls: list[float] = []
    ticker = asyncio.create_task(tick(stalls))
    await asyncio.to_thread(other.wait)
    ticker.cancel()
    return stalls


def resident() -> int:
    """Return the resident memory of this process in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def memory_per_run(count: int, folder: Path) -> float:
    """Return the bytes of this process for each run in flight with captured output."""
    async with LocalBackend() as backend:
        warm_up = [await backend.submit(job("sleep 600", folder, folder / f"warm-{n}")) for n in range(20)]
        before = resident()
        runs = await asyncio.gather(
            *(backend.submit(job("exec sleep 600", folder, folder / f"{n}" / "output.log")) for n in range(count))
        )
        waiting = [asyncio.create_task(run.outcome()) for run in runs]
        await asyncio.sleep(0.1)
        grown = resident() - before
        await asyncio.gather(*(run.cancel() for run in (*runs, *warm_up)))
        await asyncio.gather(*waiting)
    return grown / count


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def ticker_figures(repeats: list[list[float]]) -> dict[str, float]:
    """Return the median of the repeats, which hides other load of the machine, and the worst repeat."""
    return {
        "ticker_p99_ms": statistics.median(percentile(stalls, 0.99) for stalls in repeats) * 1000,
        "ticker_max_ms": statistics.median(max(stalls) for stalls in repeats) * 1000,
        "ticker_worst_ms": max(max(stalls) for stalls in repeats) * 1000,
    }


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, list[tuple[float, float, list[float]]]] = {"bare asyncio": [], "LocalBackend": []}
    control: list[list[float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # First, since later the memory that the other measurements leave is used again.
        memory = await memory_per_run(args.count, folder) if sys.platform == "linux" else None
        async with LocalBackend() as backend:
            await timed(bare, 20, 20, folder)
            await timed(through(backend), 20, 20, folder)
            for _ in range(args.rounds):
                control.append(await beside(args.count))
                rows["bare asyncio"].append(await timed(bare, args.count, args.concurrency, folder))
                rows["LocalBackend"].append(await timed(through(backend), args.count, args.concurrency, folder))
    result: dict[str, Any] = {"memory_per_run_kib": None if memory is None else memory / 1024}
    result["idle beside"] = ticker_figures(control)
    for label, runs in rows.items():
        result[label] = {
            "wall_s": statistics.median(wall for wall, _, _ in runs),
            "driver_cpu_ms_per_run": statistics.median(cpu for _, cpu, _ in runs) / args.count * 1000,
            **ticker_figures([stalls for _, _, stalls in runs]),
        }
    result["ratio"] = statistics.median(
        ours[0] / limit[0] for ours, limit in zip(rows["LocalBackend"], rows["bare asyncio"], strict=True)
    )
    return result


def show(result: dict[str, Any]) -> None:
    columns = ("wall_s", "driver_cpu_ms_per_run", "ticker_p99_ms", "ticker_max_ms", "ticker_worst_ms")
    print(f"{'':14}" + "".join(f"{column:>24}" for column in columns))
    for label in ("bare asyncio", "LocalBackend", "idle beside"):
        row = result[label]
        print(f"{label:14}" + "".join(f"{row[column]:24.2f}" if column in row else f"{'-':>24}" for column in columns))
    print("idle beside: the ticker of an idle loop while another program starts as many processes, two at a time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="processes in each measurement (default: 500)")
    parser.add_argument("--concurrency", type=int, default=0, help="how many at the same time (default: all)")
    add_options(parser, rounds=5)
    args = parser.parse_args()
    args.concurrency = args.concurrency or args.count
    result = asyncio.run(measure(args))
    show(result)
    figures = {"500 processes through LocalBackend, wall time / bare processes": result["ratio"]}
    if result["memory_per_run_kib"] is not None:
        figures["driver memory per process in flight, KiB"] = result["memory_per_run_kib"]
    report("processes", figures, args)


if __name__ == "__main__":
    main()

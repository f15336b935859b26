"""Measure what a Fleet costs on top of the processes themselves.

Runs one no-op project many times through one Fleet, and compares with bare ``asyncio.create_subprocess_exec`` of the
same command, the same number at a time. Tracking is a fake in memory, or with --server a real MLflow server on loopback
(which is then the bottleneck, so that the CPU time of the driver for each run counts). The limit there is the same four
requests by bare httpx around the same process, with nothing else: no retries, no logs, no check of the status. As many
runs as may be active are submitted at a time, on both sides: one that waits in the Fleet's queue would make more
requests. Each of the two alone, and the same requests by aiohttp, show what the machine takes for a process and for
four requests.
--aiohttp measures a Fleet with the transport of httpx-aiohttp, too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from _figures import add_options, percentile, report, resident, start_bare
from mlfleet import Fleet, RunStatus
from mlfleet.testing import FakeTracking
from mlfleet.tracking import RestTracking, Tracking
from mlfleet.tracking.rest import MAX_IN_FLIGHT

Row = tuple[float, float, list[float], float]
TICK = 0.001  # seconds
PROJECT = "name: noop\nentry_points:\n  main:\n    parameters: {n: {type: float, default: 0}}\n    command: ':'\n"


async def tick(stalls: list[float]) -> None:
    """Wake every millisecond, and record the delay of each wake-up."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(TICK)
        stalls.append(time.perf_counter() - before - TICK)


async def timed(work: Callable[[], Awaitable[None]], *, ticking: bool = True) -> Row:
    """Return wall seconds, CPU seconds of this process, the ticker's delays, and the longest garbage collection.

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
    """Collect how long each of Python's garbage collections took, which depends on all objects of the process."""
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


def ticker_figures(repeats: list[list[float]]) -> dict[str, float]:
    """Return the median of the repeats, which hides other load of the machine, and the worst repeat."""
    return {
        "ticker_p99_ms": statistics.median(percentile(stalls, 0.99) for stalls in repeats) * 1000,
        "ticker_max_ms": statistics.median(max(stalls) for stalls in repeats) * 1000,
        "ticker_worst_ms": max(max(stalls) for stalls in repeats) * 1000,
    }


async def bare_processes(count: int, concurrency: int, folder: Path) -> None:
    slots = asyncio.Semaphore(concurrency)

    async def one() -> None:
        async with slots:
            await start_bare(":", folder)

    await asyncio.gather(*(one() for _ in range(count)))


Ask = Callable[[str, str, Mapping[str, Any]], Awaitable[Any]]


async def bare_tracked_processes(
    uri: str, count: int, concurrency: int, folder: Path, *, start: bool = True, library: str = "httpx"
) -> None:
    slots, turns = asyncio.Semaphore(concurrency), asyncio.Semaphore(MAX_IN_FLIGHT)
    api = f"{uri}/api/2.0/mlflow/runs"

    async def one(ask: Ask, n: int) -> None:
        async with slots:
            made = await ask("POST", "create", {"json": {"experiment_id": "0", "tags": [{"key": "a", "value": "b"}]}})
            run_id = made["run"]["info"]["run_id"]
            await ask("POST", "log-batch", {"json": {"run_id": run_id, "params": [{"key": "n", "value": str(n)}]}})
            if start:
                await start_bare(":", folder)
            await ask("GET", "get", {"params": {"run_id": run_id}})
            await ask("POST", "update", {"json": {"run_id": run_id, "status": "FINISHED"}})

    async def all_of_them(ask: Ask) -> None:
        await asyncio.gather(*(one(ask, n) for n in range(count)))

    if library == "httpx":
        import httpx

        async with httpx.AsyncClient(trust_env=False, timeout=120) as client:

            async def by_httpx(method: str, what: str, arguments: Mapping[str, Any]) -> Any:
                async with turns:
                    answer = await client.request(method, f"{api}/{what}", **arguments)
                    return answer.raise_for_status().json()

            await all_of_them(by_httpx)
    else:
        import aiohttp

        async with aiohttp.ClientSession() as session:

            async def by_aiohttp(method: str, what: str, arguments: Mapping[str, Any]) -> Any:
                async with turns, session.request(method, f"{api}/{what}", **arguments) as answer:
                    answer.raise_for_status()
                    return await answer.json()

            await all_of_them(by_aiohttp)


async def requests_per_run(uri: str, folder: Path) -> float:
    """Count the requests of one run that starts at once and finishes, by a hook of the Fleet's HTTP client."""
    import httpx

    seen: list[str] = []

    async def note(request: httpx.Request) -> None:
        seen.append(request.url.path)

    async with httpx.AsyncClient(event_hooks={"request": [note]}, trust_env=False) as client:
        async with Fleet(tracking=RestTracking(uri, client=client)) as fleet:
            await fleet_runs(fleet, 1, folder)
            seen.clear()
            await fleet_runs(fleet, 20, folder, at_once=1)
        return len(seen) / 20


async def fleet_runs(fleet: Fleet, count: int, folder: Path, *, at_once: int | None = None) -> None:
    slots = asyncio.Semaphore(at_once or count)

    async def one(n: int) -> None:
        async with slots:
            run = await fleet.submit(folder, parameters={"n": n}, env_manager="local")
            if (await run.outcome()).status is not RunStatus.FINISHED:
                raise RuntimeError(f"a run failed: {await run.outcome()}")

    await asyncio.gather(*(one(n) for n in range(count)))


async def memory_per_run(count: int, folder: Path) -> float:
    """Return the bytes of this process for each run in flight."""
    (folder / "MLproject").write_text(PROJECT.replace("':'", "exec sleep 600"))
    async with Fleet(tracking=FakeTracking(), max_concurrent=2 * count) as fleet:
        await asyncio.gather(*(fleet.submit(folder, env_manager="local") for _ in range(20)))
        before = resident()
        await asyncio.gather(*(fleet.submit(folder, env_manager="local") for _ in range(count)))
        await asyncio.sleep(1)
        grown = resident() - before
        await fleet.cancel()
    return grown / count


async def one_after_another(rounds: int, folder: Path) -> float:
    """Return the wall time of runs of which each begins at the end of the last one / that of bare processes."""
    ratios = []
    async with Fleet(tracking=FakeTracking()) as fleet:
        await fleet_runs(fleet, 5, folder)
        for _ in range(rounds):
            limit = await timed(partial(bare_processes, 50, 1, folder), ticking=False)
            ours = await timed(partial(fleet_runs, fleet, 50, folder, at_once=1), ticking=False)
            ratios.append(ours[0] / limit[0])
    return statistics.median(ratios)


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
    """Return what is measured besides the Fleet; the first one is what the Fleet is compared with."""
    count = args.count, args.concurrency, folder
    if uri is None:
        return {"bare asyncio": partial(bare_processes, *count)}
    return {
        "bare httpx": partial(bare_tracked_processes, uri, *count),
        "bare aiohttp": partial(bare_tracked_processes, uri, *count, library="aiohttp"),
        "its processes": partial(bare_processes, *count),
        "its requests": partial(bare_tracked_processes, uri, *count, start=False),
    }


def trackings(args: argparse.Namespace, uri: str | None) -> dict[str, Callable[[], Tracking]]:
    if uri is None:
        return {"Fleet": FakeTracking}

    def by_aiohttp() -> Tracking:
        from httpx_aiohttp import AiohttpTransport

        return RestTracking(uri, transport=AiohttpTransport())

    some: dict[str, Callable[[], Tracking]] = {"Fleet": lambda: RestTracking(uri)}
    return {**some, "Fleet, aiohttp": by_aiohttp} if args.aiohttp else some


async def measure(args: argparse.Namespace, uri: str | None, folder: Path) -> dict[str, float]:
    others, fleets = works(args, uri, folder), trackings(args, uri)
    rows: dict[str, list[Row]] = {label: [] for label in (*others, *fleets)}
    control: list[list[float]] = []
    figures: dict[str, float] = {}
    if sys.platform == "linux" and uri is None:
        figures["driver memory per run in flight, KiB"] = await memory_per_run(args.count, folder) / 1024
    (folder / "MLproject").write_text(PROJECT)
    if uri is not None:
        figures["requests to tracking per run"] = await requests_per_run(uri, folder)
    for n in range(args.rounds + 1):
        found = {label: await timed(work, ticking=uri is None) for label, work in others.items()}
        for label, open_ in fleets.items():
            async with Fleet(tracking=open_(), max_concurrent=args.concurrency) as fleet:
                await fleet_runs(fleet, 5, folder)  # what is opened and imported at the first use
                runs = partial(fleet_runs, fleet, args.count, folder, at_once=args.concurrency if uri else None)
                found[label] = await timed(runs, ticking=uri is None)
        if n:  # the first round warms up
            for label, row in found.items():
                rows[label].append(row)
            if uri is None:
                control.append(await beside(args.count))
    show(rows, args.count, ticking=uri is None)
    if control:
        idle = ticker_figures(control)
        print("idle beside: the ticker of an idle loop while another program starts as many processes, two at a time:")
        print("  " + ", ".join(f"{name} {value:.2f}" for name, value in idle.items()))
    limit, ours = next(iter(others)), rows["Fleet"]
    if uri is None:
        ticks = ticker_figures([stalls for _, _, stalls, _ in ours])
        figures["500 no-op runs in memory, wall time / bare processes"] = ratio(ours, rows[limit], 0)
        alone = await one_after_another(args.rounds, folder)
        figures["50 no-op runs one after another in memory, wall time / bare processes"] = alone
        figures["ticker p99 while 500 runs start, ms"] = ticks["ticker_p99_ms"]
        figures["longest stall while 500 runs start, ms"] = ticks["ticker_max_ms"]
        return figures
    figures["driver CPU per run with a server / bare httpx"] = ratio(ours, rows[limit], 1)
    for label in rows:
        figures[f"driver CPU per run, {label}, ms"] = cpu_per_run(rows[label], args.count)
        figures[f"wall time per run, {label}, ms"] = statistics.median(row[0] for row in rows[label]) / args.count * 1e3
    if "Fleet, aiohttp" in rows:
        figures["driver CPU, httpx-aiohttp's transport / httpx's own"] = ratio(rows["Fleet, aiohttp"], ours, 1)
    return figures


def ratio(ours: Sequence[Row], limit: Sequence[Row], column: int) -> float:
    """Return the median of the ratios of each pair that was measured one right after the other.

    The machine may do something else in the next round.
    """
    return statistics.median(one[:2][column] / other[:2][column] for one, other in zip(ours, limit, strict=True))


def cpu_per_run(rows: Sequence[Row], count: int) -> float:
    return statistics.median(cpu for _, cpu, _, _ in rows) / count * 1000


def show(rows: Mapping[str, Sequence[Row]], count: int, *, ticking: bool) -> None:
    columns = ("wall_s", "driver_cpu_ms_per_run", "ticker_p99_ms", "ticker_max_ms", "ticker_worst_ms", "gc_max_ms")
    print(f"{'':14}" + "".join(f"{column:>24}" for column in columns))
    for label, runs in rows.items():
        row = {
            "wall_s": statistics.median(wall for wall, _, _, _ in runs),
            "driver_cpu_ms_per_run": cpu_per_run(runs, count),
            **(ticker_figures([stalls for _, _, stalls, _ in runs]) if ticking else {}),
            "gc_max_ms": statistics.median(pause for _, _, _, pause in runs) * 1000,
        }
        cells = (f"{row[column]:24.2f}" if column in row else f"{'-':>24}" for column in columns)
        print(f"{label:14}" + "".join(cells))
    print("gc_max_ms: the longest garbage collection of Python, which is part of the ticker's delays")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="runs in each measurement (default: 500)")
    parser.add_argument("--concurrency", type=int, default=16, help="runs at the same time (default: 16)")
    parser.add_argument("--server", action="store_true", help="track to a real MLflow server (sqlite) on loopback")
    parser.add_argument("--aiohttp", action="store_true", help="with --server: measure httpx-aiohttp's transport, too")
    add_options(parser, rounds=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        os.environ["MLFLEET_STATE_DIR"] = str(folder / "state")
        os.environ["MLFLEET_CACHE_DIR"] = str(folder / "cache")
        project = folder / "project"
        project.mkdir()
        uri = stack.enter_context(mlflow_server(folder)) if args.server else None
        figures = asyncio.run(measure(args, uri, project))
    report("fleet --server" if args.server else "fleet", figures, args)


if __name__ == "__main__":
    main()

"""Measure what following hundreds of Jobs costs, on the fake API server of the tests in a process of its own.

Counts the watches, and the requests of each run with and without a Secret. Measures the time from a Job's last event
to the return of ``wait``, and how long the event loop of the driver stands still: in CPU time of its thread, which
does not depend on other programs. Their effect on the rest shows in the figure of an empty loop: a million iterations
take 15 to 25 ms on a quiet machine. Each measurement has a process of its own; the figures are medians. ``--minute``
also compares the requests for 100 runs of one minute with those of the reference, which polls each run (the interval
is read from its source).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import json
import os
import re
import statistics
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _figures import add_options, percentile, report
from mlfleet.backends.base import Job
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.backends.kubernetes.config import KubernetesConfig, parse_config

if TYPE_CHECKING:
    from aiohttp import web

TESTS = Path(__file__).parent.parent / "tests"
WATCHES, REQUESTS = "Kubernetes: watches", "Kubernetes: requests per run"
SECRET_REQUESTS = "Kubernetes: requests per run with a Secret"
KINDS = (("/apis/batch/v1/namespaces/default", "jobs"), ("/api/v1/namespaces/default", "pods"))


async def serve(folder: Path) -> None:
    """Serve the fake, with its counts at /stats, until stdin ends."""
    from aiohttp import web

    sys.path.insert(0, str(TESTS))
    from fakes.kubernetes import KubernetesApi, serving
    from fakes.kubernetes_node import Acted, Acting, Cluster

    api, ended = KubernetesApi(), dict[str, float]()

    def play(pod: Mapping[str, Any]) -> Acting:
        seconds = pod["spec"]["containers"][0]["command"][3]
        return Acting(seconds=float(seconds), output=(b"one\n", b"two\n"))

    def note(key: tuple[str, str, str], value: Mapping[str, Any]) -> None:
        if key[0] == "jobs" and any(each["type"] == "Complete" for each in value["status"].get("conditions", ())):
            ended.setdefault(key[2], time.time())

    def stats(request: web.Request) -> web.Response | None:
        if request.path != "/stats":
            return None
        made = [(method, path, "watch" in query) for method, path, query in api.requests if path != "/stats"]
        return web.json_response({"requests": made, "ended": ended})

    api.on_sent.append(note)
    api.faults.append(stats)
    Cluster(api, Acted(play), pace=0.05)
    async with serving(api):
        api.kubeconfig(folder / "kubeconfig")
        print(api.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def measure(count: int, seconds: float, *, secret: bool) -> dict[str, float]:
    """Start `count` runs at once that take `seconds` each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "project").mkdir()
        server = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--serve", name,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert server.stdout is not None
        assert server.stdin is not None
        url = (await server.stdout.readline()).decode().strip()
        try:
            config = parse_config({"code-delivery": "none", "image": "x:1"}, {"KUBECONFIG": str(folder / "kubeconfig")})
            return await follow(count, seconds, config, folder, url, secret=secret)
        finally:
            server.stdin.close()
            await server.wait()


async def follow(
    count: int, seconds: float, config: KubernetesConfig, folder: Path, url: str, *, secret: bool
) -> dict[str, float]:
    returned: dict[str, float] = {}
    async with KubernetesBackend() as backend:
        # The first run opens connections and logs in, which does not belong to the cost of each run.
        await (await backend.submit(job(config, folder, 0))).wait()
        before = await asyncio.to_thread(stats, url)
        delays: list[float] = []
        pauses: list[float] = [0.0]
        jobs = [job(config, folder, seconds, secret=secret) for _ in range(count)]
        ticker = asyncio.create_task(tick(delays))
        gc.callbacks.append(partial(collecting, pauses))
        cpu = time.thread_time()

        async def one(each: Job) -> None:
            run = await backend.submit(each)
            await run.wait()
            returned[run.target.name] = time.time()

        await asyncio.gather(*map(one, jobs))
        cpu = time.thread_time() - cpu
        ticker.cancel()
        gc.callbacks.pop()
        after = await asyncio.to_thread(stats, url)
    made = after["requests"][len(before["requests"]) :]
    latencies = [at - after["ended"][name] for name, at in returned.items()]
    lists = {("GET", f"{base}/{kind}") for base, kind in KINDS}
    stalls = [delay for delay in delays if delay > 0.005]
    return {
        "a million iterations of an empty loop, ms": spin() * 1000,
        WATCHES: sum(watch for _, _, watch in made),
        # Without the two watches and the lists that they begin with, which all runs share.
        REQUESTS: sum(not (watch or (method, path) in lists) for method, path, watch in made) / count,
        "wait() after the last event, p50 ms": percentile(latencies, 0.5) * 1000,
        "wait() after the last event, p95 ms": percentile(latencies, 0.95) * 1000,
        "stalls above 5 ms, total s": sum(stalls),
        "longest stall, ms": max(delays) * 1000,
        "longest garbage collection, ms": max(pauses) * 1000,
        "CPU of the event loop's thread per run, ms": cpu * 1000 / count,
    }


async def tick(delays: list[float]) -> None:
    while True:
        # The CPU time of this thread, not the clock: other programs must not count as a stall.
        began = time.thread_time()
        await asyncio.sleep(0.001)
        delays.append(time.thread_time() - began)


def collecting(pauses: list[float], phase: str, info: object) -> None:
    """Measure how long Python's garbage collector stops everything, which depends on all objects of the process."""
    now = time.thread_time()
    if phase == "start":
        pauses.append(-now)
    else:
        pauses[-1] += now


def spin() -> float:
    began = time.thread_time()
    for _ in range(10**6):
        pass
    return time.thread_time() - began


def job(config: KubernetesConfig, folder: Path, seconds: float, *, secret: bool = False) -> Job:
    run_id = uuid.uuid4().hex
    return Job(
        run_id=run_id, experiment_id="0", project_name="bench", project_dir=folder / "project", command=str(seconds),
        output=folder / run_id / "output.log", config=config, secrets={"TOKEN": "hush"} if secret else {},
    )  # fmt: skip


def stats(url: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/stats") as answer:
        return json.loads(answer.read())


def measured(count: int, seconds: float, *, secret: bool = False) -> dict[str, float]:
    return asyncio.run(measure(count, seconds, secret=secret))


def processes_of_their_own() -> ProcessPoolExecutor:
    """Return a pool with a new process for each measurement, whose garbage does not slow the next one down."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1)


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rows) for name in rows[0]}


def reference_requests(count: int, seconds: float) -> float:
    """Return the reference's requests: one that creates each Job, and one poll of each Job in every interval."""
    # Not imported: it looks for packages by names that benchmarks beside this one have, too.
    spec = importlib.util.find_spec("mlflow")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "projects" / "kubernetes.py").read_text()
    found = re.search(r"POLL_STATUS_INTERVAL = (\d+)", source)
    assert found is not None
    return count * (1 + seconds / int(found[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="*", default=[500, 1000], help="runs in flight (default: 500 1000)")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds that each run takes (default: 5)")
    parser.add_argument("--minute", action="store_true", help="also compare 100 runs of one minute with the reference")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    add_options(parser, rounds=3)
    options = parser.parse_args()
    if options.serve is not None:
        asyncio.run(serve(options.serve))
        return
    os.environ.pop("KUBECONFIG", None)
    figures: dict[str, float] = {}
    with processes_of_their_own() as processes:
        for count in options.runs:
            rows = [processes.submit(measured, count, options.seconds).result() for _ in range(options.rounds)]
            row = medians(rows)
            for name in (WATCHES, REQUESTS):
                figures[name] = max(figures.get(name, 0.0), row.pop(name))
            figures |= {f"Kubernetes: {count} runs: {name}": value for name, value in row.items()}
        figures[SECRET_REQUESTS] = processes.submit(measured, 100, 0.5, secret=True).result()[REQUESTS]
    if options.minute:
        made = measured(100, 60.0)[REQUESTS] * 100
        figures["Kubernetes: requests of the reference / ours, 100 runs of a minute"] = (
            reference_requests(100, 60.0) / made
        )
    report("kubernetes_backend", figures, options)


if __name__ == "__main__":
    main()

"""What following hundreds of Jobs costs, on the fake API server of the tests, which runs in a process of its own.

Counts the watches and the requests of each run; measures how long after a Job's last event was sent `wait` returns, and
for how long the event loop of the driver stands still: by the CPU time of its thread, so that what else the machine
does is no stall. A busy machine is slower all the same, which the first line of each table tells: a million turns of an
empty loop take 15 to 25 ms on a quiet one. Each measurement has a process of its own; shown are the medians of several.
With --minute it also counts the requests for 100 runs of one minute, beside those of the reference, which asks for each
run every few seconds (the interval is read from its source).
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

from mlfleet.backends.base import Job
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.backends.kubernetes.config import KubernetesConfig, parse_config
from processes import percentile

if TYPE_CHECKING:
    from aiohttp import web

TESTS = Path(__file__).parent.parent / "tests"


async def serve(folder: Path) -> None:
    """The fake, and what it has counted at /stats; until stdin ends."""
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


async def measure(count: int, seconds: float) -> dict[str, float]:
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
            return await follow(count, seconds, config, folder, url)
        finally:
            server.stdin.close()
            await server.wait()


async def follow(count: int, seconds: float, config: KubernetesConfig, folder: Path, url: str) -> dict[str, float]:
    returned: dict[str, float] = {}
    async with KubernetesBackend() as backend:
        # The first run opens connections and reads credentials, which is no part of what each costs.
        await (await backend.submit(job(config, folder, 0))).wait()
        before = await asyncio.to_thread(stats, url)
        delays: list[float] = []
        pauses: list[float] = [0.0]
        jobs = [job(config, folder, seconds) for _ in range(count)]
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
    stalls = [delay for delay in delays if delay > 0.005]
    return {
        "a million turns of an empty loop, ms": spin() * 1000,
        "runs": count,
        "watches opened": sum(watch for _, _, watch in made),
        "requests per run": len(made) / count,
        "wait() after the last event, p50 ms": percentile(latencies, 0.5) * 1000,
        "wait() after the last event, p95 ms": percentile(latencies, 0.95) * 1000,
        "stalls above 5 ms, total s": sum(stalls),
        "longest stall, ms": max(delays) * 1000,
        "longest garbage collection, ms": max(pauses) * 1000,
        "CPU of the event loop's thread per run, ms": cpu * 1000 / count,
    }


async def tick(delays: list[float]) -> None:
    while True:
        # The CPU time of this thread, not the clock: what else the machine does is no stall of ours.
        began = time.thread_time()
        await asyncio.sleep(0.001)
        delays.append(time.thread_time() - began)


def collecting(pauses: list[float], phase: str, info: object) -> None:
    """How long Python's garbage collector holds up everything: a matter of all that the process has."""
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


def job(config: KubernetesConfig, folder: Path, seconds: float) -> Job:
    run_id = uuid.uuid4().hex
    return Job(
        run_id=run_id, experiment_id="0", project_name="bench", project_dir=folder / "project", command=str(seconds),
        output=folder / run_id / "output.log", config=config,
    )  # fmt: skip


def stats(url: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/stats") as answer:
        return json.loads(answer.read())


def measured(count: int, seconds: float) -> dict[str, float]:
    return asyncio.run(measure(count, seconds))


def processes_of_their_own() -> ProcessPoolExecutor:
    """One for each measurement: what an earlier one has left is not to be collected in the next."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1)


def in_the_middle(rows: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure, and the worst of the longest stalls."""
    row = {name: statistics.median(each[name] for each in rows) for name in rows[0]}
    return row | {"longest stall, worst, ms": max(each["longest stall, ms"] for each in rows)}


def reference_requests(count: int, seconds: float) -> float:
    """Of the reference: one that creates each Job, and one poll of each for every interval."""
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
    parser.add_argument("--runs", type=int, nargs="*", default=[500, 1000], help="how many at once")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each (default: 3)")
    parser.add_argument("--minute", action="store_true", help="also 100 runs of one minute, beside the reference")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        asyncio.run(serve(options.serve))
        return
    os.environ.pop("KUBECONFIG", None)
    with processes_of_their_own() as processes:
        rows = [
            in_the_middle([processes.submit(measured, count, options.seconds).result() for _ in range(options.repeat)])
            for count in options.runs
        ]
    if options.minute:
        row = measured(100, 60.0)
        row["requests of the reference per request of ours"] = reference_requests(100, 60.0) / (
            row["requests per run"] * 100
        )
        rows.append(row)
    for row in rows:
        for name, value in row.items():
            print(f"{name:<50} {value:>10.3g}")
        print()
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()

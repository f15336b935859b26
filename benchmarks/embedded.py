"""Measure what the embedded store costs on top of the mlflow client that it calls.

Makes, logs and ends many runs in a new sqlite database: through ``EmbeddedTracking`` from one event loop, and by the
bare mlflow client with the same calls in four threads. Each has a database of its own in each round.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _figures import add_options, report
from mlfleet.runs import RunStatus
from mlfleet.tracking import EmbeddedTracking
from mlfleet.tracking.base import end_run

_THREADS = 4  # as many as EmbeddedTracking uses
TAGS = {f"tag{number}": "value" for number in range(8)}
PARAMS = {"lr": "0.1", "n": "3"}
JOB = {"mlfleet.ref": "{}"}


def embedded(uri: str, count: int) -> float:
    async def one(tracking: EmbeddedTracking) -> None:
        run = await tracking.create_run("0", name="run", tags=TAGS)
        await tracking.log(run.run_id, params=PARAMS, tags=JOB)
        await end_run(tracking, run.run_id, RunStatus.FINISHED, patience=60)

    async def every() -> float:
        async with EmbeddedTracking(uri) as tracking:
            await one(tracking)  # makes the database and its tables
            began = time.perf_counter()
            await asyncio.gather(*(one(tracking) for _ in range(count)))
            return time.perf_counter() - began

    return asyncio.run(every())


def bare(uri: str, count: int) -> float:
    from mlflow import MlflowClient
    from mlflow.entities import Param, RunTag

    client: Any = MlflowClient(tracking_uri=uri)

    def one() -> None:
        run_id = client.create_run("0", tags=TAGS, run_name="run").info.run_id
        tags = [RunTag(*pair) for pair in JOB.items()]
        client.log_batch(run_id, params=[Param(*pair) for pair in PARAMS.items()], tags=tags)
        if client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, "FINISHED")

    one()
    began = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as pool:
        for future in [pool.submit(one) for _ in range(count)]:
            future.result()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="runs in each measurement (default: 100)")
    add_options(parser, rounds=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    seconds: dict[Callable[[str, int], float], list[float]] = {bare: [], embedded: []}
    for number in range(args.rounds + 1):
        for work in list(seconds)[:: 1 if number % 2 else -1]:
            gc.collect()
            with tempfile.TemporaryDirectory() as folder:
                taken = work(f"sqlite:///{Path(folder, 'mlflow.db')}", args.count)
            if number:  # the first round warms up
                seconds[work].append(taken)
    ratios = [ours / limit for ours, limit in zip(seconds[embedded], seconds[bare], strict=True)]
    figures = {
        "embedded store, time per run / bare mlflow client": statistics.median(ratios),
        "embedded store, ms per run": statistics.median(seconds[embedded]) / args.count * 1000,
        "bare mlflow client in 4 threads, ms per run": statistics.median(seconds[bare]) / args.count * 1000,
    }
    report("embedded", figures, args)


if __name__ == "__main__":
    main()

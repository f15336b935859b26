"""Run a sweep in a process that tests kill: ``python sweep_driver.py URI TRACKING_URI NAME COUNT JOBS``."""

from __future__ import annotations

import asyncio
import sys

from mlfleet import Fleet, grid


async def main(uri: str, tracking_uri: str, name: str, count: int, jobs: int) -> None:
    async with Fleet(tracking_uri=tracking_uri, max_concurrent=jobs) as fleet:
        space = grid(n=range(count))
        async with fleet.sweep(uri, space, name=name, resume=True, env_manager="local", give_up_after=None) as sweep:
            print("entered", flush=True)
            async for result in sweep:
                print(result.index, result.status, result.attempts, result.earlier, result.reason, flush=True)
        print(sweep.counts.finished, flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])))

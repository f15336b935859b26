"""A small program of a user: type checkers read it with the installed package."""

import asyncio
from pathlib import Path

import mlfleet
from mlfleet.tracking import RestTracking


async def run_one(uri: str | Path) -> float | None:
    run = await mlfleet.run_async(uri, parameters={"alpha": 0.5}, backend="local", tags={"team": "blue"})
    outcome: mlfleet.Outcome = await run.outcome()
    if outcome.status is not mlfleet.RunStatus.FINISHED:
        print(outcome.reason, outcome.kind)
    async for line in run.logs(tail=10):
        print(line.end, line)
    return run.metrics.get("rmse")


async def run_many(uri: str) -> list[str]:
    tracking = RestTracking("http://127.0.0.1:5000", max_in_flight=4)
    async with mlfleet.Fleet(tracking=tracking, max_concurrent=8, on_exit="cancel") as fleet:
        space = mlfleet.grid(alpha=[0.1, 0.5], l1=[0, 1])
        async with fleet.sweep(uri, space, name="night", retry=mlfleet.Retry(attempts=2)) as sweep:
            async for result in sweep:
                print(result.index, result.status, result.metrics)
        found = await fleet.get("0" * 32)
        await found.cancel(grace=3)
        return [run.run_id for run in fleet.runs]


def main() -> None:
    asyncio.run(run_one("examples/quickstart"))
    finished: mlfleet.BlockingRun = mlfleet.run("examples/quickstart", synchronous=True)
    print(finished.run_id, finished.get_status())


main()

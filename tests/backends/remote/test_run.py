"""The handle of a run elsewhere, whose task sees it to its end."""

from __future__ import annotations

import asyncio
import logging

import pytest

from mlfleet.backends._remote.run import SupervisedRun, SupervisedRuns
from mlfleet.errors import BackendError
from mlfleet.runs import FailureKind, Outcome, RunStatus


class Broken(SupervisedRun):
    """A run whose supervision meets a full disk."""

    backend = "test"
    noun = "job"

    async def started(self) -> None:
        return None

    async def get_status(self) -> RunStatus:
        return RunStatus.RUNNING

    async def _live(self) -> Outcome:
        raise OSError("no space left on device")

    async def _tidy(self) -> None:
        return None


async def test_an_unexpected_error_ends_the_run_and_leaves_no_waiter(caplog: pytest.LogCaptureFixture) -> None:
    run, runs = Broken("1" * 32, None, submitted=True), SupervisedRuns()
    with caplog.at_level(logging.CRITICAL, "mlfleet.backends"):
        runs.start(run, name="test")
        async with asyncio.timeout(10):
            outcome = await run.outcome()
            await runs.close()
    assert (outcome.status, outcome.kind) == (RunStatus.FAILED, FailureKind.INFRASTRUCTURE)
    assert isinstance(outcome.error, BackendError)
    assert outcome.reason == "this process cannot look after the job any more: OSError: no space left on device"


class Slow(Broken):
    """A run that ends at once, and tidies up as long as the test wants."""

    def __init__(self) -> None:
        super().__init__("1" * 32, None, submitted=True)
        self.tidying, self.go = asyncio.Event(), asyncio.Event()
        self.has_tidied = False

    async def _live(self) -> Outcome:
        return Outcome(RunStatus.FINISHED, 0)

    async def _tidy(self) -> None:
        self.tidying.set()
        await self.go.wait()
        self.has_tidied = True


async def test_a_cancellation_of_all_tasks_while_a_run_tidies_up_leaves_no_waiter_and_nothing_undone() -> None:
    run, runs = Slow(), SupervisedRuns()
    runs.start(run, name="test")
    await run.tidying.wait()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:  # as asyncio.run does at its end
        task.cancel()
    run.go.set()
    async with asyncio.timeout(10):
        assert (await run.outcome()).status is RunStatus.FINISHED
        await runs.close()
    assert run.has_tidied

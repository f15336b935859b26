"""The contract suite for backends. The tests of a backend subclass `BackendContract` and give it a harness.

So::

    class TestMine(BackendContract):
        @pytest.fixture
        def harness(self, tmp_path: Path) -> Harness: ...
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from mlfleet.backends.base import Backend, BackendRun, Job
from mlfleet.errors import BackendError
from mlfleet.runs import JobRef, RunStatus, SubmittedRun

__all__ = ["BackendContract", "Bench", "Harness"]

READY = "ready"
FOREVER = f"echo {READY}; sleep 600"


@dataclass(frozen=True)
class Harness:
    """The suite's access to one backend.

    Attributes:
        open: Returns a new instance of the backend, to be entered.
        job: Makes a Job from a run id and a command for ``bash -c`` (or ``sh -c``). Its output is captured, and its
            project folder holds the file ``project.txt`` with the one line ``of the project``.
        leftovers: Returns one text for each process or container that still exists of the job with that run id.
        cancel_grace: Seconds of grace for jobs that must be ended by force.
        lag: Seconds after which output and states are known here.
    """

    open: Callable[[], AbstractAsyncContextManager[Backend]]
    job: Callable[..., Job]
    leftovers: Callable[[str], Awaitable[Sequence[str]]]
    cancel_grace: float = 0.5
    lag: float = 0.0


@dataclass(frozen=True)
class Bench:
    """An open backend and the jobs that were submitted to it.

    Attributes:
        harness: The access to the backend.
        backend: The backend.
        run_ids: The run ids of all jobs that were made.
    """

    harness: Harness
    backend: Backend
    run_ids: list[str] = field(default_factory=list)

    def job(self, command: str, **options: object) -> Job:
        run_id = uuid.uuid4().hex
        self.run_ids.append(run_id)
        return self.harness.job(run_id, command, **options)

    async def submit(self, command: str, **options: object) -> BackendRun:
        return await self.backend.submit(self.job(command, **options))

    async def submit_ready(self, command: str, **options: object) -> BackendRun:
        """Submit a command that prints READY, and wait until it has."""
        run = await self.submit(command, **options)
        await seen(run, READY)
        return run

    async def leftovers(self) -> list[str]:
        return [text for run_id in self.run_ids for text in await self.harness.leftovers(run_id)]


async def seen(run: SubmittedRun, text: str) -> list[str]:
    """Return the lines of the run up to the line `text`, as soon as it is there."""
    lines: list[str] = []
    async for line in run.logs():
        lines.append(line)
        if line == text:
            return lines
    raise AssertionError(f"the run ended without the line {text!r}; it said {lines}")


async def everything(run: SubmittedRun, *, follow: bool = True) -> list[str]:
    return [line async for line in run.logs(follow=follow)]


@pytest.mark.asyncio
class BackendContract:
    """The suite. Subclass it as ``Test…`` with a fixture ``harness``.

    The jobs are lines of bash that print, sleep, fail and ignore signals. After each test nothing of them may be left.
    """

    @pytest_asyncio.fixture
    async def bench(self, harness: Harness) -> AsyncIterator[Bench]:
        async with harness.open() as backend:
            bench = Bench(harness, backend)
            yield bench
        assert await bench.leftovers() == []

    # --- how a run ends

    async def test_finished(self, bench: Bench) -> None:
        run = await bench.submit("echo done")
        assert await run.wait() is True
        assert await run.get_status() is RunStatus.FINISHED
        outcome = await run.outcome()
        assert (outcome.status, outcome.exit_code, outcome.reason) == (RunStatus.FINISHED, 0, None)
        assert await everything(run) == ["done"]

    async def test_failed_with_exit_code_and_last_lines(self, bench: Bench) -> None:
        run = await bench.submit("for n in $(seq 30); do echo line $n; done; echo why it failed >&2; exit 3")
        assert await run.wait() is False
        outcome = await run.outcome()
        assert (outcome.status, outcome.exit_code) == (RunStatus.FAILED, 3)
        assert outcome.reason == "exit code 3"
        assert "why it failed" in outcome.output
        assert 10 <= len(outcome.output) <= 30
        assert await run.get_status() is RunStatus.FAILED

    async def test_killed_by_somebody_else_is_failed(self, bench: Bench) -> None:
        run = await bench.submit("kill -KILL $$")
        outcome = await run.outcome()
        assert outcome.status is RunStatus.FAILED
        assert outcome.exit_code in (-9, 137)

    async def test_command_not_found_is_failed(self, bench: Bench) -> None:
        outcome = await (await bench.submit("no-such-program-anywhere")).outcome()
        assert (outcome.status, outcome.exit_code) == (RunStatus.FAILED, 127)
        assert any("no-such-program-anywhere" in line for line in outcome.output)

    # --- what a run sees

    async def test_variables_and_secrets_reach_the_command(self, bench: Bench) -> None:
        value = 'two words, "quotes", $HOME and\na second line'
        run = await bench.submit(
            'printf "%s|%s\\n" "$GIVEN" "$HIDDEN"', environ={"GIVEN": value}, secrets={"HIDDEN": "hush-hush"}
        )
        assert "\n".join(await everything(run)) == f"{value}|hush-hush"

    async def test_secrets_show_in_nothing_that_others_read(self, bench: Bench) -> None:
        job = bench.job("test ${#HIDDEN} = 9", secrets={"HIDDEN": "hush-hush"})
        reference = bench.backend.reference(job)
        run = await bench.backend.submit(job)
        outcome = await run.outcome()
        assert outcome.status is RunStatus.FINISHED
        shown = [job, outcome, reference, reference and reference.to_json(), dict(bench.backend.tags(run)), run]
        assert "hush-hush" not in repr(shown)

    async def test_runs_in_the_folder_of_the_project(self, bench: Bench) -> None:
        assert await everything(await bench.submit("cat project.txt")) == ["of the project"]

    async def test_stdin_is_empty(self, bench: Bench) -> None:
        assert await everything(await bench.submit("cat; echo end")) == ["end"]

    # --- waiting

    async def test_running_until_it_ends(self, bench: Bench) -> None:
        run = await bench.submit(f"echo ready; sleep {0.3 + bench.harness.lag}")
        assert await run.get_status() in (RunStatus.SCHEDULED, RunStatus.RUNNING)
        await run.started()
        await seen(run, READY)
        assert await run.get_status() is RunStatus.RUNNING
        await run.wait()
        assert await run.get_status() is RunStatus.FINISHED

    async def test_many_waiters_are_told_the_same(self, bench: Bench) -> None:
        run = await bench.submit("exit 4")
        outcomes = await asyncio.gather(*(run.outcome() for _ in range(50)))
        assert {(outcome.status, outcome.exit_code) for outcome in outcomes} == {(RunStatus.FAILED, 4)}
        assert await asyncio.gather(*(run.wait() for _ in range(50))) == [False] * 50

    async def test_cancelled_waiter_leaves_the_run_alone(self, bench: Bench) -> None:
        run = await bench.submit_ready(f"echo ready; sleep {0.3 + bench.harness.lag}; echo end")
        waiters = [asyncio.create_task(run.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        waiters[0].cancel()
        assert await asyncio.gather(*waiters[1:]) == [True, True]
        with pytest.raises(asyncio.CancelledError):
            await waiters[0]
        assert await everything(run) == ["ready", "end"]

    async def test_many_at_once(self, bench: Bench) -> None:
        runs = await asyncio.gather(*(bench.submit(f"exit {n}") for n in range(16)))
        assert [(await run.outcome()).exit_code for run in runs] == list(range(16))

    # --- cancelling

    async def test_cancel_while_it_runs(self, bench: Bench) -> None:
        run = await bench.submit_ready(FOREVER)
        waiter = asyncio.create_task(run.wait())
        await run.cancel()
        assert await bench.leftovers() == []
        assert await waiter is False
        assert (await run.outcome()).status is RunStatus.KILLED
        assert await run.get_status() is RunStatus.KILLED

    async def test_cancel_at_once_after_submit(self, bench: Bench) -> None:
        run = await bench.submit(FOREVER)
        await run.cancel()
        assert await bench.leftovers() == []
        assert (await run.outcome()).status is RunStatus.KILLED

    async def test_cancel_after_the_end_changes_nothing(self, bench: Bench) -> None:
        good, bad = await bench.submit("exit 0"), await bench.submit("exit 7")
        await asyncio.gather(good.wait(), bad.wait())
        await asyncio.gather(good.cancel(), bad.cancel())
        assert await good.get_status() is RunStatus.FINISHED
        assert (await bad.outcome()).exit_code == 7
        assert (await bad.outcome()).status is RunStatus.FAILED

    async def test_cancel_twice_and_at_the_same_time(self, bench: Bench) -> None:
        run = await bench.submit_ready(FOREVER)
        await asyncio.gather(*(run.cancel() for _ in range(5)))
        assert await bench.leftovers() == []
        await run.cancel()
        assert await run.get_status() is RunStatus.KILLED

    async def test_cancelled_cancel_still_ends_the_run(self, bench: Bench) -> None:
        run = await bench.submit_ready(
            f"trap '' TERM; echo {READY}; while :; do sleep 1; done", cancel_grace=bench.harness.cancel_grace
        )
        cancelling = asyncio.create_task(run.cancel())
        await asyncio.sleep(0)
        cancelling.cancel()
        assert await run.wait() is False
        with pytest.raises(asyncio.CancelledError):
            await cancelling
        await run.cancel()
        assert await bench.leftovers() == []

    async def test_time_to_tidy_up(self, bench: Bench) -> None:
        run = await bench.submit_ready(f"trap 'echo tidied; exit 0' TERM; echo {READY}; while :; do sleep 0.1; done")
        await run.cancel()
        assert "tidied" in await everything(run)
        assert (await run.outcome()).status is RunStatus.KILLED

    async def test_what_ignores_sigterm_is_ended_by_force(self, bench: Bench) -> None:
        run = await bench.submit_ready(
            f"trap '' TERM; echo {READY}; while :; do sleep 1; done", cancel_grace=bench.harness.cancel_grace
        )
        await run.cancel()
        assert await bench.leftovers() == []
        assert (await run.outcome()).status is RunStatus.KILLED

    async def test_grandchildren_end_with_it(self, bench: Bench) -> None:
        run = await bench.submit_ready(
            f"(trap '' TERM; (sleep 600 & sleep 600) & sleep 600; :) & (sleep 600; :) & echo {READY}; wait",
            cancel_grace=bench.harness.cancel_grace,
        )
        await run.cancel()
        assert await bench.leftovers() == []

    async def test_cancelled_submit_leaves_nothing(self, bench: Bench) -> None:
        for turns in (0, 1, 2, 3, 5, 8, 20, 50):
            submitting = asyncio.create_task(bench.submit("sleep 600"))
            for _ in range(turns):
                await asyncio.sleep(0.0005)
            submitting.cancel()
            try:
                run = await submitting
            except asyncio.CancelledError:
                assert await bench.leftovers() == []
            else:
                await run.cancel()

    async def test_closing_the_backend_ends_its_runs(self, harness: Harness) -> None:
        async with harness.open() as backend:
            bench = Bench(harness, backend)
            runs = [await bench.submit_ready(FOREVER) for _ in range(3)]
        assert await bench.leftovers() == []
        assert [await run.get_status() for run in runs] == [RunStatus.KILLED] * 3

    # --- logs

    async def test_logs_live_and_again_after_the_end(self, bench: Bench) -> None:
        run = await bench.submit_ready(
            f"echo one; echo ready; sleep {0.2 + bench.harness.lag}; echo two >&2; printf three"
        )
        assert await run.get_status() is RunStatus.RUNNING
        assert await everything(run) == ["one", "ready", "two", "three"]
        assert await everything(run) == ["one", "ready", "two", "three"]
        assert await everything(run, follow=False) == ["one", "ready", "two", "three"]

    async def test_two_followers_see_everything(self, bench: Bench) -> None:
        run = await bench.submit("for n in $(seq 200); do echo $n; done; sleep 0.1; echo end")
        first, second = await asyncio.gather(everything(run), everything(run))
        assert first == second == [*map(str, range(1, 201)), "end"]

    async def test_logs_without_following_do_not_wait(self, bench: Bench) -> None:
        run = await bench.submit_ready(FOREVER)
        assert await everything(run, follow=False) == [READY]
        await run.cancel()
        assert await everything(run) == [READY]

    async def test_follower_that_leaves_changes_nothing(self, bench: Bench) -> None:
        run = await bench.submit("echo one; echo ready; sleep 0.2; echo end")
        await seen(run, "one")
        assert await everything(run) == ["one", "ready", "end"]

    async def test_binary_output(self, bench: Bench) -> None:
        run = await bench.submit("printf 'a\\000\\377\\nb\\n'")
        assert await everything(run) == ["a\0\N{REPLACEMENT CHARACTER}", "b"]

    # --- finding a run again

    async def test_attach_or_say_that_it_cannot(self, bench: Bench) -> None:
        job = bench.job("echo ready; sleep 0.5; echo end; exit 6")
        reference = bench.backend.reference(job)
        if reference is None:
            with pytest.raises(BackendError, match="end with the process that started them"):
                await bench.backend.attach(JobRef(bench.backend.name, job.run_id))
            return
        await seen(await bench.backend.submit(job), "ready")  # until then it could be withdrawn
        assert await bench.backend.is_abandoned(reference) is False  # this process writes its status
        assert await bench.backend.withdraw(reference) is False  # it is on its way already
        async with bench.harness.open() as other:
            again = await other.attach(reference)
            assert again.run_id == job.run_id
            assert (await again.outcome()).exit_code == 6
            assert await everything(again) == ["ready", "end"]

    async def test_a_run_that_is_detached_from_goes_on(self, bench: Bench) -> None:
        job = bench.job(FOREVER)
        reference = bench.backend.reference(job)
        if reference is None:
            return
        run = await bench.backend.submit(job)
        await seen(run, READY)
        async with bench.harness.open() as other:
            other.detach(await other.attach(reference))
        assert await run.get_status() is RunStatus.RUNNING
        await run.cancel()
        assert await run.get_status() is RunStatus.KILLED

    # --- runs of other processes

    async def test_list_runs_gives_what_goes_on_or_nothing(self, bench: Bench) -> None:
        job = bench.job(FOREVER)
        run = await bench.backend.submit(job)
        await seen(run, READY)
        listed = {each.run_id: each for each in await bench.backend.list_runs()}
        assert all(each.backend == bench.backend.name for each in listed.values())
        if job.run_id in listed:
            assert listed[job.run_id].supervised
            assert listed[job.run_id].created.tzinfo is not None
            assert listed[job.run_id].state
        await run.cancel()
        assert job.run_id not in {each.run_id for each in await bench.backend.list_runs()}

    async def test_prune_leaves_what_this_process_looks_after(self, bench: Bench) -> None:
        job = bench.job(FOREVER)
        run = await bench.backend.submit(job)
        await seen(run, READY)
        assert not await bench.backend.prune([job.run_id], running=True, dry_run=True)
        assert not await bench.backend.prune([job.run_id], running=True)
        assert await run.get_status() is RunStatus.RUNNING
        await run.cancel()

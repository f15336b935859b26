"""What Slurm, its administrators and other users do to jobs, on a real Slurm."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from backends.slurm.conftest import MakeJob, OnPath, leave, line_of, running
from components.slurm import CPUS, QUICK, Slurm
from mlfleet import Resources, RunLost, RunStatus
from mlfleet._retry import RetryPolicy
from mlfleet.backends.base import Presence
from mlfleet.backends.slurm import SlurmBackend
from mlfleet.errors import BackendError, SubmitError
from mlfleet.runs import FailureKind

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(120)]


async def call(slurm: Slurm, *argv: str) -> str:
    return await anyio.to_thread.run_sync(lambda: slurm.call(*argv))


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something that Slurm says is true."""
    while not await anyio.to_thread.run_sync(holds):  # noqa: ASYNC110 - Slurm has no event to wait for
        await anyio.sleep(0.05)


# ---- submits ------------------------------------------------------------------------------------------------------


async def test_a_refused_job_is_an_error_with_the_words_of_slurm_and_leaves_nothing(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob
) -> None:
    with pytest.raises(SubmitError, match=r"does not take the job: .*[Ii]nvalid partition"):
        await backend.submit(make_job("true", {"partition": "nowhere"}))
    assert list((slurm.work_dir / "runs").iterdir()) == []


async def test_a_submit_whose_answer_is_lost_runs_once(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob, tmp_path: Path, on_path: OnPath
) -> None:
    on_path("sbatch", '"$real" "$@" > /dev/null; echo "sbatch: error: Socket timed out on send/recv" >&2; exit 1')
    job = make_job(f"echo x >> {tmp_path}/executions")
    run = await backend.submit(job)
    assert await run.wait()
    assert (tmp_path / "executions").read_text() == "x\n"
    assert slurm.jobs("-n", f"mlfleet-{job.run_id}") == []


async def test_a_submit_is_not_repeated_while_nobody_knows_whether_it_made_a_job(
    slurm: Slurm, make_job: MakeJob, tmp_path: Path, on_path: OnPath
) -> None:
    submits, asked = tmp_path / "submits", tmp_path / "asked"
    on_path("sbatch", f'echo x >> {submits}; "$real" "$@" > /dev/null; echo "sbatch: error: timed out" >&2; exit 1')
    on_path(
        "squeue",
        f'if [[ " $* " = *" -n "* ]]; then echo x >> {asked}; [ $(wc -l < {asked}) -lt 8 ] && exit 1; fi\n'
        'exec "$real" "$@"',
    )
    async with SlurmBackend(timing=replace(QUICK, search=0.6)) as backend:
        assert await (await backend.submit(make_job("true"))).wait()
    assert submits.read_text() == "x\n"


async def test_a_second_job_of_the_same_run_does_nothing(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob, tmp_path: Path, on_path: OnPath
) -> None:
    # The first submit succeeds late: neither its answer nor its job is seen before the second one.
    on_path(
        "sbatch", f'in=$(cat); echo "$in" | "$real" "$@"; mkdir {tmp_path}/once 2>&- && echo "$in" | "$real" "$@"; true'
    )
    job = make_job(f"echo x >> {tmp_path}/executions; sleep 2; echo done >> {tmp_path}/executions", {"latency": 0.2})
    run = await backend.submit(job)
    assert await run.wait()
    assert (tmp_path / "executions").read_text() == "x\ndone\n"
    await until(lambda: not slurm.jobs())
    assert (tmp_path / "executions").read_text() == "x\ndone\n"
    assert [line async for line in run.logs()] == []


async def test_a_stopped_controller_ends_no_run_and_a_submit_waits_for_it(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    first = await running(backend, make_job(f"echo ready; until [ -e {go} ]; do sleep 0.05; done"))
    controller = slurm.controller
    controller.suspend()
    try:
        submitting = asyncio.create_task(backend.submit(make_job(f"echo x >> {tmp_path}/executions")))
        go.touch()
        await asyncio.sleep(7)  # sbatch gives up after MessageTimeout, 5 s
        assert await first.get_status() is RunStatus.RUNNING
    finally:
        controller.resume()
    second = await submitting
    assert await first.wait()
    assert await second.wait()
    assert (tmp_path / "executions").read_text() == "x\n"


async def test_a_job_that_can_never_start_is_ended_with_the_reason_unless_it_may_wait_for_ever(
    backend: SlurmBackend, make_job: MakeJob
) -> None:
    patient = await backend.submit(make_job("true", {"nodes": 2, "start-timeout": None}))
    run = await backend.submit(make_job("true", {"nodes": 2, "start-timeout": 0.5}))
    outcome = await run.outcome()
    assert (outcome.status, outcome.kind) == (RunStatus.FAILED, FailureKind.FAILURE)
    assert "can never start: Slurm gives the reason Partition" in str(outcome.reason)
    assert await patient.get_status() is RunStatus.SCHEDULED
    await patient.cancel()


async def test_the_copy_of_the_project_stays_if_it_is_to_be_kept(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob
) -> None:
    jobs = [make_job("echo made > made", {"keep": keep}) for keep in (True, False)]
    for job in jobs:
        assert await (await backend.submit(job)).wait()
    kept, removed = (slurm.work_dir / "runs" / job.run_id / "project" for job in jobs)
    assert (kept / "made").read_text() == "made\n"
    assert not removed.exists()


# ---- what happens to running jobs ---------------------------------------------------------------------------------


async def test_a_job_that_somebody_else_cancels_has_failed(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob
) -> None:
    run = await running(backend, make_job("echo ready; sleep 600"))
    await call(slurm, "scancel", run.job)
    outcome = await run.outcome()
    assert (outcome.status, outcome.kind) == (RunStatus.FAILED, FailureKind.INFRASTRUCTURE)
    assert outcome.reason == "the job was cancelled from outside"


async def test_a_preempted_job_has_failed_as_preempted(slurm: Slurm, backend: SlurmBackend, make_job: MakeJob) -> None:
    run = await running(backend, make_job("echo ready; sleep 600", resources=Resources(cpus=CPUS)))
    urgent = await backend.submit(make_job("true", {"partition": "urgent"}, resources=Resources(cpus=CPUS)))
    outcome = await run.outcome()
    assert (outcome.status, outcome.kind) == (RunStatus.FAILED, FailureKind.PREEMPTED)
    assert await urgent.wait()


async def test_a_job_on_a_node_that_goes_down_has_failed(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob
) -> None:
    run = await running(backend, make_job("echo ready; sleep 600"))
    try:
        await call(slurm, "scontrol", "update", "nodename=n1", "state=down", "reason=test")
        outcome = await run.outcome()
    finally:
        await anyio.to_thread.run_sync(slurm.resume_node)
    assert (outcome.status, outcome.kind) == (RunStatus.FAILED, FailureKind.INFRASTRUCTURE)
    assert "NODE_FAIL" in str(outcome.reason)


async def test_a_job_above_its_memory_limit_has_failed_as_oom(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob
) -> None:
    command = f"{sys.executable} -c 'import time; block = bytearray(300_000_000); time.sleep(60)'"
    outcome = await (await backend.submit(make_job(command, {"mem": "50M"}))).outcome()
    assert (outcome.status, outcome.kind) == (RunStatus.FAILED, FailureKind.OOM)


async def test_a_job_that_the_administrator_requeues_runs_again(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob, tmp_path: Path, on_path: OnPath
) -> None:
    on_path("squeue", '"$real" "$@" | sed "s/RUNNING/PENDING/"')  # a poll always comes too early
    executions, go = tmp_path / "executions", tmp_path / "go"
    command = f"echo $TOKEN >> {executions}; echo ready; until [ -e {go} ]; do sleep 0.1; done"
    run = await running(backend, make_job(command, {"requeue": True}, secrets={"TOKEN": "hush-hush"}))
    await call(slurm, "scontrol", "requeue", run.job)
    # Slurm holds a requeued job for a while (BeginTime).
    await until(lambda: "PENDING" in "".join(slurm.jobs("-j", run.job)))
    while await run.get_status() is RunStatus.RUNNING:  # noqa: ASYNC110 - Slurm has no event to wait for
        await anyio.sleep(0.05)
    await call(slurm, "scontrol", "update", f"jobid={run.job}", "starttime=now")
    await until(lambda: executions.read_text().count("\n") == 2)
    assert await run.get_status() is RunStatus.RUNNING
    go.touch()
    assert await run.wait()
    assert executions.read_text() == "hush-hush\nhush-hush\n"


async def test_a_job_that_the_administrator_suspends_goes_on_afterwards(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob, tmp_path: Path
) -> None:
    run = await running(backend, make_job(f"echo ready; until [ -e {tmp_path}/go ]; do sleep 0.05; done; exit 7"))
    await call(slurm, "scontrol", "suspend", run.job)
    await until(lambda: slurm.jobs("-j", run.job) == [f"{run.job} SUSPENDED"])
    assert await run.get_status() is RunStatus.RUNNING
    await call(slurm, "scontrol", "resume", run.job)
    (tmp_path / "go").touch()
    assert (await run.outcome()).exit_code == 7


async def test_what_a_command_leaves_in_other_sessions_is_ended_with_the_job(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob
) -> None:
    job = make_job("setsid sleep 600 & (trap '' TERM; sleep 600) & nohup sleep 600 & echo done", cancel_grace=0.5)
    run = await backend.submit(job)
    assert await run.wait()
    assert slurm.processes(job.run_id) == []


async def test_a_grace_longer_than_killwait_is_kept(slurm: Slurm, backend: SlurmBackend, make_job: MakeJob) -> None:
    # KillWait is 5 s here.
    run = await running(
        backend, make_job("trap 'sleep 7; echo tidied; exit 0' TERM; echo ready; sleep 600 & wait", cancel_grace=30)
    )
    await run.cancel()
    assert (await run.outcome()).status is RunStatus.KILLED
    assert "tidied" in [line async for line in run.logs()]


async def test_a_job_that_no_poll_has_seen_running_is_not_killed_before_its_grace(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob, tmp_path: Path, on_path: OnPath
) -> None:
    on_path("squeue", '"$real" "$@" | sed "s/RUNNING/PENDING/"')
    asked, go = tmp_path / "asked", tmp_path / "go"
    command = f"trap 'touch {asked}; until [ -e {go} ]; do sleep 0.1; done; exit 0' TERM; echo ready; sleep 600 & wait"
    run = await running(backend, make_job(command, cancel_grace=60))
    cancelling = asyncio.create_task(run.cancel())
    await until(asked.exists)
    # Otherwise it completes already, and is killed after KillWait.
    assert await anyio.to_thread.run_sync(slurm.jobs, "-j", run.job) == [f"{run.job} RUNNING"]
    go.touch()
    await cancelling
    outcome = await run.outcome()
    assert (outcome.status, outcome.exit_code) == (RunStatus.KILLED, 0)


# ---- many jobs ----------------------------------------------------------------------------------------------------


async def test_submits_that_follow_each_other_become_one_array(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob
) -> None:
    jobs = [make_job(f"echo {index}; exit {index % 2}", {"array": True}) for index in range(8)]
    submits = []
    for job in jobs:
        submits.append(asyncio.create_task(backend.submit(job)))
        await asyncio.sleep(0.12)  # the tracking server creates one run after the other
    runs = await asyncio.gather(*submits)
    assert len({run.job.partition("_")[0] for run in runs}) == 1
    assert sorted(run.job.partition("_")[2] for run in runs) == [str(index) for index in range(8)]
    outcomes = [await run.outcome() for run in runs]
    assert [outcome.exit_code for outcome in outcomes] == [0, 1] * 4
    assert [[line async for line in run.logs()] for run in runs] == [[str(index)] for index in range(8)]


async def test_one_run_of_an_array_is_cancelled_alone(slurm: Slurm, backend: SlurmBackend, make_job: MakeJob) -> None:
    jobs = [make_job("echo ready; sleep 2", {"array": True}) for _ in range(3)]
    runs = await asyncio.gather(*(backend.submit(job) for job in jobs))
    await line_of(runs[1], "ready")
    await runs[1].cancel()
    assert [(await run.outcome()).status for run in runs] == [
        RunStatus.FINISHED, RunStatus.KILLED, RunStatus.FINISHED,
    ]  # fmt: skip


async def test_all_jobs_are_followed_by_one_process_a_poll(
    slurm: Slurm, make_job: MakeJob, tmp_path: Path, on_path: OnPath
) -> None:
    calls = tmp_path / "calls"
    calls.touch()
    on_path("squeue", f'echo "$@" >> {calls}; exec "$real" "$@"')

    def has_asked_for_all() -> bool:
        polls = [line for line in calls.read_text().splitlines() if " -j " in line]
        return any(line.split(" -j ")[1].split(" ")[0].count(",") == 19 for line in polls)

    async with SlurmBackend(timing=QUICK) as backend:
        command = f"until [ -e {tmp_path}/go ]; do sleep 0.1; done"
        runs = await asyncio.gather(*(backend.submit(make_job(command)) for _ in range(20)))
        await until(has_asked_for_all)
        (tmp_path / "go").touch()
        assert all([await run.wait() for run in runs])


# ---- secrets, and runs of other processes -------------------------------------------------------------------------


async def test_a_secret_is_in_no_job_record_script_or_command_line(
    slurm: Slurm,
    backend: SlurmBackend,
    make_job: MakeJob,
    tmp_path: Path,
    on_path: OnPath,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_path("sbatch", f'in=$(cat); echo "$@" "$in" >> {tmp_path}/seen; echo "$in" | exec "$real" "$@"')
    monkeypatch.setenv("DRIVER_TOKEN", "hush-hush")
    of_job = "tr '\\0' '\\n' < /proc/$PPID/environ"  # Slurm keeps the variables of the batch script
    command = f'echo "${{#TOKEN}} ${{#DRIVER_TOKEN}}"; {of_job} > {tmp_path}/environ; echo ready; sleep 600'
    job = make_job(command, secrets={"TOKEN": "hush-hush"})
    run = await running(backend, job)
    script = tmp_path / "script"
    await call(slurm, "scontrol", "write", "batch_script", run.job, str(script))
    shown = await call(slurm, "scontrol", "show", "job", "-dd", run.job)
    arguments = await anyio.to_thread.run_sync(
        lambda: subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    )
    for text in (
        shown, script.read_text(), (tmp_path / "seen").read_text(), (tmp_path / "environ").read_text(), arguments,
        backend.preview(job),
    ):  # fmt: skip
        assert "hush-hush" not in text
    assert [line async for line in run.logs(follow=False)] == ["9 9", "ready"]
    await run.cancel()
    assert b"hush-hush" not in b"".join(path.read_bytes() for path in slurm.work_dir.rglob("*") if path.is_file())


async def test_a_run_that_slurm_has_forgotten_is_judged_by_its_files(
    slurm: Slurm, make_job: MakeJob, tmp_path: Path, on_path: OnPath
) -> None:
    jobs = [make_job("echo done"), make_job("exit 5"), make_job("kill -9 $PPID", {"latency": 0.2})]
    references = []
    async with SlurmBackend(timing=QUICK) as backend:
        references = [backend.reference(job) for job in jobs]
        for job in jobs:
            await (await backend.submit(job)).outcome()
    on_path("squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    async with SlurmBackend(timing=QUICK) as backend:
        outcomes = [await (await backend.attach(reference)).outcome() for reference in references]
    assert [(each.status, each.exit_code) for each in outcomes] == [
        (RunStatus.FINISHED, 0), (RunStatus.FAILED, 5), (RunStatus.FAILED, None),
    ]  # fmt: skip
    assert isinstance(outcomes[2].error, RunLost)


async def test_a_driver_that_is_killed_leaves_its_jobs_to_whoever_attaches(
    slurm: Slurm, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(f"echo ready; until [ -e {tmp_path}/go ]; do sleep 0.05; done; exit 4")
    async with SlurmBackend(timing=QUICK) as first:
        reference = first.reference(job)
        run = await running(first, job)
        run.detach()  # as if this process had been killed
        await run.outcome()
    async with SlurmBackend(timing=QUICK) as second:
        listed = await second.list_runs()
        assert [(each.run_id, each.state, each.detail["job"]) for each in listed] == [(job.run_id, "running", run.job)]
        assert await second.presence(reference) is Presence.ACTIVE
        again = await second.attach(reference)
        assert await again.get_status() is RunStatus.RUNNING
        (tmp_path / "go").touch()
        assert (await again.outcome()).exit_code == 4


async def test_a_withdrawn_run_never_begins(slurm: Slurm, make_job: MakeJob, tmp_path: Path) -> None:
    async with SlurmBackend(timing=QUICK) as backend:
        blocker = await running(backend, make_job("echo ready; sleep 600", resources=Resources(cpus=CPUS)))
        job = make_job(f"touch {tmp_path}/begun")
        run = await backend.submit(job)
        assert await backend.withdraw(backend.reference(job))
        await blocker.cancel()
        assert (await run.outcome()).status is RunStatus.FAILED
    assert not (tmp_path / "begun").exists()


async def test_a_planted_folder_of_somebody_else_is_not_believed(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob
) -> None:
    job = make_job("true")
    folder = slurm.work_dir / "runs" / job.run_id
    folder.mkdir(parents=True)
    (folder / "exit").write_text("0 \n")
    (folder / "job").write_text("1\n")
    folder.chmod(0o777)
    with pytest.raises(RunLost, match="is not this user's own"):
        await backend.attach(backend.reference(job))


async def test_prune_looks_into_the_work_folder_that_was_selected(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob, tmp_path: Path
) -> None:
    config = {"work-dir": str(tmp_path / "elsewhere")}
    job = make_job("true", config)
    assert await (await backend.submit(job)).wait()
    await leave(replace(slurm, work_dir=tmp_path / "elsewhere"), job.run_id)
    assert await backend.prune([job.run_id]) == []
    backend.select_service(config, "")
    assert [each.run_id for each in await backend.prune()] == [job.run_id]


async def test_prune_removes_files_of_ended_runs_without_a_driver(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob
) -> None:
    job = make_job("true")
    assert await (await backend.submit(job)).wait()
    assert await backend.prune([job.run_id]) == []  # this process looks after it
    await leave(slurm, job.run_id)
    assert [each.run_id for each in await backend.prune([job.run_id], dry_run=True)] == [job.run_id]
    assert [each.run_id for each in await backend.prune()] == [job.run_id]
    assert not (slurm.work_dir / "runs" / job.run_id).exists()


async def test_prune_whose_jobs_cannot_be_cancelled_removes_nothing_and_says_why(
    slurm: Slurm, make_job: MakeJob, on_path: OnPath
) -> None:
    jobs = [make_job("echo ready; sleep 600") for _ in range(2)]
    timing = replace(QUICK, retries=RetryPolicy(seconds=0.2))
    async with SlurmBackend(timing=timing) as backend:
        runs = [await running(backend, job) for job in jobs]
        for job in jobs:
            await leave(slurm, job.run_id)
        on_path("scancel", 'echo "scancel: error: no such luck" >&2; exit 1')
        with pytest.raises(BackendError, match="scancel failed: no such luck"):
            await backend.prune([job.run_id for job in jobs], running=True)
        assert all((slurm.work_dir / "runs" / job.run_id).exists() for job in jobs)
        on_path("scancel", 'exec "$real" "$@"')
        for run in runs:
            await run.cancel(grace=0.2)

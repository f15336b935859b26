"""Cancellations and lost answers at every moment of a submit, and whatever else leaves a run half made."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread
import psutil
import pytest

from backends.slurm.conftest import MakeJob, OnPath, leave, running
from components.slurm import CPUS, QUICK, Slurm
from mlfleet import Resources, RunStatus
from mlfleet.backends.base import Presence
from mlfleet.backends.slurm import SlurmBackend
from mlfleet.errors import SubmitError
from mlfleet.runs import FailureKind

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(120)]


async def exists(path: Path) -> None:
    while not await anyio.to_thread.run_sync(path.exists):  # noqa: ASYNC110 - a file of another process
        await anyio.sleep(0.02)


async def nothing_is_left(slurm: Slurm, run_id: str) -> None:
    """Wait until Slurm has ended the job, and see that no process and no file of the run exists."""
    while await anyio.to_thread.run_sync(slurm.processes, run_id):  # noqa: ASYNC110 - Slurm has no event to wait for
        await anyio.sleep(0.1)
    assert not (slurm.work_dir / "runs" / run_id).exists()


@pytest.mark.parametrize("array", [False, True])
async def test_a_submit_that_is_cancelled_at_any_moment_leaves_nothing(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob, array: bool
) -> None:
    for delay in (0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3):
        job = make_job("sleep 600", {"array": array}, cancel_grace=0.5)
        submitting = asyncio.create_task(backend.submit(job))
        await asyncio.sleep(delay)
        submitting.cancel()
        with suppress(asyncio.CancelledError):
            await (await submitting).cancel()
            continue
        await nothing_is_left(slurm, job.run_id)


async def test_a_submit_whose_job_cannot_be_recorded_ends_the_job(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob, on_path: OnPath
) -> None:
    on_path(
        "sbatch", f'echo "Welcome to the cluster"; cd {slurm.work_dir}/runs/*; mkdir -p job/full; exec "$real" "$@"'
    )
    job = make_job("sleep 600", cancel_grace=0.5)
    with pytest.raises(SubmitError, match="the id of the job cannot be written below"):
        await backend.submit(job)
    await nothing_is_left(slurm, job.run_id)


async def test_a_cancelled_submit_leaves_the_other_runs_of_its_array_alone(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob, tmp_path: Path, on_path: OnPath
) -> None:
    on_path("sbatch", f'touch {tmp_path}/begun; until [ -e {tmp_path}/go ]; do sleep 0.02; done; exec "$real" "$@"')
    jobs = [make_job(f"echo {index}", {"array": True}) for index in range(3)]
    first = asyncio.create_task(backend.submit(jobs[0]))
    await asyncio.sleep(0.1)
    others = [asyncio.create_task(backend.submit(job)) for job in jobs[1:]]
    await exists(tmp_path / "begun")
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    (tmp_path / "go").touch()
    runs = [await other for other in others]
    assert all([await run.wait() for run in runs])
    await nothing_is_left(slurm, jobs[0].run_id)


async def test_an_array_whose_answer_is_lost_runs_each_point_once(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob, on_path: OnPath
) -> None:
    # Each task has an id of its own as soon as it has begun.
    on_path(
        "sbatch",
        '"$real" "$@" > /dev/null; while squeue -h -t PD | grep -q .; do sleep 0.05; done\n'
        'echo "sbatch: error: Socket timed out on send/recv operation" >&2; exit 1',
    )
    jobs = [make_job(f"echo {index}", {"array": True}) for index in range(3)]
    runs = await asyncio.gather(*(backend.submit(job) for job in jobs))
    shown = await anyio.to_thread.run_sync(slurm.call, "squeue", "-h", "-r", "-t", "all", "-o", "%i")
    assert {run.job for run in runs} <= set(shown.split())
    assert all([await run.wait() for run in runs])
    assert [[line async for line in run.logs()] for run in runs] == [["0"], ["1"], ["2"]]


async def test_a_cancelled_run_whose_grace_cannot_be_written_ends(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob
) -> None:
    job = make_job("echo ready; sleep 600", cancel_grace=0.5)
    run = await running(backend, job)
    grace = slurm.work_dir / "runs" / job.run_id / "grace"
    grace.unlink()
    (grace / "full").mkdir(parents=True)
    await run.cancel()
    assert (await run.outcome()).status is RunStatus.KILLED


async def test_the_second_job_of_a_repeated_submit_does_not_run_after_a_cancellation(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob, tmp_path: Path, on_path: OnPath
) -> None:
    on_path("sbatch", 'in=$(cat); echo "$in" | "$real" "$@" > /dev/null; echo "$in" | exec "$real" "$@"')
    blocker = await running(backend, make_job("echo ready; sleep 600", resources=Resources(cpus=CPUS)))
    run = await backend.submit(make_job(f"touch {tmp_path}/begun"))
    await run.cancel()
    await blocker.cancel()
    while await anyio.to_thread.run_sync(slurm.jobs):  # noqa: ASYNC110 - Slurm has no event to wait for
        await anyio.sleep(0.05)
    assert not (tmp_path / "begun").exists()


async def test_a_lost_submit_of_a_run_that_runs_again_is_not_taken_for_its_earlier_job(
    slurm: Slurm, make_job: MakeJob, tmp_path: Path, on_path: OnPath
) -> None:
    job = make_job("echo done")
    async with SlurmBackend(timing=replace(QUICK, search=0.5)) as backend:
        first = await backend.submit(job)
        assert await first.wait()
        # The first request never arrives.
        on_path(
            "sbatch",
            f'mkdir {tmp_path}/lost 2>&- || exec "$real" "$@"; echo "sbatch: error: Socket timed out" >&2; exit 1',
        )
        second = await backend.submit(job)
        assert await second.wait()
        assert second.job != first.job


# ---- what the command finds, and what it leaves -------------------------------------------------------------------


async def test_the_command_gets_its_signals_its_variables_and_its_setup_in_a_strange_work_folder(
    backend: SlurmBackend, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLEET_RUN", "outer")  # the driver is part of a local run
    work_dir = tmp_path / 'it\'s a "work" folder | ü'
    setup = ["", "# modules", "export FROM_SETUP='of setup'", "set -u"]
    job = make_job(
        'trap; echo "$FROM_SETUP" "$TEXT" "${MLFLEET_RUN-}${SLURM_GET_USER_ENV-}"; timeout -s INT 0.2 sleep 600;'
        " echo $?",
        {"work-dir": str(work_dir), "setup": setup},
        secrets={"TEXT": "two\nlines"},
    )
    run = await backend.submit(job)
    assert [each.run_id for each in await backend.list_runs()] in ([job.run_id], [])
    assert await run.wait()
    # No signal is ignored, and SIGINT ends a program. Slurm has not run the user's login files (SLURM_GET_USER_ENV).
    assert [line async for line in run.logs()] == ["of setup two", "lines ", "124"]


async def test_a_project_whose_files_are_all_left_out_has_an_empty_folder(
    backend: SlurmBackend, make_job: MakeJob
) -> None:
    job = make_job("ls -A | wc -l")
    (job.project_dir / ".dockerignore").write_text("*\n")
    run = await backend.submit(job)
    assert await run.wait()
    assert [line async for line in run.logs()] == ["0"]


async def test_a_line_of_setup_that_fails_ends_the_run_and_is_named(backend: SlurmBackend, make_job: MakeJob) -> None:
    run = await backend.submit(make_job("echo no", {"setup": ["true", "false # it's wrong"]}))
    assert (await run.outcome()).exit_code == 1
    assert [line async for line in run.logs()] == ["mlfleet: this line of setup failed: false # it's wrong"]


async def test_nothing_outlives_a_job_that_somebody_else_cancels_although_the_grace_is_long(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob
) -> None:
    # After KillWait, 5 s here, Slurm kills the batch script and its descendants.
    job = make_job("(setsid sleep 600 &); trap '' TERM; echo ready; sleep 600", cancel_grace=60)
    run = await running(backend, job)
    await anyio.to_thread.run_sync(slurm.call, "scancel", run.job)
    assert (await run.outcome()).reason == "the job was cancelled from outside"
    assert await anyio.to_thread.run_sync(slurm.processes, job.run_id) == []


async def test_a_process_of_another_cluster_with_the_id_of_the_job_is_left_alone(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob, tmp_path: Path
) -> None:
    run = await running(backend, make_job(f"echo ready; until [ -e {tmp_path}/go ]; do sleep 0.05; done"))
    other = await asyncio.create_subprocess_exec("sleep", "600", env={"PATH": "/bin", "SLURM_JOB_ID": run.job})
    try:
        (tmp_path / "go").touch()
        assert await run.wait()
        assert await anyio.to_thread.run_sync(lambda: psutil.Process(other.pid).status()) == psutil.STATUS_SLEEPING
    finally:
        other.kill()
        await other.wait()


async def test_a_command_that_is_killed_by_force_has_only_its_own_output(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob
) -> None:
    job = make_job("trap '' TERM; echo ready; sleep 600", cancel_grace=60)
    run = await running(backend, job)
    first = asyncio.create_task(run.cancel())
    await asyncio.sleep(0)
    await run.cancel(grace=0.2)
    await first
    assert ((await run.outcome()).status, (await run.outcome()).exit_code) == (RunStatus.KILLED, 137)
    assert [line async for line in run.logs()] == ["ready"]
    assert await anyio.to_thread.run_sync(slurm.processes, job.run_id) == []


async def test_binary_output_is_copied_byte_for_byte(backend: SlurmBackend, make_job: MakeJob) -> None:
    job = make_job("head -c 300000 /dev/zero; printf '\\377\\n'")
    assert await (await backend.submit(job)).wait()
    assert job.output is not None
    assert job.output.read_bytes() == bytes(300000) + b"\xff\n"


async def test_a_run_ends_although_nobody_reads_the_inherited_output(
    slurm: Slurm, tmp_path: Path, make_job: MakeJob
) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        "import asyncio, pathlib\n"
        "from mlfleet.backends.base import Job\n"
        "from mlfleet.backends.slurm import SlurmBackend\n"
        "from components.slurm import QUICK\n"
        "async def main():\n"
        "    async with SlurmBackend(timing=QUICK) as backend:\n"
        "        job = Job(run_id='a' * 32, experiment_id='0', project_name='demo', command='echo one; sleep 1.5',\n"
        f"            project_dir=pathlib.Path({str(tmp_path / 'project')!r}), output=None,\n"
        "            config=backend.configure({}))\n"
        "        assert await (await backend.submit(job)).wait()\n"
        "asyncio.run(main())\n"
    )
    path = os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
    reader, writer = os.pipe()
    os.close(reader)
    try:
        driver = await asyncio.create_subprocess_exec(
            sys.executable, str(script), stdout=writer, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
        )
        _, errors = await driver.communicate()
    finally:
        os.close(writer)
    assert driver.returncode == 0, errors
    assert b"output of a run is lost, stdout cannot be written" in errors


# ---- what is not believed -----------------------------------------------------------------------------------------


async def test_another_job_under_the_id_of_an_ended_one_is_not_believed(
    slurm: Slurm, make_job: MakeJob, tmp_path: Path, on_path: OnPath
) -> None:
    job = make_job("echo done")
    async with SlurmBackend(timing=QUICK) as backend:
        reference = backend.reference(job)
        run = await backend.submit(job)
        assert await run.wait()
        assert await backend.presence(reference) is Presence.ENDED
    on_path("squeue", f'echo "{run.job}|RUNNING|0|None|0|mlfleet-{"b" * 32}|"')
    on_path("scancel", f"touch {tmp_path}/cancelled")
    async with SlurmBackend(timing=QUICK) as backend:
        assert await backend.presence(reference) is Presence.ENDED
        assert (await (await backend.attach(reference)).outcome()).status is RunStatus.FINISHED
        await leave(slurm, job.run_id)
        await backend.prune([job.run_id], running=True)
    assert not (tmp_path / "cancelled").exists()


async def test_a_job_of_another_user_with_the_name_of_a_run_is_not_found(
    slurm: Slurm, make_job: MakeJob, on_path: OnPath
) -> None:
    # A user cannot submit as another one here: squeue shows what it shows of all users and of this one.
    on_path("squeue", '[[ " $* " = *" --me "* ]] || echo "7|RUNNING|None|"')
    job = make_job("true")
    (slurm.work_dir / "runs" / job.run_id).mkdir(parents=True, mode=0o700)
    async with SlurmBackend(timing=QUICK) as backend:
        assert await backend.withdraw(backend.reference(job))
        assert await backend.is_abandoned(backend.reference(job)) is False


async def test_a_folder_for_runs_that_others_can_write_is_refused(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob
) -> None:
    folder = slurm.work_dir / "runs"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(SubmitError, match="others can write it: give a work-dir of your own"):
        await backend.submit(make_job("true"))
    assert list(folder.iterdir()) == []


async def test_prune_removes_folders_of_arrays_and_old_copies_of_projects(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob
) -> None:
    runs = await asyncio.gather(*(backend.submit(make_job("true", {"array": True})) for _ in range(2)))
    assert all([await run.wait() for run in runs])
    (project,) = (slurm.work_dir / "projects").iterdir()
    await backend.prune()
    assert project.exists()
    assert len(list((slurm.work_dir / "arrays").iterdir())) == 1
    old = time.time() - 2 * 24 * 3600
    os.utime(project, (old, old))
    for run in runs:
        await leave(slurm, run.run_id)
    await backend.prune([run.run_id for run in runs])
    assert list((slurm.work_dir / "arrays").iterdir()) == []
    assert not project.exists()


@pytest.mark.slow
async def test_a_job_that_reaches_its_time_limit_has_failed_with_a_timeout(
    slurm: Slurm, backend: SlurmBackend, make_job: MakeJob
) -> None:
    job = make_job("echo ready; sleep 600", {"time": "1"})
    run = await running(backend, job)
    # The controller looks for jobs over their limit every 30 s.
    await anyio.to_thread.run_sync(slurm.call, "scontrol", "update", f"jobid={run.job}", "endtime=now")
    outcome = await run.outcome()
    assert (outcome.status, outcome.kind) == (RunStatus.FAILED, FailureKind.TIMEOUT)
    assert slurm.processes(job.run_id) == []

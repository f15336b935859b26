"""What is the local backend's own; what all backends share is in tests/contract."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from components.projects import pid_is_gone
from mlfleet._environments.manager import PreparedEnvironment
from mlfleet._process.guardian import guardian
from mlfleet.backends.base import Job
from mlfleet.backends.local.backend import LocalBackend
from mlfleet.errors import SubmitError, UsageError
from mlfleet.runs import RunStatus


@pytest.fixture
async def backend() -> AsyncIterator[LocalBackend]:
    async with LocalBackend() as backend:
        yield backend


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    project = tmp_path / "project with blanks"
    project.mkdir()
    return project


def job(folder: Path, command: str, **options: object) -> Job:
    given = {"output": folder.parent / "runs" / "1" / "output.log", **options}
    return Job(
        run_id="1" * 32, experiment_id="0", project_name="local", project_dir=folder, command=command,
        **given,  # type: ignore[arg-type]
    )  # fmt: skip


async def lines(backend: LocalBackend, job: Job) -> list[str]:
    run = await backend.submit(job)
    return [line async for line in run.logs()]


async def test_output_is_for_the_user_alone(backend: LocalBackend, folder: Path) -> None:
    submitted = job(folder, "echo hello")
    assert await lines(backend, submitted) == ["hello"]
    assert submitted.output is not None
    assert stat.S_IMODE(submitted.output.stat().st_mode) == 0o600


async def test_second_opening_of_stdout_overwrites_nothing(backend: LocalBackend, folder: Path) -> None:
    assert await lines(backend, job(folder, "echo one; echo two >> /dev/stdout; echo three")) == ["one", "two", "three"]


async def test_inherited_output(backend: LocalBackend, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = await backend.submit(job(folder, "echo to the terminal; exit 3", output=None))
    assert (await run.outcome()).output == ()
    assert [line async for line in run.logs()] == []
    assert capfd.readouterr().out == "to the terminal\n"


async def test_inside_its_environment(backend: LocalBackend, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_CALLER", "kept")
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    environment = PreparedEnvironment(
        "virtualenv", root=folder, path=("/the/env/bin",), environ={"VIRTUAL_ENV": "/the/env", "PYTHONHOME": None}
    )
    command = 'echo "$OF_THE_CALLER|${PYTHONHOME-unset}|$VIRTUAL_ENV|${PATH%%:*}|$GIVEN|$HIDDEN"'
    submitted = job(folder, command, environment=environment, environ={"GIVEN": "1"}, secrets={"HIDDEN": "2"})
    assert await lines(backend, submitted) == ["kept|unset|/the/env|/the/env/bin|1|2"]


async def test_signals_have_names(backend: LocalBackend, folder: Path) -> None:
    for name, reason in (
        ("KILL", "killed by signal SIGKILL (the machine may have run out of memory)"),
        ("SEGV", "killed by signal SIGSEGV"),
        ("RTMIN+3", "killed by signal 37"),
    ):
        outcome = await (await backend.submit(job(folder, f"kill -{name} $$", output=None))).outcome()
        assert (outcome.status, outcome.reason) == (RunStatus.FAILED, reason)


@pytest.mark.parametrize("name", ["gone", "bash"])
async def test_missing_folder(backend: LocalBackend, folder: Path, name: str) -> None:
    gone = folder / name
    with pytest.raises(SubmitError, match="cannot be entered: No such file or directory") as caught:
        await backend.submit(job(gone, "true", output=None))
    assert str(gone) in str(caught.value)
    assert caught.value.backend == "local"


async def test_missing_bash(backend: LocalBackend, folder: Path) -> None:
    with pytest.raises(SubmitError, match="bash cannot be run: No such file or directory"):
        await backend.submit(job(folder, "true", environ={"PATH": str(folder)}))


async def test_bash_that_is_elsewhere_by_the_next_run(backend: LocalBackend, folder: Path) -> None:
    first, second = folder / "first", folder / "second"
    for place in (first, second):
        place.mkdir()
    (first / "bash").symlink_to("/bin/bash")
    submitted = job(folder, "echo $0 $1", output=folder / "output.log", environ={"PATH": f"{first}:{second}"})
    assert await lines(backend, submitted) == ["bash"]
    (first / "bash").rename(second / "bash")
    assert await lines(backend, submitted) == ["bash", "bash"]


async def test_bash_by_a_relative_path(backend: LocalBackend, folder: Path) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "bash").symlink_to("/bin/bash")
    assert await lines(backend, job(folder, "echo found", environ={"PATH": "bin"})) == ["found"]


async def test_output_that_cannot_be_written(backend: LocalBackend, folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(SubmitError, match="output of the run cannot be written to"):
        await backend.submit(job(folder, "true", output=folder / "file" / "output.log"))


async def test_command_that_is_too_long(backend: LocalBackend, folder: Path) -> None:
    with pytest.raises(SubmitError, match="longer than the system allows"):
        await backend.submit(job(folder, "true " + "x" * 3_000_000))


async def test_variables_that_cannot_be(backend: LocalBackend, folder: Path) -> None:
    with pytest.raises(SubmitError, match="environment variable 'A=B' cannot be set"):
        await backend.submit(job(folder, "true", environ={"A=B": "1"}))
    with pytest.raises(SubmitError, match="environment variable 'HIDDEN' cannot be set") as caught:
        await backend.submit(job(folder, "true", secrets={"HIDDEN": "hush\0hush"}))
    assert "hush" not in str(caught.value)
    with pytest.raises(SubmitError, match="the command has a NUL character"):
        await backend.submit(job(folder, "echo \0"))


async def test_secrets_are_not_in_argv_nor_in_the_handle(backend: LocalBackend, folder: Path) -> None:
    submitted = job(folder, "tr '\\0' ' ' < /proc/$$/cmdline", secrets={"HIDDEN": "hush-hush"})
    run = await backend.submit(submitted)
    assert not any("hush-hush" in line for line in [line async for line in run.logs()])
    assert "hush-hush" not in f"{run!r} {submitted!r}"


def test_no_configuration() -> None:
    assert LocalBackend().configure({}) is None
    with pytest.raises(UsageError, match="'local' takes no configuration, but backend_config has image"):
        LocalBackend().configure({"image": "x"})


async def test_no_handle_is_kept_after_the_end(backend: LocalBackend, folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    runs = [await backend.submit(job(folder, "exit 0")) for _ in range(30)]
    assert [await run.wait() for run in runs] == [True] * 30
    assert len(os.listdir("/proc/self/fd")) == before


async def test_closed_while_a_run_starts(folder: Path) -> None:
    async with LocalBackend() as backend:
        submitting = asyncio.create_task(backend.submit(job(folder, "sleep 600")))
        await asyncio.sleep(0)
    with pytest.raises(SubmitError, match="closed before the run could start"):
        await submitting


async def test_cancelled_submit_leaves_no_file_open(backend: LocalBackend, folder: Path) -> None:
    await (await backend.submit(job(folder, "exit 0"))).wait()
    before = len(os.listdir("/proc/self/fd"))
    for turns in range(40):
        submitting = asyncio.create_task(backend.submit(job(folder, "sleep 600")))
        for _ in range(turns):
            await asyncio.sleep(0)
        submitting.cancel()
        with suppress(asyncio.CancelledError):
            await (await submitting).cancel()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("durable", [False, True])
async def test_only_a_durable_run_has_no_mark_of_its_driver(
    backend: LocalBackend, folder: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    monkeypatch.setenv("MLFLEET_DRIVER", "of an outer driver")
    found = await lines(backend, job(folder, 'echo "${MLFLEET_DRIVER-unset}"', durable=durable))
    assert found == (["unset"] if durable else [guardian().marker])


# Waits until the shell's child has become the program: until then it has the shell's name.
ASLEEP = "until grep -q sleep /proc/$!/comm; do :; done"


@pytest.mark.parametrize("durable", [False, True])
async def test_what_a_command_leaves_behind_is_ended_with_the_run(
    backend: LocalBackend, folder: Path, caplog: pytest.LogCaptureFixture, durable: bool
) -> None:
    run = await backend.submit(job(folder, f"sleep 600 & echo $!; {ASLEEP}; exit 3", durable=durable))
    outcome = await run.outcome()
    assert (outcome.status, outcome.exit_code) == (RunStatus.FAILED, 3)
    assert pid_is_gone(int(outcome.output[0]))
    (warning,) = caplog.messages
    assert warning.startswith(f"the command of the run {'1' * 32} ended and left sleep (")


LEFT = "setsid sleep 600 & until grep -q sleep /proc/$!/comm; do :; done; echo $!"
"""Leaves a process that is in a session of its own, and says its id."""


@pytest.mark.parametrize("durable", [False, True])
async def test_cancel_ends_what_has_left_the_session_and_nothing_of_other_runs(
    backend: LocalBackend, folder: Path, durable: bool
) -> None:
    runs = [
        await backend.submit(
            replace(job(folder, f"{LEFT}; sleep 600", durable=durable, output=folder / name), run_id=name * 32)
        )
        for name in "12"
    ]
    pids = [int(await anext(run.logs())) for run in runs]
    await runs[0].cancel()
    assert [pid_is_gone(pid) for pid in pids] == [True, False]
    await runs[1].cancel(grace=0)
    assert pid_is_gone(pids[1])


async def test_what_has_left_the_session_of_an_ended_run_goes_on(backend: LocalBackend, folder: Path) -> None:
    run = await backend.submit(job(folder, LEFT))
    (line,) = [line async for line in run.logs()]
    await run.cancel()
    assert not pid_is_gone(int(line))
    os.kill(int(line), signal.SIGKILL)

"""Real processes: how they start, end, and are ended."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from pathlib import Path

import anyio
import pytest
from blockbuster import BlockBuster

from fakes.processes import start_process
from mlfleet._process.process import Command, Process, run_process
from mlfleet._process.process import start as start_command

MARK = "PROCESS_TEST"
open_readers: list[int] = []


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After every test: no file descriptor more than before, and no child more, not even a zombie."""
    gc.collect()
    before = descriptors()
    children_before = children()
    yield
    while open_readers:
        os.close(open_readers.pop())
    gc.collect()
    assert descriptors() == before
    # Servers that other tests of this session use are children, too.
    assert children() == children_before


def children() -> set[int]:
    found = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(entry))
    return found


def descriptors() -> set[str]:
    names = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            names.add(f"{entry} {os.readlink(f'/proc/self/fd/{entry}')}")
        except FileNotFoundError:  # the one that listed them
            continue
    return names


def living(mark: str) -> list[int]:
    """The living processes that have inherited ``PROCESS_TEST=mark``, in whatever group or session."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if f"{MARK}={mark} {os.getpid()}".encode() in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                found.append(int(entry))
        except OSError:
            continue
    return found


def marked(mark: str) -> dict[str, str]:
    return {**os.environ, MARK: f"{mark} {os.getpid()}"}


async def start(script: str, mark: str, *, ready: bool = True) -> Process:
    """Start a script of bash, and wait until it has written a line."""
    reader, writer = os.pipe()
    try:
        process = await start_process(["bash", "-c", script], env=marked(mark), output=writer)
    finally:
        os.close(writer)
    if ready:
        await anyio.wait_readable(reader)
        os.read(reader, 100)
    open_readers.append(reader)  # closed, it would end what writes once more
    return process


class TestStart:
    async def test_exit_codes(self) -> None:
        for script, code in (("exit 0", 0), ("exit 3", 3), ("kill -TERM $$", -15), ("kill -KILL $$", -9)):
            process = await start_process(["bash", "-c", script])
            assert await process.wait() == code
            assert process.returncode == code
            assert await process.wait() == code

    async def test_a_process_leads_its_session_and_has_an_empty_stdin(self) -> None:
        done = await run_process(["bash", "-c", "echo $$ $(ps -o sid=,pgid= -p $$); cat"])
        pid, session, group = done.stdout.split()
        assert pid == session == group

    async def test_a_process_inherits_no_descriptor(self) -> None:
        with open("/dev/null") as file:
            os.dup2(file.fileno(), 77, inheritable=True)
        try:
            done = await run_process(["bash", "-c", "ls /proc/self/fd"])
        finally:
            os.close(77)
        assert b"77" not in done.stdout.split()

    async def test_missing_program_and_missing_folder_can_be_told_apart(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError) as program:
            await start_process(["no-such-program"])
        assert program.value.filename == "no-such-program"
        with pytest.raises(FileNotFoundError) as folder:
            await start_process(["true"], cwd=tmp_path / "gone")
        assert folder.value.filename == str(tmp_path / "gone")

    async def test_a_program_without_execute_permission_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("no program")
        with pytest.raises(PermissionError):
            await start_process([str(tmp_path / "text")])

    async def test_argument_that_is_too_long_says_so(self) -> None:
        with pytest.raises(OSError, match="longer than the system allows"):
            await start_process(["true", "x" * 10_000_000])

    async def test_too_many_open_files_says_so(self) -> None:
        await start_and_wait("true")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        held: list[int] = []
        refused: list[str] = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(name.split()[0]) for name in descriptors()) + 10, hard))
            with suppress(OSError):
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            # With ever more room: it fails at a pipe first, and at the pidfd of the running process last.
            while held:
                try:
                    await start_and_wait("true")
                except OSError as error:
                    refused.append(str(error))
                    os.close(held.pop())
                else:
                    break
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in held:
                os.close(descriptor)
        assert len(refused) > 1
        assert all("this process has too many open files (ulimit -n)" in text for text in refused)

    async def test_too_many_processes_says_so(self) -> None:
        # In a program of its own: the limit counts all processes of the user, and root has none.
        script = """if True:
            import asyncio, os, resource
            from mlfleet._process.process import run_process
            async def main():
                await run_process(["true"])
                if os.getuid() == 0:
                    os.setuid(61234)
                resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
                try:
                    await run_process(["true"])
                except OSError as error:
                    print(error)
            asyncio.run(main())
        """
        done = await run_process([sys.executable, "-W", "error", "-c", script])
        assert b"the limit of processes is reached" in done.stdout, done.stderr

    async def test_200_processes_start_at_once(self) -> None:
        processes = await asyncio.gather(*(start_process(["bash", "-c", f"exit {n % 100}"]) for n in range(200)))
        assert await asyncio.gather(*(process.wait() for process in processes)) == [n % 100 for n in range(200)]

    async def test_cancelled_start_leaves_nothing(self) -> None:
        # However far it had come: waiting for a thread, in the thread, just started.
        for turns in range(0, 40, 2):
            starting = [asyncio.create_task(start_process(["sleep", "600"], env=marked("start"))) for _ in range(4)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in starting:
                task.cancel()
            for result in await asyncio.gather(*starting, return_exceptions=True):
                if isinstance(result, Process):
                    await result.stop(0)
                else:
                    assert isinstance(result, asyncio.CancelledError)
            assert living("start") == []

    async def test_start_in_a_cancelled_scope_leaves_nothing(self) -> None:
        with anyio.move_on_after(0.001):
            process = await start_process(["sleep", "600"], env=marked("scope"))
            await process.stop(0)
        assert living("scope") == []


async def start_and_wait(*argv: str) -> int:
    return await (await start_process(argv)).wait()


class TestWait:
    async def test_many_tasks_can_wait_and_some_be_cancelled(self) -> None:
        process = await start("echo; sleep 0.2; exit 5", "wait")
        waiters = [asyncio.create_task(process.wait()) for _ in range(100)]
        await asyncio.sleep(0)
        for waiter in waiters[::2]:
            waiter.cancel()
        assert set(await asyncio.gather(*waiters[1::2])) == {5}
        assert all(waiter.cancelled() for waiter in waiters[::2])

    async def test_killed_from_outside(self) -> None:
        process = await start("echo; sleep 600", "outside")
        os.killpg(process.pid, signal.SIGKILL)
        assert await process.wait() == -9
        assert process.stopped is False

    async def test_done_callback(self) -> None:
        done = asyncio.Event()
        process = await start_process(["true"])
        process.add_done_callback(done.set)
        await done.wait()
        assert process.returncode == 0

    async def test_exit_status_collected_by_another_part_of_the_program(self, caplog: pytest.LogCaptureFixture) -> None:
        process = await start("echo; sleep 600", "stolen")
        os.killpg(process.pid, signal.SIGKILL)
        os.waitpid(process.pid, 0)  # noqa: ASYNC222
        assert await process.wait() == 255
        assert "was taken by another part of this program" in caplog.text
        await process.stop(0)


@asynccontextmanager
async def leaving(script: str, mark: str, grace: float) -> AsyncIterator[Process]:
    """Start a script of bash whose session is to be ended with it."""
    command = Command(["bash", "-c", script], env=marked(mark), title="the command", rest_grace=grace)
    process = await start_command(lambda: nullcontext(command))
    try:
        yield process
    finally:
        await process.stop(0)


class TestRestOfTheSession:
    @pytest.mark.parametrize("end", ["exit 3", "kill -9 $$"])
    async def test_ends_with_the_command(self, end: str, caplog: pytest.LogCaptureFixture) -> None:
        # The first child has become the program, so that it no longer has the shell's name.
        script = f"sleep 600 & until grep -q sleep /proc/$!/comm; do :; done; set -m; timeout 500 sleep 500 & {end}"
        async with leaving(script, "rest", 20) as process:
            assert await process.wait() == (3 if end == "exit 3" else -9)
            assert living("rest") == []
            assert process.stopped is False
        (warning,) = caplog.messages
        assert warning.startswith("the command ended and left ")
        assert "sleep (" in warning
        assert "setsid" in warning

    async def test_ends_also_in_a_group_of_its_own(self) -> None:
        async with leaving("set -m; sleep 600 & exit 4", "group", 20) as process:
            assert await process.wait() == 4
            assert living("group") == []

    async def test_is_killed_after_its_grace(self) -> None:
        async with leaving("(trap '' TERM; while :; do sleep 1; done) & sleep 0.2; exit 4", "deaf", 0.2) as process:
            assert await process.wait() == 4
            assert living("deaf") == []

    async def test_is_killed_sooner_on_request(self) -> None:
        async with leaving("(trap '' TERM; while :; do sleep 1; done) & sleep 0.2; exit 4", "sooner", 600) as process:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222
            await process.stop(0)
            assert (process.returncode, process.stopped) == (4, False)
            assert living("sooner") == []

    async def test_setsid_keeps_a_process_out_of_it(self, caplog: pytest.LogCaptureFixture) -> None:
        async with leaving("setsid sleep 600 & sleep 0.3; exit 4", "out", 20) as process:
            assert await process.wait() == 4
        (left,) = living("out")
        os.kill(left, signal.SIGKILL)
        assert caplog.messages == []

    async def test_200_commands_that_leave_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        async with AsyncExitStack() as stack:
            processes = [await stack.enter_async_context(leaving("exit 0", "none", 20)) for _ in range(200)]
            assert await asyncio.gather(*(process.wait() for process in processes)) == [0] * 200
        assert caplog.messages == []

    async def test_without_pidfds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(os, "pidfd_open")
        async with leaving("sleep 600 & exit 4", "rest of threads", 20) as process:
            assert await process.wait() == 4
            assert living("rest of threads") == []


class TestStop:
    async def test_ends_by_sigterm(self) -> None:
        process = await start("trap 'exit 7' TERM; echo; while :; do sleep 0.05; done", "term")
        await process.stop(20)
        assert process.returncode == 7
        assert process.stopped is True
        assert living("term") == []

    async def test_ignored_sigterm(self) -> None:
        process = await start("trap '' TERM; echo; while :; do sleep 1; done", "ignored")
        await process.stop(0.2)
        assert process.returncode == -9
        assert living("ignored") == []

    async def test_leader_ends_and_grandchild_ignores_sigterm(self) -> None:
        process = await start("(trap '' TERM; echo; while :; do sleep 1; done) & wait", "grandchild")
        await process.stop(0.3)
        assert process.returncode == -15
        assert living("grandchild") == []

    async def test_grandchildren_that_made_groups_of_their_own(self) -> None:
        script = "set -m; (trap '' TERM; sleep 600; sleep 600) & timeout 600 sleep 600 & cd /; sleep 0.2; echo; wait"
        process = await start(script, "groups")
        assert len({os.getpgid(pid) for pid in living("groups")}) > 1
        await process.stop(0.3)
        assert living("groups") == []

    async def test_stopped_process(self) -> None:
        process = await start("trap 'exit 9' TERM; echo; while :; do sleep 0.05; done", "sigstop")
        os.killpg(process.pid, signal.SIGSTOP)
        await process.stop(20)
        assert process.returncode == 9

    async def test_many_callers_and_the_shortest_grace(self) -> None:
        process = await start("trap '' TERM; echo; while :; do sleep 1; done", "callers")
        async with asyncio.TaskGroup() as group:
            for grace in (600, 500, 0.1, 300):
                group.create_task(process.stop(grace))
        await process.stop(0)
        assert living("callers") == []

    async def test_stopping_after_the_end_changes_nothing(self) -> None:
        process = await start_process(["bash", "-c", "exit 4"])
        await process.wait()
        await process.stop(0)
        assert (process.returncode, process.stopped) == (4, False)

    async def test_stopping_a_process_whose_end_is_not_noticed_yet(self) -> None:
        process = await start_process(["bash", "-c", "exit 4"])
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222
        await process.stop(0)
        assert (process.returncode, process.stopped) == (4, False)

    async def test_stop_survives_repeated_cancellation(self) -> None:
        process = await start("trap '' TERM; echo; while :; do sleep 1; done", "over")
        stopping = asyncio.create_task(process.stop(0.2))
        for _ in range(5):
            await asyncio.sleep(0.01)
            stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert living("over") == []

    async def test_stop_completes_in_a_cancelled_scope(self) -> None:
        process = await start("trap '' TERM; echo; while :; do sleep 1; done", "in scope")
        with anyio.CancelScope() as scope:
            scope.cancel()
            await process.stop(0.2)
        assert living("in scope") == []

    def test_stop_completes_when_the_loop_is_closed(self) -> None:
        # asyncio.run cancels every task that is left, those in the middle of a stop included.
        async def main() -> None:
            process = await start("trap '' TERM; echo; while :; do sleep 1; done", "torn")
            asyncio.get_running_loop().leftover = asyncio.create_task(process.stop(0.2))  # type: ignore[attr-defined]
            await asyncio.sleep(0)

        asyncio.run(main())
        assert living("torn") == []

    async def test_100_processes_stop_at_once(self) -> None:
        processes = [await start("echo; sleep 600 & sleep 600", "hundred") for _ in range(100)]
        await asyncio.gather(*(process.stop(10) for process in processes))
        assert living("hundred") == []

    async def test_without_pidfds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(os, "pidfd_open")
        assert await start_and_wait("bash", "-c", "exit 3") == 3
        process = await start("(trap '' TERM; echo; sleep 600; sleep 600) & wait", "threads")
        await process.stop(0.2)
        assert process.returncode == -15
        assert living("threads") == []

    async def test_stop_when_no_thread_can_be_started(
        self, monkeypatch: pytest.MonkeyPatch, blockbuster: BlockBuster
    ) -> None:
        blockbuster.deactivate()  # here the loop has to look itself
        process = await start("(trap '' TERM; echo; sleep 600; sleep 600) & wait", "no thread")

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        await process.stop(0.2)
        assert living("no thread") == []


class TestRun:
    async def test_collects_both_streams(self) -> None:
        done = await run_process(["bash", "-c", "echo out; echo err >&2; exit 2"])
        assert (done.returncode, done.stdout, done.stderr) == (2, b"out\n", b"err\n")

    async def test_both_streams_can_be_merged(self) -> None:
        done = await run_process(["bash", "-c", "echo 1; echo 2 >&2; echo 3"], merge=True)
        assert done.stdout == done.stderr == b"1\n2\n3\n"

    async def test_lines_are_delivered_as_they_arrive(self) -> None:
        lines: list[str] = []
        await run_process(["bash", "-c", "printf 'a\\nb\\r50%%\\rc'"], on_line=lines.append)
        assert lines == ["a", "b", "50%", "c"]

    async def test_the_end_of_the_output_is_kept(self) -> None:
        done = await run_process(["bash", "-c", "seq 1000000"], limit=1000)
        assert len(done.stdout) == 1000
        assert done.stdout.endswith(b"\n999999\n1000000\n")

    async def test_200_mb_of_binary_stay_out_of_memory(self) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        done = await run_process(["bash", "-c", "head -c 200000000 /dev/zero; printf end"], limit=2**20)
        assert done.stdout.endswith(b"\0end")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB

    async def test_error_of_on_line_ends_the_command(self) -> None:
        def refuse(line: str) -> None:
            raise LookupError(line)

        with pytest.raises(LookupError, match="hello"):
            await run_process(["bash", "-c", "echo hello; sleep 600"], env=marked("on_line"), on_line=refuse)
        assert living("on_line") == []

    async def test_cancelled(self) -> None:
        script = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
        begun = asyncio.Event()
        running = asyncio.create_task(
            run_process(["timeout", "600", "bash", "-c", script], env=marked("run"), on_line=lambda _: begun.set())
        )
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert living("run") == []

    async def test_timeout_of_its_caller(self) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await run_process(["sleep", "600"], env=marked("timeout"))
        assert living("timeout") == []

    async def test_processes_that_outlive_the_command_are_not_awaited(self) -> None:
        done = await run_process(["bash", "-c", "sleep 600 & echo $!"])
        os.kill(int(done.stdout), signal.SIGKILL)

    async def test_missing_program_leaves_no_pipe(self) -> None:
        with pytest.raises(FileNotFoundError):
            await run_process(["no-such-program"])


def test_no_warning_and_no_child_when_the_program_is_interrupted(tmp_path: Path) -> None:
    script = """if True:
        import asyncio, os, sys
        from mlfleet._process.process import run_process
        asyncio.run(run_process(
            ["bash", "-c", "echo ready; sleep 600"], on_line=lambda line: print(line, flush=True)
        ))
    """
    program = subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", script],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=marked("interrupt"),
    )  # fmt: skip
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate()
    assert "KeyboardInterrupt" in errors
    assert "Warning" not in errors
    assert living("interrupt") == []

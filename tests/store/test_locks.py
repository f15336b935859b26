from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fakes.processes import start_process
from mlfleet._process.process import Process
from mlfleet._store.locks import file_lock

# What another process does: says "held" when it has the lock, and keeps it until it is ended.
HOLD = """if True:
    import asyncio, sys
    from pathlib import Path
    from mlfleet._store.locks import file_lock
    async def main():
        async with file_lock(Path(sys.argv[1])):
            sys.stdout.write("held\\n")
            sys.stdout.flush()
            await asyncio.sleep(600)
    asyncio.run(main())
"""
# Adds one to a number in a file, over and over, in a way that loses some unless it is alone.
COUNT = """if True:
    import asyncio, sys, time
    from pathlib import Path
    from mlfleet._store.locks import file_lock
    async def add(path):
        for _ in range(10):
            async with file_lock(path.with_suffix(".lock")):
                number = int(path.read_text())
                await asyncio.sleep(0.001)
                path.write_text(str(number + 1))
    async def main():
        await asyncio.gather(*(add(Path(sys.argv[1])) for _ in range(3)))
    asyncio.run(main())
"""


async def hold(path: Path) -> Process:
    reader, writer = os.pipe()
    process = await start_process([sys.executable, "-c", HOLD, str(path)], output=writer)
    os.close(writer)
    text = await asyncio.to_thread(os.read, reader, 100)
    os.close(reader)
    assert text.startswith(b"held")
    return process


# Takes a free lock without any patience while the import of the lock's library takes its time.
SLOW_IMPORT = """if True:
    import asyncio, importlib.abc, sys, time
    from pathlib import Path
    from mlfleet._store.locks import file_lock
    class Slow(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == "filelock":
                time.sleep(0.2)
    sys.meta_path.insert(0, Slow())
    async def main():
        async with file_lock(Path(sys.argv[1]), patience=0.0):
            print("held")
    asyncio.run(main())
"""


def test_a_slow_import_is_no_part_of_the_patience(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SLOW_IMPORT, str(tmp_path / "lock")], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("held\n", 0), done.stderr


async def test_patience_ends_only_while_the_lock_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = await hold(path)
    with pytest.raises(TimeoutError):
        async with file_lock(path, patience=0.05):
            pass
    await holder.stop(0)
    async with file_lock(path, patience=0.0):  # a lock that is free needs no patience
        pass


async def test_tasks_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    inside = most = 0

    async def enter() -> None:
        nonlocal inside, most
        async with file_lock(tmp_path / "folder" / "lock"):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.001)
            inside -= 1

    await asyncio.gather(*(enter() for _ in range(50)))
    assert most == 1
    assert (tmp_path / "folder" / "lock").exists()


async def test_processes_exclude_each_other(tmp_path: Path) -> None:
    number = tmp_path / "number"
    number.write_text("0")
    counters = [await start_process([sys.executable, "-c", COUNT, str(number)]) for _ in range(3)]
    assert [await counter.wait() for counter in counters] == [0, 0, 0]
    assert number.read_text() == "90"


async def test_lock_of_a_process_that_dies_is_free(tmp_path: Path) -> None:
    other = await hold(tmp_path / "lock")
    waiting = asyncio.create_task(enter(tmp_path / "lock"))
    os.kill(other.pid, signal.SIGKILL)
    await waiting
    await other.wait()


async def test_waiters_need_no_thread_and_can_be_cancelled(tmp_path: Path) -> None:
    other = await hold(tmp_path / "lock")
    before = threading.active_count()
    waiting = [asyncio.create_task(enter(tmp_path / "lock")) for _ in range(100)]
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in waiting)
    assert threading.active_count() <= before + 4
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    assert all(task.cancelled() for task in waiting)
    await other.stop(0)
    await enter(tmp_path / "lock")


async def test_cancellation_at_any_moment_releases_the_lock(tmp_path: Path) -> None:
    for turns in range(30):
        task = asyncio.create_task(enter(tmp_path / "lock"))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        async with asyncio.timeout(10):
            await enter(tmp_path / "lock")


async def test_an_error_inside_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(LookupError):
        async with file_lock(tmp_path / "lock"):
            raise LookupError
    await enter(tmp_path / "lock")


async def test_a_lock_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        await enter(tmp_path / "file" / "lock")


async def enter(path: Path) -> None:
    async with file_lock(path):
        pass

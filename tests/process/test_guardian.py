"""The guardian process: what it ends when its driver has died, and what it leaves alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mlfleet._process.guardian_main import list_marked, living_groups, read_environments

DRIVER = """
import os, subprocess, sys
from mlfleet._process.guardian import MARKER_VARIABLE, guardian

def start(command, grace=0.5, marked=True):
    guardian().start()
    environ = {**os.environ, MARKER_VARIABLE: guardian().marker} if marked else None
    process = subprocess.Popen(["bash", "-c", command], env=environ, start_new_session=True)
    guardian().add(process.pid, grace)
    return process
"""


@pytest.fixture
def token(tmp_path: Path) -> Iterator[str]:
    """A number of seconds to sleep that no other process of this machine sleeps; sleepers are ended at the end."""
    name = f"{10**6 + os.getpid()}.{abs(hash(tmp_path)) % 10**6:06d}"
    yield name
    for process in sleepers(name):
        process.kill()


def sleepers(token: str) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"] == ["sleep", token] and process.status() != psutil.STATUS_ZOMBIE
    ]


def drive(script: str) -> subprocess.Popen[str]:
    """Start a driver, and wait until it prints "ready"."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER + script], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "ready\n"
    return driver


def guardian_of(driver: int) -> psutil.Process:
    found = [
        each for each in psutil.Process(driver).children() if any("guardian_main" in word for word in each.cmdline())
    ]
    assert len(found) == 1
    return found[0]


def end(driver: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    driver.send_signal(number)
    driver.wait()
    assert driver.stdout is not None
    driver.stdout.close()


def wait_until_gone(token: str) -> None:
    deadline = time.monotonic() + 20
    while sleepers(token):
        assert time.monotonic() < deadline, "still running"
        time.sleep(0.05)


def ready(token: str, count: int) -> str:
    """Code of the driver that waits until so many processes sleep, and then says so."""
    return f"""
import psutil, time
def asleep():
    return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "{token}"]]
while len(asleep()) < {count}: time.sleep(0.02)
print("ready", flush=True)
"""


def test_sessions_of_a_killed_driver_end_with_all_their_groups(token: str) -> None:
    command = f"set -m; sleep {token} & sleep {token} & wait"
    driver = drive(f"start({command!r})\n" + ready(token, 2) + "time.sleep(60)")
    watcher = guardian_of(driver.pid)
    end(driver)
    wait_until_gone(token)
    watcher.wait(20)


def test_a_process_that_left_its_session_is_found_by_its_marker(token: str) -> None:
    driver = drive(f"start('setsid sleep {token} & wait')\n" + ready(token, 1) + "time.sleep(60)")
    end(driver)
    wait_until_gone(token)


def test_a_command_that_ignores_sigterm_is_killed_after_its_grace(token: str) -> None:
    command = f"trap '' TERM; sleep {token} & wait; wait"
    driver = drive(f"start({command!r})\n" + ready(token, 1) + "time.sleep(60)")
    end(driver)
    wait_until_gone(token)


def test_a_forked_child_that_keeps_the_pipe_open_does_not_hold_up_the_end(token: str, tmp_path: Path) -> None:
    script = f"""
start('sleep {token} & wait')
if (child := os.fork()) == 0:
    import time; time.sleep(60)
open({str(tmp_path / "child")!r}, "w").write(str(child))
"""
    driver = drive(script + ready(token, 1) + "time.sleep(60)")
    child = int((tmp_path / "child").read_text())
    end(driver)
    wait_until_gone(token)
    assert psutil.Process(child).is_running(), "a child of the driver that is no run was ended"
    os.kill(child, signal.SIGKILL)


def test_the_guardian_ignores_signals_and_another_replaces_a_killed_one(token: str) -> None:
    script = f"""
start('sleep {token} & wait')
{ready(token, 1)}
sys.stdin.readline()
guardian().start()
print("again", flush=True)
time.sleep(60)
"""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER + script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    assert driver.stdin is not None
    assert driver.stdout.readline() == "ready\n"
    first = guardian_of(driver.pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        first.send_signal(number)
    assert first.is_running()
    first.kill()
    while first.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    # Reaped by the driver itself when it asks for the guardian again.
    driver.stdin.write("\n")
    driver.stdin.flush()
    assert driver.stdout.readline() == "again\n"
    assert guardian_of(driver.pid).pid != first.pid
    driver.stdin.close()
    end(driver)
    wait_until_gone(token)


def test_a_session_that_was_removed_is_left_alone(token: str) -> None:
    script = f"process = start('sleep {token} & wait', marked=False)\nguardian().remove(process.pid)\n"
    driver = drive(script + ready(token, 1) + "time.sleep(60)")
    watcher = guardian_of(driver.pid)
    end(driver)
    watcher.wait(20)
    assert len(sleepers(token)) == 1


def test_a_driver_that_ends_well_ends_its_guardian(token: str) -> None:
    driver = drive("start('true').wait()\nprint('ready', flush=True)\nsys.stdin.readline()\n")
    watcher = guardian_of(driver.pid)
    end(driver, signal.SIGTERM)
    watcher.wait(20)


def test_a_program_that_ran_commands_ends_without_warnings() -> None:
    """Neither Python's development mode nor a forked child has something to say about the guardian."""
    script = "start('true').wait()\nif os.fork() == 0: sys.exit()\nassert os.wait()[1] == 0\n"
    done = subprocess.run([sys.executable, "-X", "dev", "-c", DRIVER + script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_is_known_while_it_becomes_another_program(tmp_path: Path) -> None:
    script = tmp_path / "again.sh"
    script.write_text('exec bash "$0"\n')
    with subprocess.Popen(["bash", script], env={**os.environ, "MARK": "1"}) as process:
        try:
            one = [psutil.Process(process.pid)]
            seen = [environ.get("MARK") for _ in range(1000) for _, environ in read_environments(one)]
        finally:
            process.kill()
    # Some hundredths of single reads are empty. About one in five thousand is torn, which nothing tells.
    assert seen.count("1") >= 995


@pytest.fixture
def hopper() -> Iterator[tuple[int, str]]:
    """A session in which each process forks the next one and ends at once; with its id and the value of its mark."""
    mark = f"hopper-{os.getpid()}-{time.monotonic_ns()}"
    script = "import os, time\nfor _ in range(30_000):\n time.sleep(0.002)\n if os.fork(): os._exit(0)"
    environ = {**os.environ, "GUARDIAN_TEST": mark}
    leader = subprocess.Popen([sys.executable, "-c", script], env=environ, start_new_session=True)
    leader.wait()
    yield leader.pid, mark
    os.killpg(leader.pid, signal.SIGKILL)


def test_processes_that_fork_and_end_during_a_look_are_found(hopper: tuple[int, str]) -> None:
    session, mark = hopper
    for _ in range(50):
        assert living_groups([session]) == {session: {session: []}}
    for _ in range(3):
        assert mark in [value for _, value in list_marked("GUARDIAN_TEST")]

"""The blocking run(), used as scripts use it: each test is a script of its own in a process of its own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from components.projects import pid_is_gone, write_project
from components.scripts import Script


@pytest.fixture
def start(tmp_path: Path, new_store: Callable[[Path], str]) -> Iterator[Callable[[str], Script]]:
    store = new_store(tmp_path / "mlflow.db")
    with ExitStack() as stack:
        yield lambda code: stack.enter_context(Script(tmp_path, code, store))


pytestmark = pytest.mark.timeout(90)  # each script imports mlflow, which takes seconds on a busy machine


def test_a_plain_script(start: Callable[[str], Script], tmp_path: Path) -> None:
    write_project(tmp_path / "demo", "echo alpha is {alpha}", parameters="alpha: float")
    script = start(
        """
        import mlfleet
        run = mlfleet.run("demo", "main", None, {"alpha": 0.5}, env_manager="local")
        print(run.get_status(), run.wait(), len(run.run_id))
        """
    )
    code, out, err = script.end()
    assert (code, err) == (0, "")
    assert out.splitlines() == ["alpha is 0.5", "FINISHED True 32"]
    assert script.statuses() == ["FINISHED"]


def test_a_failed_run_raises(start: Callable[[str], Script], tmp_path: Path) -> None:
    write_project(tmp_path / "demo", "exit 5")
    script = start(
        """
        import mlfleet
        try:
            mlfleet.run("demo", env_manager="local")
        except mlfleet.ExecutionException as error:
            print(error.exit_code, error.reason)
        """
    )
    assert script.end()[:2] == (0, "5 exit code 5\n")
    assert script.statuses() == ["FAILED"]


def test_threads_and_a_running_loop(start: Callable[[str], Script], tmp_path: Path) -> None:
    write_project(tmp_path / "demo", "true")
    script = start(
        """
        import asyncio, threading, mlfleet
        def work():
            statuses.append(mlfleet.run("demo", env_manager="local").get_status())
        statuses = []
        threads = [threading.Thread(target=work) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        async def main():
            work()
        asyncio.run(main())
        print(statuses)
        """
    )
    assert script.end() == (0, f"{['FINISHED'] * 5}\n", "")


def test_hundreds_at_once_and_the_exit_waits_for_them(start: Callable[[str], Script], tmp_path: Path) -> None:
    write_project(tmp_path / "demo", "sleep 0.3; touch done-{n}", parameters="n: string")
    script = start(
        """
        import mlfleet
        runs = [mlfleet.run("demo", parameters={"n": n}, env_manager="local", synchronous=False) for n in range(100)]
        print(len({run.run_id for run in runs}))
        """
    )
    assert script.end() == (0, "100\n", "")
    assert len(list((tmp_path / "demo").glob("done-*"))) == 100
    assert set(script.statuses()) == {"FINISHED"}


@pytest.mark.parametrize(
    ("number", "synchronous"),
    [
        (signal.SIGINT, True),
        (signal.SIGINT, False),
        (signal.SIGTERM, True),
        (signal.SIGTERM, False),
        (signal.SIGHUP, False),
    ],
)
def test_an_interrupt_ends_every_run(
    start: Callable[[str], Script], tmp_path: Path, number: signal.Signals, synchronous: bool
) -> None:
    write_project(
        tmp_path / "demo", "trap '' TERM\nsleep 1000 &\necho $$ $! > pids.new; mv pids.new pids\necho ready\nwait; wait"
    )
    script = start(
        f"""
        import mlfleet, time
        soon = mlfleet.Timeouts(cancel_grace=0.2)
        run = mlfleet.run("demo", env_manager="local", synchronous={synchronous}, timeouts=soon)
        for line in run.logs():
            print(line, flush=True)
        """
    )
    assert script.line() == "ready"
    os.kill(script.process.pid, number)
    code, _, err = script.end()
    assert code == -number
    assert "KeyboardInterrupt" in err if number == signal.SIGINT else err == ""
    pids = [int(pid) for pid in (tmp_path / "demo" / "pids").read_text().split()]
    assert [pid_is_gone(pid) for pid in pids] == [True, True]
    assert script.statuses() == ["KILLED"]


@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_ends_a_sweep_and_writes_its_statuses(
    start: Callable[[str], Script], tmp_path: Path, count: int
) -> None:
    write_project(
        tmp_path / "demo",
        "trap 'touch asked' TERM\ntouch begun-{n}\nwhile :; do sleep 0.1; done",
        parameters="n: string",
    )
    script = start(
        f"""
        import mlfleet, os, signal, threading, time
        def kill():
            while not all(os.path.exists(f"demo/begun-{{n}}") for n in range(2)):
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
            while {count} == 2 and not os.path.exists("demo/asked"):
                time.sleep(0.05)
            if {count} == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        threading.Thread(target=kill).start()
        soon = mlfleet.Timeouts(cancel_grace={0.2 if count == 1 else 5})
        mlfleet.sweep("demo", mlfleet.grid(n=[0, 1]), env_manager="local", timeouts=soon, max_concurrent=2)
        """
    )
    code, _, err = script.end()
    assert (code, err) == (-signal.SIGTERM, "")
    assert script.statuses() == ["KILLED"] * 3


def test_the_exit_waits_for_calls_in_other_threads(start: Callable[[str], Script], tmp_path: Path) -> None:
    write_project(tmp_path / "demo", "touch begun; sleep 0.5")
    script = start(
        """
        import mlfleet, os, threading
        def work():
            print(len(mlfleet.run("demo", env_manager="local", output="capture").run_id))
            ended.wait()
            try:
                mlfleet.run("demo", env_manager="local")
            except mlfleet.UsageError as error:
                print(error)
        ended = threading.Event()
        threading._register_atexit(ended.set)  # called after that of mlfleet, which is younger
        threading.Thread(target=work).start()
        while not os.path.exists("demo/begun"):
            pass
        """
    )
    assert script.end() == (0, "32\nthe program is exiting: it can neither start runs nor reach them\n", "")
    assert script.statuses() == ["FINISHED"]


def test_a_signal_that_is_ignored_stays_ignored(start: Callable[[str], Script], tmp_path: Path) -> None:
    write_project(tmp_path / "demo", "kill -HUP $PPID; echo done")
    script = start(
        """
        import signal
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
        import mlfleet
        run = mlfleet.run("demo", env_manager="local", synchronous=False)
        """
    )
    assert script.end() == (0, "", "")
    assert script.statuses() == ["FINISHED"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait_for_the_grace_but_writes_the_status(
    start: Callable[[str], Script], tmp_path: Path, number: signal.Signals
) -> None:
    write_project(tmp_path / "demo", "trap 'echo asked' TERM\necho $$\nwhile :; do sleep 0.1; done")
    script = start(
        """
        import mlfleet
        soon = mlfleet.Timeouts(cancel_grace=5)
        run = mlfleet.run("demo", env_manager="local", synchronous=False, timeouts=soon)
        def show():
            for line in run.logs():
                print(line, flush=True)
        import threading
        threading.Thread(target=show, daemon=True).start()
        threading.Event().wait()
        """
    )
    pid = int(script.line())
    script.process.send_signal(number)
    while script.line() != "asked":
        pass
    script.process.send_signal(number)
    code, _, _ = script.end()
    assert code == -number
    assert script.statuses() == ["KILLED"]
    deadline = time.monotonic() + 20
    while not pid_is_gone(pid):  # the guardian ends it
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_status_before_the_command_runs_is_that_of_mlflow(start: Callable[[str], Script], tmp_path: Path) -> None:
    write_project(tmp_path / "demo", "true")
    script = start(
        """
        import mlfleet
        run = mlfleet.run("demo", env_manager="local", synchronous=False)
        statuses = [run.get_status()]
        while statuses[-1] == "RUNNING":
            statuses.append(run.get_status())
        print(sorted(set(statuses)))
        """
    )
    assert script.end() == (0, "['FINISHED', 'RUNNING']\n", "")


# Signals come between any two steps: in these two, before and after the loop was told of a call.
@pytest.mark.parametrize("function", ["call_soon_threadsafe", "_write_to_self"])
def test_an_interrupt_in_the_middle_of_a_call(start: Callable[[str], Script], tmp_path: Path, function: str) -> None:
    write_project(tmp_path / "demo", "echo $$; exec sleep 1000")
    script = start(
        f"""
        import mlfleet, sys

        def interrupt(frame, event, argument):
            if event == "call" and frame.f_code.co_name == "{function}":
                sys.setprofile(None)
                raise KeyboardInterrupt

        run = mlfleet.run("demo", env_manager="local", synchronous=False)
        lines = run.logs()
        print(next(lines), flush=True)
        sys.setprofile(interrupt)
        next(lines)
        """
    )
    pid = int(script.line())
    code, _, err = script.end()
    assert code == -signal.SIGINT
    assert "KeyboardInterrupt" in err
    assert "RuntimeError" not in err
    assert pid_is_gone(pid)
    assert script.statuses() == ["KILLED"]


def test_an_interrupt_while_the_exit_waits(start: Callable[[str], Script], tmp_path: Path) -> None:
    write_project(tmp_path / "demo", "echo $$ > pid.new; mv pid.new pid; sleep 1000")
    script = start(
        """
        import mlfleet, os
        run = mlfleet.run("demo", env_manager="local", synchronous=False)
        while not os.path.exists("demo/pid"):
            pass
        print("leaving", flush=True)
        """
    )
    assert script.line() == "leaving"
    script.process.send_signal(signal.SIGINT)
    script.end()
    assert pid_is_gone(int((tmp_path / "demo" / "pid").read_text()))
    assert script.statuses() == ["KILLED"]


def test_submit_belongs_to_the_loop_and_ends_with_it(start: Callable[[str], Script], tmp_path: Path) -> None:
    write_project(tmp_path / "demo", "echo $$; sleep 1000")
    script = start(
        """
        import asyncio, mlfleet
        async def main():
            run = await mlfleet.submit("demo", env_manager="local")
            async for line in run.logs():
                print(line)
                return
        asyncio.run(main())
        """
    )
    code, out, err = script.end()
    assert (code, err) == (0, "")
    assert pid_is_gone(int(out))
    assert script.statuses() == ["KILLED"]


def test_the_parent_is_mlflows_active_run(start: Callable[[str], Script], tmp_path: Path) -> None:
    write_project(tmp_path / "demo", "true")
    script = start(
        """
        import mlflow, mlfleet
        with mlflow.start_run() as parent:
            child = mlfleet.run("demo", env_manager="local")
        tags = mlflow.get_run(child.run_id).data.tags
        print(tags["mlflow.parentRunId"] == parent.info.run_id)
        """
    )
    assert script.end()[:2] == (0, "True\n")


def test_children_that_are_forked_after_a_run_end(start: Callable[[str], Script], tmp_path: Path) -> None:
    write_project(tmp_path / "demo", "true")
    script = start(
        """
        import multiprocessing, os, signal, sys, time
        import mlfleet
        def double(number):
            return 2 * number
        if __name__ == "__main__":
            fork = multiprocessing.get_context("fork")
            mlfleet.run("demo", env_manager="local", output="capture")
            with fork.Pool(2) as pool:
                print(pool.map(double, range(3)))
            child = fork.Process(target=double, args=(1,))
            child.start()
            child.join()
            print(child.exitcode)
            child = fork.Process(target=time.sleep, args=(60,))
            child.start()
            child.terminate()
            child.join()
            print(child.exitcode == -signal.SIGTERM, flush=True)
            if (pid := os.fork()) == 0:
                sys.exit(3)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        """
    )
    code, out, _ = script.end()
    assert (code, out.splitlines()) == (0, ["[0, 2, 4]", "0", "True", "3"])
    assert script.statuses() == ["FINISHED"]

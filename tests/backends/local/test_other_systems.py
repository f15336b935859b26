"""Runs on systems without pidfds and without /proc, such as macOS, as far as Linux can be made one of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from components import missing
from components.projects import pid_is_gone, write_project

Interpreter = Callable[[str], Sequence[str]]
"""Returns the arguments that run Python code on a system of some kind."""

WITHOUT_PIDFDS = "import os; del os.pidfd_open\n"
# /proc is hidden from this process and its children. psutil, which on macOS asks the kernel, finds it elsewhere.
HIDE_PROC = 'mount -t proc proc "$0" && mount -t tmpfs tmpfs /proc && exec "$@"'
WITHOUT_PROC = (
    WITHOUT_PIDFDS + "import psutil; psutil.PROCFS_PATH = {proc!r}; assert not os.path.exists('/proc/self')\n"
)


@pytest.fixture(params=["linux", "without pidfds", "without /proc"])
def interpreter(request: pytest.FixtureRequest, tmp_path: Path) -> Interpreter:
    if request.param == "linux":
        return lambda code: [sys.executable, "-c", code]
    if request.param == "without pidfds":
        return lambda code: [sys.executable, "-c", WITHOUT_PIDFDS + code]
    proc = tmp_path / "proc"
    proc.mkdir()
    before = [shutil.which("unshare") or "unshare", "--mount", "sh", "-c", HIDE_PROC, str(proc)]
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode != 0:
        missing("the right to hide /proc from a process", "run the tests as root, outside of a container")
    return lambda code: [*before, sys.executable, "-c", WITHOUT_PROC.format(proc=str(proc)) + code]


RUN = "import sys; from mlfleet._cli import main; sys.exit(main())"
# Groups of their own: a stop that looks at the leader's process group only would leave them.
STUBBORN = "set -m\n(trap '' TERM; while :; do sleep 600; done) &\necho pids $$ $! ready; wait"


def test_run_to_its_end(interpreter: Interpreter, new_store: Callable[[Path], str], tmp_path: Path) -> None:
    project = write_project(tmp_path / "demo", "echo hello; exit 3")
    done = subprocess.run(
        [*interpreter(RUN), "run", project, "--env-manager", "local", "--json"],
        env={**os.environ, "MLFLOW_TRACKING_URI": new_store(tmp_path / "mlflow.db")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert (told["status"], told["exit_code"]) == ("FAILED", 3)


def test_ctrl_c_ends_all_of_a_run(interpreter: Interpreter, new_store: Callable[[Path], str], tmp_path: Path) -> None:
    project = write_project(tmp_path / "demo", STUBBORN)
    with subprocess.Popen(
        [*interpreter(RUN), "run", project, "--env-manager", "local", "--cancel-grace", "0.3s"],
        env={**os.environ, "MLFLOW_TRACKING_URI": new_store(tmp_path / "mlflow.db")},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            pids = pids_in(next(line for line in process.stdout if line.startswith("pids")))
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
    assert [pid_is_gone(pid) for pid in pids] == [True, True]


COMMON = """
import asyncio, json, sys, time
from pathlib import Path
from mlfleet.backends.base import Job
from mlfleet.backends.local import LocalBackend
from mlfleet.runs import JobRef

folder = Path(sys.argv[1])
"""
DRIVER = (
    COMMON
    + """
job = Job(run_id="1" * 32, experiment_id="0", project_name="demo", project_dir=folder, command=sys.argv[2],
          output=folder / "output.log", durable=True, cancel_grace=0.3)

async def main():
    async with LocalBackend() as backend:
        reference = backend.reference(job)
        run = await backend.submit(job)
        async for line in run.logs():
            if "ready" in line:
                print(reference.to_json(), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""
)
NEXT_DRIVER = (
    COMMON
    + """
async def main():
    async with LocalBackend() as backend:
        reference = JobRef.from_json(sys.argv[2])
        listed = [(run.run_id, run.supervised) for run in await backend.list_runs()]
        abandoned = await backend.is_abandoned(reference)
        run = await backend.attach(reference)
        (folder / "go").touch()
        if sys.argv[3] == "cancel":
            await run.cancel()
        outcome = await run.outcome()
        print(json.dumps([listed, abandoned, outcome.status, outcome.exit_code]))

asyncio.run(main())
"""
)


@pytest.mark.parametrize(
    ("what", "command", "status", "code"),
    [
        ("cancel", STUBBORN, "KILLED", None),
        ("wait", "echo pids $$ $$ ready; while [ ! -e go ]; do sleep 0.05; done; exit 3", "FAILED", 3),
    ],
)
def test_durable_run_outlives_its_driver(
    interpreter: Interpreter, tmp_path: Path, what: str, command: str, status: str, code: int | None
) -> None:
    argv = [*interpreter(DRIVER), str(tmp_path), command]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True) as driver:
        assert driver.stdout is not None
        reference = driver.stdout.readline()
        driver.kill()
    pids = pids_in((tmp_path / "output.log").read_text())
    done = subprocess.run(
        [*interpreter(NEXT_DRIVER), str(tmp_path), reference, what], stdout=subprocess.PIPE, text=True, timeout=100
    )
    assert done.returncode == 0
    listed, abandoned, found, exit_code = json.loads(done.stdout)
    assert listed == [["1" * 32, False]]
    assert abandoned is False
    assert (found, exit_code if what == "wait" else None) == (status, code)
    assert [pid_is_gone(pid) for pid in pids] == [True, True]


@pytest.mark.parametrize("interpreter", ["linux"], indirect=True)
def test_reference_of_the_first_version_is_found(interpreter: Interpreter, tmp_path: Path) -> None:
    """A run folder and a reference as version 0.1 wrote them: a line of /proc/<pid>/stat, and no PID namespace."""
    folder = Path(os.environ["MLFLEET_STATE_DIR"]) / "runs" / ("1" * 32)
    folder.mkdir(parents=True)
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as shell:
        (folder / "process").write_text(Path(f"/proc/{shell.pid}/stat").read_text())
        gone = subprocess.Popen(["true"])
        gone.wait()
        reference = {
            "backend": "local",
            "run_id": "1" * 32,
            "data": {
                "folder": str(folder),
                "output": None,
                "host": os.uname().nodename,
                "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
                "driver": gone.pid,
                "driver_started": 17,
                "grace": 1.0,
            },
        }
        argv = [*interpreter(NEXT_DRIVER), str(tmp_path), json.dumps(reference), "cancel"]
        done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=100)
        assert shell.wait(20) == -signal.SIGTERM
    assert json.loads(done.stdout) == [[["1" * 32, True]], False, "KILLED", None]


def pids_in(text: str) -> list[int]:
    return [int(word) for word in text.partition("pids ")[2].split()[:2]]


def test_pid_of_another_process_is_not_taken_for_the_run(tmp_path: Path) -> None:
    from mlfleet._process.reattach import ProcessRecord

    mine = psutil.Process().create_time()
    stat = Path("/proc/self/stat").read_text()
    assert ProcessRecord.parse(stat, 0.0).identity() is not None
    assert ProcessRecord.parse(f"{os.getpid()} {os.getppid()}\n", mine + 1).identity() is not None
    assert ProcessRecord.parse(f"{os.getpid()} {os.getppid()}\n", mine - 60).pid_was_reused()
    fields = stat.split()
    fields[21] = str(int(fields[21]) - 1)
    assert ProcessRecord.parse(" ".join(fields), mine).pid_was_reused()
    for text in ("lost\n", "1 (sh) S\n", ""):
        with pytest.raises(ValueError):
            ProcessRecord.parse(text, mine)

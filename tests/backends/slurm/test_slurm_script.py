"""The batch script on its own, where Slurm cannot be made to do what happens."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import psutil
import pytest

from mlfleet.backends.slurm.run_files import RunFiles
from mlfleet.backends.slurm.script import batch_script, command_script
from mlfleet.backends.slurm.states import ExitRecord


def write_run(work_dir: Path, command: str) -> RunFiles:
    files = RunFiles(work_dir, "a" * 32)
    files.project.mkdir(parents=True)
    script = command_script(files.folder, files.project, command, environment=None, setup=())
    (files.folder / "command.sh").write_text(script)
    (files.folder / "environ").write_bytes(f"PATH={os.environ['PATH']}\0".encode())
    files.write_grace(0.2)
    return files


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a namespace in which the last process id can be set")
def test_what_a_command_leaves_is_ended_although_the_ids_of_processes_begin_again(tmp_path: Path) -> None:
    command = "setsid bash -c 'echo > up; exec sleep 600' & until [ -e up ]; do :; done; exit 3"
    script = batch_script(write_run(tmp_path, command).folder)
    inside = f"""
        read -r pid_max < /proc/sys/kernel/pid_max
        echo $((pid_max - 2)) > /proc/sys/kernel/ns_last_pid
        SLURM_JOB_ID=1 bash -c {shlex.quote(script)}
        echo $? $(pgrep -c sleep)
    """
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "bash", "-c", inside], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "3 0\n", done.stderr


def test_what_a_command_leaves_is_ended_although_it_becomes_other_programs_all_the_time(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.write_text(f"echo > {tmp_path}/up-$1; exec bash {loop} $1")
    # A process has no readable environment for a moment when it becomes another program.
    command = f"for i in {{1..30}}; do setsid bash {loop} $i & done; until [ -e {tmp_path}/up-30 ]; do :; done"
    script = batch_script(write_run(tmp_path, command).folder)
    subprocess.run(["bash", "-c", script], env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1"}, timeout=60)
    left = [process for process in psutil.process_iter(["cmdline"]) if str(loop) in (process.info["cmdline"] or ())]
    for process in left:
        process.kill()
    assert left == []


def test_a_run_that_cannot_be_claimed_since_the_disk_is_full_has_not_succeeded(tmp_path: Path) -> None:
    files = write_run(tmp_path, "true")
    (files.folder / "claim").touch()  # a full disk takes the file, but not its content
    environ = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1"}
    done = subprocess.run(
        ["bash", "-c", batch_script(files.folder)], env=environ, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, files.exit_record()) == (1, None)
    assert "cannot be claimed: see that" in done.stderr


def test_a_command_that_dies_of_sigterm_before_its_batch_script_gets_it_runs_again_after_a_requeue(
    tmp_path: Path,
) -> None:
    executions = tmp_path / "executions"
    files = write_run(tmp_path, f"echo x >> {executions}; [ $(wc -l < {executions}) = 2 ] || kill -TERM $$")
    codes = []
    for restarts in ("0", "1"):
        environ = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": restarts}
        codes.append(subprocess.run(["bash", "-c", batch_script(files.folder)], env=environ, timeout=60).returncode)
    assert (codes, executions.read_text()) == ([143, 0], "x\nx\n")
    assert files.exit_record() == ExitRecord(0, asked=False)

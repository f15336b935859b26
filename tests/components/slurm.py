"""A real Slurm of one node on loopback: munged, slurmctld and slurmd of Debian, in a temporary folder.

It runs without cgroups, where Slurm leaves most background processes of a job alone: what ends them is mlfleet.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from components import free_port, missing
from mlfleet._retry import RetryPolicy
from mlfleet.backends.slurm.client import Timing

__all__ = ["QUICK", "Slurm", "run_slurm", "slurm", "slurm_daemons"]

QUICK = Timing(fast=0.1, slow=1.0, search=10.0, retries=RetryPolicy(seconds=60, first_pause=0.2, longest_pause=1.0))
CPUS = 32
_STARTS_WITHIN = 30.0  # seconds
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/node
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
KillWait=5
MinJobAge={min_job_age}
MessageTimeout={message_timeout}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,default_queue_depth=1000
MaxArraySize=201
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=16000
PartitionName=main Nodes=n1 Default=YES PriorityTier=10
PartitionName=urgent Nodes=n1 PriorityTier=20 PreemptMode=OFF
"""


@dataclass(frozen=True, slots=True)
class Slurm:
    """A running Slurm.

    Attributes:
        folder: The folder with its files.
        work_dir: A work folder for the test's runs.
    """

    folder: Path
    work_dir: Path

    @property
    def environ(self) -> dict[str, str]:
        """The variables by which the client programs find it."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    @property
    def controller(self) -> psutil.Process:
        """The controller."""
        return psutil.Process(int((self.folder / "slurmctld.pid").read_text()))

    def call(self, *argv: str) -> str:
        """Run a client program and return its output."""
        # The test may have put something else in front of it on PATH.
        program = shutil.which(argv[0], path="/usr/bin:/usr/local/bin") or argv[0]
        done = subprocess.run([program, *argv[1:]], env=self.environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def resume_node(self) -> None:
        """Take the node back after it was set down, and wait until it is idle; it may come back by itself."""
        with suppress(AssertionError):
            self.call("scontrol", "update", "nodename=n1", "state=resume")
        _wait_for_node(self.environ)

    def jobs(self, *options: str) -> list[str]:
        """Return the id and state of the jobs that have not ended."""
        return self.call("squeue", "-h", "-r", "-o", "%i %T", *options).splitlines()

    def processes(self, run_id: str) -> Sequence[str]:
        """Return the processes of a run that still exist, and its job if it has not ended."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                is_of_run = process.environ().get("MLFLEET_TEST_RUN") == run_id or run_id in process.cwd()
                if is_of_run and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(str(process))
        return [*found, *self.jobs("-n", f"mlfleet-{run_id}")]


@pytest.fixture(scope="session")
def slurm_daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("slurm")
    for parent in folder.parents[:3]:  # munged insists on it
        parent.chmod(0o711)
    with run_slurm(folder):
        yield folder


@contextmanager
def run_slurm(
    folder: Path, *, cpus: int = CPUS, message_timeout: int = 5, min_job_age: int = 60
) -> Iterator[dict[str, str]]:
    """Run the daemons with their files in a folder, and return the variables by which the client programs find them.

    Args:
        folder: The folder; other users must be able to enter those above it.
        cpus: The number of CPUs that the node pretends to have.
        message_timeout: Seconds after which programs and daemons stop waiting for an answer.
        min_job_age: Seconds for which Slurm remembers an ended job.
    """
    for program in ("munged", "slurmctld", "slurmd"):
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            missing("Slurm", "apt-get install slurmctld slurmd slurm-client munge")
    folder.chmod(0o711)
    for name in ("munge", "controller", "node"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge/key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    config = folder / "slurm.conf"
    text = _CONFIG.format(
        host=socket.gethostname().partition(".")[0],
        controller_port=free_port(),
        node_port=free_port(),
        user=getpass.getuser(),
        folder=folder,
        cpus=cpus,
        message_timeout=message_timeout,
        min_job_age=min_job_age,
    )
    config.write_text(text)
    environ = {**os.environ, "SLURM_CONF": str(config), "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    started: list[str] = []
    try:
        for argv in (
            ("munged", "--force", *(f"--{name}={folder}/munge/{file}" for name, file in _MUNGE.items())),
            ("slurmctld",),
            ("slurmd", "-N", "n1"),
        ):
            subprocess.run(argv, env=environ, check=True, capture_output=True, timeout=30)
            started.append(argv[0])
        _wait_for_node(environ)
        yield environ
    finally:
        for program in reversed(started):
            _stop(folder / ("munge/pid" if program == "munged" else f"{program}.pid"))


_MUNGE = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


@pytest.fixture
def slurm(slurm_daemons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """The Slurm, found by SLURM_CONF; nothing of the test's jobs may be left."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_daemons / "slurm.conf"))
    work_dir = tmp_path / "work"
    monkeypatch.setenv("MLFLEET_SLURM_WORK_DIR", str(work_dir))
    running = Slurm(slurm_daemons, work_dir)
    yield running
    left = running.jobs()
    if left:
        running.call("scancel", "--user", getpass.getuser())
    assert left == []


def _wait_for_node(environ: dict[str, str]) -> None:
    deadline = time.monotonic() + _STARTS_WITHIN
    while True:
        shown = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environ, capture_output=True, text=True, timeout=30)
        if "idle" in shown.stdout:
            return
        assert time.monotonic() < deadline, f"Slurm does not start: {shown.stdout}{shown.stderr}"
        time.sleep(0.05)


def _stop(pid_file: Path) -> None:
    with suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int(pid_file.read_text()))
        process.send_signal(signal.SIGCONT)
        process.terminate()
        with suppress(psutil.TimeoutExpired):
            process.wait(10)
        process.kill()

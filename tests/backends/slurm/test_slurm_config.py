"""The configuration of the Slurm backend, and what it becomes on the command line of sbatch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlfleet import Resources, UsageError
from mlfleet.backends.slurm.backend import SlurmBackend
from mlfleet.backends.slurm.client import sbatch_arguments
from mlfleet.backends.slurm.config import parse_config
from mlfleet.backends.slurm.script import environment_file
from mlfleet.backends.slurm.states import GONE, ExitRecord, JobState, conclude
from mlfleet.runs import FailureKind, RunStatus


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"partion": "x"}, "unknown key 'partion', did you mean 'partition'"),
        ({"cpus_per_task": 2}, "did you mean 'cpus-per-task'"),
        ({"nodes": "many"}, "nodes is 'many': give a whole number"),
        ({"time": 1.5}, "time is 1.5: give a text as sbatch takes it"),
        ({"mem": "1G", "mem-per-cpu": "1G"}, "both mem and mem-per-cpu"),
        ({"sbatch-args": ["--job-name=x"]}, "finds the jobs of its runs by their names"),
        ({"sbatch-args": ["--job-n=x"]}, "short for --job-name: mlfleet finds the jobs"),
        ({"sbatch-args": ["-oout.txt"]}, "the output is in the run's folder"),
        ({"sbatch-args": ["--partition=x"]}, "give the key partition"),
        ({"sbatch-args": ["--mail-type", "FAIL"]}, "holds 'FAIL': give each option with its value as one text"),
        ({"sbatch-args": "script.sh"}, "holds 'script.sh'"),
        ({"work-dir": "relative"}, "give an absolute path"),
        ({"work-dir": "/shared/%u"}, "without %"),
        ({"clusters": "a,b"}, "give the name of one cluster"),
        ({"array": "yes"}, "array is 'yes': give true or false"),
        ({"latency": -1}, "latency is -1: give seconds"),
        ({"start-timeout": "soon"}, "give seconds, or null for no limit"),
        ({"setup": [1]}, "setup is [1]: give a text or a list of lines"),
    ],
)
def test_a_wrong_value_is_one_error_that_names_the_key(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_config(config, {})
    assert words in str(caught.value)


def test_keys_and_resources_become_options_of_sbatch() -> None:
    config = parse_config({"partition": "gpu", "time": "1:00:00", "exclusive": True, "sbatch-args": ["--nice=5"]}, {})
    assert sbatch_arguments(config, Resources(cpus=1.5, gpus=2, memory="1Gi")) == (
        "--partition=gpu", "--time=1:00:00", "--cpus-per-task=2", "--mem=1048576K", "--gres=gpu:2", "--exclusive",
        "--no-requeue", "--nice=5",
    )  # fmt: skip


def test_keys_count_more_than_resources() -> None:
    config = parse_config({"cpus-per-task": 4, "mem-per-cpu": "2G", "gpus-per-node": "a100:1", "requeue": True}, {})
    assert sbatch_arguments(config, Resources(cpus=1, gpus=2, memory="1Gi")) == (
        "--mem-per-cpu=2G", "--gpus-per-node=a100:1", "--cpus-per-task=4", "--requeue",
    )  # fmt: skip


def test_the_default_work_folder_is_that_of_the_variable() -> None:
    assert parse_config({}, {"MLFLEET_SLURM_WORK_DIR": "/shared/me"}).work_dir == Path("/shared/me")
    assert parse_config({}, {}).work_dir == Path("~/.mlfleet/slurm").expanduser()


def test_a_folder_of_the_variable_that_sbatch_would_not_take_as_it_is_is_refused() -> None:
    with pytest.raises(UsageError, match="MLFLEET_SLURM_WORK_DIR is '/shared/%u': give a path without %"):
        parse_config({}, {"MLFLEET_SLURM_WORK_DIR": "/shared/%u"})


def test_variables_that_the_node_sets_cannot_be_given() -> None:
    backend = SlurmBackend()
    backend.check_variables(["TOKEN"], parse_config({}, {}))
    with pytest.raises(UsageError, match="env: CUDA_VISIBLE_DEVICES, SLURM_CPU_BIND cannot be given to runs on Slurm"):
        backend.check_variables(["TOKEN", "SLURM_CPU_BIND", "CUDA_VISIBLE_DEVICES"], parse_config({}, {}))
    assert environment_file({"CUDA_VISIBLE_DEVICES": "of the driver", "A": "1"}) == b"A=1\0"


def test_variables_of_slurm_and_of_bash_itself_are_left_out_and_functions_are_kept() -> None:
    environ = {"A": "1\n2", "SLURM_JOB_ID": "5", "SBATCH_PARTITION": "x", "UID": "0", "BASH_FUNC_module%%": "() { :; }"}
    assert environment_file(environ) == b"A=1\n2\0BASH_FUNC_module () { :; }\nexport -f module\0"


def state(word: str, code: int = 0, reason: str = "None") -> JobState:
    return JobState(word, code, reason)


@pytest.mark.parametrize(
    ("job", "record", "options", "expected"),
    [
        (state("COMPLETED"), ExitRecord(0, False), {}, (RunStatus.FINISHED, 0, None)),
        (state("COMPLETED"), None, {}, (RunStatus.FINISHED, 0, None)),
        # The run was withdrawn.
        (state("COMPLETED"), None, {"claimed": False}, (RunStatus.FAILED, None, FailureKind.INFRASTRUCTURE)),
        (state("FAILED", 3 << 8), ExitRecord(3, False), {}, (RunStatus.FAILED, 3, FailureKind.FAILURE)),
        (state("FAILED", 137 << 8), ExitRecord(137, False), {}, (RunStatus.FAILED, 137, FailureKind.OOM)),
        (state("FAILED", 9), None, {}, (RunStatus.FAILED, 137, FailureKind.OOM)),
        (state("FAILED", 4021), None, {"claimed": False}, (RunStatus.FAILED, None, FailureKind.INFRASTRUCTURE)),
        (
            state("FAILED", 9), None, {"output": ("error: Exceeded job memory limit",)},
            (RunStatus.FAILED, 137, FailureKind.OOM),
        ),
        (state("OUT_OF_MEMORY"), ExitRecord(0, False), {}, (RunStatus.FAILED, None, FailureKind.OOM)),
        (state("TIMEOUT", 15), ExitRecord(143, True), {}, (RunStatus.FAILED, 143, FailureKind.TIMEOUT)),
        (state("DEADLINE"), None, {}, (RunStatus.FAILED, None, FailureKind.TIMEOUT)),
        (state("PREEMPTED", 15), ExitRecord(143, True), {}, (RunStatus.FAILED, 143, FailureKind.PREEMPTED)),
        (state("NODE_FAIL"), None, {}, (RunStatus.FAILED, None, FailureKind.INFRASTRUCTURE)),
        (state("CANCELLED"), ExitRecord(143, True), {}, (RunStatus.FAILED, None, FailureKind.INFRASTRUCTURE)),
        (state("CANCELLED"), ExitRecord(0, False), {}, (RunStatus.FINISHED, 0, None)),
        (state("CANCELLED"), ExitRecord(143, True), {"cancelled": True}, (RunStatus.KILLED, 143, None)),
        (state("CANCELLED"), None, {"cancelled": True}, (RunStatus.KILLED, None, None)),
        (state("COMPLETED"), ExitRecord(0, False), {"cancelled": True}, (RunStatus.FINISHED, 0, None)),
        (GONE, ExitRecord(0, False), {}, (RunStatus.FINISHED, 0, None)),
        (GONE, None, {}, (RunStatus.FAILED, None, FailureKind.INFRASTRUCTURE)),
    ],
)  # fmt: skip
def test_what_slurm_says_and_the_exit_record_make_the_outcome(
    job: JobState, record: ExitRecord | None, options: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    facts: dict[str, Any] = {"cancelled": False, "claimed": True, "output": (), **options}
    outcome = conclude(job, record, **facts)
    assert (outcome.status, outcome.exit_code, outcome.kind) == expected
    assert (outcome.reason is None) == (outcome.status is RunStatus.FINISHED)


def test_a_job_that_its_node_did_not_start_in_time_is_told_from_one_that_somebody_cancelled() -> None:
    # As seen on a real Slurm whose slurmd was stopped for longer than MessageTimeout.
    cancelled = JobState("CANCELLED", 0, "None", restarts=1)
    reasons = [
        conclude(cancelled, None, cancelled=False, claimed=claimed, output=()).reason for claimed in (False, True)
    ]
    assert reasons == [
        "Slurm cancelled the job, since its node did not start it in time", "the job was cancelled from outside",
    ]  # fmt: skip

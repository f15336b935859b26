"""The output of runs on a real cluster whose kubelet rotates logs; see `test_kubernetes_cluster`.

The node must rotate a log at a few MiB (``containerLogMaxSize``), as that of ``.ci/cluster`` does at 1 MiB. The kubelet
looks every ten seconds, so that a test takes a minute. Kubelets before 1.28 do not follow a log from one file to the
next, which these tests see, too.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import anyio
import pytest

from contract.test_kubernetes_cluster import GIVEN, Place, place
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.runs import JobRef, RunStatus

__all__ = ["place"]

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not GIVEN, reason="no real cluster: set MLFLEET_TEST_KUBECONFIG"),
]
_LINES = 30_000  # of a hundred bytes: 3 MB
_ROTATES = 12  # seconds in which the kubelet rotates a log that is too large
_PAD = "x" * 88
# awk, since a shell prints too slowly.
_AWK = f'BEGIN {{ for (i = from; i < to; i++) printf "line %06d {_PAD}\\n", i }}'
PRINT = f"print_lines() {{ awk -v from=$1 -v to=$2 '{_AWK}'; }}\n"

DRIVER = """
import asyncio, json, os, sys
from pathlib import Path
from mlfleet.backends.base import Job
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.backends.kubernetes.config import parse_config

async def main():
    given = json.loads(sys.argv[1])
    config = parse_config(given["config"], os.environ)
    job = Job(run_id=given["run_id"], experiment_id="0", project_name="output", project_dir=Path(given["project"]),
              command=given["command"], output=Path(given["output"]), config=config)
    async with KubernetesBackend() as backend:
        run = await backend.submit(job)
        print(backend.reference(job).to_json(), flush=True)
        await run.wait()

asyncio.run(main())
"""


async def begin_and_kill(place: Place, run_id: str, command: str, last: str) -> JobRef:
    """Run a driver until it has copied a line, and kill it."""
    output = place.output(run_id)
    given = {"config": place.given, "run_id": run_id, "project": str(place.project), "command": command}
    driver = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DRIVER, json.dumps({**given, "output": str(output)}), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert driver.stdout is not None
        reference = JobRef.from_json((await driver.stdout.readline()).decode())
        with anyio.fail_after(120):
            while not await anyio.to_thread.run_sync(ends_with, output, last):  # noqa: ASYNC110 - another process
                await anyio.sleep(0.1)
    finally:
        driver.send_signal(signal.SIGKILL)
        await driver.wait()
    return reference


def ends_with(path: Path, line: str) -> bool:
    return path.exists() and path.read_bytes().endswith(f"{line}\n".encode())


def numbers(lines: Sequence[str]) -> list[int]:
    return [int(match[1]) for line in lines if (match := re.fullmatch(rf"line (\d{{6}}) {_PAD}", line))]


async def test_followed_output_is_complete_although_the_node_rotates_it(place: Place) -> None:
    parts = "\n".join(f"print_lines {n * 3000} {(n + 1) * 3000}; sleep 1" for n in range(20))
    async with KubernetesBackend() as backend:
        run = await backend.submit(place.job("followed", PRINT + parts))
        assert (await run.outcome()).status is RunStatus.FINISHED
    found = place.output("followed").read_text().splitlines()
    assert numbers(found) == list(range(60_000))
    assert len(found) == 60_000


async def test_killed_driver_costs_only_lines_that_the_node_has_discarded(place: Place) -> None:
    # At first a pause: of a log that was rotated before it was read for the first time nobody knows that.
    command = PRINT + "\n".join(
        [f"sleep 5; print_lines 0 {_LINES}", "echo first part", f"sleep {_ROTATES}"]
        + [f"print_lines {n * _LINES} {(n + 1) * _LINES}; sleep {_ROTATES}" for n in (1, 2)]
        + [f"print_lines {3 * _LINES} {3 * _LINES + 100}", "echo 'second part'", "sleep 20", "echo done"]
    )
    reference = await begin_and_kill(place, "killed", command, "first part")
    async with KubernetesBackend() as backend:
        # Attaching at once would lose nothing: the kubelet follows a log from one file to the next.
        await anyio.sleep(3 * _ROTATES + 2)
        run = await backend.attach(reference)
        assert (await run.outcome()).status is RunStatus.FINISHED
    found = place.output("killed").read_text().splitlines()
    printed = numbers(found)
    assert printed[:_LINES] == list(range(_LINES)), "what was copied stays"
    assert printed[-100:] == list(range(3 * _LINES, 3 * _LINES + 100))
    assert all(one < other for one, other in itertools.pairwise(printed)), "each line once and in order"
    (said,) = [n for n, line in enumerate(found) if line.startswith("mlfleet: lines may be missing here")]
    assert found[said - 1] == "first part"
    assert found[-2:] == ["second part", "done"]


async def test_killed_driver_costs_no_lines_that_the_node_has(place: Place) -> None:
    command = PRINT + f"sleep 5; print_lines 0 {_LINES}; sleep {_ROTATES}; print_lines 0 9; echo first part"
    command += "; print_lines 9 20; sleep 9"
    reference = await begin_and_kill(place, "resumed", command, f"line 000019 {_PAD}")
    async with KubernetesBackend() as backend:
        run = await backend.attach(reference)
        assert (await run.outcome()).status is RunStatus.FINISHED
    found = place.output("resumed").read_text().splitlines()
    assert numbers(found) == [*range(_LINES), *range(20)]
    assert len(found) == _LINES + 21


async def test_every_attempt_of_a_restarted_container_is_in_the_output(place: Place) -> None:
    template = {"spec": {"backoffLimit": 3, "template": {"spec": {"restartPolicy": "OnFailure"}}}}
    template["spec"]["template"]["spec"]["containers"] = [{"name": "main"}]  # type: ignore[index]
    command = "read id </proc/sys/kernel/random/uuid; echo begin $id; sleep 1; echo end $id; exit 4"
    async with KubernetesBackend() as backend:
        job = await anyio.to_thread.run_sync(partial(place.job, "restarted", command, **{"job-template": template}))
        run = await backend.submit(job)
        outcome = await run.outcome()
    found = place.output("restarted").read_text().splitlines()
    begun = [line.removeprefix("begin ") for line in found if line.startswith("begin ")]
    ended = [line.removeprefix("end ") for line in found if line.startswith("end ")]
    assert len(set(begun)) == len(begun), "no attempt twice"
    # The Job's controller deletes the pod as soon as the last attempt has begun.
    assert len(begun) == 4 or any(line.startswith("mlfleet: output is missing here") for line in found)
    assert begun[:3] == ended[:3]
    assert (outcome.status, outcome.exit_code) == (RunStatus.FAILED, 4), outcome


async def test_logs_without_following_are_those_up_to_now(place: Place) -> None:
    reference = await begin_and_kill(place, "looked-at", "echo one; sleep 5; echo two; sleep 600", "one")
    async with KubernetesBackend() as backend:
        await anyio.sleep(7)
        run = await backend.attach(reference)
        assert [line async for line in run.logs(follow=False)] == ["one", "two"]
        await run.cancel(grace=1)

"""Drive Fleets with random operations, and check after each Fleet that nothing is left and every status is right.

The operations are submits of commands that succeed, fail, hang, ignore SIGTERM or leave processes behind, sweeps,
cancellations by every way that there is (of runs, of calls, of whole Fleets, once and twice), waits with time limits,
reads of output, SIGKILL of commands, and refusals of the tracking server. A Fleet is left after a random number of
them: normally, by an error, or by a cancellation. Afterwards

- every MLflow run has one terminal status and an end time, and its handle says the same;
- a run that nobody has disturbed has the status that its command deserves;
- no process of a run lives, no task is left, and no file descriptor.

With ``--drivers N`` it starts N programs besides, each with a Fleet that submits and cancels without end, and kills
each one with SIGKILL at a random moment. Then no process of its runs may live, and the next Fleet must have written a
terminal status for all of them.

The same seed gives the same choices; the order in which the runs end is the machine's. Run it with ``python -X dev -W
error`` to see what nobody awaited or closed. Exit code 1: a check failed; the message names the seed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from anyio.from_thread import start_blocking_portal

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import mlfleet
from fakes.scripted_server import scripted
from fakes.small_mlflow import SmallMlflow
from mlfleet import Fleet, FleetRun, RunStatus, Timeouts
from mlfleet.errors import MlfleetError, TrackingError
from mlfleet.testing import FakeTracking

MARK = "MLFLEET_RANDOM_OPERATIONS"  # a variable of the runs' environment, and a tag
COMMANDS = {
    "good": ("true", RunStatus.FINISHED),
    "prints": ("for i in $(seq 200); do echo line $i; done", RunStatus.FINISHED),
    "bad": ("exit 3", RunStatus.FAILED),
    "slow": ("sleep 0.2", RunStatus.FINISHED),
    "leaves-a-child": ("sleep 1000 & exit 0", RunStatus.FINISHED),
    "kills-itself": ("kill -9 $$", RunStatus.FAILED),
    "hangs": ("sleep 1000", None),
    "ignores-term": ("trap '' TERM; while :; do sleep 0.05; done", None),
    "tree": ("sleep 1000 & (sleep 1000; true) & wait", None),
}
DEFINITE = [name for name, (_, status) in COMMANDS.items() if status is not None]
GRACE = 0.2  # seconds
FEW_DESCRIPTORS = 12  # that may be open more than after the first Fleet: clients and threads that are reused
PATIENCE = 60.0  # seconds in which a Fleet must end


class Left(AssertionError):
    """A check failed."""


@dataclass
class Followed:
    """A run and what was done to it.

    Attributes:
        run: The handle.
        kind: The name of its command.
        disturbed: True if something else than its command may have decided its end.
    """

    run: FleetRun
    kind: str
    disturbed: bool = False


@dataclass
class Driver:
    """One Fleet and the operations on it.

    Attributes:
        dice: The source of all choices.
        uri: The project.
        tracking: The tracking server in memory.
        done: Operation → its number so far, in all Fleets.
        runs: The runs of this Fleet.
        tasks: The calls that are under way.
        is_left: True from the moment at which the Fleet's block ends.
    """

    dice: random.Random
    uri: str
    tracking: FakeTracking
    done: Counter[str]
    runs: list[Followed] = field(default_factory=list)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    is_left: bool = False

    async def live(self, operations: int) -> None:
        """Open a Fleet, do so many operations, and leave it in one of its ways."""
        way = self.dice.choice(["wait", "error", "cancel", "cancel twice", "time-outs", "Fleet.cancel"])
        self.done[f"left by: {way}"] += 1
        inside = asyncio.Event()
        task = asyncio.create_task(self._in_a_fleet(operations, way, inside))
        if way.startswith("cancel"):
            await inside.wait()
            for _ in range(1 if way == "cancel" else 2):
                task.cancel()
                await asyncio.sleep(self.dice.uniform(0, 0.1))
        await asyncio.wait([task], timeout=PATIENCE)
        if not task.done():
            for each in asyncio.all_tasks():
                each.print_stack()
            raise Left(f"the Fleet, left by {way!r}, has not ended after {PATIENCE:g} s")
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, _Expected):
            raise error
        for call in self.tasks:
            call.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _in_a_fleet(self, operations: int, way: str, inside: asyncio.Event) -> None:
        limit = self.dice.choice([None, 3, 20])
        try:
            async with (
                asyncio.timeout(None) as outer,
                asyncio.timeout(None) as inner,
                Fleet(
                    tracking=self.tracking,
                    timeouts=Timeouts(cancel_grace=GRACE),
                    max_concurrent=limit,
                    tracking_patience=30,
                ) as fleet,
            ):
                for _ in range(operations):
                    await self._operate(fleet, only_definite=way == "wait")
                self.is_left = True
                inside.set()
                match way:
                    case "error":
                        raise _Expected
                    case "cancel" | "cancel twice":
                        self._disturb_all()
                        await asyncio.sleep(PATIENCE)
                    case "time-outs":
                        self._disturb_all()
                        now = asyncio.get_running_loop().time()
                        inner.reschedule(now + self.dice.uniform(0, 0.05))
                        outer.reschedule(now + self.dice.uniform(0, 0.1))
                        await asyncio.sleep(PATIENCE)
                    case "Fleet.cancel":
                        self._disturb_all()
                        # Calls that are under way may submit further runs, for which the Fleet would wait.
                        while fleet.runs or any(not task.done() for task in self.tasks):
                            await fleet.cancel()
                            await asyncio.sleep(0.01)
                    case _:
                        for followed in self.runs:
                            if COMMANDS[followed.kind][1] is None:
                                await self._cancel(followed)
        except (_Expected, TimeoutError):
            self._disturb_all()
        finally:
            self.is_left = True
            inside.set()

    def _disturb_all(self) -> None:
        for followed in self.runs:
            followed.disturbed = True

    async def _operate(self, fleet: Fleet, *, only_definite: bool) -> None:
        operation = self.dice.choices(
            ["submit", "submit-cancelled", "cancel", "wait", "status", "logs", "kill", "sweep", "pause", "refusal"],
            [30, 8, 10, 8, 12, 8, 4, 2, 10, 3],
        )[0]
        self.done[operation] += 1
        kind = self.dice.choice(DEFINITE if only_definite else list(COMMANDS))
        followed = self.dice.choice(self.runs) if self.runs else None
        match operation:
            case "submit":
                self._start(self._submit(fleet, kind))
            case "submit-cancelled":
                # Whatever it has made by then has ended as KILLED, or as its command deserves.
                task = self._start(self._submit(fleet, kind, disturbed=True))
                await asyncio.sleep(self.dice.choice([0, 0.001, 0.01, 0.05]))
                task.cancel()
            case "cancel" if followed is not None:
                followed.disturbed = True
                self._start(self._cancel(followed))
            case "wait" if followed is not None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.dice.uniform(0, 0.1)):
                        await followed.run.wait()
            case "status" if followed is not None:
                status = await followed.run.get_status()
                if status.is_terminal and status is not self.tracking.runs[followed.run.run_id].status:
                    raise Left(f"the handle of a {followed.kind!r} run says {status}, MLflow does not")
            case "logs" if followed is not None:
                self._start(self._read(followed.run))
            case "kill" if followed is not None:
                followed.disturbed = True
                _kill(self.dice, followed.run.run_id)
            case "sweep":
                self._start(self._sweep(fleet))
            case "refusal":
                self.tracking.fail = _refuse_once(self.tracking, self.dice.choice(["log", "create_run"]))
            case _:
                await asyncio.sleep(self.dice.choice([0, 0.01, 0.1]))

    def _start(self, call: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(call)
        self.tasks.add(task)
        return task

    async def _submit(self, fleet: Fleet, kind: str, *, disturbed: bool = False) -> None:
        try:
            run = await fleet.submit(
                self.uri, kind, experiment_id="0", env_manager="local", output="capture", tags={MARK: kind}
            )
        except MlfleetError:
            return  # the Fleet is closing, or tracking has refused it
        # A call that returns while the Fleet is being left may have been cancelled by it.
        self.runs.append(Followed(run, kind, disturbed or self.is_left))

    async def _cancel(self, followed: Followed) -> None:
        followed.disturbed = True
        await followed.run.cancel(grace=self.dice.choice([None, 0, 0.05]))

    async def _read(self, run: FleetRun) -> None:
        count = 0
        async for _ in run.logs():
            count += 1
            if count == 20:
                break

    async def _sweep(self, fleet: Fleet) -> None:
        with suppress(MlfleetError):
            async with fleet.sweep(
                self.uri,
                mlfleet.grid(n=[1, 2, 3]),
                entry_point=self.dice.choice(["good", "bad"]),
                experiment_id="0",
                env_manager="local",
            ) as sweep:
                left_early = self.dice.random() < 0.5
                async for _ in sweep:
                    if left_early:
                        break

    async def check(self) -> None:
        """Check that the Fleet has left nothing, and that every status is right."""
        for run in self.tracking.runs.values():
            ends = {status for status in run.statuses if status.is_terminal}
            if len(ends) != 1 or not run.status.is_terminal or run.end_time is None:
                raise Left(f"an MLflow run of {run.tags} had the statuses {run.statuses}, and ended at {run.end_time}")
        for followed in self.runs:
            status = await followed.run.get_status()
            recorded = self.tracking.runs[followed.run.run_id].status
            deserved = COMMANDS[followed.kind][1]
            if status is not recorded:
                raise Left(f"the handle of a {followed.kind!r} run says {status}, MLflow says {recorded}")
            if not followed.disturbed and status is not deserved:
                raise Left(f"an undisturbed {followed.kind!r} run is {status}, not {deserved}")
            self.done[f"{followed.kind}: {status}"] += 1
        self.tracking.runs.clear()


class _Expected(Exception):
    """The error by which a Fleet's block is left."""


def _refuse_once(tracking: FakeTracking, method: str) -> Any:
    def refuse(called: str) -> Exception | None:
        if called != method:
            return None
        tracking.fail = None
        return TrackingError("the server is busy", uri=tracking.uri, status=503)

    return refuse


def _kill(dice: random.Random, run_id: str) -> None:
    for process in marked():
        with suppress(psutil.Error):
            if process.environ().get("MLFLOW_RUN_ID") == run_id and dice.random() < 0.7:
                process.send_signal(signal.SIGKILL)


def marked() -> list[psutil.Process]:
    """Return the processes of runs of this script that live."""
    found = []
    for process in psutil.Process().children(recursive=True) + _orphans():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == os.environ[MARK] and "MLFLOW_RUN_ID" in process.environ():
                found.append(process)
    return found


def _orphans() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.ppid() == 1:
                found.append(process)
    return found


async def drive(arguments: argparse.Namespace, folder: Path) -> Counter[str]:
    """Do all operations.

    Returns:
        Operation, and end of a run → their number.
    """
    project = folder / "project"
    project.mkdir()
    entry_points = "".join(f"  {name}:\n    command: {command!r}\n" for name, (command, _) in COMMANDS.items())
    (project / "MLproject").write_text(f"name: random\nentry_points:\n{entry_points}")
    dice = random.Random(arguments.seed)
    done: Counter[str] = Counter()
    count = 0
    descriptors: int | None = None
    while count < arguments.operations:
        operations = min(dice.randint(1, 60), arguments.operations - count)
        tasks = asyncio.all_tasks()
        driver = Driver(dice, str(project), FakeTracking(latency=dice.choice([0, 0, 0.002])), done)
        await driver.live(operations)
        await driver.check()
        count += operations
        for _ in range(5):
            await asyncio.sleep(0)
        if left := asyncio.all_tasks() - tasks:
            raise Left(f"{len(left)} tasks are left: {left}")
        if alive := await asyncio.to_thread(marked):
            raise Left(f"{len(alive)} processes are left: {alive}")
        open_now = psutil.Process().num_fds()
        descriptors = open_now if descriptors is None else descriptors
        if open_now > descriptors + FEW_DESCRIPTORS:
            raise Left(f"{open_now} file descriptors are open, {descriptors} after the first Fleet")
        if arguments.verbose:
            print(f"{count} operations, {dict(done)}", flush=True)
    return done


async def be_killed(uri: str, project: str, seed: int) -> None:
    """Submit and cancel runs until this process is killed."""
    dice = random.Random(seed)
    async with Fleet(tracking_uri=uri, max_concurrent=dice.choice([None, 2])) as fleet:
        runs: list[FleetRun] = []
        calls: set[asyncio.Task[Any]] = set()

        async def submit() -> None:
            kind = dice.choice(list(COMMANDS))
            runs.append(await fleet.submit(project, kind, experiment_id="0", env_manager="local", output="capture"))

        async def sweep() -> None:
            points = mlfleet.grid(n=[1, 2, 3])
            options: Any = {"entry_point": "slow", "experiment_id": "0", "env_manager": "local"}
            async with fleet.sweep(project, points, **options) as sweep:
                await sweep.result()

        print("ready", flush=True)
        while True:
            match dice.choices(["submit", "cancel", "sweep", "pause"], [10, 3, 1, 6])[0]:
                case "submit":
                    calls.add(asyncio.create_task(submit()))
                case "cancel" if runs:
                    calls.add(asyncio.create_task(dice.choice(runs).cancel()))
                case "sweep":
                    calls.add(asyncio.create_task(sweep()))
            await asyncio.sleep(dice.choice([0, 0.01, 0.1]))


def kill_drivers(count: int, seed: int, project: str) -> Counter[str]:
    """Kill programs with active runs, and check what is left of these.

    Returns:
        The statuses of all their runs → their number.
    """
    dice = random.Random(seed)
    server = SmallMlflow()
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(scripted(server.script)) as listener,
    ):
        uri = f"http://{listener.place}"
        for _ in range(count):
            argv = [sys.executable, __file__, "--child", uri, project, str(dice.randrange(2**32))]
            with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as driver:
                assert driver.stdout is not None
                driver.stdout.readline()
                time.sleep(dice.uniform(0, 3))
                driver.kill()
            wait_for(lambda: not marked(), "processes of a killed driver live")
            asyncio.run(conclude(uri, server))
        return Counter(f"killed driver: {status}" for status in server.statuses)


async def conclude(uri: str, server: SmallMlflow) -> None:
    """Open a Fleet, which writes the statuses that a killed driver could not write."""

    def is_done() -> bool:
        return all(RunStatus(status).is_terminal for status in server.statuses)

    async with Fleet(tracking_uri=uri):
        try:
            await asyncio.to_thread(wait_for, is_done, "runs of a killed driver have no terminal status")
        except Left as error:
            left = [run for run in server.runs.values() if not RunStatus(run["info"]["status"]).is_terminal]
            raise Left(f"{error}: {left}") from None


def wait_for(holds: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds; raise `Left` if that takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise Left(what)
        time.sleep(0.05)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        asyncio.run(be_killed(sys.argv[2], sys.argv[3], int(sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=10_000, help="the number of operations (default: 10000)")
    parser.add_argument("--seed", type=int, default=None, help="the seed of all choices (default: a new one)")
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio", help="the event loop")
    parser.add_argument("--drivers", type=int, default=0, help="the number of programs to kill (default: 0)")
    parser.add_argument("--verbose", action="store_true", help="print the counts after each Fleet")
    arguments = parser.parse_args()
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(2**32)
    factory = None
    if arguments.loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    os.environ[MARK] = str(os.getpid())
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MLFLEET_STATE_DIR": f"{folder}/state", "MLFLEET_CACHE_DIR": f"{folder}/cache"}
        try:
            with asyncio.Runner(loop_factory=factory) as runner:
                done = runner.run(drive(arguments, Path(folder)))
            done += kill_drivers(arguments.drivers, arguments.seed, f"{folder}/project")
        except Exception as error:
            print(f"seed {arguments.seed}, {arguments.loop}: {type(error).__name__}: {error}", file=sys.stderr)
            if not isinstance(error, Left):
                raise
            sys.exit(1)
    for what, number in sorted(done.items()):
        print(f"{what:24}{number:8}")
    seconds = time.perf_counter() - start
    print(
        f"{arguments.operations} operations, seed {arguments.seed}, {arguments.loop}, {seconds:.0f} s: nothing is left"
    )


if __name__ == "__main__":
    main()

"""Measure the cost of a run in a container, compared with ``docker run --rm`` of the same image by the docker command.

Needs an engine and the docker command. Without ``--image`` it makes an image of its own from this machine's static
busybox (Debian's busybox-static), and removes it at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from _figures import add_options, report
from mlfleet._project.spec import DockerEnv
from mlfleet.backends.base import DockerRequest, Job
from mlfleet.backends.docker import DockerBackend
from mlfleet.runs import RunStatus


@contextlib.contextmanager
def own_image() -> Iterator[str]:
    """Create an image with only busybox and its sh."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise SystemExit("there is no busybox to make an image of: install busybox-static, or give --image")
    name, content = f"mlfleet-benchmark:{uuid.uuid4().hex[:8]}", io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.add(busybox, "bin/busybox")
        link = tarfile.TarInfo("bin/sh")
        link.type, link.linkname = tarfile.SYMTYPE, "busybox"
        tar.addfile(link)
    subprocess.run(["docker", "import", "--change", "ENV PATH=/bin", "-", name], input=content.getvalue(), check=True)
    try:
        yield name
    finally:
        subprocess.run(["docker", "rmi", name], stdout=subprocess.DEVNULL, check=False)


def by_command(image: str) -> Callable[[], Awaitable[None]]:
    async def one() -> None:
        process = await asyncio.create_subprocess_exec(
            "docker", "run", "--rm", image, "sh", "-c", "echo done",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        if await process.wait() != 0:
            raise SystemExit("docker run failed")

    return one


def by_backend(
    backend: DockerBackend, image: str, folder: Path, args: dict[str, object]
) -> Callable[[], Awaitable[None]]:
    async def one() -> None:
        run_id = uuid.uuid4().hex
        run = await backend.submit(
            Job(
                run_id=run_id,
                experiment_id="0",
                project_name="benchmark",
                project_dir=folder,
                command="echo done",
                output=folder / run_id / "output.log",
                docker=DockerRequest(env=DockerEnv(image), args=args),
            )
        )
        outcome = await run.outcome()
        if outcome.status is not RunStatus.FINISHED or outcome.output != ("done",):
            raise SystemExit(f"a run of the docker backend failed: {outcome}")

    return one


async def timed(one: Callable[[], Awaitable[None]], count: int, concurrency: int) -> tuple[float, float]:
    """Wall seconds, and CPU seconds of this process alone."""
    slots = asyncio.Semaphore(concurrency)

    async def held() -> None:
        async with slots:
            await one()

    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(held() for _ in range(count)))
    return time.perf_counter() - wall, time.process_time() - cpu


async def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    rows: dict[str, list[tuple[float, float]]] = {"docker run": [], "DockerBackend": [], "DockerBackend, no init": []}
    with tempfile.TemporaryDirectory() as name:
        os.environ["MLFLEET_STATE_DIR"] = name
        async with DockerBackend() as backend:
            ways = {
                "docker run": by_command(args.image),
                "DockerBackend": by_backend(backend, args.image, Path(name), {}),
                "DockerBackend, no init": by_backend(backend, args.image, Path(name), {"init": False}),
            }
            for one in ways.values():
                await timed(one, 4, 4)
            for _ in range(args.rounds):
                for label, one in ways.items():
                    rows[label].append(await timed(one, args.count, args.concurrency))
    result: dict[str, dict[str, float]] = {}
    for label, runs in rows.items():
        result[label] = {
            "wall_s": statistics.median(wall for wall, _ in runs),
            "driver_cpu_ms_per_run": statistics.median(cpu for _, cpu in runs) / args.count * 1000,
            "ratio": statistics.median(
                ours[0] / theirs[0] for ours, theirs in zip(runs, rows["docker run"], strict=True)
            ),
        }
    return result


def show(result: dict[str, dict[str, float]]) -> None:
    columns = ("wall_s", "driver_cpu_ms_per_run", "ratio")
    print(f"{'':24}" + "".join(f"{column:>24}" for column in columns))
    for label, row in result.items():
        print(f"{label:24}" + "".join(f"{row[column]:24.2f}" for column in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="an image with sh that the engine has (default: one made for this)")
    parser.add_argument("--count", type=int, default=50, help="runs (default: 50)")
    parser.add_argument("--concurrency", type=int, default=8, help="of them in flight (default: 8)")
    add_options(parser, rounds=3)
    args = parser.parse_args()
    with contextlib.nullcontext(args.image) if args.image else own_image() as args.image:
        result = asyncio.run(measure(args))
    show(result)
    ours = result["DockerBackend"]
    figures = {
        "Docker: wall time / docker run": ours["ratio"],
        "Docker: driver CPU per run, ms": ours["driver_cpu_ms_per_run"],
    }
    report("docker_backend", figures, args)


if __name__ == "__main__":
    main()

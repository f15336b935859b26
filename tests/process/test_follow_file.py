from __future__ import annotations

import asyncio
import resource
from pathlib import Path

import pytest

from fakes.processes import start_process
from mlfleet._process.process import Process
from mlfleet._text.lines import find_tail, follow_bytes, last_lines, split_lines


async def write(path: Path, script: str) -> Process:
    with open(path, "ab") as file:
        return await start_process(["bash", "-c", script], output=file.fileno())


async def test_lines_arrive_while_the_file_is_written(tmp_path: Path) -> None:
    path = tmp_path / "output"
    # It goes on only when its first line was seen.
    writer = await write(
        path, f"echo first; while [ ! -e {tmp_path}/seen ]; do sleep 0.01; done; echo second; printf third"
    )
    lines = []
    async for line in split_lines(follow_bytes(path, writer.wait)):
        lines.append(line)
        (tmp_path / "seen").touch()
    assert lines == ["first", "second", "third"]


async def test_a_file_that_appears_later_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "output"
    ended = asyncio.Event()
    following = asyncio.create_task(read(path, ended))
    await asyncio.sleep(0.05)
    path.write_text("late\n")
    ended.set()
    assert await following == ["late"]


async def test_following_a_file_that_never_appears_ends(tmp_path: Path) -> None:
    ended = asyncio.Event()
    ended.set()
    assert await read(tmp_path / "none", ended) == []
    assert [line async for line in split_lines(follow_bytes(tmp_path / "none"))] == []


async def test_without_following_only_existing_lines_are_returned(tmp_path: Path) -> None:
    path = tmp_path / "output"
    path.write_text("\n".join(map(str, range(50_000))))
    assert [line async for line in split_lines(follow_bytes(path))] == [*map(str, range(50_000))]


async def test_end_wakes_followers_at_once(tmp_path: Path) -> None:
    path = tmp_path / "output"
    path.write_text("line\n")
    ended = asyncio.Event()
    followers = [asyncio.create_task(read(path, ended)) for _ in range(50)]
    await asyncio.sleep(0.5)  # until they look but rarely
    with open(path, "a") as file:
        file.write("last\n")
    ended.set()
    assert await asyncio.gather(*followers) == [["line", "last"]] * 50


async def test_a_process_that_outlives_the_writer_is_not_followed_forever(tmp_path: Path) -> None:
    path = tmp_path / "output"
    writer = await write(path, "while :; do echo y; done & echo $! > " + str(tmp_path / "pid") + "; exit 0")
    try:
        assert set(await read_until(path, writer)) <= {"y", ""}
    finally:
        killer = await start_process(["kill", "-KILL", (tmp_path / "pid").read_text().strip()])
        await killer.wait()
    path.unlink()


async def test_a_reader_that_never_catches_up_ends_with_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "output"
    path.write_text("line\n")
    ended = asyncio.Event()
    ended.set()
    read = b""
    async for data in follow_bytes(path, ended.wait):
        read += data
        assert len(read) < 1000
        with path.open("ab") as file:  # a process that outlives the writer is faster than the reader
            file.write(b"more\n")
    assert read.startswith(b"line\n")


async def test_an_error_comes_after_all_that_was_written(tmp_path: Path) -> None:
    async def ended() -> None:
        raise RuntimeError("lost")

    async def copy() -> None:
        async for data in follow_bytes(path, ended):
            copied.extend(data)

    path, copied = tmp_path / "output", bytearray()
    path.write_bytes(bytes(1_000_000))
    with pytest.raises(RuntimeError, match="lost"):
        await copy()
    assert len(copied) == 1_000_000


async def test_100_mb_of_binary_stay_out_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "output"
    writer = await write(path, "head -c 100000000 /dev/zero; echo; echo end")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    longest, last = 0, ""
    async for line in split_lines(follow_bytes(path, writer.wait)):
        longest, last = max(longest, len(line)), line
    assert (longest, last) == (65536, "end")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
    path.unlink()


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_last_lines(tmp_path: Path, count: int) -> None:
    path = tmp_path / "output"
    path.write_text("".join(f"{n}\n" for n in range(10_000)) + "no end")
    expected = [*map(str, range(10_000)), "no end"]
    assert last_lines(path, count) == tuple(expected[len(expected) - count :])


def test_last_lines_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "output"
    assert last_lines(path) == ()
    path.write_text("short\n")
    assert last_lines(path) == ("short",)
    path.write_text("x" * 1_000_000)
    assert last_lines(path) == ("x" * 16384,)
    path.write_text("x" * 100_000 + "\nlast\n")
    assert last_lines(path) == ("last",)


@pytest.mark.parametrize("count", [0, 1, 20, 30_000, 99_999, 100_000, 200_000])
def test_the_tail_of_a_file_is_found_from_its_end(tmp_path: Path, count: int) -> None:
    path = tmp_path / "output"
    assert find_tail(path, count) == 0
    lines = [f"{number}\n".encode() for number in range(100_000)]
    path.write_bytes(b"".join(lines))
    assert path.read_bytes()[find_tail(path, count) :] == b"".join(lines[max(len(lines) - count, 0) :])


async def read(path: Path, ended: asyncio.Event) -> list[str]:
    return [line async for line in split_lines(follow_bytes(path, ended.wait))]


async def read_until(path: Path, writer: Process) -> list[str]:
    return [line async for line in split_lines(follow_bytes(path, writer.wait))]

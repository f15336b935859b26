"""The local copy of a run's output."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from mlfleet._concurrency.threads import FILES
from mlfleet.backends._remote.output import STDERR, STDOUT, KeptOutput, OutputFile, write_output
from mlfleet.errors import SubmitError


async def write(output: OutputFile, data: bytes, *, stream: int = STDOUT) -> None:
    await FILES.run(partial(output.write, data, stream=stream))


async def test_a_file_is_begun_anew_and_then_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "run" / "output.log"
    path.parent.mkdir()
    path.write_text("of an earlier process, and longer than what comes now\n")
    output = OutputFile(path, backend="somewhere")
    await output.open()
    await write(output, b"one\n")
    await write(output, b"two\n", stream=STDERR)
    await output.open()
    await write(output, b"three\n", stream=STDOUT)
    await output.close()
    await output.close()
    assert path.read_bytes() == b"one\ntwo\nthree\n"


async def test_a_file_that_cannot_be_made_is_an_error_of_the_backend(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "output.log"
    with pytest.raises(SubmitError, match=rf"output of the run cannot be written to {path}: ") as caught:
        await OutputFile(path, backend="somewhere").open()
    assert caught.value.backend == "somewhere"
    with pytest.raises(SubmitError):
        await FILES.run(partial(write_output, path, b"one", backend="somewhere", at=0))
    with pytest.raises(SubmitError):
        await FILES.run(partial(KeptOutput(path, backend="somewhere").write, b"one"))


async def test_a_full_disk_costs_lines_and_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    output = OutputFile(Path("/dev/full"), backend="somewhere")
    await output.open()
    await write(output, b"one\n")
    await write(output, b"two\n")
    await output.open()
    await write(output, b"three\n")
    await output.close()
    (record,) = caplog.records  # one warning, however many lines are lost
    assert "output of a run is lost, /dev/full cannot be written" in record.getMessage()


def test_two_processes_may_write_the_same_output_at_positions(tmp_path: Path) -> None:
    path = tmp_path / "output.log"
    for _ in range(2):
        write_output(path, b"one\n", backend="somewhere", at=0)
        write_output(path, b"two\n", backend="somewhere", at=4)
    assert path.read_bytes() == b"one\ntwo\n"


def test_bytes_that_an_earlier_process_has_copied_are_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "output.log"
    path.write_bytes(b"one\ntwo\nthr")
    output = KeptOutput(path, backend="somewhere")
    output.seek(4)
    for part in (b"tw", b"o\nthree", b"\nfour\n"):
        output.write(part)
    assert path.read_bytes() == b"one\ntwo\nthree\nfour\n"
    assert (output.position, output.ends_line) == (len(b"one\ntwo\nthree\nfour\n"), True)


def test_output_that_differs_from_the_copy_goes_behind_it_with_a_line_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "output.log"
    path.write_bytes(b"one\ntwo\nthr")
    output = KeptOutput(path, backend="somewhere")
    output.write(b"five\n")
    output.write(b"six\n")
    *kept, said, five, six = path.read_text().splitlines()
    assert (kept, five, six) == (["one", "two", "thr"], "five", "six")
    assert "lines may be missing or repeated here" in said


async def test_without_a_file_the_output_goes_to_that_of_this_process(capfd: pytest.CaptureFixture[str]) -> None:
    output = OutputFile(None, backend="somewhere")
    await output.open()
    await write(output, b"one\n")
    await write(output, b"two\n", stream=STDERR)
    await FILES.run(partial(write_output, None, b"three\n", backend="somewhere", at=0))
    await output.close()
    assert capfd.readouterr() == ("one\nthree\n", "two\n")

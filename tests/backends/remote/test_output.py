"""The local copy of a run's output."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlfleet.backends._remote.output import STDERR, KeptOutput, begin_output, pass_on
from mlfleet.errors import SubmitError


def test_a_file_is_begun_anew_and_then_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "run" / "output.log"
    path.parent.mkdir()
    path.write_text("of an earlier process, and longer than what comes now\n")
    begin_output(path, backend="somewhere")
    output = KeptOutput(path, backend="somewhere")
    output.write(b"one\n")
    output.write(b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_file_that_cannot_be_made_is_an_error_of_the_backend(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "output.log"
    with pytest.raises(SubmitError, match=rf"output of the run cannot be written to {path}: ") as caught:
        begin_output(path, backend="somewhere")
    assert caught.value.backend == "somewhere"
    with pytest.raises(SubmitError):
        KeptOutput(path, backend="somewhere").write(b"one")


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


def test_without_a_file_the_output_goes_to_that_of_this_process(capfd: pytest.CaptureFixture[str]) -> None:
    pass_on(b"one\n")
    pass_on(b"two\n", STDERR)
    KeptOutput(None, backend="somewhere").write(b"three\n")
    assert capfd.readouterr() == ("one\nthree\n", "two\n")

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mlfleet._text.lines import LineSplitter, LogLine, find_tail


def split(*pieces: bytes) -> list[str]:
    splitter = LineSplitter()
    lines: list[str] = [line for piece in pieces for line in splitter.feed(piece)]
    return [*lines, *splitter.close()]


def test_line_ends() -> None:
    assert split(b"a\nb\r\nc\rd") == ["a", "b", "c", "d"]
    assert split(b"\n\n") == ["", ""]
    assert split(b"end\n") == ["end"]
    assert split() == []


def test_progress_bar_is_lines() -> None:
    assert split(b"\r10%", b"\r20", b"%\r\n", b"done\n") == ["", "10%", "20%", "done"]


def test_line_end_in_two_pieces() -> None:
    assert split(b"a\r", b"\nb") == ["a", "b"]
    assert split(b"a\r", b"\n") == ["a"]
    assert split(b"a\r", b"b") == ["a", "b"]
    assert split(b"a\r", b"\r\n", b"\n") == ["a", "", ""]


def test_character_in_two_pieces() -> None:
    snowman = "\N{SNOWMAN}".encode()
    assert split(snowman[:1], snowman[1:] + b"\n") == ["\N{SNOWMAN}"]
    assert split(snowman[:2]) == ["\N{REPLACEMENT CHARACTER}"]


def test_other_separators_do_not_end_a_line() -> None:
    text = "form\ffeed\vtab\x1cseparator\x85next\N{LINE SEPARATOR}line"
    assert split(text.encode()) == [text]


def test_long_line_is_cut() -> None:
    lines = split(b"x" * 150_000 + b"\nnext\n")
    assert [len(line) for line in lines] == [65536, 65536, 18928, 4]
    assert split(b"y" * 65536 + b"\n") == ["y" * 65536]


def test_endless_line_is_emitted_in_pieces_and_not_buffered() -> None:
    splitter = LineSplitter()
    given_out = sum(len(line) for _ in range(1000) for line in splitter.feed(b"z" * 1000))
    assert given_out >= 1_000_000 - 65536


@given(st.lists(st.text(alphabet="ab\r\n\N{SNOWMAN}")), st.data())
def test_splitting_the_input_does_not_change_the_lines(texts: list[str], data: st.DataObject) -> None:
    whole = "".join(texts).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert split(*pieces) == split(whole)


@given(st.binary())
def test_any_bytes(data: bytes) -> None:
    assert "".join(split(data)) == data.decode(errors="replace").replace("\r", "").replace("\n", "")


def test_a_long_line_is_cut_between_characters() -> None:
    line = "xx" + 30_000 * "\N{SNOWMAN}"
    lines = split(line.encode())
    assert "".join(lines) == line
    assert [len(each.encode()) for each in lines] == [65_534, 90_002 - 65_534]


@given(st.lists(st.text(alphabet="ab\r\n\N{SNOWMAN}")), st.data())
def test_the_lines_after_any_line_are_found_at_its_end(texts: list[str], data: st.DataObject) -> None:
    pieces = [text.encode() for text in texts]
    whole = b"".join(pieces)
    splitter = LineSplitter()
    lines = [line for piece in pieces for line in splitter.feed(piece)]
    lines += splitter.close()
    assert whole.endswith(b"\r\n") or [line.end for line in lines][-1:] == [len(whole)][: len(lines)]
    if lines:
        number = data.draw(st.integers(0, len(lines) - 1))
        start = lines[number].end
        rest = LineSplitter(start)
        assert [*rest.feed(whole[start - 1 : start]), *rest.feed(whole[start:]), *rest.close()] == lines[number + 1 :]


def test_a_line_is_sent_to_another_process_with_its_end() -> None:
    (line,) = LineSplitter().feed(b"a line\n")
    again = pickle.loads(pickle.dumps(line))
    assert (type(again), again, again.end) == (LogLine, "a line", 7)


def test_the_memory_to_find_a_tail_grows_neither_with_its_length_nor_with_the_output(tmp_path: Path) -> None:
    path = tmp_path / "output.log"
    path.write_bytes(b"a\n" * 200_000)
    tracemalloc.start()
    try:
        assert [find_tail(path, count) for count in (10**30, 200_000, 199_999, 150_000)] == [0, 0, 2, 100_000]
        assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    finally:
        tracemalloc.stop()

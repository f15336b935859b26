"""Logs with timestamps, interrupted anywhere and resumed: every line arrives once, in order and unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfleet.backends.kubernetes.log_stream import LogStream

DATA = Path(__file__).parents[2] / "data" / "kubernetes-1.36"
STAMPS = [f"2026-11-23T04:27:2{second}.{fraction}Z" for second in range(3) for fraction in ("5", "500000001", "6")]
# What may be in a line: anything but its end; also what looks like a stamp.
PRINTED = st.lists(
    st.tuples(
        st.sampled_from(STAMPS), st.sampled_from([b"", b"a", b"\xff\r50%", b"two words", STAMPS[0].encode() + b" x"])
    )
)


def served(lines: list[tuple[str, bytes]], since: str | None) -> bytes:
    """Return the response of the kubelet: sinceTime counts whole seconds; the last line may lack its newline."""
    whole = (since or "")[:19]
    kept = [stamp.encode() + b" " + text for stamp, text in lines if stamp[:19] >= whole]
    return b"\n".join(kept)


def test_recorded_log_is_decoded_to_the_printed_output() -> None:
    recorded = (json.loads(line) for line in (DATA / "http.jsonl").read_text().splitlines())
    (chunks,) = [each["body"] for each in recorded if each["what"].startswith("GET log follow")]
    stream = LogStream()
    printed = b"".join(stream.feed(text.encode()) for _, text in chunks) + stream.close()
    assert printed == b"line 0\nline 1\nline 2\nline 3\nline 4\nno newline"
    assert stream.since == "2026-11-23T04:27:32.454662904Z"


@given(PRINTED, st.lists(st.integers(0, 400), max_size=4), st.integers(1, 50))
def test_every_line_arrives_once_wherever_the_connection_breaks(
    printed: list[tuple[str, bytes]], breaks: list[int], piece: int
) -> None:
    lines = sorted(printed, key=lambda line: line[0])
    stream = LogStream()
    out = b""
    for end in [*breaks, None]:
        stream.resume()
        sent = served(lines, stream.since)[:end]
        out += b"".join(stream.feed(sent[at : at + piece]) for at in range(0, len(sent), piece))
    assert out + stream.close() == b"\n".join(text for _, text in lines)


def test_lines_that_another_stream_has_delivered_are_dropped() -> None:
    stamp = "2026-11-23T04:27:2{}.500000000Z".format
    first = LogStream()
    first.feed(f"{stamp(1)} one\n{stamp(3)} three\n".encode())
    first.resume()
    first.feed(f"{stamp(3)} three\n{stamp(6)} six\n".encode())
    log = "".join(f"{stamp(number)} {number}\n" for number in range(8))
    other = LogStream(known=first.spans, heading=b"more:\n")
    assert other.feed(log.encode()) == b"more:\n0\n4\n5\n7\n"


@pytest.mark.parametrize("cut", range(1, 60))
@pytest.mark.parametrize(
    "said",
    [
        b"unable to retrieve container logs for containerd://0123456789",
        b'rpc error: code = NotFound desc = an error occurred when try to find container "0123": not found',
        b'failed to try resolving symlinks in path "/var/log/pods/a/0.log": lstat: no such file or directory',
    ],
)
def test_kubelet_error_lines_are_not_output(said: bytes, cut: int) -> None:
    stream = LogStream()
    assert stream.feed(said[:cut]) + stream.feed(said[cut:]) + stream.close() == b""
    assert stream.remark == said
    stream.resume()
    assert stream.remark == b""
    assert stream.feed(b"2026-01-01T00:00:00.5Z one\n") == b"one\n"


@pytest.mark.parametrize("cut", range(1, 20))
def test_other_lines_without_a_timestamp_are_output(cut: int) -> None:
    stream = LogStream()
    line = b"unable to do what was asked\n"
    assert stream.feed(line[:cut]) + stream.feed(line[cut:]) + stream.close() == line
    assert stream.remark == b""

"""The log of a container as the API server sends it, interrupted and resumed, turned into what was printed. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlfleet.backends._remote.output import remark_line

__all__ = ["GONE", "LogStream", "Mark"]

# RFC 3339 with nanoseconds, in the time zone of the node.
_STAMP = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)) ")
_LONGEST_STAMP = 37
# https://github.com/kubernetes/kubernetes/blob/master/pkg/kubelet/kuberuntime/kuberuntime_container.go and
# …/staging/src/k8s.io/cri-client/pkg/logs/logs.go: with the status 200, for the answer has begun already.
GONE = b"rpc error: code = "
"""The beginning of a remark after which there is no more: the runtime has removed the container."""
_REMARKS = (
    GONE,
    b"failed to try resolving symlinks in path ",
    b"failed to open log file ",
    b"unable to retrieve container logs for ",
)
_LONGEST_REMARK = 1000
_BEGINNING = 48  # bytes of a line that tell what it is


@dataclass(frozen=True, slots=True)
class Mark:
    """The place that a copy has reached in the log of one instance of a container.

    Attributes:
        last: The timestamp of the last line.
        taken: The number of complete lines with that timestamp.
        partial: The bytes of a line that has not ended.
    """

    last: str = ""
    taken: int = 0
    partial: int = 0


class LogStream:
    """Removes the timestamps of a log, and drops what an earlier connection has delivered already. Pure.

    The server starts again with the whole second of the last line (``sinceTime`` is not more precise). Lines before the
    last delivered line are dropped. Of several lines with the same timestamp as many are dropped as were delivered, and
    of a line that was cut off its beginning. If a connection begins after the last delivered line, the node has
    discarded the lines in between, and a line of mlfleet's own says so.

    Args:
        mark: The place that an earlier process has reached.
        known: The first and the last timestamps of lines that were delivered by other streams of the same container.
        heading: Text to deliver before the first line.

    Attributes:
        spans: The first and the last timestamps of the lines that each connection has delivered.
        last: The timestamp of the last line.
        remark: The message of the kubelet itself on this connection in place of output: that there is no log.
        reached: True if this connection has come to the last delivered line, or past it.
        gaps: The number of places at which lines may be missing.
    """

    def __init__(
        self, mark: Mark | None = None, *, known: Sequence[tuple[bytes, bytes]] = (), heading: bytes = b""
    ) -> None:
        mark = mark or Mark()
        self.known = list(known)
        self.spans: list[tuple[bytes, bytes]] = []
        self._heading = heading
        self.last = mark.last.encode()
        self.remark = b""
        self.gaps = 0
        self._taken = mark.taken  # complete lines with that stamp
        self._partial = mark.partial  # bytes taken of a line that has not ended
        self._restart()

    def _restart(self) -> None:
        self._head = b""  # of a line whose stamp is not complete yet
        self._in_line = False
        self._is_remark = False
        self.remark = b""
        self.reached = not self.last
        self._joins = not self.last  # this connection shows that nothing is missing before its new lines
        self._keep = True
        self._in_span = False
        self._skip_bytes = 0
        self._to_skip = self._taken + (1 if self._partial else 0)

    @property
    def since(self) -> str | None:
        """The ``sinceTime`` of the next request (RFC 3339); None: everything."""
        return self.last.decode() or None

    @property
    def mark(self) -> Mark:
        """The place that has been reached."""
        return Mark(self.last.decode(), self._taken, self._partial)

    def resume(self, *, at_end: bool = False) -> None:
        """Begin a new connection.

        Args:
            at_end: True if the one before had delivered all that was printed until a moment ago.
        """
        self._restart()
        self._joins |= at_end

    def feed(self, data: bytes) -> bytes:
        """Return the new part of `data`, without timestamps."""
        out: list[bytes] = []
        data, self._head, at = self._head + data, b"", 0
        while at < len(data):
            if not self._in_line:
                at += self._begin(data[at : at + _BEGINNING], out)
                if not self._in_line:
                    self._head = data[at:]
                    break
            end = data.find(b"\n", at) + 1
            self._body(data[at : end or len(data)], out)
            if not end:
                break
            self._end()
            at = end
        return b"".join(out)

    def close(self) -> bytes:
        """Return what was held back for a timestamp that was never complete."""
        head, self._head = self._head, b""
        return head

    def _begin(self, start: bytes, out: list[bytes]) -> int:
        """Read the timestamp of a line, unless it has not arrived completely. Return its length."""
        match = _STAMP.match(start)
        if match is None and b"\n" not in start:
            may_be_stamp = len(start) < _LONGEST_STAMP and b" " not in start
            if may_be_stamp or any(len(start) < len(each) and each.startswith(start) for each in _REMARKS):
                return 0
        self._in_line = True
        self._is_remark = match is None and start.startswith(_REMARKS)
        if match is None:
            self._keep, self._skip_bytes = True, 0
            return 0
        self._stamp(match[1], out)
        return match.end()

    def _stamp(self, stamp: bytes, out: list[bytes]) -> None:
        self._judge(stamp, out)
        if self._keep:
            first = self.spans.pop()[0] if self._in_span else stamp
            self.spans.append((first, stamp))
            self._in_span = True

    def _judge(self, stamp: bytes, out: list[bytes]) -> None:
        """Decide whether to keep a line."""
        self._keep, self._skip_bytes = True, 0
        if any(first <= stamp <= last for first, last in self.known):
            self._keep = False
            return
        if not self.reached and stamp < self.last:
            self._keep, self._joins = False, True
            return
        # From here on the clock of the node may even go back: what arrives on this connection is new.
        self.reached = True
        if stamp == self.last:
            self._joins = True
            if self._to_skip > 0:
                self._to_skip -= 1
                if self._to_skip == 0 and self._partial:
                    self._skip_bytes = self._partial
                else:
                    self._keep = False
            return
        if not self._joins:
            self._joins = True
            self.gaps += 1
            text = f"lines may be missing here: the node has discarded its log between {self.last.decode()} and"
            out.append((b"\n" if self._partial else b"") + remark_line(f"{text} {stamp.decode()}"))
        self.last, self._taken, self._partial, self._to_skip = stamp, 0, 0, 0
        if self._heading:
            out.append(self._heading)
            self._heading = b""

    def _body(self, piece: bytes, out: list[bytes]) -> None:
        if self._is_remark:
            self.remark = (self.remark + piece)[:_LONGEST_REMARK]
            return
        if not self._keep:
            return
        if self._skip_bytes:
            skipped = min(self._skip_bytes, len(piece))
            self._skip_bytes -= skipped
            piece = piece[skipped:]
        self._partial += len(piece)
        out.append(piece)

    def _end(self) -> None:
        if self._keep and not self._is_remark:
            self._taken += 1
            self._partial = 0
        self._in_line = False

"""Copying the output of a run's containers into the run's file: live, in order, and each line once."""

from __future__ import annotations

import asyncio
import logging
import re
import resource
from functools import partial
from pathlib import Path
from typing import Protocol

import anyio

from mlfleet._concurrency.threads import FILES
from mlfleet.backends._remote.output import write_output
from mlfleet.backends.kubernetes.client import ApiError, KubernetesClient, Pool, reconnect_pause
from mlfleet.errors import SubmitError

__all__ = ["Copier", "End", "LogSlots", "LogStream"]

_log = logging.getLogger("mlfleet.kubernetes")
_SILENCE = 60.0  # seconds without a byte of the log of a container that has ended
_GATHER = 0.01  # seconds in which more of a trickle is let come, so that it costs fewer turns
_SMALL = 16 * 1024
_LOOK = 2.0  # seconds between two looks for a free slot
_TRIES = 10  # without any output, of a container that has ended
# RFC 3339 with nanoseconds, in the time zone of the node.
_STAMP = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)) ")
_LONGEST_STAMP = 37
# https://github.com/kubernetes/kubernetes/blob/master/pkg/kubelet/kuberuntime/kuberuntime_container.go and
# …/staging/src/k8s.io/cri-client/pkg/logs/logs.go: with the status 200, for the answer has begun already.
_REMARKS = (
    b"failed to try resolving symlinks in path ",
    b"failed to open log file ",
    b"unable to retrieve container logs for ",
)
_LONGEST_REMARK = 1000
_BEGINNING = 48  # bytes of a line that tell what it is


class LogStream:
    """Removes the timestamps of a log, and drops what an earlier connection has delivered already. Pure.

    The server starts again with the whole second of the last line (``sinceTime`` is not more precise). Lines before the
    last delivered line are dropped. Of several lines with the same timestamp as many are dropped as were delivered, and
    of a line that was cut off its beginning.

    Attributes:
        last: The timestamp of the last line.
        remark: The message of the kubelet itself on this connection in place of output: that there is no log.
    """

    def __init__(self) -> None:
        self.last = b""
        self.remark = b""
        self._taken = 0  # complete lines with that stamp
        self._partial = 0  # bytes taken of a line that has not ended
        self._restart()

    def _restart(self) -> None:
        self._head = b""  # of a line whose stamp is not complete yet
        self._prefix = b""  # of a line without a stamp
        self._in_line = False
        self._is_remark = False
        self.remark = b""
        self._keep = True
        self._skip_bytes = 0
        self._to_skip = self._taken + (1 if self._partial else 0)

    @property
    def since(self) -> str | None:
        """The ``sinceTime`` of the next request (RFC 3339); None: everything."""
        return self.last.decode() or None

    def resume(self) -> None:
        """Begin a new connection."""
        self._restart()

    def feed(self, data: bytes) -> bytes:
        """Return the new part of `data`, without timestamps."""
        out: list[bytes] = []
        at = 0
        while at < len(data):
            if not self._in_line:
                at = self._begin(data, at)
                if not self._in_line:
                    break
            end = data.find(b"\n", at)
            piece = data[at:] if end < 0 else data[at : end + 1]
            self._body(piece, out)
            at += len(piece)
            if end >= 0:
                self._end()
        return b"".join(out)

    def close(self) -> bytes:
        """Return what was held back for a timestamp that was never complete."""
        head, self._head = self._head, b""
        return head

    def _begin(self, data: bytes, at: int) -> int:
        """Read the timestamp of a line, which may arrive in pieces."""
        have = self._head + data[at : at + _BEGINNING]
        match = _STAMP.match(have)
        if match is None and b"\n" not in have:
            is_stamp = len(have) < _LONGEST_STAMP and b" " not in have
            if is_stamp or any(len(have) < len(each) and each.startswith(have) for each in _REMARKS):
                self._head = have
                return len(data)
        held = len(self._head)
        self._head = b""
        self._in_line = True
        self._is_remark = False
        if match is None:
            self._is_remark = have.startswith(_REMARKS)
            self._keep, self._skip_bytes = True, 0
            self._prefix = have[:held]
            return at
        self._prefix = b""
        self._stamp(match[1])
        return at + match.end() - held

    def _stamp(self, stamp: bytes) -> None:
        self._keep, self._skip_bytes = True, 0
        if self.last and stamp < self.last:
            self._keep = False
        elif stamp == self.last and self._to_skip > 0:
            self._to_skip -= 1
            if self._to_skip == 0 and self._partial:
                self._skip_bytes = self._partial
            else:
                self._keep = False
        elif stamp != self.last:
            self.last, self._taken, self._partial, self._to_skip = stamp, 0, 0, 0

    def _body(self, piece: bytes, out: list[bytes]) -> None:
        if self._prefix:
            piece, self._prefix = self._prefix + piece, b""
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


class End(Protocol):
    """The end of a container."""

    @property
    def is_there(self) -> bool:
        """True if the container has ended, or is gone."""

    async def wait(self) -> None:
        """Wait for the end."""


class LogSlots:
    """The limits for logs that are read at once, since a followed log holds a connection.

    With more runs than that, the output of the others arrives when a slot is free or when their container has ended,
    for which there are other slots.
    """

    def __init__(self) -> None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._following = max(16, min(2000, files // 4))  # free slots
        self._reading = asyncio.Semaphore(50)

    async def acquire(self, end: End) -> bool:
        """Wait for a slot to read the log of a container; call `release` afterwards.

        Returns:
            True if the log may be followed; False if it must be read at once.
        """
        while not end.is_there:
            if self._following > 0:
                self._following -= 1
                return True
            with anyio.move_on_after(_LOOK):
                await end.wait()
        await self._reading.acquire()
        return False

    def release(self, *, follow: bool) -> None:
        """Free a slot.

        Args:
            follow: The result of `acquire`.
        """
        if follow:
            self._following += 1
        else:
            self._reading.release()


class Copier:
    """Copies the logs of the pods of one run.

    Args:
        client: The client of the cluster.
        slots: The limits that all runs share.
        namespace: The namespace of the pods.
        path: The file to write; None: the stdout of this process.
    """

    def __init__(self, client: KubernetesClient, slots: LogSlots, namespace: str, path: Path | None) -> None:
        self._client = client
        self._slots = slots
        self._namespace = namespace
        self._path = path
        self._begun = False
        self._last_byte = b"\n"
        self.copied = 0

    async def copy(self, pod: str, container: str, end: End) -> None:
        """Copy the log of one container to its end.

        Args:
            pod: The name of the pod.
            container: The name of the container.
            end: The end of the container.
        """
        stream = LogStream()
        attempt = 0
        had_ended = False
        while True:
            before = self.copied
            try:
                follow = await self._slots.acquire(end)
                had_ended = not follow
                try:
                    await self._follow(pod, container, stream, follow=follow)
                finally:
                    self._slots.release(follow=follow)
                # The kubelet may not find the log yet of a container that has just started.
                complete = had_ended or not stream.remark
            except ApiError as error:
                complete = False
                if error.status in (403, 404, 410) or (error.status == 400 and had_ended):
                    if error.status == 403 or not had_ended:
                        _log.warning("the output of the pod %s is not all there: %s", pod, error)
                    break
                _log.debug("%s", error)
            # A log ends with its container, but a proxy may end it sooner: it is complete only if it ended after the
            # container.
            if complete and (had_ended or end.is_there):
                if stream.remark:
                    remark = stream.remark.decode(errors="replace").strip()
                    _log.warning("the output of the pod %s is not all there: %s", pod, remark)
                break
            attempt = 0 if self.copied > before else attempt + 1
            if attempt > _TRIES and end.is_there:
                _log.warning("the output of the pod %s is not all there: the API server gives no more of it", pod)
                break
            # Short, because the end of the run waits for its output.
            seconds = reconnect_pause(min(attempt, 2))
            if end.is_there and not complete:
                await anyio.sleep(seconds)
            with anyio.move_on_after(seconds):
                await end.wait()
        await self._write(stream.close())

    async def finish_line(self) -> None:
        """End the last line, so that the next container begins a new one."""
        if self._last_byte != b"\n":
            await self._write(b"\n")

    async def _follow(self, pod: str, container: str, stream: LogStream, *, follow: bool) -> None:
        stream.resume()
        params = {"container": container, "timestamps": "true"}
        if follow:
            params["follow"] = "true"
        if stream.since is not None:
            params["sinceTime"] = stream.since
        path = f"/api/v1/namespaces/{self._namespace}/pods/{pod}/log"
        silence = None if follow else _SILENCE
        async with self._client.stream(
            "reading a log", path, pool=Pool.LOGS, params=params, read_timeout=silence
        ) as answer:
            while data := await answer.content.readany():
                await self._write(stream.feed(data))
                if len(data) < _SMALL and not answer.content.at_eof():
                    await anyio.sleep(_GATHER)

    async def _write(self, data: bytes) -> None:
        if not data:
            return
        first, self._begun = not self._begun, True
        self._last_byte = data[-1:]
        self.copied += len(data)
        try:
            await FILES.run(partial(write_output, self._path, data, backend="kubernetes", begin=first))
        except OSError as error:
            if first:
                text = f"the output of the run cannot be written to {self._path}: {error.strerror}"
                raise SubmitError(text, backend="kubernetes") from error
            _log.warning("output of a run is lost: %s", error)

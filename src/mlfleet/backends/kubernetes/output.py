"""Copying the output of a run's containers into the run's file: live, in order, and each line once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import anyio

from mlfleet._concurrency.threads import FILES
from mlfleet._run_log import get_logger
from mlfleet.backends._remote.output import KeptOutput, remark_line
from mlfleet.backends._remote.state_cache import CachedState
from mlfleet.backends.kubernetes.client import ApiError, KubernetesClient, Pool, reconnect_pause
from mlfleet.backends.kubernetes.log_stream import GONE, LogStream, Mark
from mlfleet.backends.kubernetes.state import ContainerState, PodState, Snapshot
from mlfleet.errors import SubmitError

__all__ = ["ContainerLife", "Copier", "LogSlots", "next_log"]

_log = get_logger("mlfleet.kubernetes")
_SILENCE = 60.0  # seconds without a byte of the log of a container that has ended
_GATHER = 0.01  # seconds in which more of a trickle is let come, so that it costs fewer turns
_SMALL = 16 * 1024
_LOOK = 2.0  # seconds between two looks for a free slot
_END_COMES = 2.0  # seconds by which a container's end may be seen later than the end of its log
_QUIET = 8.0  # seconds; less than the ten between two looks of the kubelet at the sizes of logs
_LONG_QUIET = 30.0  # seconds
_SHORT_QUIETS = 3  # how often in turn a quiet log is read again after the short time
_ROTATABLE = 256 * 1024  # bytes; no kubelet rotates a smaller log
_PATIENCE = 90.0  # seconds for which the server may be away when a container has ended


@dataclass(frozen=True, slots=True)
class ContainerLife:
    """The instances of one container of a pod, one after the other: ``restartPolicy: OnFailure`` starts it again.

    Attributes:
        state: The states of the run.
        pod: The uid of the pod.
        container: The name of the container.
    """

    state: CachedState[Snapshot]
    pod: str
    container: str

    def _find(self) -> tuple[PodState | None, ContainerState | None]:
        pods = self.state.value.pods if self.state.value is not None else ()
        pod = next((pod for pod in pods if pod.uid == self.pod), None)
        found = next((each for each in (pod.main, *pod.init) if each.name == self.container), None) if pod else None
        return pod, found

    @property
    def restarts(self) -> int:
        """The number of the latest instance, counted from 0."""
        _, found = self._find()
        return found.restarts if found is not None else 0

    @property
    def ended(self) -> bool:
        """True if the container has ended and is not started again, or is gone."""
        pod, found = self._find()
        if pod is None or pod.ended:
            return True
        return found is not None and found.terminated and not self._restarts_after(pod, found)

    @property
    def restartable(self) -> bool:
        """True if an instance that ends may be followed by another one."""
        pod, _ = self._find()
        return pod is not None and pod.restart_policy in ("OnFailure", "Always")

    @property
    def runs(self) -> bool:
        """True if an instance runs now."""
        _, found = self._find()
        return found is not None and found.running

    def has_ended(self, instance: int) -> bool:
        """Return True if an instance has ended: the next one was started, or none will be."""
        return self.ended or self.restarts > instance

    async def wait_end(self, instance: int) -> None:
        """Wait until `has_ended` returns True."""
        await self.state.until(lambda snapshot: self.has_ended(instance))

    def _restarts_after(self, pod: PodState, found: ContainerState) -> bool:
        if pod.deleting:
            return False
        return pod.restart_policy == "Always" or (pod.restart_policy == "OnFailure" and found.exit_code != 0)


def next_log(snapshot: Snapshot, done: Collection[str]) -> tuple[PodState, str] | None:
    """Return the next pod to copy the output of, and its container: an init container if that has failed.

    Args:
        snapshot: The states of the run.
        done: The uids of the pods whose output is complete.
    """
    for pod in snapshot.pods:
        if pod.uid in done:
            continue
        if pod.main.started:
            return pod, pod.main.name
        broken = next((each for each in pod.init if each.terminated and each.exit_code), None)
        if broken is not None and pod.ended:
            return pod, broken.name
    return None


class LogSlots:
    """The limits for logs that are read at once, since a followed log holds a connection.

    With more runs than that, the output of the others arrives when a slot is free or when their container has ended,
    for which there are other slots.

    Args:
        quiet: Seconds without output after which a log that the kubelet may have rotated is read again.
    """

    def __init__(self, *, quiet: float = _QUIET) -> None:
        self.quiet = quiet
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._following = max(16, min(2000, files // 4))  # free slots
        self._reading = asyncio.Semaphore(50)

    async def acquire(self, life: ContainerLife, instance: int) -> bool:
        """Wait for a slot to read the log of an instance of a container; call `release` afterwards.

        Returns:
            True if the log may be followed; False if it must be read at once.
        """
        while not life.has_ended(instance):
            if self._following > 0:
                self._following -= 1
                return True
            with anyio.move_on_after(_LOOK):
                await life.wait_end(instance)
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


class _Reading(Enum):
    """The end of one reading of a log."""

    ENDED = "it was read to its end"
    QUIET = "nothing more was printed"
    GIVEN_UP = "see `Copier.reread`"


class Copier:
    """Copies the logs of the pods of one run, and continues a copy that an earlier process has begun.

    The place that the copy has reached is kept next to the file, in ``<file>.place``: a node keeps only the last part
    of a log, so what was copied once may not be there a second time.

    Args:
        client: The client of the cluster.
        slots: The limits that all runs share.
        namespace: The namespace of the pods.
        path: The file to write; None: the stdout of this process.
        resume: True if an earlier process may have begun the copy.

    Attributes:
        copied: The number of bytes that were copied here.
        done: The uids of the pods whose output is complete.
        caught_up: Set when all output up to the creation of this object has been copied.
    """

    def __init__(
        self, client: KubernetesClient, slots: LogSlots, namespace: str, path: Path | None, *, resume: bool = False
    ) -> None:
        self._client = client
        self._slots = slots
        self._namespace = namespace
        self._path = path
        self._file = KeptOutput(path, backend="kubernetes")
        self._resume = resume
        self._opened = False
        self._quiets = 0  # readings in turn that ended for want of output
        self._stalls = False  # True if this kubelet does not follow a log from one file to the next
        self._wrote = False
        self._pod, self._container, self._instance = "", "", 0
        self._stream = LogStream()
        self._next_stream: LogStream | None = None  # where it is not a new one
        self._reading: anyio.CancelScope | None = None
        self.copied = 0
        self.done: list[str] = []
        self._away = False  # True if the API server does not answer
        self._life: ContainerLife | None = None  # of the container whose log is copied now
        self.caught_up = asyncio.Event()

    async def open(self) -> None:
        """Find the place that an earlier process has reached."""
        if not self._resume:
            self.caught_up.set()
        if self._opened or self._path is None:
            return
        self._opened = True
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none, or it is damaged
            await FILES.run(self._load)

    async def copy(self, pod: PodState, life: ContainerLife) -> None:
        """Copy the log of one container to its end, with all its instances.

        Args:
            pod: The pod.
            life: The states of the container.
        """
        if (self._pod, self._container) != (pod.uid, life.container):
            await self._leave()
            await self._finish_line()
            self._pod, self._container, self._instance = pod.uid, life.container, 0
            self._stream = LogStream()
        self._life = life
        while True:
            missed = self._instance + (1 if await self._copy_instance(pod.name, life) else 0)
            await self._write(self._stream.close())
            if life.restarts <= self._instance:
                break
            # Several may have come and gone: the node keeps the log of the current one and of the one before.
            following = max(self._instance + 1, life.restarts - 1)
            if following > missed:
                numbers = f"attempt {following}" if following == missed + 1 else f"attempts {missed + 1} to {following}"
                await self._report(pod.name, f"the node has discarded that of the {numbers}")
            old = self._stream
            self._instance = following
            self._stream = self._next_stream or LogStream(known=(*old.known, *old.spans))
            await self._finish_line()
        self._life = None
        self.done.append(pod.uid)
        self._pod, self._stream = "", LogStream()
        if self._path is not None:
            await FILES.run(self._save_place)

    async def finish(self, *, stalled: bool = False) -> None:
        """Say so in the output if the rest of it is missing.

        Args:
            stalled: True if no more arrives; False if the copy is complete, apart from a pod that is gone.
        """
        if not stalled:
            await self._leave()
        elif self.lacks:
            await self._report(self._pod, "the API server gives no more of it")
        self.caught_up.set()

    @property
    def lacks(self) -> bool:
        """True if there is more output, or may be, as soon as the API server gives it."""
        return self._away or (self._life is not None and self._life.has_ended(self._instance))

    def reread(self) -> None:
        """Give up a followed log that delivers nothing, and read it again: its connection may be broken silently."""
        if self._reading is not None:
            self._reading.cancel()

    async def _leave(self) -> None:
        if self._pod and self._pod not in self.done:
            self.done.append(self._pod)
            await self._report(self._pod, "the pod is gone, which another process has read last")

    async def _copy_instance(self, pod: str, life: ContainerLife) -> bool:  # noqa: C901
        """Copy the log of one instance of a container.

        1. The latest instance is followed until it has ended, and then read once more, since that may end too early.
           Kubelets before 1.28 do not follow a log from one file to the next: after the rotation nothing arrives
           (https://github.com/kubernetes/kubernetes/issues/115701). So a large log that is quiet is read again.
        2. The log of one that was replaced is read as the previous one, which also settles whose lines were followed:
           the node may have replaced it before the states said so.
        3. That of an older one is gone.

        Returns:
            False if it is gone.
        """
        stream, instance = self._stream, self._instance
        self._next_stream = None
        attempt, last_success = 0, anyio.current_time()
        clean = was_clean = quiet = False  # the log was read to its end by the last read, and by the one before
        while True:
            before = self.copied
            follow = await self._slots.acquire(life, instance)
            had_ended = not follow
            behind = life.restarts - instance
            try:
                if behind > 1:
                    return False
                now = not self.caught_up.is_set()
                was_clean = clean
                stream.resume(at_end=quiet)
                reading = await self._read(pod, stream, follow=follow and not now, previous=behind == 1)
                quiet = reading is _Reading.QUIET
                clean = reading is not _Reading.GIVEN_UP and (not stream.remark or stream.remark.startswith(GONE))
                # The kubelet may not find the log yet of a container that has just started.
                complete = reading is _Reading.ENDED and (had_ended or not stream.remark)
                last_success, self._away = anyio.current_time(), False
                if behind == 1 and not stream.reached and not stream.remark:
                    await self._copy_missed(pod)
                if now and complete and not had_ended:
                    self.caught_up.set()
                    continue
            except ApiError as error:
                complete = False
                if error.status in (403, 404, 410) or (error.status == 400 and had_ended):
                    # If the log was read to its end just before, nothing is missing of a pod that is gone.
                    if error.status == 403 or not (clean or (error.status == 400 and behind == 0)):
                        await self._report(pod, str(error))
                    return True
                clean = quiet = False
                self._away = error.is_transient
                _log.debug("%s", error)
                if life.has_ended(instance) and anyio.current_time() - last_success > _PATIENCE:
                    await self._report(pod, str(error))
                    return True
            finally:
                self._slots.release(follow=follow)
            if complete and had_ended:
                if stream.remark and not was_clean:
                    await self._report(pod, stream.remark.decode(errors="replace").strip())
                return True
            if complete and life.restartable and not life.runs:
                await life.wait_end(instance)
                continue
            if quiet:
                continue
            attempt = 0 if self.copied > before else attempt + 1
            # Short, because the end of the run waits for its output.
            seconds = _END_COMES if complete else reconnect_pause(min(attempt, 2))
            if life.has_ended(instance) and not complete:
                await anyio.sleep(seconds)
            with anyio.move_on_after(seconds):
                await life.wait_end(instance)

    async def _copy_missed(self, pod: str) -> None:
        """Copy what is missing of the log of an instance whose successor was followed in its place."""
        stream = self._next_stream = self._stream
        heading = remark_line("the output of an earlier attempt, which ended before it could be copied:")
        missed = LogStream(
            known=(*stream.known, *stream.spans), heading=heading if self._file.ends_line else b"\n" + heading
        )
        await self._read(pod, missed, follow=False, previous=True)
        await self._write(missed.close())
        stream.known += missed.spans

    async def _finish_line(self) -> None:
        """End the last line, so that the next container begins a new one."""
        if not self._file.ends_line:
            await self._write(b"\n")

    async def _report(self, pod: str, why: str) -> None:
        """Say in the log of this process, and in one line of the output, that output is missing."""
        _log.warning("the output of the pod %s is not all there: %s", pod, why)
        await self._finish_line()
        await self._write(remark_line(f"output is missing here: {' '.join(why.split())}"))

    async def _read(self, pod: str, stream: LogStream, *, follow: bool, previous: bool) -> _Reading:
        """Read a log from the place that was reached."""
        params = {"container": self._container, "timestamps": "true"}
        if follow and not previous:
            params["follow"] = "true"
        if previous:
            params["previous"] = "true"
        if stream.since is not None:
            params["sinceTime"] = stream.since
        path = f"/api/v1/namespaces/{self._namespace}/pods/{pod}/log"
        silence = None if "follow" in params else _SILENCE
        with anyio.CancelScope() as scope:
            if silence is None:
                self._reading = scope
            try:
                async with self._client.stream(
                    "reading a log", path, pool=Pool.LOGS, params=params, read_timeout=silence
                ) as answer:
                    return await self._receive(pod, stream, answer, follow=silence is None)
            finally:
                self._reading = None
        return _Reading.GIVEN_UP

    async def _receive(self, pod: str, stream: LogStream, answer: aiohttp.ClientResponse, *, follow: bool) -> _Reading:
        gaps, began = stream.gaps, anyio.current_time()
        while True:
            with anyio.move_on_after(self._patience if follow else None) as waiting:
                data = await answer.content.readany()
            if waiting.cancelled_caught:
                self._quiets += 1
                return _Reading.QUIET
            if not data:
                return _Reading.ENDED
            if new := stream.feed(data):
                # What arrives at once after a quiet time was printed in it.
                self._stalls |= self._quiets > 0 and anyio.current_time() - began < 1.0
                self._quiets = 0
                await self._write(new)
            if stream.gaps > gaps:
                gaps = stream.gaps
                _log.warning("the output of the pod %s may not be all there: see %s", pod, self._path)
            if len(data) < _SMALL and not answer.content.at_eof():
                await anyio.sleep(_GATHER)

    @property
    def _patience(self) -> float | None:
        """The seconds without output after which a followed log is read again; None: never."""
        if not self._resume and self.copied < _ROTATABLE:
            return None
        return self._slots.quiet if self._stalls or self._quiets < _SHORT_QUIETS else _LONG_QUIET

    async def _write(self, data: bytes) -> None:
        if not data:
            return
        self.copied += len(data)
        try:
            # A cancelled caller has taken the data from the stream already: it must not be lost.
            await FILES.finish(partial(self._save, data))
        except (OSError, SubmitError) as error:
            if not self._wrote:
                text = f"the output of the run cannot be written to {self._path}: {error}"
                raise error if isinstance(error, SubmitError) else SubmitError(text, backend="kubernetes") from error
            _log.warning("output of a run is lost: %s", error)
        self._wrote = True

    # ---- the place, kept for a process that continues this copy -----------------------------------------------------

    def _place_file(self) -> Path:
        assert self._path is not None  # noqa: S101 - the caller has checked
        return self._path.with_name(f"{self._path.name}.place")

    def _load(self) -> None:
        """Continue at the place. Blocking."""
        first, _, _ = self._place_file().read_bytes().partition(b"\n")
        place: dict[str, Any] = json.loads(first)
        done, (last, taken, cut) = [str(each) for each in place["done"]], place["mark"]
        stream = LogStream(Mark(str(last), int(taken), int(cut)))
        pod, container, instance = str(place["pod"]), str(place["container"]), int(place["instance"])
        self._file.seek(int(place["position"]))
        self.done, self._stream = done, stream
        self._pod, self._container, self._instance = pod, container, instance

    def _save(self, data: bytes) -> None:
        """Write output, and then the place: what the file holds beyond the place is compared. Blocking."""
        self._file.write(data)
        if self._path is not None:
            self._save_place()

    def _save_place(self) -> None:
        mark = self._stream.mark
        place = {
            "position": self._file.position,
            "done": self.done,
            "pod": self._pod,
            "container": self._container,
            "instance": self._instance,
            "mark": [mark.last, mark.taken, mark.partial],
        }
        text = json.dumps(place).encode() + b"\n"
        # In one call and over the old one, of which a longer rest may stay: a killed process leaves no half of it.
        with contextlib.suppress(OSError):
            file = os.open(self._place_file(), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(file, text, 0)
            finally:
                os.close(file)

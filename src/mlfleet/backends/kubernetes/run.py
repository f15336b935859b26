"""The handle of a run on Kubernetes: its one task sees to its output, its end and its cancellation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio

from mlfleet._concurrency.cancellation import wait_done
from mlfleet.backends._remote.run import SupervisedRun
from mlfleet.backends._remote.state_cache import CachedState
from mlfleet.backends.kubernetes.client import ApiError, KubernetesClient
from mlfleet.backends.kubernetes.config import StartTimeouts
from mlfleet.backends.kubernetes.diagnosis import Hindrance, Kind, hindrance, outcome
from mlfleet.backends.kubernetes.jobs import delete_job, warnings_of
from mlfleet.backends.kubernetes.output import Copier, Streams
from mlfleet.backends.kubernetes.state import JobState, PodState, Seen, job_of_pod, read_pod
from mlfleet.backends.kubernetes.watch import NamespaceWatch
from mlfleet.errors import MlfleetError, RunLost, SubmitError
from mlfleet.runs import FailureKind, Outcome, RunStatus

__all__ = ["KubernetesRun", "Target"]

_log = logging.getLogger("mlfleet.kubernetes")
_STALLED = 30.0  # seconds without output of a run that has ended
_POD_COMES = 2.0  # seconds by which the pod's end may be seen later than the Job's
_WARN_AFTER = 30.0  # seconds of waiting for a node
_STUCK = 120.0  # seconds after the grace time, in which a node must confirm that a pod has ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The Job of a run.

    Attributes:
        namespace: of the Job.
        name: of the Job.
        uid: of the Job.
        run_id: of the MLflow run.
        output: the file for its output; None: that of this process.
        grace: seconds between SIGTERM and SIGKILL, as the pods have it.
        timeouts: for what keeps the run from its start.
        keep: whether the Job stays when the run has ended, until its TTL takes it.
        tags: for the MLflow run.
    """

    namespace: str
    name: str
    uid: str
    run_id: str
    output: Path | None = None
    grace: float = 30.0
    timeouts: StartTimeouts = field(default_factory=StartTimeouts)
    keep: bool = True
    tags: Mapping[str, str] = field(default_factory=dict)


class KubernetesRun(SupervisedRun):
    """The handle. A cancelled run has ended when its Job and its pods are gone."""

    backend = "kubernetes"
    noun = "Job"

    def __init__(
        self,
        target: Target,
        job: JobState,
        client: KubernetesClient,
        streams: Streams,
        watch: NamespaceWatch,
        *,
        submitted: bool,
    ) -> None:
        super().__init__(target.run_id, target.output, submitted=submitted)
        self.target = target
        self._client = client
        self._watch = watch
        self._cell = watch.track(job)
        self._copier = Copier(client, streams, target.namespace, target.output)
        self._started = asyncio.Event()
        self._grace: float | None = None
        self._stop_changed: asyncio.Event | None = None  # hundreds of runs live at the same time, and few are stopped
        self._living: asyncio.TaskGroup | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._cut = False  # by us, before it had ended

    # ---- the handle -------------------------------------------------------------------------------------------------

    async def started(self) -> None:
        """Wait until the container runs, has run, or never will."""
        await self._started.wait()

    def _begin_stop(self, grace: float | None) -> None:
        seconds = self.target.grace if grace is None else grace
        first = self._grace is None
        if self._grace is None or seconds < self._grace:
            self._grace = seconds
            if self._stop_changed is None:
                self._stop_changed = asyncio.Event()
            self._stop_changed.set()
            if first and self._living is not None:
                self._stopping = self._living.create_task(self._stop())

    async def get_status(self) -> RunStatus:
        """SCHEDULED until a container runs; how it ended once its output is complete."""
        if self._outcome is not None:
            return self._outcome.status
        seen = self._cell.value
        if seen is None:
            return RunStatus.SCHEDULED
        return RunStatus.RUNNING if seen.status.is_terminal else seen.status

    # ---- its task ---------------------------------------------------------------------------------------------------

    async def _tidy(self) -> None:
        if not self.target.keep and not self._cut and self.submitted:
            await wait_done(asyncio.ensure_future(self._remove()))
        self._watch.untrack(self.target.uid)
        self._started.set()

    async def _remove(self) -> None:
        try:
            await delete_job(self._client, self.target.namespace, self.target.name, self.target.uid)
        except MlfleetError as error:
            _log.warning("the Job %s stays: %s", self.target.name, error)

    async def _abandon(self) -> None:
        """What follows the cluster has failed. Nobody would see the Job's end: it must not go on unseen."""
        if not self.submitted:
            return
        try:
            await delete_job(self._client, self.target.namespace, self.target.name, self.target.uid, seconds=10)
        except MlfleetError as error:
            _log.warning("the Job %s may still run: %s", self.target.name, error)

    async def _live(self) -> Outcome:
        failed: BaseException | None = None
        try:
            # Not anyio's: hundreds of runs live at the same time, and its groups and tasks are twice as large.
            async with asyncio.TaskGroup() as group:
                copying = group.create_task(self._copy())
                self._stopping = group.create_task(self._stop()) if self._grace is not None else None
                self._living = group
                try:
                    seen = await self._until_over()
                    if not self._cut:
                        seen = await self._with_pods(seen)
                    await self._drain(copying)
                finally:
                    self._living = None
                for task in (copying, self._stopping):
                    if task is not None:
                        task.cancel()
        except* MlfleetError as errors:
            failed = errors
        while isinstance(failed, BaseExceptionGroup):
            failed = failed.exceptions[0]
        if isinstance(failed, _NeverStarts):
            return await self._never_started(failed)
        if failed is not None:
            raise failed
        return await self._end(seen)

    def _is_over(self, seen: Seen) -> bool:
        """Whether nothing more will come: of a Job that we delete, when its pods are gone with it."""
        return seen.job is not None and seen.job.deleted if self._cut else seen.ended

    async def _end(self, seen: Seen) -> Outcome:
        told, job = outcome(seen), seen.job
        by_itself = job is not None and (job.complete or job.failed is not None or job.ending is not None)
        if self._cut or (self._grace is not None and not by_itself):
            told = Outcome(RunStatus.KILLED, told.exit_code, "cancelled")
        return told if told.status is RunStatus.FINISHED else replace(told, output=await self._last_lines())

    async def _with_pods(self, seen: Seen) -> Seen:
        """The same, with the pod that tells the exit code: its watch may be behind, or away."""

        def told(seen: Seen) -> bool:
            pod = seen.last_pod
            return pod is not None and (pod.main.terminated or pod.ended)

        if told(seen) or (seen.job is not None and seen.job.deleted):
            return seen
        with anyio.move_on_after(_POD_COMES):
            return await self._cell.until(told)
        try:
            answer = await self._client.call(
                "looking for the pods of a Job",
                "GET",
                f"/api/v1/namespaces/{self.target.namespace}/pods",
                params={"labelSelector": f"batch.kubernetes.io/job-name={self.target.name}"},
                seconds=10,
            )
        except ApiError as error:
            _log.debug("%s", error)
            return seen
        pods = [read_pod(raw) for raw in answer.get("items") or () if job_of_pod(raw) == self.target.uid]
        return Seen(seen.job, tuple(sorted(pods, key=lambda pod: (pod.created, pod.name)))) if pods else seen

    # ---- output -----------------------------------------------------------------------------------------------------

    async def _copy(self) -> None:
        """Pod after pod, as the Job tries again. What can be copied has started."""
        done: set[str] = set()
        while True:
            seen = await self._cell.until(lambda seen: seen.ended or _next_log(seen, done) is not None)
            found = _next_log(seen, done)
            if found is None and not self._cut:
                # The watch of pods may be behind, or away, when that of Jobs tells the end.
                found = _next_log(await self._with_pods(seen), done)
            if found is None:
                break
            pod, container = found
            if pod.main.started:
                self._started.set()
            await self._copier.finish_line()
            done.add(pod.uid)
            await self._copier.copy(pod.name, container, _ContainerEnd(self._cell, pod.uid, container))

    async def _drain(self, copying: asyncio.Task[None]) -> None:
        """Wait for the rest of the output, as long as some comes."""
        seen = -1
        while not copying.done() and seen != self._copier.copied:
            seen = self._copier.copied
            await asyncio.wait([copying], timeout=_STALLED)

    # ---- what never starts ------------------------------------------------------------------------------------------

    async def _until_over(self) -> Seen:
        """Wait for the Job's end; give up one that is kept from its start for too long."""
        while not self._is_over(seen := await self._cell.until(self._is_over_or_hindered)):
            await self._mind(hindrance(seen))
            del seen  # not kept for as long as the run lives
        return seen

    def _is_over_or_hindered(self, seen: Seen) -> bool:
        return self._is_over(seen) or hindrance(seen) is not None

    async def _mind(self, found: Hindrance | None) -> None:
        """Wait until nothing, or something else, keeps the run from its start; for a while."""
        if found is None:
            return
        limit = self.target.timeouts.of(found.kind)
        warn_after = _WARN_AFTER if found.kind is Kind.UNSCHEDULABLE else None
        if warn_after is not None and (limit is None or limit > warn_after):
            if await self._passes(found.kind, warn_after):
                return
            await self._warn(self._now_hindered(found))
            limit = None if limit is None else limit - warn_after
        if not await self._passes(found.kind, limit):
            raise _NeverStarts(self._now_hindered(found), self.target.timeouts.of(found.kind) or 0.0)

    async def _warn(self, found: Hindrance) -> None:
        # Why there is no pod, such as a quota, only the Job's events tell; a pod says by itself why it waits.
        said = () if found.pod else await warnings_of(self._client, self.target.namespace, self.target.name)
        _log.warning("the run %s does not start yet: %s", self.run_id, "; ".join((found.text, *said[-1:])))

    async def _passes(self, kind: Kind, seconds: float | None) -> bool:
        with anyio.move_on_after(seconds):
            await self._cell.until(lambda seen: (found := hindrance(seen)) is None or found.kind is not kind)
            return True
        return False

    def _now_hindered(self, first: Hindrance) -> Hindrance:
        return (hindrance(self._cell.value) if self._cell.value is not None else None) or first

    async def _never_started(self, error: _NeverStarts) -> Outcome:
        found = error.hindrance
        said = await warnings_of(self._client, self.target.namespace, found.pod or self.target.name)
        reason = f"the run did not start within {error.seconds:g} s: {found.text}"
        await self._abandon()
        with anyio.move_on_after(self.target.grace + _STUCK):
            await self._cell.until(lambda seen: seen.job is not None and seen.job.deleted)
        lost = SubmitError("\n".join((reason, *said)), backend="kubernetes")
        return Outcome(RunStatus.FAILED, None, reason, output=tuple(said), error=lost, cause=FailureKind.INFRASTRUCTURE)

    # ---- cancellation -----------------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        """Delete the Job and see its pods end; ends with the group when the Job is gone."""
        assert self._grace is not None and self._stop_changed is not None  # noqa: S101, PT018 - why it was started
        if self._cell.value is not None and self._cell.value.ended:
            return
        target, sent = self.target, self.target.grace
        self._cut = await delete_job(self._client, target.namespace, target.name, target.uid)
        stuck_at = anyio.current_time() + self._grace + _STUCK
        while True:
            self._stop_changed.clear()
            if self._grace < sent:
                # A Job's pods get their own grace time, whatever its deletion says; a shorter one they are told.
                sent = self._grace
                await self._hurry(sent)
                stuck_at = min(stuck_at, anyio.current_time() + sent + _STUCK)
            with anyio.move_on_after(stuck_at - anyio.current_time()) as scope:
                await self._stop_changed.wait()
            if scope.cancelled_caught:
                names = ", ".join(f"{pod.name} on {pod.node}" for pod in self._pods if not pod.ended)
                text = f"the Job {target.name} was deleted, but its pods do not end: {names or 'unknown'}"
                raise RunLost(text, backend="kubernetes")

    async def _hurry(self, grace: float) -> None:
        body: dict[str, Any] = {"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": max(1, round(grace))}
        for pod in self._pods:
            if pod.ended:
                continue
            path = f"/api/v1/namespaces/{self.target.namespace}/pods/{pod.name}"
            try:
                await self._client.call(
                    "ending a pod", "DELETE", path, body={**body, "preconditions": {"uid": pod.uid}}
                )
            except ApiError as error:
                if error.status not in (404, 409):
                    _log.warning("a shorter grace time cannot be given to the pod %s: %s", pod.name, error)

    @property
    def _pods(self) -> tuple[PodState, ...]:
        return self._cell.value.pods if self._cell.value is not None else ()


class _NeverStarts(MlfleetError):
    """What keeps the run from its start has lasted too long. Never leaves this module."""

    def __init__(self, hindrance: Hindrance, seconds: float) -> None:
        super().__init__(hindrance.text)
        self.hindrance = hindrance
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class _ContainerEnd:
    """The end of a container, as `Copier.copy` wants to know it."""

    cell: CachedState[Seen]
    pod: str
    container: str

    @property
    def is_there(self) -> bool:
        return self.cell.value is not None and self._in(self.cell.value)

    async def wait(self) -> None:
        await self.cell.until(self._in)

    def _in(self, seen: Seen) -> bool:
        pod = next((pod for pod in seen.pods if pod.uid == self.pod), None)
        if pod is None or pod.ended:
            return True
        return any(each.terminated for each in (pod.main, *pod.init) if each.name == self.container)


def _next_log(seen: Seen, done: set[str]) -> tuple[PodState, str] | None:
    """The next pod to copy the output of, and its container: an init container's if that has failed."""
    for pod in seen.pods:
        if pod.uid in done:
            continue
        if pod.main.started:
            return pod, pod.main.name
        broken = next((each for each in pod.init if each.terminated and each.exit_code), None)
        if broken is not None and pod.ended:
            return pod, broken.name
    return None

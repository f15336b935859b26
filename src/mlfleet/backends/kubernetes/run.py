"""The handle of a run on Kubernetes. One task copies its output, waits for its end and carries out its cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import anyio

from mlfleet._run_log import get_logger
from mlfleet.backends._remote.run import SupervisedRun
from mlfleet.backends.kubernetes.client import ApiError, KubernetesClient
from mlfleet.backends.kubernetes.config import StartTimeouts
from mlfleet.backends.kubernetes.diagnosis import (
    PendingKind,
    PendingReason,
    decided_outcome,
    exit_code,
    outcome,
    pending_reason,
    straggling_pod,
)
from mlfleet.backends.kubernetes.jobs import delete_job, delete_pod, delete_secret, list_pods, warnings_of
from mlfleet.backends.kubernetes.output import ContainerLife, Copier, LogSlots, next_log
from mlfleet.backends.kubernetes.state import JobState, PodState, Snapshot
from mlfleet.backends.kubernetes.watch import NamespaceWatch
from mlfleet.errors import MlfleetError, RunLost, SubmitError
from mlfleet.runs import FailureKind, Outcome, RunStatus

__all__ = ["KubernetesRun", "Target"]

_log = get_logger("mlfleet.kubernetes")
_QUIET = 5.0  # seconds without output of a run that has ended, after which its log is read again
_STALLED = 10.0  # seconds without output of a run that has ended, whose container goes on
_AWAY = 120.0  # the same if output is missing
_POD_COMES = 2.0  # seconds by which the pod's end may arrive later than the Job's
_WARN_AFTER = 30.0  # seconds of waiting for a node
_WHOLE_SECOND = 1.0  # the unit of a pod's grace period


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The Job of a run.

    Attributes:
        namespace: The namespace of the Job.
        name: The name of the Job.
        uid: The uid of the Job.
        run_id: The id of the MLflow run.
        output: The file for the output; None: the output of this process.
        grace: Seconds between SIGTERM and SIGKILL, as the pods have it.
        timeouts: Limits for the reasons that keep the run from starting.
        keep: True if the Job stays after the end of the run until its TTL; False deletes it.
        has_secret: True if the run has a Secret of its own, which is deleted at its end.
        patience: Seconds after the grace time in which nodes must confirm that pods have ended.
        tags: Tags for the MLflow run.
    """

    namespace: str
    name: str
    uid: str
    run_id: str
    output: Path | None
    grace: float
    timeouts: StartTimeouts
    keep: bool
    has_secret: bool
    patience: float
    tags: Mapping[str, str]


class KubernetesRun(SupervisedRun):
    """The handle of a run. A cancelled run has ended when its Job and its pods are gone."""

    backend = "kubernetes"
    noun = "Job"

    def __init__(
        self,
        target: Target,
        job: JobState,
        client: KubernetesClient,
        slots: LogSlots,
        watch: NamespaceWatch,
        *,
        submitted: bool,
    ) -> None:
        ended_as = Snapshot(job).status if job.ended and not submitted else None
        super().__init__(target.run_id, target.output, submitted=submitted, grace=target.grace, ended_as=ended_as)
        self.target = target
        self._client = client
        self._watch = watch
        self._state = watch.track(job)
        self._copier = Copier(client, slots, target.namespace, target.output, resume=not submitted)
        self._started = asyncio.Event()
        self._cut = False  # True if we deleted the Job before it had ended
        self._decided: Outcome | None = None  # the outcome, if we deleted it for containers that went on
        self._warned = False  # True once a warning has named containers that went on
        self._over = False  # True if the run has ended, as opposed to our looking after it

    # ---- the handle -------------------------------------------------------------------------------------------------

    async def started(self) -> None:
        """Wait until the container runs, has run, or can never run."""
        await self._started.wait()

    async def _active_status(self) -> RunStatus:
        """Return SCHEDULED until a container runs."""
        status = self._snapshot.status
        return RunStatus.RUNNING if status.is_terminal else status

    # ---- its task ---------------------------------------------------------------------------------------------------

    @property
    def _snapshot(self) -> Snapshot:
        assert self._state.value is not None  # noqa: S101 - `NamespaceWatch.track` gives it a first state
        return self._state.value

    async def _tidy(self) -> None:
        if self._over:
            await self._remove()
        self._watch.untrack(self.target.uid)
        self._started.set()
        self._copier.caught_up.set()

    async def _remove(self) -> None:
        """Delete what must not stay after the end of the run: the Secret, or the Job, which takes it along."""
        target = self.target
        if self._cut or self._snapshot.job.deleted:
            return
        try:
            if not target.keep:
                await delete_job(self._client, target.namespace, target.name, target.uid)
            elif target.has_secret:
                await delete_secret(self._client, target.namespace, target.name)
        except MlfleetError as error:
            _log.warning("the Job %s stays: %s", target.name, error)

    async def _abandon(self) -> None:
        """Delete the Job after the watch has failed: its end would not be noticed, so it must not go on."""
        if self.submitted:
            await self._give_up()

    async def _give_up(self) -> None:
        try:
            await delete_job(self._client, self.target.namespace, self.target.name, self.target.uid, seconds=10)
        except MlfleetError as error:
            _log.warning("the Job %s may still run: %s", self.target.name, error)

    async def _live(self) -> Outcome:
        failed: BaseException | None = None
        try:
            # asyncio's group takes half the memory of anyio's, for each of hundreds of runs.
            async with asyncio.TaskGroup() as group:
                copying, stopping = group.create_task(self._copy()), group.create_task(self._stop())
                snapshot = await self._until_over()
                if not self._cut:
                    snapshot = await self._with_pods(snapshot)
                await self._drain(copying)
                copying.cancel()
                stopping.cancel()
        except* MlfleetError as errors:
            failed = errors
        while isinstance(failed, BaseExceptionGroup):
            failed = failed.exceptions[0]
        if isinstance(failed, StartTimeout):
            return await self._fail_start(failed)
        if isinstance(failed, _Concluded):
            return await self._end(self._snapshot)
        if failed is not None:
            raise failed
        return await self._end(snapshot)

    def _is_over(self, snapshot: Snapshot) -> bool:
        """Return True at the end: for a Job that we delete, when it is gone together with its pods."""
        if self._cut or self._decided is not None:
            return snapshot.job.deleted
        return snapshot.ended

    async def _end(self, snapshot: Snapshot) -> Outcome:
        self._over, job = True, snapshot.job
        by_itself = job.complete or job.failed is not None or job.ending is not None
        if self._decided is not None:
            result = self._decided
        elif self._cut or (self._stop_request.is_requested and not by_itself):
            result = Outcome(RunStatus.KILLED, exit_code(snapshot), "cancelled")
        else:
            result = outcome(snapshot)
        return result if result.status is RunStatus.FINISHED else replace(result, output=await self._last_lines())

    async def _with_pods(self, snapshot: Snapshot) -> Snapshot:
        """Return the snapshot with the pod that has the exit code: the watch of pods may be late or interrupted."""

        def has_end(snapshot: Snapshot) -> bool:
            pod = snapshot.last_pod
            return pod is not None and (pod.main.terminated or pod.ended)

        if has_end(snapshot) or snapshot.job.deleted:
            return snapshot
        with anyio.move_on_after(_POD_COMES):
            return await self._state.until(has_end)
        target, known = self.target, {pod.uid: pod for pod in snapshot.pods}
        try:
            listed = await list_pods(self._client, target.namespace, target.name, target.uid)
        except ApiError as error:
            _log.debug("%s", error)
            return snapshot
        return Snapshot(snapshot.job, tuple(pod.merge(known.get(pod.uid)) for pod in listed)) if listed else snapshot

    # ---- output -----------------------------------------------------------------------------------------------------

    async def _catch_up(self) -> None:
        await self._copier.caught_up.wait()

    async def _copy(self) -> None:
        """Copy the output of one pod after the other, as the Job tries again. A pod with output has started."""
        copier = self._copier
        await copier.open()
        while True:
            if next_log(self._snapshot, copier.done) is None:
                copier.caught_up.set()
            snapshot = await self._state.until(lambda now: now.ended or next_log(now, copier.done) is not None)
            found = next_log(snapshot, copier.done)
            if found is None and not self._cut:
                # The watch of pods may be behind, or away, when that of Jobs tells the end.
                found = next_log(await self._with_pods(snapshot), copier.done)
            if found is None:
                break
            pod, container = found
            if pod.main.started:
                self._started.set()
            await copier.copy(pod, ContainerLife(self._state, pod.uid, container))
        await copier.finish()

    async def _drain(self, copying: asyncio.Task[None]) -> None:
        """Wait for the rest of the output, as long as some arrives."""
        copied, quiet = self._copier.copied, 0.0
        while not copying.done():
            await asyncio.wait([copying], timeout=_QUIET)
            quiet = 0.0 if copied != self._copier.copied else quiet + _QUIET
            copied = self._copier.copied
            if quiet >= (_AWAY if self._copier.lacks else _STALLED):
                copying.cancel()
                await asyncio.wait([copying])
                await self._copier.finish(stalled=True)
                return
            if quiet:
                self._copier.reread()

    # ---- the start --------------------------------------------------------------------------------------------------

    async def _until_over(self) -> Snapshot:
        """Wait for the Job's end, or until something has kept it from starting for too long.

        Raises:
            StartTimeout: It does not start.
        """
        while not self._is_over(snapshot := await self._state.until(self._is_over_or_stuck)):
            if (pod := straggling_pod(snapshot)) is not None:
                await self._end_stragglers(pod)
            elif (reason := pending_reason(snapshot)) is not None:
                await self._wait_pending(reason)
            del snapshot, pod  # a long run must not keep the snapshot in memory
        return snapshot

    def _is_over_or_stuck(self, snapshot: Snapshot) -> bool:
        return self._is_over(snapshot) or pending_reason(snapshot) is not None or straggling_pod(snapshot) is not None

    async def _end_stragglers(self, pod: PodState) -> None:
        """End the containers of a pod that go on after the command, when they have had the grace time for it.

        A deleted pod has failed for the Job's controller, which may try again: only the pod is deleted where it should.
        Otherwise the whole Job is deleted, whose outcome is that of the command.

        Raises:
            _Concluded: The command has ended for the last time, and the rest does not end.
        """
        target, copied = self.target, -1
        while copied != self._copier.copied:  # the log of a deleted pod cannot be read any more
            copied = self._copier.copied
            with anyio.move_on_after(target.grace):
                await self._state.until(lambda snapshot: not _goes_on(snapshot, pod.uid))
                return
        if not self._warned:
            self._warned = True
            _log.warning(
                "the command of the run %s has ended (exit code %s), and %s in its pod %s has not: it is ended now."
                " Make a container that never ends a sidecar: an init container with restartPolicy: Always",
                self.run_id, pod.main.exit_code, ", ".join(pod.running), pod.name,
            )  # fmt: skip
        decided = decided_outcome(self._snapshot)
        if decided is None:
            await delete_pod(self._client, target.namespace, pod.name, pod.uid)
            await self._state.until(lambda snapshot: not _goes_on(snapshot, pod.uid))
            return
        self._decided = decided
        await delete_job(self._client, target.namespace, target.name, target.uid)
        with anyio.move_on_after(target.grace + target.patience):
            await self._state.until(self._is_over)
            return
        _log.warning("the Job %s was deleted, but its pod %s on %s does not end", target.name, pod.name, pod.node)
        raise _Concluded("the command has ended")

    async def _wait_pending(self, found: PendingReason) -> None:
        """Wait until the reason is gone, or another kind of reason takes its place.

        Raises:
            StartTimeout: The reason has lasted longer than its limit.
        """
        limit = self.target.timeouts.of(found.kind)
        warn_after = _WARN_AFTER if found.kind is PendingKind.UNSCHEDULABLE else None
        if warn_after is not None and (limit is None or limit > warn_after):
            if await self._clears(found.kind, warn_after):
                return
            await self._warn(self._current_reason(found))
            limit = None if limit is None else limit - warn_after
        if not await self._clears(found.kind, limit):
            raise StartTimeout(self._current_reason(found), self.target.timeouts.of(found.kind) or 0.0)

    async def _warn(self, found: PendingReason) -> None:
        # The reason why there is no pod, such as a quota, is only in the Job's events; a pod has its own in its status.
        said = () if found.pod else await warnings_of(self._client, self.target.namespace, self.target.name)
        _log.warning("the run %s does not start yet: %s", self.run_id, "; ".join((found.text, *said[-1:])))

    async def _clears(self, kind: PendingKind, seconds: float | None) -> bool:
        with anyio.move_on_after(seconds):
            await self._state.until(
                lambda snapshot: (found := pending_reason(snapshot)) is None or found.kind is not kind
            )
            return True
        return False

    def _current_reason(self, first: PendingReason) -> PendingReason:
        return pending_reason(self._snapshot) or first

    async def _fail_start(self, error: StartTimeout) -> Outcome:
        found = error.reason
        said = await warnings_of(self._client, self.target.namespace, found.pod or self.target.name)
        reason = f"the run did not start within {error.seconds:g} s: {found.text}"
        await self._give_up()
        with anyio.move_on_after(self.target.grace + self.target.patience):
            await self._state.until(lambda snapshot: snapshot.job.deleted)
        lost = SubmitError("\n".join((reason, *said)), backend="kubernetes")
        return Outcome(RunStatus.FAILED, None, reason, output=tuple(said), error=lost, cause=FailureKind.INFRASTRUCTURE)

    # ---- cancellation -----------------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        """Delete the Job when that is requested, and wait for the end of its pods. Cancelled when the run has ended."""
        await self._stop_request.requested()
        target, snapshot = self.target, self._snapshot
        if snapshot.ended:
            return
        if straggling_pod(snapshot) is not None and self._decided is None:
            self._decided = decided_outcome(snapshot)  # what has ended keeps its end
        self._cut = await delete_job(self._client, target.namespace, target.name, target.uid)
        pods_end_at = anyio.current_time() + target.grace
        while True:
            deadline = self._stop_request.deadline
            assert deadline is not None  # noqa: S101 - requested
            if deadline < pods_end_at - _WHOLE_SECOND:
                # Deleting a Job does not pass gracePeriodSeconds to its pods, so shorten it pod by pod.
                pods_end_at = max(deadline, anyio.current_time())
                await self._hurry(pods_end_at - anyio.current_time())
                if self._stop_request.deadline != deadline:
                    continue
            with anyio.move_on_after(pods_end_at + target.patience - anyio.current_time()) as scope:
                await self._stop_request.changed()
            if scope.cancelled_caught:
                self._check_stopped()

    def _check_stopped(self) -> None:
        """Decide about a deleted Job that does not go away.

        Raises:
            _Concluded: None of its containers runs.
            RunLost: Some may run, since their node has not confirmed their end.
        """
        name = self.target.name
        running = [f"{pod.name} on {pod.node or 'no node'}" for pod in self._snapshot.pods if pod.running]
        if running:
            raise RunLost(
                f"the Job {name} was deleted, but its pods do not end, and their commands may still run:"
                f" {', '.join(running)}. See whether the node answers (kubectl get nodes), and cancel again",
                backend="kubernetes",
            )
        _log.warning("the Job %s was deleted and has ended, but it is still there: a finalizer may hold it", name)
        raise _Concluded("nothing of the Job runs any more")

    async def _hurry(self, grace: float) -> None:
        for pod in self._snapshot.pods:
            if pod.ended:
                continue
            try:
                await delete_pod(self._client, self.target.namespace, pod.name, pod.uid, grace=grace)
            except ApiError as error:
                _log.warning("a shorter grace time cannot be given to the pod %s: %s", pod.name, error)


def _goes_on(snapshot: Snapshot, uid: str) -> bool:
    """Return True if a pod exists that has not ended and was not deleted, and its Job has not ended, either."""
    return not snapshot.ended and any(pod.uid == uid and not (pod.ended or pod.deleting) for pod in snapshot.pods)


class _Concluded(MlfleetError):
    """The outcome of the run is known, although its Job is still there. Never leaves this module."""


class StartTimeout(MlfleetError):
    """A reason has kept the run from starting for too long. Never leaves this module."""

    def __init__(self, reason: PendingReason, seconds: float) -> None:
        super().__init__(reason.text)
        self.reason = reason
        self.seconds = seconds

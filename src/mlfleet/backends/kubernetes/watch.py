"""Two watches for all runs of a namespace: the Jobs and the pods that mlfleet manages there."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import anyio

from mlfleet._concurrency.cancellation import complete
from mlfleet._run_log import get_logger
from mlfleet.backends._remote.run import tasks_beside
from mlfleet.backends._remote.state_cache import CachedState, StateCache
from mlfleet.backends.kubernetes.client import ApiError, KubernetesClient, Pool, reconnect_pause
from mlfleet.backends.kubernetes.login import Cluster
from mlfleet.backends.kubernetes.state import MANAGED_BY, JobState, PodState, Snapshot, job_of_pod, read_job, read_pod
from mlfleet.errors import BackendError, MlfleetError

__all__ = ["NamespaceWatch", "SharedWatch", "WatchPool"]

_log = get_logger("mlfleet.kubernetes")
_PAGE = "100"  # objects of a list at once: thousands would be decoded in one piece, and hold up the event loop
_LASTS = (120, 180)  # seconds of one watch; random, so that clients do not all come back at once
_IDLE = 75.0  # seconds
_SHORT = 1.0  # seconds; a watch that ends sooner without an event is not tried again at once
_FIRST_LIST_SECONDS = 20.0  # seconds for the first list: a submit to a cluster that is not there must fail soon
_LIST_SECONDS = 90.0  # seconds for a later list
_UNREACHABLE_SECONDS = 3600.0  # seconds without any answer after which the cluster is given up
_LOGIN_SECONDS = 300.0  # seconds for which a login that fails is tried again
_SLICE = 0.004  # seconds of events to handle in one iteration of the event loop, in CPU time: the machine may be busy
_REMEMBERED = 4096  # deleted Jobs
_SELECTOR = {"labelSelector": f"{MANAGED_BY}=mlfleet"}


class NamespaceWatch:
    """The states of the runs of one namespace, by the uid of the Job. A waiter costs no request.

    Jobs and pods that are not tracked are remembered, too: an event may come before the answer to the POST that made
    its Job, and a Job that is attached to has pods already.

    Args:
        client: The client of the cluster.
        namespace: The namespace.
        idle: Seconds without a byte after which a connection counts as broken; bookmarks come once a minute.
    """

    def __init__(self, client: KubernetesClient, namespace: str, *, idle: float = _IDLE) -> None:
        self._jobs: dict[str, JobState] = {}  # those that exist
        self._deleted: OrderedDict[str, JobState] = OrderedDict()
        self._pods: dict[str, dict[str, PodState]] = {}  # by the uids of their Jobs
        self._cache: StateCache[Snapshot] = StateCache(self._feed, name=f"the watch of the namespace {namespace}")
        jobs, pods = f"/apis/batch/v1/namespaces/{namespace}/jobs", f"/api/v1/namespaces/{namespace}/pods"
        self._reflectors = (
            _Reflector(client, jobs, self._put_job, self._replace_jobs, self._known_jobs, idle),
            _Reflector(client, pods, self._put_pod, self._replace_pods, self._known_jobs, idle),
        )
        self._synced = anyio.Event()  # set when both are listed, or the watch has failed

    @property
    def failed(self) -> MlfleetError | None:
        """The error with which the watch has ended; None while it goes on."""
        return self._cache.error

    async def __aenter__(self) -> Self:
        await self._cache.__aenter__()
        try:
            await self._synced.wait()
            if self.failed is not None:
                raise self.failed
        except BaseException:
            await self._cache.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._cache.__aexit__(kind, error, trace)

    def track(self, job: JobState) -> CachedState[Snapshot]:
        """Follow a Job that exists; call `untrack` once for each call.

        Args:
            job: The Job in the answer that named it. Events that arrived before that answer are not lost.
        """
        cell = self._cache.track(job.uid)
        if cell.value is None:
            cell.put(self._snapshot(self._last_job(job.uid) or job))
        return cell

    def untrack(self, uid: str) -> None:
        """Undo one call of `track`."""
        self._cache.untrack(uid)
        self._publish(uid)

    # ---- feeding the cache ------------------------------------------------------------------------------------------

    async def _feed(self, watch: StateCache[Snapshot]) -> None:
        jobs, pods = self._reflectors
        try:
            async with tasks_beside(pods.run):
                await jobs.run()
        except Exception:
            self._synced.set()
            raise

    def _put_job(self, kind: str, raw: Mapping[str, Any]) -> None:
        self._set_job(read_job(raw, deleted=kind == "DELETED"))

    def _replace_jobs(self, raws: list[Mapping[str, Any]], before: Collection[str]) -> bool:
        """Take over a complete list.

        Returns:
            True if the list must be read again: a tracked Job may be younger than this list.
        """
        listed = {job.uid: job for job in map(read_job, raws)}
        for uid in before:
            if uid not in listed and (job := self._last_job(uid)) is not None and not job.deleted:
                self._set_job(replace(job, deleted=True, unseen=True))
        for job in listed.values():
            self._set_job(job)
        self._note_listed()
        return any(uid not in listed and (job := self._last_job(uid)) and not job.ended for uid in self._cache.keys)

    def _put_pod(self, kind: str, raw: Mapping[str, Any]) -> None:
        owner = job_of_pod(raw)
        if owner is not None:
            self._set_pod(owner, read_pod(raw, gone=kind == "DELETED"))

    def _replace_pods(self, raws: list[Mapping[str, Any]], before: Collection[str]) -> bool:
        listed = {raw["metadata"]["uid"] for raw in raws}
        for owner, pods in tuple(self._pods.items()):
            for pod in tuple(pods.values()):
                if pod.uid not in listed:
                    self._set_pod(owner, replace(pod, gone=True))
        for raw in raws:
            self._put_pod("ADDED", raw)
        self._note_listed()
        return False

    def _note_listed(self) -> None:
        if all(reflector.listed for reflector in self._reflectors):
            self._synced.set()

    # ---- the last states --------------------------------------------------------------------------------------------

    def _known_jobs(self) -> Collection[str]:
        return {*self._jobs, *self._cache.keys}

    def _last_job(self, uid: str) -> JobState | None:
        tracked = self._cache.get(uid)
        return self._jobs.get(uid) or self._deleted.get(uid) or (tracked.job if tracked is not None else None)

    def _set_job(self, job: JobState) -> None:
        if job.deleted:
            self._jobs.pop(job.uid, None)
            self._deleted[job.uid] = job
            if len(self._deleted) > _REMEMBERED:
                self._deleted.popitem(last=False)
        else:
            self._jobs[job.uid] = job
        self._publish(job.uid)

    def _set_pod(self, owner: str, pod: PodState) -> None:
        pods = self._pods.setdefault(owner, {})
        pods[pod.uid] = pod.merge(pods.get(pod.uid))
        self._publish(owner)

    def _publish(self, uid: str) -> None:
        """Give the states of a Job to those who track it; if nobody does and nothing of it exists, forget its pods."""
        tracked = self._cache.get(uid)
        if tracked is not None:
            self._cache.put(uid, self._snapshot(self._last_job(uid) or tracked.job))
        elif uid not in self._jobs and all(pod.gone for pod in self._pods.get(uid, {}).values()):
            self._pods.pop(uid, None)

    def _snapshot(self, job: JobState) -> Snapshot:
        # Times of creation are whole seconds: of pods that are alike in that, the watch told the older one first.
        return Snapshot(job, tuple(sorted(self._pods.get(job.uid, {}).values(), key=lambda pod: pod.created)))


class _Reflector:
    """Lists and watches one kind of object (the word is that of Kubernetes' client-go).

    https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
    """

    def __init__(
        self,
        client: KubernetesClient,
        path: str,
        put: Callable[[str, Mapping[str, Any]], None],
        replace_all: Callable[[list[Mapping[str, Any]], Collection[str]], bool],
        known: Callable[[], Collection[str]],
        idle: float,
    ) -> None:
        self._client = client
        self._idle = idle
        self._path = path
        self._put = put
        self._replace_all = replace_all
        self._known = known
        self._what = f"following {path.rpartition('/')[2]}"
        self._version: str | None = None
        self._attempt = 0
        self._last_success = 0.0
        self.listed = False

    async def run(self) -> None:
        """Follow until cancelled.

        Raises:
            BackendError: The watch is not allowed, or the cluster has not answered for too long.
        """
        self._version = None
        self._last_success = time.monotonic()
        while True:
            # A watch from a version that the server has not reached yet (after it was restored from a backup) stays
            # silent. Otherwise bookmarks at least should have arrived.
            if time.monotonic() - self._last_success > self._idle:
                self._version = None
            try:
                if self._version is None:
                    await self._list()
                began = time.monotonic()
                if not await self._watch() and time.monotonic() - began < _SHORT:
                    await self._pause(None)
            except ApiError as error:
                if error.status == 410:
                    self._version = None
                elif not error.is_transient and error.status != 401:
                    raise
                self._check_deadline(error, _LOGIN_SECONDS if error.status == 401 else _UNREACHABLE_SECONDS)
                _log.debug("%s", error)
                await self._pause(error.retry_after)
            except BackendError as error:
                self._check_deadline(error, _LOGIN_SECONDS)
                _log.warning("%s", error)
                await self._pause(None)

    async def _pause(self, asked: float | None) -> None:
        seconds = reconnect_pause(self._attempt, asked)
        self._attempt += 1
        await anyio.sleep(seconds)

    def _check_deadline(self, error: BackendError, seconds: float) -> None:
        if not self.listed or time.monotonic() - self._last_success > seconds:
            # Before the first list there are no runs to keep: the submit fails at once.
            raise error

    def _note_success(self) -> None:
        self._attempt = 0
        self._last_success = time.monotonic()

    async def _list(self) -> None:
        """Read a consistent list: without a resourceVersion, since "0" may be older than the Job just created."""
        again = True
        while again:
            before = self._known()
            items: list[Mapping[str, Any]] = []
            params = {**_SELECTOR, "limit": _PAGE}
            while True:
                answer = await self._client.call(
                    self._what,
                    "GET",
                    self._path,
                    params=params,
                    seconds=_LIST_SECONDS if self.listed else _FIRST_LIST_SECONDS,
                )
                items += answer.get("items") or ()
                meta = answer.get("metadata") or {}
                if not meta.get("continue"):
                    break
                params["continue"] = meta["continue"]
            self.listed = True
            again = self._replace_all(items, before)
        self._note_success()
        self._version = str(meta.get("resourceVersion") or "")

    async def _watch(self) -> bool:
        """Handle events until the server ends the watch, as it does after a while.

        Returns:
            True if there was any event.
        """
        seconds = random.randint(*_LASTS)  # noqa: S311 - no secret
        params = {
            **_SELECTOR,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds),
            "resourceVersion": self._version or "",
        }
        count = 0
        stream = self._client.stream(self._what, self._path, pool=Pool.WATCH, params=params, read_timeout=self._idle)
        async with stream as answer:
            pending = bytearray()
            while data := await answer.content.readany():
                start = len(pending)
                pending += data
                if pending.find(b"\n", start) < 0:
                    continue
                *lines, rest = pending.split(b"\n")
                pending = bytearray(rest)  # of an event that is cut off, if this was the last of it
                began = time.thread_time()
                for line in filter(bytearray.strip, lines):
                    self._event(line)
                    count += 1
                    if time.thread_time() - began > _SLICE:
                        await asyncio.sleep(0)
                        began = time.thread_time()
        return count > 0

    def _event(self, line: bytearray) -> None:
        try:
            event = json.loads(line.decode())  # faster than to let it guess the encoding
            kind, raw = event["type"], event["object"]
            if kind != "ERROR":
                version = str(raw["metadata"]["resourceVersion"])
        except (ValueError, KeyError, TypeError) as error:
            raise ApiError.of_request(self._what, f"an event that cannot be read: {error!r}") from error
        if kind == "ERROR":
            code = raw.get("code")
            seconds = (raw.get("details") or {}).get("retryAfterSeconds")
            raise ApiError.of_request(
                self._what,
                str(raw.get("message")),
                status=code if isinstance(code, int) else 500,
                reason=str(raw.get("reason") or ""),
                retry_after=float(seconds) if seconds else None,
            )
        self._note_success()
        if kind in ("ADDED", "MODIFIED", "DELETED"):
            self._put(kind, raw)
        self._version = version


@dataclass(slots=True)
class SharedWatch:
    """The watch of a namespace, shared by all its runs.

    Attributes:
        client: The client of its cluster.
        watch: The watch itself.
        key: The cluster and the namespace.
        users: The number of runs that use it.
    """

    client: KubernetesClient
    watch: NamespaceWatch
    key: tuple[Cluster, str]
    users: int = 0


class WatchPool:
    """Opens the client of each cluster and the watch of each namespace at its first use.

    The last run of a namespace closes its watch; clients stay open for the next run.

    Args:
        opened: Closes the clients. Every watch must have been released before.
    """

    def __init__(self, opened: AsyncExitStack) -> None:
        self._clients: dict[Cluster, KubernetesClient] = {}
        self._watches: dict[tuple[Cluster, str], SharedWatch] = {}
        self._opened = opened
        self._lock = asyncio.Lock()

    async def client(self, cluster: Cluster) -> KubernetesClient:
        """Return the client of a cluster.

        Raises:
            BackendError: The login failed.
        """
        async with self._lock:
            return await self._client(cluster)

    async def _client(self, cluster: Cluster) -> KubernetesClient:
        if cluster not in self._clients:
            self._clients[cluster] = await self._opened.enter_async_context(KubernetesClient(cluster))
        return self._clients[cluster]

    async def acquire(self, cluster: Cluster, namespace: str) -> SharedWatch:
        """Return the watch of a namespace; `release` it.

        Raises:
            BackendError: The cluster cannot be reached, or it does not allow the watch.
        """
        async with self._lock:
            key = (cluster, namespace)
            shared = self._watches.get(key)
            if shared is None or shared.watch.failed is not None:
                client = await self._client(cluster)
                shared = SharedWatch(client, await NamespaceWatch(client, namespace).__aenter__(), key)
                self._watches[key] = shared
            shared.users += 1
            return shared

    async def release(self, shared: SharedWatch) -> None:
        """Give a watch back; the last user closes it."""

        async def release() -> None:
            async with self._lock:
                shared.users -= 1
                if shared.users == 0:
                    if self._watches.get(shared.key) is shared:
                        del self._watches[shared.key]
                    await shared.watch.__aexit__(None, None, None)

        await complete(release)

"""The Job controller and a node with a kubelet, which run the Jobs of `fakes.kubernetes`.

The node runs containers as processes of this machine, or only simulates them (`Acted`), for a thousand at a time. The
sequences of states are those recorded from Kubernetes 1.36.2 (tests/data/kubernetes-1.36).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fakes.kubernetes import Key, KubernetesApi, Log, mark_deleted, now

__all__ = ["Acted", "Acting", "Cluster", "Ended", "Processes", "expand"]


@dataclass(frozen=True)
class Ended:
    """The exit code, reason and message of a container that ended."""

    code: int
    reason: str = ""
    message: str = ""

    def state(self) -> dict[str, Any]:
        reason = self.reason or ("Completed" if self.code == 0 else "Error")
        ended = {"exitCode": self.code, "reason": reason, "startedAt": now(), "finishedAt": now()}
        return {"terminated": {**ended, **({"message": self.message} if self.message else {})}}


class Container(Protocol):
    async def wait(self) -> Ended: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Runtime(Protocol):
    async def start(self, pod: Mapping[str, Any], container: Mapping[str, Any], log: Log) -> Container: ...

    def close_pod(self, pod: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Acting:
    """The behaviour of a simulated container."""

    seconds: float = 0.0
    code: int = 0
    output: tuple[bytes, ...] = ()
    reason: str = ""
    obeys: bool = True
    asked: int = 143  # the exit code after SIGTERM


class Acted:
    """A runtime that simulates containers.

    `play` returns the behaviour of a pod's run container, `others` that of other containers by their names.
    """

    def __init__(self, play: Callable[[Mapping[str, Any]], Acting], others: Mapping[str, Acting] | None = None) -> None:
        self._play = play
        self._others = {} if others is None else others

    async def start(self, pod: Mapping[str, Any], container: Mapping[str, Any], log: Log) -> Container:
        if container["name"] in self._others:
            return _ActedContainer(self._others[container["name"]], log)
        unpacks = any(each["name"] == container["name"] for each in pod["spec"].get("initContainers") or ())
        return _ActedContainer(Acting() if unpacks else self._play(pod), log)

    def close_pod(self, pod: Mapping[str, Any]) -> None:
        return None


class _ActedContainer:
    def __init__(self, acting: Acting, log: Log) -> None:
        self._acting = acting
        self._stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        for line in acting.output:
            log.add(line)

    async def wait(self) -> Ended:
        try:
            async with asyncio.timeout(self._acting.seconds):
                return Ended(await self._stopped)
        except TimeoutError:
            return Ended(self._acting.code, self._acting.reason)

    def terminate(self) -> None:
        if self._acting.obeys and not self._stopped.done():
            self._stopped.set_result(self._acting.asked)

    def kill(self) -> None:
        if not self._stopped.done():
            self._stopped.set_result(137)


class Processes:
    """A runtime that starts containers as processes of this machine, without a file system of their own.

    Mount paths in the manifest are replaced by the real folders of the volumes. `path` is the PATH of the processes.
    """

    def __init__(self, api: KubernetesApi, folder: Path, path: str = os.environ["PATH"]) -> None:
        self._api = api
        self._folder = folder
        self._path = path
        self.sessions: dict[str, list[int]] = {}

    async def start(self, pod: Mapping[str, Any], container: Mapping[str, Any], log: Log) -> Container:
        meta = pod["metadata"]
        root = self._folder / meta["uid"]
        mounts = self._mounts(pod, container, root)
        environ = {"PATH": self._path, "HOSTNAME": meta["name"], **self._environ(pod, container)}
        real = {name: text for name, text in environ.items() if name not in ("PATH",)}

        def placed(text: str) -> str:
            for path in sorted(mounts, key=len, reverse=True):
                text = text.replace(path, str(mounts[path]))
            return text

        argv = [placed(expand(part, real)) for part in (*container["command"], *container.get("args", ()))]
        work = root / "work"
        work.mkdir(parents=True, exist_ok=True)
        process = await asyncio.create_subprocess_exec(
            *argv,
            cwd=placed(container["workingDir"]) if "workingDir" in container else work,
            env=environ,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=2**20,
        )
        self.sessions.setdefault(meta["uid"], []).append(process.pid)
        return _ProcessContainer(process, log)

    def close_pod(self, pod: Mapping[str, Any]) -> None:
        uid = pod["metadata"]["uid"]
        for session in self.sessions.pop(uid, ()):
            kill_session(session)
        shutil.rmtree(self._folder / uid, ignore_errors=True)

    def _environ(self, pod: Mapping[str, Any], container: Mapping[str, Any]) -> dict[str, str]:
        environ: dict[str, str] = {}
        for source in container.get("envFrom") or ():
            environ.update(self._secret(pod, source["secretRef"]["name"]))
        for each in container.get("env") or ():
            environ[each["name"]] = expand(each.get("value", ""), environ)
        return environ

    def _secret(self, pod: Mapping[str, Any], name: str) -> dict[str, str]:
        found = self._api.objects[("secrets", pod["metadata"]["namespace"], name)]
        decoded = {key: base64.b64decode(value).decode() for key, value in (found.get("data") or {}).items()}
        return {**decoded, **(found.get("stringData") or {})}

    def _mounts(self, pod: Mapping[str, Any], container: Mapping[str, Any], root: Path) -> dict[str, Path]:
        volumes = {each["name"]: each for each in pod["spec"].get("volumes") or ()}
        made: dict[str, Path] = {}
        for mount in container.get("volumeMounts") or ():
            volume, path = volumes[mount["name"]], root / mount["name"]
            path.mkdir(parents=True, exist_ok=True)
            if "hostPath" in volume:
                path = Path(volume["hostPath"]["path"])
            elif "configMap" in volume:
                key = ("configmaps", pod["metadata"]["namespace"], volume["configMap"]["name"])
                for name, data in (self._api.objects[key].get("binaryData") or {}).items():
                    (path / name).write_bytes(base64.b64decode(data))
            elif "secret" in volume:
                for name, text in self._secret(pod, volume["secret"]["secretName"]).items():
                    (path / name).write_text(text)
            made[mount["mountPath"]] = path
        return made


class _ProcessContainer:
    def __init__(self, process: asyncio.subprocess.Process, log: Log) -> None:
        self._process = process
        self._log = log
        self._reading = asyncio.create_task(self._read())

    async def wait(self) -> Ended:
        code = await self._process.wait()
        # When process 1 ends, all other processes of the container are killed.
        kill_session(self._process.pid)
        await self._reading
        return Ended(code if code >= 0 else 128 - code)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        kill_session(self._process.pid)
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self._log.add(line)


def kill_session(session: int) -> None:
    for pid in living_in(session):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def living_in(session: int) -> list[int]:
    found: list[int] = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            state = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(state[3]) == session and state[0] != "Z":
            found.append(int(entry))
    return found


def expand(text: str, environ: Mapping[str, str]) -> str:
    """Expand ``$(NAME)`` of known variables, and ``$$`` to a dollar sign, as Kubernetes does."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return environ.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, text)


class Cluster:
    """The Job controller, the garbage collector's TTL, the scheduler and one kubelet.

    Attributes:
        answers: False for a node that does not answer: its pods run on, whatever is asked of them.
        injected: Containers that an admission webhook adds to every pod.
        counts_deleted: False for the Job controller before Kubernetes 1.26, to which a deleted pod has not failed.
    """

    def __init__(self, api: KubernetesApi, runtime: Runtime, *, pace: float = 0.0, retry_after: float = 0.01) -> None:
        self.api = api
        self.runtime = runtime
        self.pace = pace
        self.retry_after = retry_after
        self.ttl = True
        self.answers = True
        self.injected: list[dict[str, Any]] = []
        self.counts_deleted = True
        self.log_bytes: int | None = None  # the size at which the kubelet rotates logs (containerLogMaxSize)
        self._tasks: set[asyncio.Task[None]] = set()
        self._containers: dict[str, list[Container]] = {}
        self._ending: dict[str, float] = {}
        api.on_change.append(self._changed)

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pod in self.api.of_kind("pods"):
            self.runtime.close_pod(pod)

    def answer(self) -> None:
        """Let the node answer again; it catches up with the deletions that it has missed."""
        self.answers = True
        for key, value in tuple(self.api.objects.items()):
            if key[0] == "pods":
                self._changed("MODIFIED", key, value)

    def start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            asyncio.get_running_loop().call_exception_handler({"message": "fake", "exception": task.exception()})

    def _changed(self, kind: str, key: Key, value: dict[str, Any]) -> None:
        meta = value["metadata"]
        if key[0] == "jobs":
            suspended = value["spec"].get("suspend")
            if kind == "ADDED" and not suspended:
                self.start(self._run_job(key, meta["uid"]))
            elif kind == "ADDED":
                condition = {"type": "Suspended", "status": "True", "reason": "JobSuspended"}
                self.start(self._set_status(key, {"conditions": [condition]}))
            elif kind == "MODIFIED" and not suspended and "startTime" not in value["status"]:
                self.start(self._run_job(key, meta["uid"]))
        elif key[0] == "pods" and kind == "MODIFIED" and "deletionTimestamp" not in meta:
            self._count_restarts(key, value)
        elif key[0] == "pods" and kind == "MODIFIED":
            seconds = float(meta["deletionGracePeriodSeconds"])
            if self.answers and seconds < self._ending.get(meta["uid"], 1e9):
                self._ending[meta["uid"]] = seconds
                self.start(self._end_pod(meta["uid"], seconds))

    async def _set_status(self, key: Key, status: dict[str, Any]) -> None:
        self.api.change(key, lambda job: job["status"].update(status))

    async def _step(self) -> None:
        await asyncio.sleep(self.pace)

    # ---- the Job controller -----------------------------------------------------------------------------------------

    async def _run_job(self, key: Key, uid: str) -> None:
        failed = 0
        while True:
            await self._step()
            job = self.api.objects.get(key)
            if job is None or job["metadata"]["uid"] != uid or "deletionTimestamp" in job["metadata"]:
                return
            status: dict[str, Any] = {"startTime": now(), "active": 1, "ready": 0, "terminating": 0}
            self.api.change(key, lambda job, status=status: job["status"].update(status))  # type: ignore[misc]
            pod = self.api.create("pods", key[1], self._pod_of(job))
            ended = await self._run_pod(("pods", key[1], pod["metadata"]["name"]), pod)
            await self._step()
            job = self.api.objects.get(key)
            if ended is None or job is None or "deletionTimestamp" in job["metadata"]:
                return
            if _is_ending(job):
                return
            if not ended and not self.counts_deleted and pod["metadata"]["name"] not in self._names_of_pods():
                continue
            failed += not ended
            self.api.change(key, lambda job, failed=failed: job["status"].update(active=0, failed=failed))  # type: ignore[misc]
            if ended or failed > job["spec"]["backoffLimit"]:
                await self._finish(key, good=ended)
                return
            await asyncio.sleep(self.retry_after)

    def _count_restarts(self, pod_key: Key, pod: Mapping[str, Any]) -> None:
        """Fail a Job whose containers were restarted as often as its backoffLimit says, while they still run.

        https://github.com/kubernetes/kubernetes/blob/master/pkg/controller/job/job_controller.go
        has it as pastBackoffLimitOnFailure.
        """
        owner: Mapping[str, Any] = next(iter(pod["metadata"].get("ownerReferences") or ()), {})
        key = ("jobs", pod_key[1], owner.get("name", ""))
        job = self.api.objects.get(key)
        if job is None or pod["spec"].get("restartPolicy") != "OnFailure" or _is_ending(job):
            return
        restarts = sum(
            each["restartCount"]
            for field in ("initContainerStatuses", "containerStatuses")
            for each in pod["status"].get(field) or ()
        )
        if restarts > 0 and restarts >= job["spec"]["backoffLimit"]:
            self.start(self._fail_restarted(key, pod_key))

    async def _fail_restarted(self, key: Key, pod: Key) -> None:
        await self._step()
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        interim = {"type": "FailureTarget", "status": "True", "reason": reason, "message": message}
        job = self.api.objects.get(key)
        if job is None or _is_ending(job):
            return
        await self._set_status(key, {"conditions": [interim]})
        if pod in self.api.objects:
            self.api.delete_pod(pod, None)
        while pod in self.api.objects:  # noqa: ASYNC110 - a fake of a controller that looks again and again
            await asyncio.sleep(0.01)
        final = {**interim, "type": "Failed"}
        await self._set_status(key, {"conditions": [interim, final], "failed": 1, "active": 0})

    def _names_of_pods(self) -> set[str]:
        return {each["metadata"]["name"] for each in self.api.of_kind("pods")}

    async def _finish(self, key: Key, *, good: bool) -> None:
        """Finish a Job in two phases, as Kubernetes does since 1.31."""
        interim, final = ("SuccessCriteriaMet", "Complete") if good else ("FailureTarget", "Failed")
        reason = "CompletionsReached" if good else "BackoffLimitExceeded"
        message = "Reached expected number of succeeded pods" if good else "Job has reached the specified backoff limit"
        conditions: list[dict[str, str]] = []
        for kind in (interim, final):
            conditions.append({"type": kind, "status": "True", "reason": reason, "message": message})
            await self._set_status(key, {"conditions": list(conditions), **({"succeeded": 1} if good else {})})
            await self._step()
        job = self.api.objects.get(key)
        ttl = job["spec"].get("ttlSecondsAfterFinished") if job is not None else None
        if self.ttl and ttl is not None and ttl < 100:
            await asyncio.sleep(ttl)
            if key in self.api.objects:
                self.api.delete_job(key, "Foreground")

    # ---- the kubelet ------------------------------------------------------------------------------------------------

    async def _run_pod(self, key: Key, pod: dict[str, Any]) -> bool | None:
        """Run a pod to its end; return its success, or None if it never ends. A deleted pod has failed."""
        uid, spec = pod["metadata"]["uid"], pod["spec"]
        await self._step()
        if spec.get("nodeSelector"):
            message = "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."
            waits = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
            await self._set_status(key, {"conditions": [waits]})
            return None
        self.api.change(key, lambda pod: pod["spec"].update(nodeName="node1"))
        await self._set_status(key, {"conditions": [{"type": "PodScheduled", "status": "True"}]})
        states: dict[str, dict[str, Any]] = {}
        good = True
        sidecars: list[asyncio.Task[bool]] = []
        for container in spec.get("initContainers") or ():
            running = asyncio.create_task(self._run_container(key, pod, "initContainers", container, states))
            if container.get("restartPolicy") == "Always":
                sidecars.append(running)
            elif not (good := await running):
                break
        if good:
            plain = (self._run_container(key, pod, "containers", each, states) for each in spec["containers"])
            good = all(await asyncio.gather(*plain))
        for sidecar in self._containers.get(uid, ()):
            sidecar.terminate()
        await asyncio.gather(*sidecars)
        self.runtime.close_pod(pod)
        await self._set_status(key, {"phase": "Succeeded" if good else "Failed"})
        self._containers.pop(uid, None)
        self._ending.pop(uid, None)
        found = self.api.objects.get(key)
        if found is None or "deletionTimestamp" in found["metadata"]:
            self.api.change(key, lambda pod: mark_deleted(pod, 0, None))
            self.api.remove(key)
            self.api.collect()
            return False
        return good

    async def _run_container(
        self, key: Key, pod: dict[str, Any], kind: str, container: dict[str, Any], states: dict[str, dict[str, Any]]
    ) -> bool:
        uid, name = pod["metadata"]["uid"], container["name"]
        restarts = 0
        last: dict[str, Any] = {}

        async def show(state: dict[str, Any], phase: str) -> None:
            shown = {"name": name, "state": state, "ready": "running" in state, "restartCount": restarts}
            states[name] = {**shown, "lastState": last}
            field = "initContainerStatuses" if kind == "initContainers" else "containerStatuses"
            names = [each["name"] for each in pod["spec"].get(kind) or ()]
            if any(
                "waiting" not in states[each["name"]]["state"]
                for each in pod["spec"]["containers"]
                if each["name"] in states
            ):
                phase = "Running"
            await self._set_status(key, {field: [states[each] for each in names if each in states], "phase": phase})

        await show({"waiting": {"reason": "ContainerCreating"}}, "Pending")
        while (wrong := self._hindrance(pod, container)) is not None:
            await show({"waiting": {"reason": wrong[0], "message": wrong[1]}}, "Pending")
            await asyncio.sleep(0.02)
            if self._is_deleted(key):
                return False
        await self._step()
        phase = "Running" if kind == "containers" else "Pending"
        while True:
            if self._is_deleted(key):
                return False
            log_key = (key[1], key[2], name)
            if restarts:
                self.api.previous_logs[log_key] = self.api.logs[log_key]
            log = self.api.logs[log_key] = Log(self.log_bytes)
            running = await self.runtime.start(pod, container, log)
            self._containers.setdefault(uid, []).append(running)
            if uid in self._ending:
                running.terminate()
            await show({"running": {"startedAt": now()}}, phase)
            ended = await running.wait()
            await show(ended.state(), phase)
            await self._step()
            log.end()
            if ended.code == 0 or pod["spec"].get("restartPolicy") != "OnFailure" or self._is_deleted(key):
                return ended.code == 0
            last = ended.state()
            if restarts:  # the kubelet restarts at once the first time, and then after a back-off
                message = f"back-off restarting failed container={name}"
                await show({"waiting": {"reason": "CrashLoopBackOff", "message": message}}, phase)
                await asyncio.sleep(self.retry_after)
            restarts += 1

    def _is_deleted(self, key: Key) -> bool:
        found = self.api.objects.get(key)
        return found is None or "deletionTimestamp" in found["metadata"]

    def _hindrance(self, pod: dict[str, Any], container: dict[str, Any]) -> tuple[str, str] | None:
        image, namespace = container["image"], pod["metadata"]["namespace"]
        if image != image.lower():
            return "InvalidImageName", f"couldn't parse image name {image!r}"
        if image.startswith("registry.invalid/"):
            return "ErrImagePull", f'failed to pull and unpack image "{image}"'
        for source in container.get("envFrom") or ():
            name = source["secretRef"]["name"]
            if ("secrets", namespace, name) not in self.api.objects:
                return "CreateContainerConfigError", f'secret "{name}" not found'
        return None

    async def _end_pod(self, uid: str, grace: float) -> None:
        for container in self._containers.get(uid, ()):
            container.terminate()
        await asyncio.sleep(grace)
        if self._ending.get(uid) == grace:
            for container in self._containers.get(uid, ()):
                container.kill()

    def _pod_of(self, job: dict[str, Any]) -> dict[str, Any]:
        meta, template = job["metadata"], job["spec"]["template"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": meta["uid"], "controller": True}
        return {
            "metadata": {
                "generateName": f"{meta['name']}-",
                "labels": dict(template["metadata"]["labels"]),
                "annotations": dict(template["metadata"].get("annotations") or {}),
                "ownerReferences": [owner],
            },
            "spec": {**template["spec"], "containers": [*template["spec"]["containers"], *self.injected]},
            "status": {"phase": "Pending"},
        }


def _is_ending(job: Mapping[str, Any]) -> bool:
    return any(each["type"] != "Suspended" for each in job["status"].get("conditions") or ())


def scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="fake-node-"))

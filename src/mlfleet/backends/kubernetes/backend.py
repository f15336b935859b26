"""The backend: it makes a Kubernetes Job of a job, and a handle of a reference."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import anyio

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.threads import FILES, LOGINS
from mlfleet._concurrency.throttle import Throttle
from mlfleet._paths import run_folder
from mlfleet._text.masking import MASK
from mlfleet.backends._remote.backend import RemoteBackend
from mlfleet.backends._remote.owner import owner_lives, owner_text
from mlfleet.backends.base import BackendRun, DockerRequest, Job, ListedRun, Presence
from mlfleet.backends.kubernetes.client import ApiError, KubernetesClient
from mlfleet.backends.kubernetes.config import CodeDelivery, KubernetesConfig, StartTimeouts, parse_config
from mlfleet.backends.kubernetes.delivery import Deliveries, preview_code
from mlfleet.backends.kubernetes.jobs import create_job, create_secret, delete_job, find_job, has_ended, job_path
from mlfleet.backends.kubernetes.manifest import (
    OWNER,
    check_copied,
    check_names,
    check_tracking,
    grace_of,
    has_secret,
    host_volumes,
    image_of,
    job_manifest,
    secret_manifest,
    variables,
)
from mlfleet.backends.kubernetes.names import NAME, job_name
from mlfleet.backends.kubernetes.output import LogSlots
from mlfleet.backends.kubernetes.run import KubernetesRun, Target
from mlfleet.backends.kubernetes.state import MANAGED_BY, RUN_LABEL, read_job
from mlfleet.backends.kubernetes.watch import SharedWatch, WatchPool
from mlfleet.errors import MlfleetError, RunLost, SubmitError, UsageError
from mlfleet.runs import JobRef

__all__ = ["KubernetesBackend"]

_AT_ONCE = 10  # Jobs that are created at the same time; more would delay other clients of the server and the event loop
_GRACE = 60.0  # seconds to delete a Job whose submission is cancelled


class KubernetesBackend(RemoteBackend[KubernetesConfig]):
    """Runs each job as a ``batch/v1`` Job of a cluster.

    Leaving the backend ends the Jobs that it submitted. Jobs that it attached to go on.

    Args:
        end_patience: Seconds after the grace time in which nodes must confirm that the pods of a cancelled run have
            ended. After that the run counts as lost: it may still run.
    """

    name: ClassVar[str] = "kubernetes"
    path_keys: ClassVar[frozenset[str]] = frozenset({"kube-job-template-path"})

    def __init__(self, *, end_patience: float = 120.0) -> None:
        super().__init__()
        self._end_patience = end_patience
        self._watches = WatchPool(self._stack)
        self._deliveries = Deliveries()
        self._log_slots = LogSlots()
        self._throttle = Throttle()
        self._creating = asyncio.Semaphore(_AT_ONCE)

    def configure(self, config: Mapping[str, Any]) -> KubernetesConfig:
        """Check ``backend_config``; see `Backend.configure`. Blocking: reads the kubeconfig and the template."""
        return parse_config(config, os.environ)

    def check(self, docker: DockerRequest | None, folder: Path) -> None:
        """Check the volumes and variables of ``docker_env``; see `Backend.check`."""
        check_copied(docker)
        if docker is not None:
            host_volumes(docker.env.volumes)

    def check_config(self, config: KubernetesConfig, docker: DockerRequest | None, variables: Collection[str]) -> None:
        """Check that the template leaves what the run sets to it, and that there is an image; see `Backend`."""
        image = image_of(docker, config)
        named = [] if docker is None else [name for name, _ in docker.env.environment]
        check_names((*variables, *named))
        if not config.template:
            return
        job = Job(
            run_id="0" * 32,
            experiment_id="0",
            project_name="project",
            project_dir=Path(),
            command="true",
            docker=docker,
            config=config,
        )
        plain = dict.fromkeys((*variables, *named), "")
        job_manifest(job, config, preview_code(job, config, image), plain, secrets=(), submission="")

    def check_tracking(self, uri: str, config: KubernetesConfig | None = None) -> None:
        """Refuse a store on this machine, unless ``tracking-uri`` gives pods another; see `Backend.check_tracking`."""
        own = config.tracking_uri if config is not None else None
        check_tracking(own or uri)

    def reference(self, job: Job) -> JobRef:
        """Return the context, the namespace and the name of the Job."""
        config = _config(job)
        data: dict[str, Any] = {
            "context": config.cluster.context,
            "namespace": config.namespace,
            "name": job_name(job.project_name, job.run_id),
            "owner": self._this_process,
        }
        if config.timeouts != StartTimeouts():
            data["start-timeout"] = asdict(config.timeouts)
        if not config.keep_jobs:
            data["keep-jobs"] = False
        return JobRef(self.name, job.run_id, data)

    def variables(self, job: Job) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Return the variables of the job and of ``docker_env``, with the address of tracking that pods know."""
        return variables(job, _config(job).tracking_uri)

    def preview(self, job: Job) -> str:
        """Return the manifests of the Job, and of its Secret without the values, as YAML. Makes nothing.

        Raises:
            MlfleetError: The configuration, the template or the project is wrong.
        """
        import yaml

        config = _config(job)
        plain, secret = variables(job, config.tracking_uri)
        code = preview_code(job, config, image_of(job.docker, config))
        manifest = job_manifest(job, config, code, plain, secrets=tuple(secret), submission="(of the run)")
        documents = [manifest]
        if secret:
            documents.append(secret_manifest(job, config, dict.fromkeys(secret, MASK), None))
        return yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=120)

    async def submit(self, job: Job) -> KubernetesRun:
        """Bring the project's code to the cluster and create the run's Job, and its Secret if it has secrets.

        Raises:
            SubmitError: The cluster, or the registry, refused; nothing is left.
            ApiError: The cluster cannot be reached.
        """
        config = _config(job)
        # A thousand submissions at once must not block the event loop.
        await self._throttle.wait()
        plain, secret = variables(job, config.tracking_uri)
        image = image_of(job.docker, config)
        client = await self._watches.client(config.cluster)
        code = await self._deliveries.deliver(client, job, config, image)

        async def create(shared: SharedWatch) -> dict[str, Any]:
            async with self._creating:
                manifest = job_manifest(
                    job, config, code, plain, secrets=tuple(secret), submission=uuid.uuid4().hex, owner=owner_text()
                )
                return await self._create(shared, job, config, manifest, secret)

        tags = {"mlflow.docker.image.uri": code.image}
        return await self._supervise(config, create, job.run_id, job.output, submitted=True, tags=tags)

    def tags(self, run: BackendRun) -> Mapping[str, str]:
        """Return the tags that name the Job and the image."""
        return run.target.tags if isinstance(run, KubernetesRun) else {}

    async def attach(self, ref: JobRef) -> KubernetesRun:
        """Return the handle of a Job that an earlier process submitted.

        The copy of its output goes on where that process has left it.

        Raises:
            RunLost: The Job does not exist any more.
            ApiError: The cluster cannot be reached.
        """
        data = ref.data
        config = await LOGINS.run(partial(_attached_config, data))
        if await FILES.run(partial(owner_lives, data.get("owner"))):
            # The process that submitted the run deletes its Job as soon as it has the output.
            config = replace(config, keep_jobs=True)
        name = _job_name(ref)

        async def find(shared: SharedWatch) -> dict[str, Any]:
            return await find_job(shared.client, config.namespace, name, ref.run_id)

        # The file that the first process writes to: if it still lives, both write the same there.
        output = run_folder(ref.run_id) / "output.log"
        return await self._supervise(config, find, ref.run_id, output, submitted=False, tags={})

    # ---- runs of other processes ------------------------------------------------------------------------------------

    def select_service(self, config: Mapping[str, Any], tracking_uri: str) -> None:
        """Select the cluster and the namespace of a run with these settings; see `Backend.select_service`."""
        self._selected = self.configure({"code-delivery": CodeDelivery.NONE.value, **config})

    async def list_runs(self) -> Sequence[ListedRun]:
        """Return the runs whose Job is in the cluster and namespace that were selected; see `Backend.list_runs`."""
        _, jobs = await self._list_jobs()
        return [await FILES.run(partial(_listed, each)) for each in jobs]

    async def prune(
        self, run_ids: Collection[str] = (), *, running: bool = False, dry_run: bool = False
    ) -> Sequence[ListedRun]:
        """Delete the Jobs that no process of this machine looks after, and their Secrets; see `Backend.prune`.

        They are those of the cluster and namespace that were selected. Jobs that another machine submitted stay.
        """
        client, jobs = await self._list_jobs()
        chosen: list[ListedRun] = []
        try:
            async with anyio.create_task_group() as group:
                for each in jobs:
                    run, job = await FILES.run(partial(_listed, each)), read_job(each)
                    if run.supervised or job.deleting or (run_ids and run.run_id not in run_ids):
                        continue
                    if job.ended or running:
                        chosen.append(run)
                        if not dry_run:
                            group.start_soon(delete_job, client, each["metadata"]["namespace"], job.name, job.uid)
        except* ApiError as errors:
            raise errors.exceptions[0] from None
        return chosen

    async def _list_jobs(self) -> tuple[KubernetesClient, list[dict[str, Any]]]:
        config = await self._selected_config()
        client = await self._watches.client(config.cluster)
        params = {"labelSelector": f"{MANAGED_BY}=mlfleet"}
        answer = await client.call("listing Jobs", "GET", job_path(config.namespace), params=params)
        return client, [each for each in answer.get("items") or () if RUN_LABEL in (each["metadata"]["labels"] or {})]

    async def presence(self, ref: JobRef) -> Presence:
        """Return the state of the Job; see `Backend.presence`."""
        config = await LOGINS.run(partial(_attached_config, ref.data))
        client = await self._watches.client(config.cluster)
        try:
            found = await find_job(client, config.namespace, _job_name(ref), ref.run_id)
        except RunLost:
            return Presence.MISSING
        return Presence.ENDED if await has_ended(client, found) else Presence.ACTIVE

    # ---- one Job ----------------------------------------------------------------------------------------------------

    async def _create(
        self,
        shared: SharedWatch,
        job: Job,
        config: KubernetesConfig,
        manifest: Mapping[str, Any],
        secret: Mapping[str, str],
    ) -> dict[str, Any]:
        made: list[dict[str, Any]] = []  # filled by `create`, since a cancelled `complete` loses its result

        async def create() -> None:
            made.append(await create_job(shared.client, config.namespace, manifest, job.run_id))
            if secret:
                # After the Job, which owns it, so that nothing is left if this process dies in between: the kubelet
                # waits until the Secret exists.
                await create_secret(shared.client, config.namespace, secret_manifest(job, config, secret, made[0]))

        try:
            # Without the answer it would be unknown whether the Job exists.
            await complete(create, limit=_GRACE)
        except BaseException:
            for each in made:
                await complete(partial(self._take_back, shared, each))
            raise
        return made[0]

    async def _take_back(self, shared: SharedWatch, made: dict[str, Any]) -> None:
        """Delete a Job whose handle is not returned, and wait until it is gone."""
        meta = made["metadata"]
        state = shared.watch.track(read_job(made))
        try:
            await delete_job(shared.client, meta["namespace"], meta["name"], meta["uid"])
            with anyio.move_on_after(_GRACE):
                await state.until(lambda snapshot: snapshot.job.deleted)
        except MlfleetError as error:
            raise SubmitError(f"the Job {meta['name']} may be left behind: {error}", backend=self.name) from error
        finally:
            shared.watch.untrack(meta["uid"])

    async def _supervise(
        self,
        config: KubernetesConfig,
        obtain: Callable[[SharedWatch], Awaitable[dict[str, Any]]],
        run_id: str,
        output: Path | None,
        *,
        submitted: bool,
        tags: Mapping[str, str],
    ) -> KubernetesRun:
        """Return the handle of a run, which is supervised from now on.

        Args:
            config: The configuration of the backend.
            obtain: A function that creates or finds the Job of the run.
            run_id: The id of the MLflow run.
            output: The file for the output; None: the output of this process.
            submitted: True if this process creates the Job.
            tags: Tags for the MLflow run, besides those that name the Job.
        """
        shared = await self._watches.acquire(config.cluster, config.namespace)
        try:
            made = await obtain(shared)
            name, uid = made["metadata"]["name"], made["metadata"]["uid"]
            target = Target(
                namespace=config.namespace,
                name=name,
                uid=uid,
                run_id=run_id,
                output=output,
                grace=grace_of(made),
                timeouts=config.timeouts,
                keep=config.keep_jobs,
                has_secret=has_secret(made),
                patience=self._end_patience,
                tags={
                    **tags,
                    "mlfleet.kubernetes.job": f"{config.namespace}/{name}",
                    "mlfleet.kubernetes.uid": uid,
                },
            )
            job, slots = read_job(made), self._log_slots
            run = KubernetesRun(target, job, shared.client, slots, shared.watch, submitted=submitted)
            self._runs.start(run, name=f"mlfleet Job {name}", then=partial(self._watches.release, shared))
            return run
        except BaseException:
            await self._watches.release(shared)
            raise


def _attached_config(data: Mapping[str, Any]) -> KubernetesConfig:
    """Return the configuration to find a Job again, and to look after it as it was submitted. Blocking.

    Args:
        data: The data of the reference, which anybody who may write tags can have changed.

    Raises:
        UsageError: The kubeconfig does not have the context any more, or the reference is damaged.
    """
    context = str(data.get("context") or "")
    given: dict[str, Any] = {"code-delivery": "none", "namespace": str(data.get("namespace") or "")}
    given.update({key: data[key] for key in ("start-timeout", "keep-jobs") if key in data})
    if context and not context.startswith("("):
        given["kube-context"] = context
    return parse_config(given, os.environ)


def _config(job: Job) -> KubernetesConfig:
    if not isinstance(job.config, KubernetesConfig):
        raise UsageError("the job has no configuration for the backend 'kubernetes': give backend_config")
    return job.config


def _job_name(ref: JobRef) -> str:
    """Return the name of the Job in a reference, which others may have written.

    Raises:
        RunLost: It is not the name of a Job.
    """
    name = str(ref.data.get("name") or "")
    if not NAME.fullmatch(name):
        text = f"the tag {JobRef.TAG} of the run {ref.run_id} names no Job, but {name!r}"
        raise RunLost(text, backend=KubernetesBackend.name)
    return name


def _listed(raw: Mapping[str, Any]) -> ListedRun:
    """Return the entry of a Job. Blocking."""
    meta, job = raw["metadata"], read_job(raw)
    state = "deleting" if job.deleting else "active"
    if job.ended:
        state = "complete" if job.complete else "failed"
    elif job.suspended:
        state = "suspended"
    return ListedRun(
        run_id=job.run_id,
        backend=KubernetesBackend.name,
        created=datetime.fromisoformat(meta["creationTimestamp"]),
        state=state,
        # A process on another machine may look after its Jobs.
        supervised=owner_lives(str((meta.get("annotations") or {}).get(OWNER, ""))) is not False,
        detail={"job": f"{meta['namespace']}/{meta['name']}"},
    )

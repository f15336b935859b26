"""The submitting of runs, and the attaching to them, with one tracking server or store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._engine.attach import AttachedSupervisor, concluded, find_again
from mlfleet._engine.detached import DetachedSupervisor, Order
from mlfleet._engine.plan import Plan, ProjectPlan
from mlfleet._engine.records import tracking_key
from mlfleet._engine.request import RunRequest, choose_experiment
from mlfleet._engine.run import FleetRun
from mlfleet._engine.supervisor import SubmittedSupervisor
from mlfleet._engine.variables import check_reserved
from mlfleet._run_log import about_run
from mlfleet.errors import RunLost, UsageError
from mlfleet.runs import RunEvent, Stage, Timeouts
from mlfleet.tracking import Tracking, open_tracking

if TYPE_CHECKING:
    from mlfleet._engine.services import FleetServices

__all__ = ["RunContext"]


class RunContext:
    """The services of a Fleet together with one tracking server or store: all that a run needs.

    Args:
        fleet: The services of the Fleet.
        tracking: The tracking server or store of the runs.
        tracking_uri: The URI that `tracking` was made of, with its credentials, for detached runs; empty: its default.
            None: it was not made of a URI.

    Attributes:
        fleet: The services of the Fleet.
        tracking: The tracking server or store of the runs.
    """

    def __init__(self, fleet: FleetServices, tracking: Tracking, tracking_uri: str | None) -> None:
        self.fleet = fleet
        self.tracking = tracking
        self._tracking_uri = tracking_uri
        self._experiments: SingleFlight[str, str] = SingleFlight(keep=True)

    def is_of(self, tracking_uri: str | None, tracking: Tracking | None) -> bool:
        """Return True for the arguments that name this tracking: its URI, or the object itself."""
        return tracking is self.tracking or (tracking is None and tracking_uri == self._tracking_uri)

    @cached_property
    def tracking_key(self) -> str:
        """The name under which records keep the tracking server or store."""
        return tracking_key(self.tracking.uri)

    @property
    def reopen(self) -> Callable[[], Tracking] | None:
        """A function that makes the tracking again, for use after the Fleet; None if it was not made of a URI."""
        return None if self._tracking_uri is None else partial(open_tracking, self._tracking_uri)

    async def plan(self, request: RunRequest, *, like: ProjectPlan | None = None) -> Plan:
        """Fetch the project and check the whole request. Nothing is made but the cache of projects.

        Args:
            request: The request.
            like: The plan of a request for the same project and entry point, so that many runs use one commit and are
                planned at no cost.

        Raises:
            MlfleetError: The request, the project or the parameters are wrong.
        """
        self.fleet.check_open()
        if like is None and self.fleet.events.has_readers:
            self.fleet.events.publish(RunEvent(Stage.FETCHING, request.uri))
        plan = await self.fleet.planner.plan(
            request,
            like=like,
            on_progress=lambda line: self.fleet.events.publish(RunEvent(Stage.FETCHING, request.uri, detail=line)),
        )
        backend = self.fleet.backends[plan.backend]
        backend.check_tracking(plan.tracking_uri(self.tracking.uri), plan.config)
        plain, secret = await self.tracking.environ()
        if request.env:
            # Reserving a part of this machine chooses the GPUs.
            chosen = {"CUDA_VISIBLE_DEVICES"} if backend.runs_here and self.fleet.admission.machine.gpus else set()
            check_reserved(request.env, {*plain, *secret, *chosen}, tracking_uri=self.tracking.uri)
        traced = () if self.fleet.instrumentation is None else self.fleet.instrumentation.names
        names = (*plain, *secret, "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", *traced, *(request.env or ()))
        backend.check_config(plan.config, plan.docker, names)
        if backend.runs_here and request.resources is not None:
            self.fleet.admission.check(request.resources)
        return plan

    async def start(self, request: RunRequest, *, wait: bool = False) -> FleetRun:
        """Plan a request and launch its run, here or in a process of its own. A cancelled call cancels the run.

        Args:
            request: The request.
            wait: True to wait for room if the queue is full.

        Raises:
            FleetFull: The queue is full. Found before the project is fetched, if possible.
        """
        if request.detach:
            return await self._detach(request)
        if not wait:
            self.fleet.admission.check_room(request.group)
        return await self.launch(await self.plan(request), wait=wait)

    async def _detach(self, request: RunRequest) -> FleetRun:
        self.fleet.check_open()
        if self._tracking_uri is None:
            raise UsageError(
                "another process supervises a detached run, and cannot use the Tracking of this Fleet: give the Fleet "
                "a tracking_uri, or submit the run without detach"
            )
        inherit_env = self.fleet.inherit_env if request.inherit_env is None else request.inherit_env
        order = Order.of(
            replace(request, timeouts=request.timeouts or self.fleet.timeouts, inherit_env=inherit_env),
            tracking_uri=self._tracking_uri or self.tracking.uri,
            tracking_patience=self.fleet.tracking_patience,
            resources=self.fleet.resources,
        )
        return await self._created(self.fleet.follow(DetachedSupervisor(self, order, request.parameters)))

    async def launch(self, plan: Plan, *, wait: bool = False) -> FleetRun:
        """Launch a planned run and return its handle when its MLflow run exists. A cancelled call cancels the run.

        Args:
            plan: The plan of the run.
            wait: True to wait for room if the queue is full. Sweeps, which bound their runs themselves, are exempt.
        """
        self.fleet.check_open()
        group, exempt = plan.request.group, plan.request.member is not None
        reservation = self.fleet.admission.reserve(self.fleet.needed(plan), group=group, exempt=exempt)
        await reservation.enter(wait=wait)
        if not self.fleet.is_open:
            reservation.release()
            self.fleet.check_open()
        return await self._created(self.fleet.supervise(SubmittedSupervisor(self, plan, reservation)))

    async def _created(self, run: FleetRun) -> FleetRun:
        try:
            await run.created()
        except BaseException:
            # After a cancellation the run has to be ended; after an error in the creation it has ended already.
            await complete(run.cancel, restart=True)
            raise
        return run

    async def attach(self, run_id: str, *, timeouts: Timeouts | None = None, ended: bool = False) -> FleetRun:
        """Supervise a run that an earlier process submitted. See `Fleet.attach`.

        Args:
            run_id: The id of the MLflow run.
            timeouts: The time limits from now on.
            ended: True to take the status of a run that somebody else has concluded meanwhile for its outcome.
        """
        self.fleet.check_open()
        info = await self.tracking.get_run(run_id)
        with about_run(run_id):
            found = concluded(info) if ended and info.status.is_terminal else await find_again(self, info)
        run = self.fleet.supervise(AttachedSupervisor(self, info, found, timeouts))
        await run.created()
        if isinstance(found.handle, RunLost) or (await found.handle.get_status()).is_terminal:
            await run.outcome()  # its status is to be known as soon as there is a handle
        return run

    async def experiment_id(self, request: RunRequest) -> str:
        """Return the id of the experiment of a run, which is created if it does not exist."""
        name, experiment_id = choose_experiment(request.experiment_name, request.experiment_id)
        if name is None:
            return experiment_id
        return await self._experiments(name, lambda: self.tracking.experiment_id(name))

"""Traces and metrics of runs for OpenTelemetry: ``mlfleet.otel.instrument(fleet)``.

It uses the API of OpenTelemetry only (``pip install 'mlfleet[otel]'``). Where the spans and figures go is configured
with the SDK of the program, as for everything else that it traces.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from mlfleet._engine.supervisor import Supervisor
from mlfleet._run_log import get_logger
from mlfleet._text.masking import mask_uri
from mlfleet._version import __version__
from mlfleet.errors import UsageError
from mlfleet.fleet import Fleet, context_of
from mlfleet.runs import Outcome, RunEvent, RunStatus, Stage
from mlfleet.tracking.base import clean_reason

if TYPE_CHECKING:
    from types import TracebackType

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, TracerProvider

__all__ = ["Instrumentation", "instrument"]

logger = get_logger("mlfleet.otel")

_STAGES = {Stage.QUEUED: "queued", Stage.PREPARING: "preparing", Stage.STARTING: "starting", Stage.STARTED: "running"}


def instrument(
    fleet: Fleet,
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> Instrumentation:
    """Trace and count the runs that a Fleet submits or attaches to from now on.

    Each run is a span, whose parent is the current span of the call that submits the run. Its stages are child spans.
    The command gets the context of the run's span in its variables ``TRACEPARENT`` and ``TRACESTATE``, so that what it
    traces itself belongs to the run. The names of all spans, attributes and metrics are on the page "Observability" of
    the documentation.

    Args:
        fleet: The Fleet, open or not yet open.
        tracer_provider: The provider of the tracer; None: the global one.
        meter_provider: The provider of the meter; None: the global one.

    Returns:
        The instrumentation. It ends with the Fleet; closing it earlier ends it for runs that are submitted later.

    Raises:
        UsageError: The Fleet is instrumented already, or ``opentelemetry-api`` is not installed.
    """
    context = context_of(fleet)
    if context.fleet.instrumentation is not None:
        raise UsageError("this Fleet is instrumented already: close its instrumentation first")
    try:
        instrumentation = Instrumentation(fleet, tracer_provider, meter_provider)
    except ImportError as error:
        raise UsageError(f"opentelemetry-api cannot be imported ({error}): pip install 'mlfleet[otel]'") from error
    context.fleet.instrumentation = instrumentation
    return instrumentation


class Instrumentation:
    """The instrumentation of a Fleet, made by `instrument`. It can be used as ``with instrument(fleet): …``."""

    def __init__(
        self, fleet: Fleet, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None
    ) -> None:
        from opentelemetry import metrics, trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._context = context_of(fleet)
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._tracer = trace.get_tracer("mlfleet", __version__, tracer_provider)
        meter = metrics.get_meter("mlfleet", __version__, meter_provider)
        self._active = meter.create_up_down_counter(
            "mlfleet.run.active", unit="{run}", description="Runs that have not ended, by stage."
        )
        self._ended = meter.create_counter("mlfleet.run.ended", unit="{run}", description="Runs that have ended.")
        self._queue_time = meter.create_histogram(
            "mlfleet.run.queue.duration", unit="s", description="Time from the MLflow run to its slot in the Fleet."
        )
        self._run_time = meter.create_histogram(
            "mlfleet.run.duration", unit="s", description="Time from the start of the command to its end."
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the environment variables that a run may get."""
        return tuple(sorted(name.upper() for name in self._propagator.fields))

    def observe(self, supervisor: Supervisor) -> _RunObserver:
        """Observe a run, for the Fleet."""
        return _RunObserver(self, supervisor)

    def close(self) -> None:
        """End the instrumentation for runs that are submitted later. Those that are active are observed to their end.

        Closing it again has no effect.
        """
        if self._context.fleet.instrumentation is self:
            self._context.fleet.instrumentation = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def _errors_logged() -> Iterator[None]:
    """Log an error instead of raising it: those of a program's exporters must not reach its runs."""
    try:
        yield
    except Exception:
        logger.exception("a run could not be traced")


class _RunObserver:
    """The spans and figures of one run.

    Args:
        shared: The tracer and the instruments.
        supervisor: The supervisor of the run, which is about to begin.
    """

    def __init__(self, shared: Instrumentation, supervisor: Supervisor) -> None:
        self.variables: Mapping[str, str] = {}
        self._shared = shared
        self._supervisor = supervisor
        self._span: Span | None = None
        self._stage_span: Span | None = None
        self._stage: Stage | None = None
        self._times: dict[Stage, float] = {}
        self._counted: dict[str, str] | None = None
        with _errors_logged():
            self._begin()

    def _begin(self) -> None:
        shared = self._shared
        self._span = shared._tracer.start_span("mlfleet.run", attributes=self._description())
        carrier: dict[str, str] = {}
        shared._propagator.inject(carrier, shared._trace.set_span_in_context(self._span))
        self.variables = {name.upper(): text for name, text in carrier.items()}

    def follow(self, event: RunEvent) -> None:
        """Begin the span of a stage when the run comes to it."""
        with _errors_logged():
            if event.stage is Stage.FINISHED:
                self._finish(event.time)
            elif event.stage in _STAGES and event.stage is not self._stage and self._span is not None:
                self._enter(self._span, event.stage, event.time)

    def end(self) -> None:
        """End the spans of a run that ends without an event: it was never created, or goes on elsewhere."""
        with _errors_logged():
            self._finish(time.time())

    def _enter(self, span: Span, stage: Stage, now: float) -> None:
        shared = self._shared
        self._leave(now)
        self._stage = stage
        self._times[stage] = now
        self._counted = {**self._place(), "mlfleet.stage": _STAGES[stage]}
        shared._active.add(1, self._counted)
        if stage is Stage.PREPARING:
            shared._queue_time.record(now - self._times[Stage.QUEUED], self._place())
        self._stage_span = shared._tracer.start_span(
            f"mlfleet.run.{_STAGES[stage]}",
            shared._trace.set_span_in_context(span),
            start_time=_nanoseconds(now),
        )

    def _leave(self, now: float, outcome: Outcome | None = None) -> None:
        """End the span of the present stage, and no longer count the run in it."""
        if self._counted is not None:
            self._shared._active.add(-1, self._counted)
            self._counted = None
        if self._stage_span is not None:
            self._set_failure(self._stage_span, outcome)
            self._stage_span.end(_nanoseconds(now))
            self._stage_span = None

    def _finish(self, now: float) -> None:
        span, self._span = self._span, None
        if span is None:
            return
        outcome = self._supervisor.outcome
        self._leave(now, outcome)
        # A process that follows a detached run may end before the run does.
        status = RunStatus.RUNNING if outcome is None else outcome.status
        span.set_attributes({**self._description(), "mlfleet.run.status": status.value})
        if outcome is not None and outcome.exit_code is not None:
            span.set_attribute("process.exit.code", outcome.exit_code)
        self._set_failure(span, outcome)
        span.end(_nanoseconds(now))
        if outcome is None or self._stage is None:
            return
        result = {**self._place(), "mlfleet.run.status": status.value, **_failure(outcome)}
        self._shared._ended.add(1, result)
        # The times of a run that was attached to are not known.
        if Stage.STARTED in self._times and Stage.PREPARING in self._times:
            self._shared._run_time.record(now - self._times[Stage.STARTED], result)

    def _set_failure(self, span: Span, outcome: Outcome | None) -> None:
        if outcome is not None and outcome.status is RunStatus.FAILED:
            span.set_attributes(_failure(outcome))
            span.set_status(self._shared._trace.StatusCode.ERROR, clean_reason(outcome.reason or ""))

    def _place(self) -> dict[str, str]:
        """Return the attributes that spans and metrics have."""
        description = self._supervisor.description
        group = {} if description.group is None else {"mlfleet.group": description.group}
        return {"mlfleet.backend": description.backend, **group}

    def _description(self) -> dict[str, str | int]:
        description, info = self._supervisor.description, self._supervisor.info
        found: dict[str, str | int] = {
            **self._place(),
            "mlfleet.project.name": mask_uri(description.project_name),
            "mlfleet.entry_point": description.entry_point,
        }
        if info is not None:
            found |= {"mlfleet.run.id": info.run_id, "mlfleet.run.name": info.name}
        if (member := description.member) is not None:
            found |= {
                "mlfleet.sweep.id": member.sweep_id,
                "mlfleet.sweep.index": member.index,
                "mlfleet.sweep.attempt": member.attempt,
            }
        return found


def _failure(outcome: Outcome) -> dict[str, str]:
    return {} if outcome.kind is None else {"error.type": outcome.kind.value}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)

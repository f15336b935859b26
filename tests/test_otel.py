"""Traces and metrics of runs, seen by the exporters of OpenTelemetry's own SDK."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from components.fake_kubernetes import FakeCluster
from components.projects import write_project
from mlfleet import Fleet, FleetRun, RunStatus, Timeouts, TrackingError, UsageError, grid
from mlfleet.otel import instrument
from mlfleet.testing import FakeTracking

LOCAL: dict[str, Any] = {"env_manager": "local"}
SHOW = "echo ${TRACEPARENT:-none}"


class Telemetry:
    """The SDK of a program, whose exporters keep everything in memory."""

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self.meters = MeterProvider([self._reader])

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self._spans.get_finished_spans()}

    @property
    def runs(self) -> list[ReadableSpan]:
        return [span for span in self._spans.get_finished_spans() if span.name == "mlfleet.run"]

    def metrics(self) -> dict[str, list[Any]]:
        """The points of each metric."""
        data = self._reader.get_metrics_data()
        assert data is not None
        [resource] = data.resource_metrics
        return {metric.name: list(metric.data.data_points) for metric in resource.scope_metrics[0].metrics}

    def in_flight(self) -> int:
        return sum(point.value for point in self.metrics()["mlfleet.run.active"])


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    telemetry = Telemetry()
    yield telemetry
    telemetry.tracers.shutdown()
    telemetry.meters.shutdown()


@pytest.fixture
def tracking() -> FakeTracking:
    return FakeTracking()


@pytest.fixture
async def fleet(tracking: FakeTracking, telemetry: Telemetry) -> AsyncIterator[Fleet]:
    async with Fleet(tracking=tracking, timeouts=Timeouts(cancel_grace=0.5)) as fleet:
        instrument(fleet, tracer_provider=telemetry.tracers, meter_provider=telemetry.meters)
        yield fleet


async def output(run: FleetRun) -> list[str]:
    return [line async for line in run.logs()]


async def test_a_run_is_a_span_between_that_of_its_caller_and_those_of_its_command(
    fleet: Fleet, telemetry: Telemetry, tmp_path: Path
) -> None:
    uri = write_project(tmp_path / "demo", SHOW)
    with telemetry.tracers.get_tracer("service").start_as_current_span("POST /runs") as request:
        run = await fleet.submit(uri, **LOCAL)
    [line] = await output(run)
    span = telemetry.spans["mlfleet.run"]
    assert span.context is not None
    context = span.context
    assert line == f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    assert span.parent == request.get_span_context()
    assert span.attributes == {
        "mlfleet.run.id": run.run_id,
        "mlfleet.run.name": run.info.name,
        "mlfleet.run.status": "FINISHED",
        "mlfleet.backend": "local",
        "mlfleet.project.name": "demo",
        "mlfleet.entry_point": "main",
        "process.exit.code": 0,
    }
    assert span.status.status_code is StatusCode.UNSET
    stages = [telemetry.spans[f"mlfleet.run.{name}"] for name in ("queued", "preparing", "starting", "running")]
    assert [stage.parent for stage in stages] == [span.context] * 4
    times = [span.start_time, *(stage.start_time for stage in stages), span.end_time]
    assert times == sorted(time for time in times if time is not None)
    assert [stage.end_time for stage in stages] == [*(stage.start_time for stage in stages[1:]), span.end_time]


async def test_runs_are_counted_by_stage_and_by_the_way_they_ended(
    fleet: Fleet, telemetry: Telemetry, tmp_path: Path
) -> None:
    uri = write_project(tmp_path / "demo", "echo begun; {then}", parameters="then: string")
    good = await fleet.submit(uri, parameters={"then": "true"}, **LOCAL)
    bad = await fleet.submit(write_project(tmp_path / "bad", "exit 7"), **LOCAL)
    await good.wait()
    await bad.wait()
    assert telemetry.in_flight() == 0
    endless = await fleet.submit(write_project(tmp_path / "endless", "echo begun; sleep 600"), **LOCAL)
    assert await anext(endless.logs()) == "begun"
    [running] = [point for point in telemetry.metrics()["mlfleet.run.active"] if point.value]
    assert running.value == 1
    assert dict(running.attributes) == {"mlfleet.backend": "local", "mlfleet.stage": "running"}
    await endless.cancel()
    metrics = telemetry.metrics()
    assert {tuple(sorted(point.attributes.items())): point.value for point in metrics["mlfleet.run.ended"]} == {
        (("mlfleet.backend", "local"), ("mlfleet.run.status", "FINISHED")): 1,
        (("error.type", "failure"), ("mlfleet.backend", "local"), ("mlfleet.run.status", "FAILED")): 1,
        (("mlfleet.backend", "local"), ("mlfleet.run.status", "KILLED")): 1,
    }
    assert sum(point.count for point in metrics["mlfleet.run.duration"]) == 3
    assert [point.count for point in metrics["mlfleet.run.queue.duration"]] == [3]
    assert telemetry.in_flight() == 0


async def test_a_failure_sets_the_status_of_the_run_and_its_stage_without_secrets(
    fleet: Fleet, tracking: FakeTracking, telemetry: Telemetry, tmp_path: Path
) -> None:
    run = await fleet.submit(write_project(tmp_path / "demo", "exit 3"), group="tenant", **LOCAL)
    await run.wait()
    for name in ("mlfleet.run", "mlfleet.run.running"):
        span = telemetry.spans[name]
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == (await run.outcome()).reason
        assert span.attributes is not None
        assert span.attributes["error.type"] == "failure"
    [ended] = telemetry.metrics()["mlfleet.run.ended"]
    assert ended.attributes["mlfleet.group"] == "tenant"
    assert telemetry.spans["mlfleet.run.starting"].status.status_code is StatusCode.UNSET

    def refuse(method: str) -> Exception | None:
        return TrackingError("no rights with the-long-secret at https://me:word@host/") if method == "log" else None

    tracking.fail = refuse
    run = await fleet.submit(
        write_project(tmp_path / "demo", "echo {a}", parameters="a: string"),
        parameters={"a": 1},
        env={"KEY": "the-long-secret"},
        **LOCAL,
    )
    await run.wait()
    failed = telemetry.spans["mlfleet.run"]
    assert failed.status.description == "no rights with *** at https://***@host/"
    assert failed.attributes is not None
    assert failed.attributes["error.type"] == "infrastructure"
    assert not failed.events


async def test_a_run_that_could_not_be_created_is_an_error_in_the_trace_of_its_caller(
    fleet: Fleet, tracking: FakeTracking, telemetry: Telemetry, tmp_path: Path
) -> None:
    tracking.fail = lambda method: TrackingError("no rights") if method == "create_run" else None
    with pytest.raises(TrackingError):
        await fleet.submit(write_project(tmp_path / "demo", SHOW), **LOCAL)
    [span] = telemetry.runs
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "no rights")


async def test_runs_of_a_sweep_have_its_id_and_their_place_in_it(
    fleet: Fleet, telemetry: Telemetry, tmp_path: Path
) -> None:
    uri = write_project(tmp_path / "demo", "echo {a}", parameters="a: int")
    async with fleet.sweep(uri, grid(a=[1, 2]), **LOCAL) as sweep:
        results = [result async for result in sweep]
    found = {
        (span.attributes["mlfleet.run.id"], span.attributes["mlfleet.sweep.index"], span.attributes["mlfleet.sweep.id"])
        for span in telemetry.runs
        if span.attributes is not None
    }
    assert found == {(result.run_id, result.index, sweep.run_id) for result in results}


async def test_a_variable_of_the_caller_counts_more_and_without_a_trace_there_is_none(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = write_project(tmp_path / "demo", SHOW)
    assert await output(await fleet.submit(uri, env={"TRACEPARENT": "mine"}, **LOCAL)) == ["mine"]
    async with Fleet(tracking=tracking) as other:  # the API without an SDK
        with instrument(other):
            assert await output(await other.submit(uri, **LOCAL)) == ["none"]


async def test_containers_and_jobs_of_a_cluster_get_it_too(
    fleet: Fleet, telemetry: Telemetry, shell_image: str, fake_cluster: FakeCluster, tmp_path: Path
) -> None:
    uri = write_project(tmp_path / "demo", SHOW, extra=f"docker_env: {{image: '{shell_image}'}}\n")
    in_container = await fleet.submit(uri)
    [line] = await output(in_container)
    config: dict[str, Any] = {"code-delivery": "none", "tracking-uri": "http://mlflow:5000"}
    in_job = await fleet.submit(uri, backend="kubernetes", backend_config=config)
    await in_job.wait()
    [job] = [each for (kind, *_), each in fake_cluster.api.objects.items() if kind == "jobs"]
    [container] = job["spec"]["template"]["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    for run, parent in ((in_container, line), (in_job, variables["TRACEPARENT"])):
        [span] = [each for each in telemetry.runs if (each.attributes or {})["mlfleet.run.id"] == run.run_id]
        assert span.context is not None
        assert parent.split("-")[2] == f"{span.context.span_id:016x}"
    own = {"name": "main", "env": [{"name": "TRACEPARENT", "value": "x"}]}
    template = {"spec": {"template": {"spec": {"containers": [own]}}}}
    with pytest.raises(UsageError, match="template sets TRACEPARENT, which the run sets too"):
        await fleet.submit(uri, backend="kubernetes", backend_config={**config, "job-template": template})


async def test_closing_it_ends_it_for_later_runs_only(fleet: Fleet, telemetry: Telemetry, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="instrumented already"):
        instrument(fleet)
    async with Fleet(tracking=FakeTracking()) as other:
        with instrument(other, tracer_provider=telemetry.tracers, meter_provider=telemetry.meters) as instrumentation:
            uri = write_project(tmp_path / "demo", f"while [ ! -e ../go ]; do sleep 0.05; done; {SHOW}")
            traced = await other.submit(uri, **LOCAL)
        instrumentation.close()
        plain = await other.submit(uri, **LOCAL)
        (tmp_path / "go").touch()
        assert await output(plain) == ["none"]
        assert await traced.wait()
    [span] = telemetry.runs
    assert span.attributes is not None
    assert span.attributes["mlfleet.run.id"] == traced.run_id


async def test_errors_of_a_processor_of_spans_do_not_reach_the_run(
    tracking: FakeTracking, telemetry: Telemetry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(SpanProcessor):
        def on_start(self, span: Span, parent_context: object = None) -> None:
            raise RuntimeError("the processor is broken")

    telemetry.tracers.add_span_processor(Broken())
    async with Fleet(tracking=tracking) as fleet:
        instrument(fleet, tracer_provider=telemetry.tracers, meter_provider=telemetry.meters)
        run = await fleet.submit(write_project(tmp_path / "demo", SHOW), **LOCAL)
        assert await run.wait()
        assert await run.get_status() is RunStatus.FINISHED
    assert "the processor is broken" in caplog.text


def test_without_the_api_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(UsageError, match=r"pip install 'mlfleet\[otel\]'"):
        instrument(Fleet(tracking=FakeTracking()))

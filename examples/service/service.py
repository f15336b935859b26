"""A web service that runs projects, with any number of workers: see README.md beside this file."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

import mlfleet
from mlfleet.asgi import lifespan

PROJECTS: dict[str, dict[str, Any]] = {"quickstart": {"uri": Path(__file__).parents[1] / "quickstart"}}
"""What callers may run: a name, and what the service itself decides, as arguments of `Fleet.submit`."""

FIELDS = {"project": str, "parameters": dict, "tenant": str}
"""What callers may send, and its type."""


def create_app(projects: Mapping[str, Mapping[str, Any]], **options: Any) -> Starlette:
    """Return the application.

    Args:
        projects: The projects that callers may run, as in `PROJECTS`.
        options: The options of the Fleet of each worker.
    """
    app = Starlette(
        routes=[
            Route("/runs", create_run, methods=["POST"]),
            Route("/runs/{run_id}", show_run, methods=["GET"]),
            Route("/runs/{run_id}", cancel_run, methods=["DELETE"]),
            Route("/runs/{run_id}/logs", stream_logs),
            Route("/events", stream_events),
        ],
        lifespan=lifespan(inherit_env=False, **options),  # the service's own secrets stay its own
        exception_handlers={HTTPException: show_http_error, mlfleet.MlfleetError: show_mlfleet_error},
    )
    app.state.projects = projects
    return app


# ---- runs -----------------------------------------------------------------------------------------------------------


async def create_run(request: Request) -> Response:
    body = await read_body(request)
    projects = request.app.state.projects
    if body.get("project") not in projects:
        raise HTTPException(404, f"there is no project {body.get('project')!r}: give one of {', '.join(projects)}")
    run = await request.state.fleet.submit(
        **projects[body["project"]],
        parameters=body.get("parameters"),
        group=body.get("tenant"),
    )
    return JSONResponse(
        {"run_id": run.run_id, "status": await run.get_status()}, 201, {"Location": f"/runs/{run.run_id}"}
    )


async def show_run(request: Request) -> Response:
    run = await request.state.fleet.get(request.path_params["run_id"])
    return JSONResponse({"run_id": run.run_id, "status": await run.get_status()})


async def cancel_run(request: Request) -> Response:
    run = await request.state.fleet.get(request.path_params["run_id"])
    await run.cancel()
    return JSONResponse({"run_id": run.run_id, "status": await run.get_status()})


async def read_body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise HTTPException(400, "the body is not a JSON object")
    for name, value in body.items():
        if not isinstance(value, FIELDS.get(name, ())):
            raise HTTPException(400, f"{name!r} is unknown or of a wrong type: give {', '.join(FIELDS)}")
    return body


# ---- errors ---------------------------------------------------------------------------------------------------------


async def show_http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def show_mlfleet_error(request: Request, error: mlfleet.MlfleetError) -> Response:
    """Say who can do something about an error: the caller (4xx), or those who run the service (5xx)."""
    headers = {}
    match error:
        case mlfleet.FleetFull():
            status, headers = 503, {"Retry-After": "5"}
        case mlfleet.TrackingError(code="RESOURCE_DOES_NOT_EXIST"):
            status = 404
        case mlfleet.TrackingError(code="INVALID_PARAMETER_VALUE") | mlfleet.UsageError() | mlfleet.ParameterError():
            status = 400
        case _:
            status = 502
    return JSONResponse({"error": str(error)}, status, headers)


# ---- streams --------------------------------------------------------------------------------------------------------


async def stream_logs(request: Request) -> Response:
    run = await request.state.fleet.get(request.path_params["run_id"])
    last = request.headers.get("Last-Event-ID", "0")
    if last == "end":
        return Response(status_code=204)  # which ends the reconnecting of a browser
    try:
        start = int(last)
    except ValueError:
        raise HTTPException(400, "Last-Event-ID is not a number") from None

    async def lines() -> AsyncGenerator[str, None]:
        try:
            async with aclosing(run.logs(start=start)) as logs:
                async for line in logs:
                    yield server_sent(line, id=line.end)
            yield server_sent(await run.get_status(), id="end", event="end")
        except mlfleet.MlfleetError as error:  # the answer has begun: it is too late for a status
            yield server_sent(str(error), event="problem")

    return EventStream(lines())


async def stream_events(request: Request) -> Response:
    subscription = request.state.fleet.events(buffer=1000)  # from now on, not from the first read

    async def events() -> AsyncGenerator[str, None]:
        async for event in subscription:
            yield server_sent(json.dumps(asdict(event)), event=event.stage)

    return EventStream(events())


def server_sent(data: str, **fields: object) -> str:
    """Return one event in the text of server-sent events."""
    head = "".join(f"{name}: {value}\n" for name, value in fields.items())
    return head + "".join(f"data: {line}\n" for line in data.split("\n")) + "\n"


class EventStream(StreamingResponse):
    """Server-sent events, with a comment now and then: proxies close a connection on which nothing comes."""

    media_type = "text/event-stream"
    pause = 15.0  # seconds, as the standard advises

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.events = events

    async def stream_response(self, send: Send) -> None:
        # Leaving by a cancellation, as when the client has gone, closes what the events are read from.
        async with aclosing(self.events), anyio.create_task_group() as group:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            group.start_soon(self.send_comments, send)
            async for event in self.events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            group.cancel_scope.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send_comments(self, send: Send) -> None:
        while True:
            await anyio.sleep(self.pause)
            await send({"type": "http.response.body", "body": b": still there\n\n", "more_body": True})


app = create_app(
    PROJECTS,
    max_queued=1000,  # for each worker; what is more is told to come again (503)
    timeouts=mlfleet.Timeouts(setup=600, run=86_400, cancel_grace=5),
)

"""Reading the states of many runs at once: by few requests, and yet each as if it were alone."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Sequence

import httpx
import pytest

from components.mlflow_server import MlflowServer
from fakes.flaky_proxy import Answer, FlakyProxy, Forward, Request
from mlfleet.errors import TrackingError
from mlfleet.runs import RunStatus
from mlfleet.tracking import RestTracking, RunInfo
from mlfleet.tracking.ending import end_run


@pytest.fixture
async def tracking(proxy: FlakyProxy) -> AsyncIterator[RestTracking]:
    """One request at a time: of reads that begin together, the first goes alone and all others wait."""
    async with RestTracking(proxy.url, timeout=20, max_in_flight=1) as opened:
        yield opened


async def create(tracking: RestTracking, count: int) -> list[str]:
    """Runs with a tag that tells them apart."""
    experiment = await tracking.experiment_id("reads")
    runs = [await tracking.create_run(experiment, name=None, tags={"n": str(n)}) for n in range(count)]
    return [run.run_id for run in runs]


async def read(tracking: RestTracking, ids: Sequence[str], *, retry_for: float | None = None) -> list[RunInfo]:
    return await asyncio.gather(*(tracking.get_run(run_id, retry_for=retry_for) for run_id in ids))


def check(ids: Sequence[str], seen: Sequence[RunInfo]) -> None:
    """Everybody has got the run that was asked for."""
    assert [(info.run_id, info.tags["n"]) for info in seen] == [(run_id, str(n)) for n, run_id in enumerate(ids)]


async def test_the_end_of_a_fan_out_is_few_requests_and_each_run_gets_its_own_truth(
    proxy: FlakyProxy, mlflow_server: MlflowServer
) -> None:
    async with RestTracking(proxy.url) as tracking, httpx.AsyncClient(base_url=mlflow_server.url) as code:
        first, second = [await tracking.experiment_id(f"reads of {proxy.url} {n}") for n in range(2)]
        made = [await tracking.create_run((first, second)[n % 2], name=f"r{n}", tags={}) for n in range(40)]
        for n, run in enumerate(made):
            for key, metric in (("n", n), ("odd", "NaN" if n % 2 else 0.5)):
                body = {"run_id": run.run_id, "key": key, "value": metric, "timestamp": 1}
                (await code.post("/api/2.0/mlflow/runs/log-metric", json=body)).raise_for_status()
            if n % 5 == 0:  # its own code says that it has failed, and exits with 0
                body = {"run_id": run.run_id, "status": "FAILED", "end_time": 1}
                (await code.post("/api/2.0/mlflow/runs/update", json=body)).raise_for_status()
        ended = await asyncio.gather(*(end_run(tracking, run.run_id, RunStatus.FINISHED, patience=20) for run in made))
        # The first seven have turns at once.
        assert proxy.count("runs/get?") + proxy.count("runs/search") < 15
        for n, (run, info) in enumerate(zip(made, ended, strict=True)):
            own = n % 5 == 0
            assert (info.run_id, info.name, info.experiment_id) == (run.run_id, f"r{n}", run.experiment_id)
            assert (info.metrics["n"], math.isnan(info.metrics["odd"])) == (n, bool(n % 2))
            assert info.status is (RunStatus.FAILED if own else RunStatus.RUNNING)
            assert (await tracking.get_run(run.run_id)).status is (RunStatus.FAILED if own else RunStatus.FINISHED)


async def test_who_waits_is_asked_for_together(tracking: RestTracking, proxy: FlakyProxy) -> None:
    ids = await create(tracking, 12)
    check(ids, await read(tracking, ids))
    assert (proxy.count("runs/get?"), proxy.count("runs/search")) == (1, 1)


async def test_what_is_read_together_is_what_reading_alone_tells(tracking: RestTracking) -> None:
    ids = await create(tracking, 3)
    await tracking.log(ids[2], params={"a": "1"}, tags={"b": "2"})
    together = (await read(tracking, ids))[2]
    assert together == await tracking.get_run(ids[2])


async def test_several_who_ask_for_the_same_run_all_get_it(tracking: RestTracking) -> None:
    (run_id,) = await create(tracking, 1)
    assert {info.run_id for info in await read(tracking, [run_id] * 5)} == {run_id}


async def test_who_need_not_wait_is_asked_for_alone(tracking: RestTracking, proxy: FlakyProxy) -> None:
    ids = await create(tracking, 3)
    check(ids, [await tracking.get_run(run_id) for run_id in ids])
    assert proxy.count("runs/search") == 0


async def test_runs_that_are_not_known_yet_are_asked_for_alone(tracking: RestTracking, proxy: FlakyProxy) -> None:
    ids = await create(tracking, 5)
    async with RestTracking(proxy.url, max_in_flight=1) as other:
        check(ids, await read(other, ids))
        assert (proxy.count("runs/get?"), proxy.count("runs/search")) == (5, 0)
        check(ids, await read(other, ids))
        assert (proxy.count("runs/get?"), proxy.count("runs/search")) == (6, 1)


async def test_runs_that_have_ended_are_forgotten(tracking: RestTracking, proxy: FlakyProxy) -> None:
    ids = await create(tracking, 5)
    for run_id in ids:
        await tracking.update_run(run_id, RunStatus.FINISHED)
    check(ids, await read(tracking, ids))
    check(ids, await read(tracking, ids))
    assert proxy.count("runs/search") == 0


async def test_more_than_one_request_can_take(tracking: RestTracking, proxy: FlakyProxy) -> None:
    ids = await create(tracking, 130)
    check(ids, await read(tracking, ids))
    assert (proxy.count("runs/get?"), proxy.count("runs/search")) == (1, 2)


async def test_databricks_is_asked_for_each_run(proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABRICKS_HOST", proxy.url)
    monkeypatch.setenv("DATABRICKS_TOKEN", "token")
    async with RestTracking("databricks", max_in_flight=1) as tracking:
        ids = await create(tracking, 5)
        check(ids, await read(tracking, ids))
    assert (proxy.count("runs/get?"), proxy.count("runs/search")) == (5, 0)


class Held:
    """The first search is not answered; `arrived` tells that it is there."""

    def __init__(self, proxy: FlakyProxy) -> None:
        self.arrived = asyncio.Event()
        self.go_on = asyncio.Event()
        proxy.rule = self._rule

    async def _rule(self, request: Request, forward: Forward) -> Answer | None:
        if "runs/search" in request.target and not self.arrived.is_set():
            self.arrived.set()
            await self.go_on.wait()
        return await forward()


async def held_reads(tracking: RestTracking, proxy: FlakyProxy) -> tuple[Held, list[str], list[asyncio.Task[RunInfo]]]:
    """Ten reads that have begun: the first went alone, and the next asks for all others."""
    ids = await create(tracking, 10)
    held = Held(proxy)
    reads = [asyncio.create_task(tracking.get_run(run_id)) for run_id in ids]
    await held.arrived.wait()
    return held, ids, reads


async def test_when_the_one_who_asks_is_cancelled_the_others_get_their_answers(
    tracking: RestTracking, proxy: FlakyProxy
) -> None:
    _, ids, reads = await held_reads(tracking, proxy)
    reads[1].cancel()  # the first went alone, and the next asks for all others
    seen = await asyncio.gather(*reads, return_exceptions=True)
    assert isinstance(seen.pop(1), asyncio.CancelledError)
    assert [info.run_id for info in seen if isinstance(info, RunInfo)] == [ids[0], *ids[2:]]
    assert proxy.count("runs/search") == 2


async def test_when_one_of_those_who_are_asked_for_is_cancelled_nobody_else_notices(
    tracking: RestTracking, proxy: FlakyProxy
) -> None:
    held, ids, reads = await held_reads(tracking, proxy)
    reads[5].cancel()
    await asyncio.wait([reads[5]])  # at once, not with the answer
    held.go_on.set()
    seen = await asyncio.gather(*reads, return_exceptions=True)
    assert isinstance(seen.pop(5), asyncio.CancelledError)
    assert [info.run_id for info in seen if isinstance(info, RunInfo)] == ids[:5] + ids[6:]
    assert (await tracking.get_run(ids[5])).run_id == ids[5]  # no turn was lost
    assert proxy.count("runs/search") == 1


async def test_when_all_are_cancelled_nothing_is_left(tracking: RestTracking, proxy: FlakyProxy) -> None:
    _, ids, reads = await held_reads(tracking, proxy)
    for task in reads[1:]:
        task.cancel()
    await asyncio.wait(reads)
    assert all(task.cancelled() for task in reads[1:])
    assert (await tracking.get_run(ids[5])).run_id == ids[5]


@pytest.mark.parametrize("failure", [None, Answer(503), Answer(429), Answer(200, b'{"runs": []}', sent=5)])
async def test_a_request_that_breaks_is_a_failure_of_the_one_who_asks_only(
    tracking: RestTracking, proxy: FlakyProxy, failure: Answer | None
) -> None:
    ids = await create(tracking, 10)

    async def break_once(request: Request, forward: Forward) -> Answer | None:
        if "runs/search" in request.target and proxy.count("runs/search") == 1:
            return failure
        return await forward()

    proxy.rule = break_once
    reads = [asyncio.create_task(tracking.get_run(run_id, retry_for=0)) for run_id in ids]
    seen = await asyncio.gather(*reads, return_exceptions=True)
    assert isinstance(seen.pop(1), TrackingError)  # which has no patience
    assert [info.run_id for info in seen if isinstance(info, RunInfo)] == [ids[0], *ids[2:]]


async def test_the_one_whose_request_broke_asks_again(tracking: RestTracking, proxy: FlakyProxy) -> None:
    ids = await create(tracking, 10)

    async def never_search(request: Request, forward: Forward) -> Answer | None:
        return None if "runs/search" in request.target else await forward()

    proxy.rule = never_search
    check(ids, await read(tracking, ids))
    assert proxy.count("runs/search") == 1, "it is not the search that they wait for a second time"


async def test_a_run_that_the_search_does_not_give_is_asked_for_alone(
    tracking: RestTracking, proxy: FlakyProxy
) -> None:
    ids = await create(tracking, 6)
    gone = json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "it is gone"}).encode()

    async def give_half(request: Request, forward: Forward) -> Answer | None:
        answer = await forward()
        if "runs/search" in request.target:
            runs = [run for run in json.loads(answer.body)["runs"] if run["info"]["run_id"] not in (ids[1], *ids[4:])]
            return Answer(200, json.dumps({"runs": runs}).encode())
        return Answer(404, gone) if ids[5] in request.target else answer

    proxy.rule = give_half
    reads = [asyncio.create_task(tracking.get_run(run_id)) for run_id in ids]
    *seen, error = await asyncio.gather(*reads, return_exceptions=True)
    check(ids[:5], [info for info in seen if isinstance(info, RunInfo)])
    assert isinstance(error, TrackingError)
    assert error.code == "RESOURCE_DOES_NOT_EXIST"
    assert "answered runs/get with 404: RESOURCE_DOES_NOT_EXIST it is gone" in str(error)
    assert (proxy.count("runs/get?"), proxy.count("runs/search")) == (4, 1)


@pytest.mark.parametrize("status", [400, 501])
async def test_a_server_that_refuses_the_search_is_asked_for_each_run_from_then_on(
    tracking: RestTracking, proxy: FlakyProxy, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    ids = await create(tracking, 6)

    async def refuse(request: Request, forward: Forward) -> Answer | None:
        if "runs/search" in request.target:
            told = {"error_code": "INVALID_PARAMETER_VALUE", "message": "Invalid attribute key 'run_id' specified"}
            return Answer(status, json.dumps(told).encode())
        return await forward()

    proxy.rule = refuse
    caplog.set_level("INFO")
    check(ids, await read(tracking, ids))
    check(ids, await read(tracking, ids))
    assert (proxy.count("runs/get?"), proxy.count("runs/search")) == (12, 1)
    assert not [record for record in caplog.records if record.name.startswith("mlfleet")]


@pytest.mark.parametrize("answer", [Answer(403), Answer(200, b"<!doctype html><title>Log in</title>")])
async def test_who_may_not_search_reads_all_the_same(tracking: RestTracking, proxy: FlakyProxy, answer: Answer) -> None:
    ids = await create(tracking, 6)

    async def forbid(request: Request, forward: Forward) -> Answer | None:
        return answer if "runs/search" in request.target else await forward()

    proxy.rule = forbid
    check(ids, await read(tracking, ids))


async def test_a_server_that_searches_slowly_is_asked_for_each_run(tracking: RestTracking, proxy: FlakyProxy) -> None:
    ids = await create(tracking, 10)

    async def look_through_all_runs(request: Request, forward: Forward) -> Answer | None:
        if "runs/search" in request.target:
            await asyncio.sleep(3)  # as one does that keeps thousands of runs in files
        return await forward()

    proxy.rule = look_through_all_runs
    for _ in range(3):
        check(ids, await read(tracking, ids))
    assert (proxy.count("runs/get?"), proxy.count("runs/search")) == (21, 1)


async def test_a_server_that_searched_slowly_once_gets_another_chance(
    tracking: RestTracking, proxy: FlakyProxy
) -> None:
    ids = await create(tracking, 10)

    async def stumble(request: Request, forward: Forward) -> Answer | None:
        if proxy.count("runs/search") == 0:
            await asyncio.sleep(0.1)  # far away at first
        elif "runs/search" in request.target and proxy.count("runs/search") == 1:
            await asyncio.sleep(2)
        return await forward()

    proxy.rule = stumble
    while proxy.count("runs/search") < 2:
        check(ids, await read(tracking, ids))


@pytest.mark.timeout(180)  # the server may have to be installed and started
@pytest.mark.parametrize(
    ("name", "requests"),
    [
        ("oldest_mlflow_server", (12, 1)),  # which refuses the search
        ("mlflow_server_with_auth", (1, 1)),
        ("mlflow_server_with_workspaces", (1, 1)),
    ],
)
async def test_other_servers(
    name: str,
    requests: tuple[int, int],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = request.getfixturevalue(name)
    for variable, text in server.environ.items():
        monkeypatch.setenv(variable, text)
    async with FlakyProxy(server.url).listen() as proxy:
        async with RestTracking(proxy.url, max_in_flight=1) as tracking:
            ids = await create(tracking, 12)
            check(ids, await read(tracking, ids))
        assert (proxy.count("runs/get?"), proxy.count("runs/search")) == requests
    assert not caplog.records

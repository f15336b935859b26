"""Tracking on a real MLflow server, directly and through a network that loses things."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import httpx
import pytest

from components.mlflow_server import MlflowServer
from fakes.flaky_proxy import Answer, FlakyProxy, Forward, Request
from mlfleet.errors import TrackingError
from mlfleet.runs import RunStatus
from mlfleet.tracking import Credentials, RestTracking, open_tracking


def new_name() -> str:
    return f"experiment {uuid.uuid4().hex[:8]}"


@pytest.fixture
async def tracking(mlflow_server: MlflowServer) -> AsyncIterator[RestTracking]:
    async with RestTracking(mlflow_server.url) as opened:
        yield opened


@pytest.fixture
async def through_proxy(proxy: FlakyProxy) -> AsyncIterator[RestTracking]:
    async with RestTracking(proxy.url, timeout=20) as opened:
        yield opened


async def test_a_run_from_its_creation_to_its_end(tracking: RestTracking) -> None:
    experiment = await tracking.experiment_id(new_name())
    run = await tracking.create_run(experiment, name="first", tags={"mlflow.user": "ada", "a": "b"}, start_time=1000)
    assert (run.name, run.status, run.tags["a"]) == ("first", RunStatus.RUNNING, "b")
    many = {f"p{number}": str(number) for number in range(250)}
    await tracking.log(run.run_id, params=many, tags={f"t{number}": "x" for number in range(120)})
    await tracking.update_run(run.run_id, RunStatus.FINISHED, end_time=2000)

    seen = await tracking.get_run(run.run_id)
    assert seen.status is RunStatus.FINISHED
    assert seen.params == many
    assert {"t0", "t119", "a"} <= set(seen.tags)


async def test_a_run_without_a_name_gets_one_from_the_server(tracking: RestTracking) -> None:
    run = await tracking.create_run("0", name=None, tags={})
    assert run.name


async def test_search_goes_through_all_pages_and_stops_at_the_limit(tracking: RestTracking) -> None:
    experiment = await tracking.experiment_id(new_name())
    made = [
        (await tracking.create_run(experiment, name=None, tags={"n": str(n)}, start_time=n)).run_id for n in range(5)
    ]
    assert [run.run_id for run in await tracking.search_runs([experiment])] == made[::-1]
    assert [run.run_id for run in await tracking.search_runs([experiment], "tags.n = '3'")] == [made[3]]
    assert len(await tracking.search_runs([experiment], max_results=2)) == 2


async def test_many_ask_for_one_new_experiment_at_once_and_all_get_it(mlflow_server: MlflowServer) -> None:
    name = new_name()
    async with RestTracking(mlflow_server.url) as one, RestTracking(mlflow_server.url) as other:
        ids = await asyncio.gather(*(tracking.experiment_id(name) for tracking in (one, other) * 5))
    assert len(set(ids)) == 1


async def test_a_deleted_experiment_says_how_to_restore_it(tracking: RestTracking, mlflow_server: MlflowServer) -> None:
    name = new_name()
    experiment = await tracking.experiment_id(name)
    async with httpx.AsyncClient(base_url=mlflow_server.url) as client:
        await client.post("/api/2.0/mlflow/experiments/delete", json={"experiment_id": experiment})
    async with RestTracking(mlflow_server.url) as fresh:
        with pytest.raises(TrackingError, match=f"was deleted: restore it .mlflow experiments restore -x {experiment}"):
            await fresh.experiment_id(name)
    with pytest.raises(TrackingError, match="must be in the 'active' state"):
        await tracking.create_run(experiment, name=None, tags={})


async def test_an_unknown_run_is_named_in_the_error(tracking: RestTracking) -> None:
    with pytest.raises(TrackingError, match="Run with id=nope not found") as caught:
        await tracking.get_run("nope")
    assert (caught.value.status, caught.value.code) == (404, "RESOURCE_DOES_NOT_EXIST")


async def test_a_parameter_cannot_change_and_the_server_says_so(tracking: RestTracking) -> None:
    run = await tracking.create_run("0", name=None, tags={})
    await tracking.log(run.run_id, params={"alpha": "1"})
    await tracking.log(run.run_id, params={"alpha": "1"})
    with pytest.raises(TrackingError, match="Changing param values is not allowed"):
        await tracking.log(run.run_id, params={"alpha": "2"})


async def test_a_very_long_parameter_does_not_fail_the_run(tracking: RestTracking) -> None:
    run = await tracking.create_run("0", name=None, tags={})
    await tracking.log(run.run_id, params={"text": "x" * 20_000, "short": "y"}, tags={"note": "z" * 20_000})
    seen = await tracking.get_run(run.run_id)
    assert (len(seen.params["text"]), seen.params["short"]) == (6000, "y")


@pytest.mark.timeout(120)  # a real server makes some 50 runs in a second
async def test_hundreds_of_runs_at_once_do_not_flood_the_server(through_proxy: RestTracking, proxy: FlakyProxy) -> None:
    experiment = await through_proxy.experiment_id(new_name())
    before = len(proxy.requests)
    runs = await asyncio.gather(*(through_proxy.create_run(experiment, name=f"r{n}", tags={}) for n in range(300)))
    assert len({run.run_id for run in runs}) == 300
    assert len(proxy.requests) - before == 300
    assert proxy.peak <= 7


async def test_an_experiment_is_asked_for_once_for_all_runs(through_proxy: RestTracking, proxy: FlakyProxy) -> None:
    name = new_name()
    await asyncio.gather(*(through_proxy.experiment_id(name) for _ in range(50)))
    assert (proxy.count("get-by-name"), proxy.count("experiments/create")) == (1, 1)


async def test_a_run_whose_creation_was_not_answered_is_found_and_not_made_again(
    through_proxy: RestTracking, proxy: FlakyProxy
) -> None:
    experiment = await through_proxy.experiment_id(new_name())

    async def lose_the_answer(request: Request, forward: Forward) -> Answer | None:
        answer = await forward()
        return None if "runs/create" in request.target else answer

    proxy.rule = lose_the_answer
    run = await through_proxy.create_run(experiment, name="lost", tags={})
    proxy.rule = None
    assert [found.run_id for found in await through_proxy.search_runs([experiment])] == [run.run_id]
    assert proxy.count("runs/create") == 1


async def test_a_search_for_a_lost_run_that_fails_too_is_repeated(
    through_proxy: RestTracking, proxy: FlakyProxy
) -> None:
    experiment = await through_proxy.experiment_id(new_name())

    async def lose_much(request: Request, forward: Forward) -> Answer | None:
        answer = await forward()
        if "runs/create" in request.target:
            return Answer(answer.status, answer.body, answer.headers, sent=10)
        if "runs/search" in request.target and proxy.count("runs/search") < 3:
            return Answer(503)
        return answer

    proxy.rule = lose_much
    run = await through_proxy.create_run(experiment, name="lost", tags={})
    assert [found.run_id for found in await through_proxy.search_runs([experiment])] == [run.run_id]
    assert proxy.count("runs/create") == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_a_create_that_never_reached_mlflow_is_repeated(
    through_proxy: RestTracking, proxy: FlakyProxy, status: int
) -> None:
    experiment = await through_proxy.experiment_id(new_name())

    async def turn_away_once(request: Request, forward: Forward) -> Answer | None:
        first = "runs/create" in request.target and proxy.count("runs/create") == 1
        return Answer(status, b"<html>later</html>") if first else await forward()

    proxy.rule = turn_away_once
    run = await through_proxy.create_run(experiment, name="second try", tags={})
    assert [found.run_id for found in await through_proxy.search_runs([experiment])] == [run.run_id]
    # Before the second attempt and after it; the last search is this test's own.
    assert proxy.count("runs/search") == 3


async def test_a_create_that_mlflow_itself_put_off_is_repeated_without_a_search(
    through_proxy: RestTracking, proxy: FlakyProxy
) -> None:
    async def limit_once(request: Request, forward: Forward) -> Answer | None:
        first = "runs/create" in request.target and proxy.count("runs/create") == 1
        return Answer(429, b'{"error_code": "REQUEST_LIMIT_EXCEEDED"}') if first else await forward()

    proxy.rule = limit_once
    await through_proxy.create_run("0", name="second try", tags={})
    assert (proxy.count("runs/create"), proxy.count("runs/search")) == (2, 0)


async def test_a_late_duplicate_run_is_deleted(through_proxy: RestTracking, proxy: FlakyProxy) -> None:
    experiment = await through_proxy.experiment_id(new_name())
    late: list[Forward] = []

    async def hold_the_first_back(request: Request, forward: Forward) -> Answer | None:
        if "runs/create" not in request.target:
            return await forward()
        if not late:
            late.append(forward)
            return Answer(504)
        answer = await forward()
        await late[0]()
        return answer

    proxy.rule = hold_the_first_back
    run = await through_proxy.create_run(experiment, name="twin", tags={})
    assert [found.run_id for found in await through_proxy.search_runs([experiment])] == [run.run_id]


async def test_a_cancelled_creation_leaves_no_run_that_seems_to_run(
    through_proxy: RestTracking, proxy: FlakyProxy
) -> None:
    experiment = await through_proxy.experiment_id(new_name())
    made, go_on = asyncio.Event(), asyncio.Event()

    async def answer_late(request: Request, forward: Forward) -> Answer | None:
        answer = await forward()
        if "runs/create" in request.target:
            made.set()
            await go_on.wait()
        return answer

    proxy.rule = answer_late
    task = asyncio.create_task(through_proxy.create_run(experiment, name="unwanted", tags={}))
    await made.wait()
    task.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [run.status for run in await through_proxy.search_runs([experiment])] == [RunStatus.KILLED]


async def test_creations_that_still_wait_for_their_turn_are_not_made_after_a_cancellation(proxy: FlakyProxy) -> None:
    first = asyncio.Event()

    async def never(request: Request, forward: Forward) -> Answer | None:
        if "runs/create" in request.target:
            first.set()
            return (
                Answer(400, b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}')
                if go.is_set()
                else await hold()
            )
        return await forward()

    async def hold() -> Answer:
        await go.wait()
        return Answer(400)

    go = asyncio.Event()
    proxy.rule = never
    async with RestTracking(proxy.url, max_in_flight=2) as tracking:
        tasks = [asyncio.create_task(tracking.create_run("0", name=None, tags={})) for _ in range(20)]
        await first.wait()
        for task in tasks:
            task.cancel()
        go.set()
        await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    assert proxy.count("runs/create") <= 2


async def test_a_server_with_the_default_connection_pool_withstands_a_fan_out(
    mlflow_server: MlflowServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with RestTracking(mlflow_server.url) as tracking:
        runs = await asyncio.gather(*(tracking.create_run("0", name=None, tags={}) for _ in range(60)))
        await asyncio.gather(*(tracking.log(run.run_id, params={"n": "1"}) for run in runs))
    assert not caplog.records, "the server has refused some"


async def test_a_server_whose_database_has_no_connection_left_is_asked_again(
    through_proxy: RestTracking, proxy: FlakyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    # Recorded from MLflow 3.17, asked 20 times at once.
    told = b"QueuePool limit of size 5 overflow 10 reached, connection timed out, timeout 30.00"

    async def starve_once(request: Request, forward: Forward) -> Answer | None:
        if "runs/create" in request.target and proxy.count("runs/create") == 1:
            return Answer(400, b'{"error_code": "BAD_REQUEST", "message": "' + told + b'"}')
        return await forward()

    experiment = await through_proxy.experiment_id(new_name())
    proxy.rule = starve_once
    run = await through_proxy.create_run(experiment, name=None, tags={})
    assert [info.run_id for info in await through_proxy.search_runs([experiment])] == [run.run_id]
    assert "or lower max_in_flight" in caplog.text


async def test_updates_survive_temporary_server_errors(through_proxy: RestTracking, proxy: FlakyProxy) -> None:
    run = await through_proxy.create_run("0", name=None, tags={})

    async def stumble(request: Request, forward: Forward) -> Answer | None:
        tries = proxy.count(request.target)
        if tries == 1:
            return None
        if tries == 2:
            return Answer(429, headers={"retry-after": "0"})
        if tries == 3:
            return Answer(200, b'{"run_info": {}}', sent=5)
        return await forward()

    proxy.rule = stumble
    await through_proxy.update_run(run.run_id, RunStatus.FAILED)
    await through_proxy.log(run.run_id, params={"a": "1"})
    proxy.rule = None
    seen = await through_proxy.get_run(run.run_id)
    assert (seen.status, seen.params) == (RunStatus.FAILED, {"a": "1"})


async def test_basic_authentication_by_url_by_argument_and_by_environment(
    mlflow_server_with_auth: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = mlflow_server_with_auth
    with_userinfo = server.url.replace("//", f"//{server.username}:{server.password.replace(' ', '%20')}@")
    async with RestTracking(with_userinfo) as tracking:
        assert server.password not in tracking.uri
        run = await tracking.create_run("0", name=None, tags={})
        plain, secret = await tracking.environ()
    assert plain == {"MLFLOW_TRACKING_URI": server.url, "MLFLOW_TRACKING_USERNAME": server.username}
    assert secret == {"MLFLOW_TRACKING_PASSWORD": server.password}

    async with RestTracking(server.url, credentials=Credentials(server.username, server.password)) as tracking:
        assert (await tracking.get_run(run.run_id)).run_id == run.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", server.username)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.password)
    async with open_tracking(server.url) as opened:
        assert (await opened.get_run(run.run_id)).run_id == run.run_id


async def test_a_wrong_password_says_which_variables_to_set_and_hides_it(mlflow_server_with_auth: MlflowServer) -> None:
    async with RestTracking(
        mlflow_server_with_auth.url, credentials=Credentials("admin", "not-the-password")
    ) as tracking:
        with pytest.raises(
            TrackingError, match=r"401.*set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        ) as caught:
            await tracking.create_run("0", name=None, tags={})
    assert "not-the-password" not in str(caught.value)


async def test_a_server_below_a_path(mlflow_server_with_prefix: MlflowServer, tmp_path: Path) -> None:
    async with RestTracking(f"{mlflow_server_with_prefix.url}/") as tracking:
        run = await tracking.create_run(await tracking.experiment_id("prefixed"), name=None, tags={})
        file = tmp_path / "model.txt"
        file.write_text("weights")
        await tracking.log_artifact(run, file)
        got = await tracking.download(f"runs:/{run.run_id}/model.txt", tmp_path)
    assert got.read_text() == "weights"


async def test_the_server_without_its_path_is_asked_whether_it_is_one(mlflow_server_with_prefix: MlflowServer) -> None:
    async with RestTracking(mlflow_server_with_prefix.url.removesuffix("/some/prefix")) as tracking:
        with pytest.raises(TrackingError, match=r"404.*is this an MLflow server, and is the path"):
            await tracking.get_run("x")


async def test_a_server_that_is_not_there_is_given_up_soon_and_says_what_to_do(mlflow_server: MlflowServer) -> None:
    async with FlakyProxy(None).listen() as gone:
        url = gone.url
    async with RestTracking(url.replace("//", "//user:secret-word@")) as tracking:
        with pytest.raises(TrackingError, match=r"connection refused; start it .mlflow server. or check") as caught:
            await tracking.experiment_id("x")
    assert "secret-word" not in repr(caught.value) + str(caught.value.uri)
    assert url in str(caught.value)


async def test_a_longer_retry_time_waits_for_a_server_that_starts_late(mlflow_server: MlflowServer) -> None:
    async with RestTracking(mlflow_server.url) as direct:
        run = await direct.create_run("0", name=None, tags={})
    proxy = FlakyProxy(mlflow_server.url)
    async with proxy.listen(), RestTracking(proxy.url) as tracking:
        answered = asyncio.Event()

        async def away(request: Request, forward: Forward) -> Answer | None:
            if len(proxy.requests) < 5:
                return Answer(503)
            answered.set()
            return await forward()

        proxy.rule = away
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: tracking.update_run(run.run_id, RunStatus.FINISHED, retry_for=25))
            await answered.wait()
        assert (await tracking.get_run(run.run_id)).status is RunStatus.FINISHED


async def test_retry_for_zero_sends_one_request(through_proxy: RestTracking, proxy: FlakyProxy) -> None:
    async def down(request: Request, forward: Forward) -> Answer | None:
        return Answer(503, b"maintenance until noon")

    proxy.rule = down
    with pytest.raises(TrackingError, match="answered runs/update with 503: maintenance until noon"):
        await through_proxy.update_run("x", RunStatus.FAILED, retry_for=0)
    assert len(proxy.requests) == 1

"""Answers that are lost, cut, doubled, endless or not what was asked for: no request is done twice, and none hangs."""

from __future__ import annotations

import asyncio
import gzip
from typing import Any

import pytest

from components.event_loops import on_each_loop
from fakes.scripted_server import Peer, scripted, turns
from fakes.small_mlflow import Fault, SmallMlflow, answering, cut, doubled, lost, reset, response, sending
from mlfleet.errors import TrackingError
from mlfleet.runs import RunStatus
from mlfleet.tracking import RestTracking

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
GZIPPED = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n"


BROKEN: dict[str, Fault] = {
    "lost": lost,
    "reset": reset,
    "without its last byte": cut(1),
    "half a head": sending(b"HTTP/1.1 200 OK\r\nContent-"),
    "cut between chunks": sending(CHUNKED, b"2\r\n{}\r\n"),
    "cut in a chunk": sending(CHUNKED, b"5\r\n{"),
    "without HTTP": sending(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "impossible status": sending(b"HTTP/1.1 7 No\r\n\r\n"),
    "two lengths": sending(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
    "impossible chunk": sending(CHUNKED, b"zz\r\n{}\r\n"),
    "gzip that is none": sending(GZIPPED + b"Content-Length: 2\r\n\r\n{}"),
    "503": answering(response(b"later", "503 No")),
    "429": answering(response(b"later", "429 No")),
    "408": answering(response(b"later", "408 No")),
    "another run": answering(response({"run": {"info": {"run_id": "r2", "experiment_id": "0", "status": "RUNNING"}}})),
    "nothing in JSON": answering(response({})),
}
# After these no client can tell from the answer if the run was made.
UNCLEAR = {
    **{name: fault for name, fault in BROKEN.items() if name != "another run"},
    "another run's creation": answering(
        response(
            {
                "run": {
                    "info": {"run_id": "r2", "experiment_id": "0", "status": "RUNNING"},
                    "data": {"tags": [{"key": "mlfleet.submission", "value": "x"}]},
                }
            }
        )
    ),
    "web page": answering(response(b"<!doctype html><title>Log in</title>", content_type="text/html")),
    "204": answering(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "a list": answering(response([])),
    "a run of another kind": answering(response({"run": 5})),
    "nesting": answering(response(b"[" * 100_000)),
    "an id that is a path": answering(
        response({"run": {"info": {"run_id": "../x", "experiment_id": "0", "status": "RUNNING"}}})
    ),
}


@pytest.mark.parametrize("fault", list(BROKEN))
@on_each_loop
async def test_a_read_is_repeated(fault: str) -> None:
    server = SmallMlflow({"get": [BROKEN[fault]]})
    server.add_run()
    async with scripted(server.script) as listening, RestTracking(f"http://{listening.place}") as tracking:
        assert (await tracking.get_run("r1")).run_id == "r1"
    assert server.requests == ["get", "get"]


@pytest.mark.parametrize("fault", list(UNCLEAR))
@on_each_loop
async def test_a_run_created_despite_an_unclear_answer_is_used(fault: str) -> None:
    server = SmallMlflow({"create": [UNCLEAR[fault]]})
    async with scripted(server.script) as listening, RestTracking(f"http://{listening.place}") as tracking:
        run = await tracking.create_run("0", name=None, tags={"a": "b"})
    assert ([run.run_id], run.tags["a"]) == (list(server.runs), "b")
    assert server.requests == ["create", "search"]
    assert server.statuses == ["RUNNING"]


@on_each_loop
async def test_a_run_created_by_the_last_attempt_is_used() -> None:
    server = SmallMlflow({"create": [lost]})
    server.add_run()
    async with (
        scripted(server.script) as listening,
        RestTracking(f"http://{listening.place}", retry_for=0) as tracking,
    ):
        await tracking.get_run("r1")
        run = await tracking.create_run("0", name=None, tags={})
    assert list(server.runs) == ["r1", run.run_id]
    assert server.requests == ["get", "create", "search"]


@on_each_loop
async def test_a_search_that_answers_with_other_runs_gives_none() -> None:
    server = SmallMlflow({"create": [lost], "search": [answering(response({"runs": [{"info": {
        "run_id": "foreign", "experiment_id": "0", "status": "RUNNING"}}]}))]})  # fmt: skip
    async with scripted(server.script) as listening, RestTracking(f"http://{listening.place}") as tracking:
        run = await tracking.create_run("0", name=None, tags={})
    # Another run was made then; the first one is found afterwards and deleted.
    assert run.run_id.startswith("run2-")
    assert list(server.runs) == [run.run_id]


@pytest.mark.parametrize("fault", ["400 Bad Request", "401 Who", "403 No", "404 Not Found", "301 Moved", "302 Found"])
@on_each_loop
async def test_a_refusal_is_final(fault: str) -> None:
    server = SmallMlflow({"create": [answering(response(b"no", fault, location="/login"))]})
    async with scripted(server.script) as listening, RestTracking(f"http://{listening.place}") as tracking:
        with pytest.raises(TrackingError):
            await tracking.create_run("0", name=None, tags={})
    assert server.requests == ["create"]


@pytest.mark.parametrize("first", ["get", "update", "create", "log-batch"])
@on_each_loop
async def test_the_second_of_two_answers_is_not_taken_for_that_of_the_next_request(first: str) -> None:
    server = SmallMlflow({first: [doubled]})
    for run_id in ("r1", "r2", "r3"):
        server.add_run(run_id)
    async with (
        scripted(server.script) as listening,
        RestTracking(f"http://{listening.place}", max_in_flight=1) as tracking,
    ):
        if first == "get":
            await tracking.get_run("r1")
        elif first == "update":
            await tracking.update_run("r1", RunStatus.FINISHED)
        elif first == "log-batch":
            await tracking.log("r1", params={"a": "b"})
        else:
            await tracking.create_run("0", name=None, tags={})
        assert (await tracking.get_run("r2")).run_id == "r2"
        run = await tracking.create_run("0", name=None, tags={"mine": "yes"})
        assert run.tags["mine"] == "yes"
        await tracking.update_run("r3", RunStatus.FINISHED)
        assert (await tracking.get_run("r3")).status is RunStatus.FINISHED
    assert listening.accepted == 2
    assert server.requests.count("create") == (2 if first == "create" else 1)


@on_each_loop
async def test_data_on_an_idle_connection_is_not_an_answer() -> None:
    async def late(peer: Peer, answer: bytes) -> bool:
        await peer.send(answer)
        await turns(5)
        await peer.send(answer)
        return True

    server = SmallMlflow({"get": [late]})
    for run_id in ("r1", "r2"):
        server.add_run(run_id)
    async with scripted(server.script) as listening, RestTracking(f"http://{listening.place}") as tracking:
        await tracking.get_run("r1")
        await turns(20)
        assert (await tracking.get_run("r2")).run_id == "r2"


@on_each_loop
async def test_a_connection_that_the_server_closed_while_it_was_idle_is_replaced() -> None:
    server = SmallMlflow()
    server.add_run()

    async def once(peer: Peer) -> None:
        await peer.answer(response({"run": server.runs["r1"]}))

    # Without a second attempt: none is needed.
    async with scripted(once) as listening, RestTracking(f"http://{listening.place}", retry_for=0) as tracking:
        for number in range(1, 4):
            await tracking.get_run("r1")
            await listening.done()
            await turns(5)
            assert listening.accepted == number


async def endless_blanks(peer: Peer, answer: bytes) -> bool:
    peer.writer.write(CHUNKED)
    while True:
        peer.writer.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        await peer.writer.drain()


async def endless_head(peer: Peer, answer: bytes) -> bool:
    peer.writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        peer.writer.write(b"X: " + b"x" * 1000 + b"\r\n")
        await peer.writer.drain()


async def one_byte_after_the_other(peer: Peer, answer: bytes) -> bool:
    await peer.send(CHUNKED)
    while not peer.writer.is_closing():
        await peer.send(b"1\r\n \r\n")
        await asyncio.sleep(0.05)
    return False


async def silence(peer: Peer, answer: bytes) -> bool:
    await peer.closed()
    return False


async def bomb(peer: Peer, answer: bytes) -> bool:
    content = gzip.compress(bytes(2**28), compresslevel=1)
    await peer.send(GZIPPED + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return False


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (endless_blanks, "with more than 64 MiB"),
        (bomb, "with more than 64 MiB"),
        (endless_head, "did not answer runs/get"),
        (one_byte_after_the_other, "did not answer runs/get: no answer in time"),
        (silence, "did not answer runs/get: no answer in time"),
        (answering(response(b"{}", content_encoding="br")), "in the content encoding 'br'"),
        (answering(response(b"[" * 100_000)), "something that is not JSON"),
        (answering(response(b"[" * 100_000, "400 No")), "answered runs/get with 400"),
        (answering(response({"run": {"info": {"run_id": "r1", "experiment_id": "../x"}}})), "as an id"),
    ],
    ids=["blanks", "bomb", "head", "bytes", "silence", "brotli", "nesting", "nesting in an error", "path as an id"],
)  # fmt: skip
@on_each_loop
async def test_an_answer_has_a_size_limit(fault: Fault, text: str) -> None:
    server = SmallMlflow({"get": [fault]})
    server.add_run()
    async with (
        scripted(server.script) as listening,
        # The timeout is for all of an answer: bytes that keep coming do not prolong it. 64 MiB take their time, too.
        RestTracking(f"http://{listening.place}", timeout=2 if "in time" in text else 20, retry_for=0) as tracking,
    ):
        with pytest.raises(TrackingError, match=text):
            await tracking.get_run("r1")
        assert (await tracking.get_run("r1")).run_id == "r1"


@pytest.mark.parametrize("token", ["tökén-of-mine", "token-of\nmine"])
async def test_a_token_that_no_header_can_hold_is_not_shown(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
    async with scripted(SmallMlflow().script) as listening, RestTracking(f"http://{listening.place}") as tracking:
        with pytest.raises(
            TrackingError, match=r"the header Authorization .* not ASCII.*MLFLOW_TRACKING_TOKEN"
        ) as caught:
            await tracking.create_run("0", name=None, tags={})
        assert listening.accepted == 0
    assert "mine" not in f"{caught.value}{caught.value.__cause__}{caught.value.__context__}"


@pytest.mark.parametrize("is_reset", [False, True])
@on_each_loop
async def test_a_port_that_accepts_and_closes_is_given_up_soon(is_reset: bool) -> None:
    async def close(peer: Peer) -> None:
        if is_reset:
            await reset(peer, b"")

    async with scripted(close) as listening, RestTracking(f"http://{listening.place}") as tracking:
        with pytest.raises(TrackingError, match="tried 3 times"):
            await tracking.get_run("r1")
        assert listening.accepted == 3


@pytest.mark.parametrize("place", ["another port", "another scheme", "another host"])
@on_each_loop
async def test_headers_and_bodies_are_not_redirected_to_another_origin(place: str) -> None:
    elsewhere = SmallMlflow()
    async with scripted(elsewhere.script) as other:
        there = {
            "another port": f"http://{other.place}/x",
            "another scheme": f"https://127.0.0.1:{other.port}/x",
            "another host": f"http://localhost:{other.port}/x",
        }[place]
        moved = answering(response(b"", "308 Moved", location=there))
        server = SmallMlflow({"create": [moved], "get": [moved]})
        server.add_run()
        async with (
            scripted(server.script) as listening,
            RestTracking(f"http://{listening.place}", headers={"X-Api-Key": "secret"}) as tracking,
        ):
            with pytest.raises(TrackingError, match="redirects runs/create to http"):
                await tracking.create_run("0", name=None, tags={})
            with pytest.raises(TrackingError, match="redirects runs/get to http"):
                await tracking.get_run("r1")
        assert other.accepted == 0


# ---- cancellation ---------------------------------------------------------------------------------------------------


class Held:
    """An answer that does not come before `go_on`."""

    def __init__(self, then: Fault | None = None) -> None:
        self.arrived = asyncio.Event()
        self.go_on = asyncio.Event()
        self._then = then

    async def __call__(self, peer: Peer, answer: bytes) -> bool:
        self.arrived.set()
        await self.go_on.wait()
        if self._then is not None:
            return await self._then(peer, answer)
        await peer.send(answer)
        return True


@pytest.mark.parametrize("then", [None, "lost", "503", "web page"])
@on_each_loop
async def test_a_cancelled_creation_is_ended_however_often_it_is_cancelled(then: str | None) -> None:
    held = Held(None if then is None else UNCLEAR[then])
    server = SmallMlflow({"create": [held]})
    async with scripted(server.script) as listening, RestTracking(f"http://{listening.place}") as tracking:
        task = asyncio.create_task(tracking.create_run("0", name=None, tags={}))
        await held.arrived.wait()
        for _ in range(3):
            task.cancel()
            await turns(3)
        held.go_on.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert server.statuses == ["KILLED"]
    (run,) = server.runs.values()
    assert run["info"]["end_time"] > 0
    assert server.requests.count("create") == 1


@on_each_loop
async def test_a_cancelled_creation_is_looked_for_until_the_server_shows_it() -> None:
    hidden, held = answering(response({"runs": []})), Held(lost)
    server = SmallMlflow({"create": [held], "search": [hidden, hidden]})
    async with scripted(server.script) as listening, RestTracking(f"http://{listening.place}") as tracking:
        task = asyncio.create_task(tracking.create_run("0", name=None, tags={}))
        await held.arrived.wait()
        task.cancel()
        held.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert server.statuses == ["KILLED"]
    assert server.requests == ["create", "search", "search", "search", "update"]


@pytest.mark.slow
async def test_a_cancelled_creation_that_never_appears_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def never(peer: Peer) -> None:
        arrived.set()
        await peer.closed()

    arrived = asyncio.Event()
    async with scripted(never) as listening, RestTracking(f"http://{listening.place}") as tracking:
        task = asyncio.create_task(tracking.create_run("7", name=None, tags={}))
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert "may be left RUNNING: in experiment 7 with the tag mlfleet.submission=" in caplog.text


@on_each_loop
async def test_a_creation_that_is_cancelled_at_any_turn_of_the_event_loop_leaves_nothing() -> None:
    server = SmallMlflow()
    done = 0
    async with scripted(server.script) as listening:
        for count in range(200):
            async with RestTracking(f"http://{listening.place}") as tracking:
                task = asyncio.create_task(tracking.create_run("0", name=None, tags={}))
                await turns(count)
                task.cancel()
                await turns(count % 7)
                task.cancel()
                outcome: Any = (await asyncio.gather(task, return_exceptions=True))[0]
                if not isinstance(outcome, asyncio.CancelledError):
                    done += 1
                    await tracking.update_run(outcome.run_id, RunStatus.FINISHED)
                assert not [other for other in asyncio.all_tasks() if "_create" in repr(other)]
            if done > 3:
                break
        await listening.done()
    assert done
    assert set(server.statuses) <= {"KILLED", "FINISHED"}
    assert "KILLED" in server.statuses


@pytest.mark.parametrize("how", ["answered", "cut", "silent"])
@on_each_loop
async def test_closing_leaves_no_connection_open(how: str) -> None:
    held = Held()
    faults: dict[str, list[Fault]] = {"answered": [], "cut": [cut(2)], "silent": [held]}
    server = SmallMlflow({"get": faults[how]})
    server.add_run()
    async with scripted(server.script) as listening:
        async with RestTracking(f"http://{listening.place}", retry_for=0) as tracking:
            task = asyncio.create_task(tracking.get_run("r1"))
            if how == "silent":
                await held.arrived.wait()
                for _ in range(3):
                    task.cancel()
                    await turns(1)
                held.go_on.set()
            await asyncio.gather(task, return_exceptions=True)
        await listening.done()

"""Proxies, certificates, clients of the caller, and what is logged of requests."""

from __future__ import annotations

import asyncio
import base64
import logging
import ssl
import uuid
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import trustme
from httpx_aiohttp import AiohttpTransport

from components.event_loops import on_each_loop
from components.mlflow_server import MlflowServer
from components.projects import write_project
from fakes.flaky_proxy import Answer, FlakyProxy, Forward, Request
from fakes.scripted_server import Peer, Script, ScriptedServer, scripted
from fakes.scripted_server import Request as RawRequest
from fakes.small_mlflow import SmallMlflow, lost, response
from mlfleet import Fleet
from mlfleet.errors import TrackingError, UsageError
from mlfleet.runs import RunStatus
from mlfleet.tracking import RestTracking, open_tracking
from mlfleet.tracking.base import end_run

RUN = response({"run": {"info": {"run_id": "r1", "experiment_id": "0", "status": "RUNNING"}}})


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


@pytest.fixture
def elsewhere(tmp_path: Path, no_proxies: pytest.MonkeyPatch) -> ssl.SSLContext:
    """The TLS of a server ``tracking.example``, whose authority our settings name."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    no_proxies.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "ca.pem"))
    no_proxies.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("tracking.example", "127.0.0.1").configure_cert(context)
    return context


def tunnel(server: ScriptedServer, heads: list[RawRequest]) -> Script:
    """A proxy that connects its clients to `server`, whatever they ask for."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def script(peer: Peer) -> None:
        heads.append(await peer.head())
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        await peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        try:
            await asyncio.gather(pump(peer.reader, writer), pump(reader, peer.writer))
        finally:
            writer.transport.abort()

    return script


@on_each_loop
async def test_a_proxy_for_http(no_proxies: pytest.MonkeyPatch) -> None:
    requests: list[RawRequest] = []

    async def script(peer: Peer) -> None:
        for _ in range(2):
            requests.append(await peer.answer(RUN))
        await peer.closed()

    async with scripted(script) as proxy:
        no_proxies.setenv("HTTP_PROXY", f"http://ada:pass%20word@{proxy.place}")
        async with RestTracking("http://tracking.example:5000") as tracking:
            for _ in range(2):
                assert (await tracking.get_run("r1")).run_id == "r1"
        assert proxy.accepted == 1
    target = "http://tracking.example:5000/api/2.0/mlflow/runs/get?run_id=r1"
    assert requests[1].first == f"GET {target} HTTP/1.1"
    assert requests[1].headers["host"] == "tracking.example:5000"
    assert requests[1].headers["proxy-authorization"] == basic("ada", "pass word")


@pytest.mark.parametrize("is_tls", [False, True])
@on_each_loop
async def test_a_proxy_for_https(is_tls: bool, elsewhere: ssl.SSLContext, no_proxies: pytest.MonkeyPatch) -> None:
    heads: list[RawRequest] = []
    mlflow = SmallMlflow()
    mlflow.add_run()
    async with (
        scripted(mlflow.script, tls=elsewhere) as server,
        scripted(tunnel(server, heads), tls=elsewhere if is_tls else None) as proxy,
    ):
        no_proxies.setenv("HTTPS_PROXY", f"{'https' if is_tls else 'http'}://ada:secret@{proxy.place}")
        async with RestTracking("https://tracking.example") as tracking:
            for _ in range(2):
                assert (await tracking.get_run("r1")).run_id == "r1"
        assert (server.accepted, proxy.accepted) == (1, 1)
        # A certificate that is not trusted is not trusted through a proxy either.
        no_proxies.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
        if not is_tls:
            no_proxies.delenv("SSL_CERT_FILE")
            async with RestTracking("https://tracking.example") as tracking:
                with pytest.raises(TrackingError, match="is not trusted"):
                    await tracking.get_run("r1")
        no_proxies.setenv("NO_PROXY", "tracking.example")
        async with RestTracking("https://tracking.example", retry_for=0) as tracking:
            with pytest.raises(TrackingError, match="cannot be reached"):
                await tracking.get_run("r1")
    assert heads[0].first == "CONNECT tracking.example:443 HTTP/1.1"
    assert heads[0].headers["proxy-authorization"] == basic("ada", "secret")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 5\r\n\r\nlogin", "407 Proxy Authentication"),
        (b"HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n", "302 Found"),
        (b"", "tracking.example"),
        (b"garbage", "tracking.example"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "tracking.example"),
    ],
)
@on_each_loop
async def test_a_proxy_that_refuses_or_closes(answer: bytes, text: str, no_proxies: pytest.MonkeyPatch) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(answer)

    async with scripted(script) as proxy:
        no_proxies.setenv("HTTPS_PROXY", f"http://ada:secret@{proxy.place}")
        async with RestTracking("https://tracking.example", retry_for=0) as tracking:
            with pytest.raises(TrackingError, match=text) as caught:
                await tracking.create_run("0", name=None, tags={})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("proxy", ["ftp://x", "http://", "socks5://127.0.0.1:1"])
async def test_a_proxy_that_cannot_be_used(proxy: str, no_proxies: pytest.MonkeyPatch) -> None:
    no_proxies.setenv("HTTP_PROXY", proxy)
    with pytest.raises(TrackingError, match=r"the proxy for http://tracking\.example|cannot be|did not answer"):
        async with RestTracking("http://tracking.example", retry_for=0) as tracking:
            await tracking.get_run("r1")


@on_each_loop
async def test_a_handshake_that_does_not_end_is_given_up() -> None:
    async def silent(peer: Peer) -> None:
        await peer.closed()

    async with (
        scripted(silent) as server,
        RestTracking(f"https://{server.place}", timeout=0.5, retry_for=0) as tracking,
    ):
        with pytest.raises(TrackingError, match="no answer in time"):
            await tracking.get_run("r1")


async def test_a_header_that_cannot_be_sent_raises_an_mlfleet_error() -> None:
    for headers in ({"X-Name": "Ä"}, {"X-Name": "a\nb"}, {"X Name": "a"}):
        async with (
            scripted(SmallMlflow().script) as server,
            RestTracking(f"http://{server.place}", headers=headers) as t,
        ):
            with pytest.raises(TrackingError, match="cannot be sent"):
                await t.get_run("r1")
            assert not server.ended


# ---- clients and transports of the caller ---------------------------------------------------------------------------


async def test_the_life_of_a_run_by_the_transport_of_httpx_aiohttp(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    transport = AiohttpTransport()
    async with RestTracking(mlflow_server.url, transport=transport) as tracking:
        experiment = await tracking.experiment_id(f"aiohttp {uuid.uuid4().hex}")
        run = await tracking.create_run(experiment, name="first", tags={"a": "b"})
        await tracking.log(run.run_id, params={"p": "1"})
        (tmp_path / "file.txt").write_text("content")
        await tracking.log_artifact(run, tmp_path / "file.txt")
        (tmp_path / "got").mkdir()
        got = await tracking.download(f"runs:/{run.run_id}/file.txt", tmp_path / "got")
        assert got.read_text() == "content"
        await end_run(tracking, run.run_id, RunStatus.FINISHED, patience=10)
        seen = await tracking.get_run(run.run_id)
        assert (seen.status, seen.params) == (RunStatus.FINISHED, {"p": "1"})
        session = transport.get_client()
    assert session.closed


async def test_nothing_is_sent_twice_by_a_transport_that_calls_a_lost_answer_a_lost_connection() -> None:
    server = SmallMlflow({"create": [lost], "get": [lost]})
    server.add_run()
    async with (
        scripted(server.script) as listening,
        RestTracking(f"http://{listening.place}", transport=AiohttpTransport()) as tracking,
    ):
        assert (await tracking.get_run("r1")).run_id == "r1"
        run = await tracking.create_run("0", name=None, tags={})
    assert server.requests.count("create") == 1
    assert list(server.runs) == ["r1", run.run_id]


async def test_a_port_that_is_closed_is_one_clear_error_by_another_transport() -> None:
    async with FlakyProxy().listen() as gone:
        url = gone.url
    async with RestTracking(url, transport=AiohttpTransport()) as tracking:
        with pytest.raises(TrackingError, match=r"cannot be reached: .*tried 3 times"):
            await tracking.create_run("0", name=None, tags={})


async def test_a_client_of_the_caller_stays_open_and_keeps_its_own_authentication(
    no_proxies: pytest.MonkeyPatch,
) -> None:
    requests: list[RawRequest] = []

    async def script(peer: Peer) -> None:
        while True:
            requests.append(await peer.answer(RUN))

    async with scripted(script) as server, httpx.AsyncClient(auth=("ada", "secret"), headers={"X-Team": "a"}) as client:
        async with RestTracking(f"http://{server.place}", client=client) as tracking:
            await tracking.get_run("r1")
        assert not client.is_closed
        assert (await client.get(f"http://{server.place}/x")).status_code == 200
    assert requests[0].headers["authorization"] == basic("ada", "secret")
    assert requests[0].headers["x-team"] == "a"
    assert requests[0].headers["user-agent"].startswith("mlfleet/")


async def test_a_client_and_a_transport_cannot_be_given_together() -> None:
    async with httpx.AsyncClient() as client:
        with pytest.raises(UsageError, match="client and transport are both given"):
            RestTracking("http://h", client=client, transport=httpx.AsyncHTTPTransport())


async def test_requests_of_a_fan_out_are_seven_at_a_time_by_a_client_of_the_caller_too(proxy: FlakyProxy) -> None:
    async with httpx.AsyncClient() as client, RestTracking(proxy.url, client=client) as tracking:
        await asyncio.gather(*(tracking.create_run("0", name=None, tags={}) for _ in range(40)))
    assert proxy.peak <= 7


# ---- logs and messages ----------------------------------------------------------------------------------------------


async def test_our_requests_are_not_in_the_log_of_httpx_and_those_of_others_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    server = SmallMlflow()
    server.add_run("r1")
    async with (
        scripted(server.script) as listening,
        httpx.AsyncClient() as foreign,
        RestTracking(f"http://{listening.place}") as tracking,
    ):
        await asyncio.gather(tracking.get_run("r1"), foreign.get(f"http://{listening.place}/update-x"))
    shown = [record.getMessage() for record in caplog.records if record.name == "httpx"]
    assert len(shown) == 1
    assert "update-x" in shown[0]


@pytest.mark.parametrize(
    "uri",
    [
        "http://ada:pass/SECRET@127.0.0.1:1",
        "http://127.0.0.1:1/x?password=SECRET",
        "http://127.0.0.1:1/x?token=SECRET",
        "http://ada:SECRET@127.0.0.1:1",
        "htp://ada:SECRET@127.0.0.1:1",
        "postgresql://ada:SECRET@127.0.0.1:1/runs?password=SECRET",
    ],
)
async def test_no_message_shows_the_password_in_a_uri(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    async def use() -> None:
        async with open_tracking(uri, retry_for=0) as tracking:
            assert "SECRET" not in tracking.uri
            await tracking.get_run("r1")

    with pytest.raises((TrackingError, UsageError)) as caught:
        await use()
    error: BaseException | None = caught.value
    shown = caplog.text + repr(getattr(error, "uri", ""))
    while error is not None:
        shown += repr(error) + str(error)
        error = error.__cause__
    assert "SECRET" not in shown


# ---- the life of a run ----------------------------------------------------------------------------------------------


async def test_a_run_takes_four_requests(proxy: FlakyProxy, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "exit {code}", parameters="code: int")
    async with Fleet(tracking=RestTracking(proxy.url)) as fleet:
        for code, count in ((0, 4), (3, 5)):  # the tags of a failure are one more
            proxy.requests.clear()
            run = await fleet.submit(uri, parameters={"code": code}, env_manager="local", experiment_id="0")
            await run.wait()
            names = [request.target.partition("?")[0].rpartition("/")[2] for request in proxy.requests]
            assert len(names) == count, names
            assert names[0] == "create"
            assert names[-1] == "update"


async def test_a_run_deleted_while_it_ran_is_reported_as_deleted(
    mlflow_server: MlflowServer, proxy: FlakyProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = write_project(tmp_path / "demo", "until test -e ../go; do sleep 0.02; done")
    async with Fleet(tracking=RestTracking(proxy.url)) as fleet, httpx.AsyncClient() as code:
        run = await fleet.submit(uri, env_manager="local")
        answer = await code.post(f"{mlflow_server.url}/api/2.0/mlflow/runs/delete", json={"run_id": run.run_id})
        answer.raise_for_status()
        assert (await fleet.tracking.get_run(run.run_id)).deleted
        (tmp_path / "go").touch()
        outcome = await run.outcome()
    assert str(outcome.tracking_error) == f"the run {run.run_id} was deleted"
    assert f"the run {run.run_id} was deleted" in caplog.text


async def test_the_end_of_a_fan_out_keeps_the_status_of_each_run(proxy: FlakyProxy) -> None:
    async with RestTracking(proxy.url) as tracking:
        made = await asyncio.gather(*(tracking.create_run("0", name=f"r{n}", tags={}) for n in range(40)))
        for n, run in enumerate(made):
            if n % 5 == 0:  # its own code says that it has failed, and exits with 0
                await tracking.update_run(run.run_id, RunStatus.FAILED)
        before = len(proxy.requests)
        await asyncio.gather(*(end_run(tracking, run.run_id, RunStatus.FINISHED, patience=20) for run in made))
        assert len(proxy.requests) - before == 40 + 32
        for n, run in enumerate(made):
            seen = await tracking.get_run(run.run_id)
            assert (seen.name, seen.status) == (f"r{n}", RunStatus.FINISHED if n % 5 else RunStatus.FAILED)


async def test_a_redirect_within_the_server_keeps_the_query(proxy: FlakyProxy) -> None:
    async def move(request: Request, forward: Forward) -> Answer | None:
        if "moved" in request.target:
            return Answer(200, RUN.partition(b"\r\n\r\n")[2])
        return Answer(307, headers={"location": f"/moved{request.target}"})

    proxy.rule = move
    async with RestTracking(proxy.url) as tracking:
        assert (await tracking.get_run("r1")).run_id == "r1"
    assert proxy.requests[-1].target.endswith("runs/get?run_id=r1")

"""Other responders at a tracking URI: proxies, login pages, redirects, other TLS, Databricks."""

from __future__ import annotations

import importlib.util
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from components import missing
from components.mlflow_server import MlflowServer
from fakes.flaky_proxy import Answer, FlakyProxy, Forward, Request, Rule
from mlfleet.errors import TrackingError, UsageError
from mlfleet.runs import RunStatus
from mlfleet.tracking import Credentials, RestTracking, open_tracking

RUN = {"run": {"info": {"run_id": "r1", "experiment_id": "0", "status": "RUNNING"}, "data": {}}}


def run_answer() -> Answer:
    return Answer(200, json.dumps(RUN).encode())


@pytest.fixture
async def server() -> AsyncIterator[FlakyProxy]:
    async with FlakyProxy().listen() as listening:
        yield listening


def answer_with(answer: Answer) -> Rule:
    async def rule(request: Request, forward: Forward) -> Answer | None:
        return answer

    return rule


async def test_headers_of_every_kind_are_sent(server: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a-token")
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team")

    async def rule(request: Request, forward: Forward) -> Answer | None:
        about = Answer(200, b'{"workspaces_enabled": true}')
        return about if request.target.endswith("/server-info") else run_answer()

    server.rule = rule
    async with RestTracking(server.url, headers={"X-Route": "blue"}) as tracking:
        await tracking.get_run("r1")
        plain, secret = await tracking.environ()
    headers = server.requests[-1].headers
    assert headers["authorization"] == "Bearer a-token"
    assert (headers["x-mlflow-workspace"], headers["x-route"]) == ("team", "blue")
    assert headers["user-agent"].startswith("mlfleet/")
    assert plain == {"MLFLOW_TRACKING_URI": server.url, "MLFLOW_WORKSPACE": "team"}
    assert secret == {"MLFLOW_TRACKING_TOKEN": "a-token"}


async def test_the_credentials_file_of_mlflow(
    server: FlakyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".mlflow").mkdir()
    file = tmp_path / ".mlflow" / "credentials"
    file.write_text("[mlflow]\nmlflow_tracking_username = ada\nmlflow_tracking_password = 100%\n")
    server.rule = answer_with(run_answer())
    async with RestTracking(server.url) as tracking:
        await tracking.get_run("r1")
    assert server.requests[0].headers["authorization"] == httpx.BasicAuth("ada", "100%")._auth_header
    file.write_text("mlflow_tracking_password = secret-word\n")
    with pytest.raises(TrackingError, match=r"credentials cannot be read: .*\[mlflow\]") as caught:
        async with RestTracking(server.url):
            pass
    assert "secret-word" not in str(caught.value)


async def test_netrc_is_the_last_resort(server: FlakyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".netrc"
    file.write_text("machine 127.0.0.1 login ada password secret-word\n")
    file.chmod(0o600)
    server.rule = answer_with(run_answer())

    async def shown(**how: Any) -> str:
        async with RestTracking(server.url, **how) as tracking:
            await tracking.get_run("r1")
        return server.requests[-1].headers["authorization"]

    assert await shown() == httpx.BasicAuth("ada", "secret-word")._auth_header
    assert await shown(headers={"authorization": "Digest x"}) == "Digest x"
    assert await shown(credentials=Credentials(token="a-token")) == "Bearer a-token"
    monkeypatch.setenv("NETRC", str(tmp_path / "other"))
    (tmp_path / "other").write_text("machine\n")
    async with RestTracking(server.url) as tracking:
        await tracking.get_run("r1")
    assert "authorization" not in server.requests[-1].headers


async def test_a_proxy_of_the_environment_is_used_for_servers_elsewhere(
    server: FlakyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.url.replace("://", "://me:secret@"))
    monkeypatch.delenv("NO_PROXY", raising=False)
    server.rule = answer_with(run_answer())
    async with RestTracking("http://tracking.invalid:5000") as tracking:
        assert (await tracking.get_run("r1")).run_id == "r1"
    assert server.requests[0].target.startswith("http://tracking.invalid:5000/api/2.0/mlflow/runs/get?")
    assert server.requests[0].headers["proxy-authorization"] == httpx.BasicAuth("me", "secret")._auth_header


async def test_a_login_page_is_recognised(server: FlakyProxy) -> None:
    page = b"<!doctype html><title>Please sign in</title>"
    server.rule = answer_with(Answer(200, page, {"content-type": "text/html"}))
    async with RestTracking(server.url) as tracking:
        with pytest.raises(TrackingError, match=r"a web page \(Please sign in\): is this an MLflow server"):
            await tracking.get_run("r1")
        server.rule = answer_with(Answer(200, b"hello"))
        with pytest.raises(TrackingError, match="something that is not JSON"):
            await tracking.get_run("r1")


async def test_a_plain_text_that_is_called_html_is_shown(server: FlakyProxy) -> None:
    server.rule = answer_with(Answer(403, b"Permission denied", {"content-type": "text/html; charset=utf-8"}))
    async with RestTracking(server.url) as tracking:
        with pytest.raises(TrackingError, match=r"403: Permission denied; .*check that this user may do it"):
            await tracking.get_run("r1")


async def test_a_json_service_that_is_not_mlflow_is_recognised(server: FlakyProxy) -> None:
    async with RestTracking(server.url) as tracking:
        for body in (b"[]", b'{"run": 5}', b'{"run": {"info": {}}}', b'"x"', b"{}"):
            server.rule = answer_with(Answer(200, body))
            with pytest.raises(TrackingError):
                await tracking.get_run("r1")


async def test_a_long_error_is_cut_and_holds_no_secret(server: FlakyProxy) -> None:
    message = "the password secret-word is wrong " + "x" * 5000
    server.rule = answer_with(Answer(403, json.dumps({"error_code": "DENIED", "message": message}).encode()))
    async with RestTracking(server.url, credentials=Credentials("ada", "secret-word")) as tracking:
        with pytest.raises(TrackingError, match=r"403: DENIED the password \*\*\* is wrong xxx") as caught:
            await tracking.get_run("r1")
    assert len(str(caught.value)) < 1000


async def test_redirects_are_followed_on_the_same_server_only(server: FlakyProxy) -> None:
    async def move(request: Request, forward: Forward) -> Answer | None:
        if request.target.startswith("/moved"):
            return run_answer()
        status = 301 if "runs/get" in request.target else 308
        return Answer(status, headers={"location": f"/moved{request.target}"})

    server.rule = move
    async with RestTracking(server.url) as tracking:
        assert (await tracking.get_run("r1")).run_id == "r1"
        assert (await tracking.create_run("0", name=None, tags={})).run_id == "r1"
        moved = [(request.method, request.target) for request in server.requests if "/moved" in request.target]
        assert moved[1] == ("POST", "/moved/api/2.0/mlflow/runs/create")
        assert server.requests[-1].body == server.requests[-2].body
        for status, place in ((302, "/login"), (308, "http://elsewhere.invalid/x")):
            server.rule = answer_with(Answer(status, headers={"location": place}))
            with pytest.raises(TrackingError, match=f"redirects runs/create to {place}: give the URI of the server"):
                await tracking.create_run("0", name=None, tags={})


async def test_an_older_server_that_refuses_long_values(server: FlakyProxy) -> None:
    logged: list[list[int]] = []

    async def refuse_more_than_500(request: Request, forward: Forward) -> Answer | None:
        body = json.loads(request.body)
        lengths = [len(pair["value"]) for pair in body["params"] + body["tags"]]
        logged.append(lengths)
        if max(len(pair["value"]) for pair in body["params"]) > 500:
            return Answer(
                400, b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "had length 7000, which exceeded"}'
            )
        return Answer(200, b"{}")

    server.rule = refuse_more_than_500
    async with RestTracking(server.url) as tracking:
        await tracking.log("r1", params={"long": "x" * 7000, "short": "y"}, tags={"t": "z"})
        assert logged == [[7000, 1, 1], [6000, 1, 1], [500, 1, 1]]
        server.rule = answer_with(Answer(400, b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "bad name"}'))
        with pytest.raises(TrackingError, match="bad name"):
            await tracking.log("r1", params={"a": "1"})


async def test_mistakes_in_the_settings_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for uri, text in (("http://", "names no host"), ("http://ada:secret@host:port", "http://.*@host:port.* is wrong")):
        with pytest.raises(UsageError, match=text) as caught:
            open_tracking(uri)
        assert "secret" not in str(caught.value)
    settings = {
        "MLFLOW_TRACKING_AUTH": ("kubernetes", "cannot use mlflow's authentication plugins"),
        "MLFLOW_TRACKING_AWS_SIGV4": ("true", "cannot sign requests for AWS"),
        "MLFLOW_TRACKING_SERVER_CERT_PATH": (str(tmp_path / "no.pem"), "cannot be loaded from .*no.pem"),
        "MLFLOW_TRACKING_CLIENT_CERT_PATH": (str(tmp_path / "no.pem"), "cannot be loaded from .*no.pem"),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": ("soon", "MLFLOW_HTTP_REQUEST_TIMEOUT='soon'"),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": ("-1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES='-1'"),
    }
    for variable, (value, text) in settings.items():
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            with pytest.raises((TrackingError, UsageError), match=text):
                async with open_tracking("http://127.0.0.1:1"):
                    pass
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path))
    with pytest.raises(UsageError, match="contradict each other"):
        async with open_tracking("http://127.0.0.1:1"):
            pass


async def test_a_client_that_is_not_open_says_so() -> None:
    with pytest.raises(
        TrackingError,
        match="use it, or a handle of the Fleet that has it, inside `async with`",
    ):
        await RestTracking("http://127.0.0.1:1").get_run("r1")


async def test_proxies_are_not_used_for_loopback(server: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    server.rule = answer_with(run_answer())
    async with RestTracking(server.url) as tracking:
        assert (await tracking.get_run("r1")).run_id == "r1"


async def test_mlflows_limit_of_retries_is_kept(server: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    server.rule = answer_with(Answer(503))
    async with RestTracking(server.url) as tracking:
        with pytest.raises(TrackingError, match=r"503 \(tried 3 times"):
            await tracking.get_run("r1")
    assert len(server.requests) == 3


async def test_a_server_that_asks_for_a_long_wait_is_not_waited_for_in_vain(server: FlakyProxy) -> None:
    server.rule = answer_with(Answer(429, b"{}", {"retry-after": "3600"}))
    async with RestTracking(server.url) as tracking:
        with pytest.raises(TrackingError, match="429"):
            await tracking.get_run("r1")
    assert len(server.requests) == 1


async def test_an_own_certificate_authority_and_client_certificate(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "both.pem")
    context.load_verify_locations(certificates / "certificate.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    async with FlakyProxy(tls=context).listen() as server:
        server.rule = answer_with(run_answer())
        async with RestTracking(server.url) as tracking:
            with pytest.raises(TrackingError, match=r"is not trusted: .*MLFLOW_TRACKING_SERVER_CERT_PATH"):
                await tracking.get_run("r1")
        monkeypatch.setenv("MLFLOW_TRACKING_CLIENT_CERT_PATH", str(certificates / "both.pem"))
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificates / "certificate.pem"))
        async with RestTracking(server.url) as tracking:
            assert (await tracking.get_run("r1")).run_id == "r1"
        monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
        monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
        async with RestTracking(server.url) as tracking:
            assert (await tracking.get_run("r1")).run_id == "r1"


async def test_https_to_a_server_that_speaks_http(mlflow_server: MlflowServer) -> None:
    async with RestTracking(mlflow_server.url.replace("http:", "https:")) as tracking:
        with pytest.raises(TrackingError, match="is it http:// rather than https://"):
            await tracking.get_run("r1")


@pytest.fixture
async def workspace(mlflow_server: MlflowServer) -> AsyncIterator[FlakyProxy]:
    """An MLflow server that asks for a bearer token, as a Databricks workspace does."""

    async def check(request: Request, forward: Forward) -> Answer | None:
        if request.headers.get("authorization") != "Bearer dapi-secret-token":
            return Answer(401, b'{"error_code": "UNAUTHENTICATED", "message": "invalid token"}')
        return await forward()

    async with FlakyProxy(mlflow_server.url).listen() as listening:
        listening.rule = check
        yield listening


async def test_databricks_by_environment(workspace: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABRICKS_HOST", f"{workspace.url}/")
    monkeypatch.setenv("DATABRICKS_TOKEN", "dapi-secret-token")
    async with open_tracking("databricks") as tracking:
        run = await tracking.create_run("0", name=None, tags={})
        await tracking.update_run(run.run_id, RunStatus.FINISHED)
        plain, secret = await tracking.environ()
    assert plain == {"MLFLOW_TRACKING_URI": "databricks", "DATABRICKS_HOST": workspace.url}
    assert secret == {"DATABRICKS_TOKEN": "dapi-secret-token"}
    assert {request.target.split("?")[0] for request in workspace.requests} == {
        "/api/2.0/mlflow/runs/create",
        "/api/2.0/mlflow/runs/update",
    }


async def test_databricks_by_profile(workspace: FlakyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "databrickscfg"
    file.write_text(
        "[DEFAULT]\nhost = http://127.0.0.1:1\ntoken = x\n"
        f"[team]\nhost = {workspace.url}\ntoken = dapi-secret-token\n"
        f"[wrong]\nhost = {workspace.url}\ntoken = no-token\n"
    )
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(file))
    async with open_tracking("databricks://team") as tracking:
        assert (await tracking.create_run("0", name=None, tags={})).run_id
        assert (await tracking.environ())[1] == {"DATABRICKS_TOKEN": "dapi-secret-token"}
    async with open_tracking("databricks://wrong") as tracking:
        with pytest.raises(TrackingError, match=r"401: UNAUTHENTICATED invalid token; check DATABRICKS_HOST"):
            await tracking.create_run("0", name=None, tags={})
    with pytest.raises(TrackingError, match="has no profile 'nobody'; it has: DEFAULT, team, wrong"):
        async with open_tracking("databricks://nobody"):
            pass


async def test_databricks_by_another_kind_of_login(workspace: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("databricks") is None:
        missing("databricks-sdk", "pip install 'mlfleet[databricks]'")

    async def issue(request: Request, forward: Forward) -> Answer | None:
        # What a workspace tells about itself, and about where tokens are issued.
        if request.target == "/.well-known/databricks-config":
            return Answer(200, json.dumps({"oidc_endpoint": f"{workspace.url}/oidc"}).encode())
        if "oauth-authorization-server" in request.target:
            endpoints = {"authorization_endpoint": f"{workspace.url}/a", "token_endpoint": f"{workspace.url}/token"}
            return Answer(200, json.dumps(endpoints).encode(), {"content-type": "application/json"})
        if request.target == "/token":
            token = {"access_token": "dapi-secret-token", "token_type": "Bearer", "expires_in": 3600}
            return Answer(200, json.dumps(token).encode(), {"content-type": "application/json"})
        if "/api/2.0/mlflow/" not in request.target:
            return Answer(404, b"{}")
        return await check(request, forward)

    assert workspace.rule is not None
    check, workspace.rule = workspace.rule, issue
    monkeypatch.setenv("DATABRICKS_HOST", workspace.url)
    monkeypatch.setenv("DATABRICKS_CLIENT_ID", "robot")
    monkeypatch.setenv("DATABRICKS_CLIENT_SECRET", "robot-secret")
    async with open_tracking("databricks") as tracking:
        assert (await tracking.create_run("0", name=None, tags={})).run_id
        assert await tracking.search_runs(["0"])
        plain, secret = await tracking.environ()
    assert workspace.count("/token") == 1
    assert plain["DATABRICKS_CLIENT_ID"] == "robot"
    assert secret == {"DATABRICKS_CLIENT_SECRET": "robot-secret"}


async def test_databricks_without_any_login_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(TrackingError, match=r"DATABRICKS_HOST|no way to log in"):
        async with open_tracking("databricks"):
            pass
    with pytest.raises(UsageError, match="secret scope, which only a Databricks notebook can read"):
        open_tracking("databricks://scope:prefix")

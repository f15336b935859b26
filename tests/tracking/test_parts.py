"""The pure parts of tracking: URIs, batches, retries, MLflow's JSON; and the fake for people's own tests."""

from __future__ import annotations

import contextlib
import math
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfleet.errors import MlfleetError, TrackingError, UsageError
from mlfleet.runs import Outcome, RunStatus
from mlfleet.testing import FakeTracking
from mlfleet.tracking import Credentials, EmbeddedTracking, RestTracking, Tracking, default_uri, open_tracking
from mlfleet.tracking.auth import split_userinfo
from mlfleet.tracking.base import failure_tags
from mlfleet.tracking.locations import ModelRef, absolute_uri, join, parse_model_uri, parse_run_uri, safe_path
from mlfleet.tracking.models import batches, run_info, shortened


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("http://host:5000", RestTracking),
        ("HTTPS://host/prefix/", RestTracking),
        ("databricks", RestTracking),
        ("databricks://profile", RestTracking),
        ("sqlite:///x.db", EmbeddedTracking),
        ("postgresql://u:p@h/d", EmbeddedTracking),
        ("file:///x", EmbeddedTracking),
        ("./mlruns", EmbeddedTracking),
        (Path("mlruns"), EmbeddedTracking),
    ],
)
async def test_the_uri_decides(uri: str | Path, kind: type[Tracking], monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_tracking(uri), kind)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(uri))
    assert isinstance(open_tracking(), kind)


def test_without_a_uri_the_default_of_mlflow_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "mlruns" / ".trash").mkdir(parents=True)
    (tmp_path / "mlruns" / "1").mkdir()
    assert default_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "mlruns" / "1" / "meta.yaml").touch()
    assert default_uri() == (tmp_path / "mlruns").as_uri()


def test_a_relative_store_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///a/b.db?timeout=5") == f"sqlite:///{tmp_path}/a/b.db?timeout=5"
    assert absolute_uri("mlruns") == (tmp_path / "mlruns").as_uri()
    assert absolute_uri("file:mlruns") == (tmp_path / "mlruns").as_uri()
    for same in ("sqlite:////abs/b.db", "sqlite://", "sqlite:///:memory:", "postgresql://h/d", "plugin://x"):
        assert absolute_uri(same) == same


def test_credentials_are_removed_from_the_url() -> None:
    assert split_userinfo("http://ada:p%40ss@[::1]:5000/a/") == ("http://[::1]:5000/a", Credentials("ada", "p@ss"))
    assert split_userinfo("https://host") == ("https://host", Credentials())


def test_credentials_show_no_secret() -> None:
    assert "secret" not in repr(Credentials("ada", "secret", "secret-token"))


def test_run_and_model_uris_are_parsed() -> None:
    assert parse_run_uri("runs:/abc/a//b/./c/").path == "a/b/c"
    assert parse_model_uri("models:/m y/3/x") == ModelRef(name="m y", version="3", path="x")
    assert parse_model_uri("models:/m/Production") == ModelRef(name="m", stage="Production")
    assert parse_model_uri("models:/m@champion/a/b") == ModelRef(name="m", alias="champion", path="a/b")
    assert parse_model_uri("models:/m-0123abc/a/b") == ModelRef(model_id="m-0123abc", path="a/b")
    assert join("s3://bucket/a?x=1", "b/c") == "s3://bucket/a/b/c?x=1"


SCHEMES = ("", "http://", "runs:/", "models:/", "databricks://", "sqlite:///", "file:", "mlflow-artifacts:/", "//")
URIS = st.builds(str.__add__, st.sampled_from(SCHEMES), st.text("[]:/@%#?.\\ab0 \0\n٣") | st.text())


@given(URIS)
def test_any_uri_raises_only_mlfleet_errors(text: str) -> None:
    for parse in (
        parse_run_uri,
        parse_model_uri,
        lambda uri: safe_path(uri, uri),
        split_userinfo,
        open_tracking,
        absolute_uri,
    ):
        with contextlib.suppress(MlfleetError):
            parse(text)


@given(st.text())
def test_a_safe_path_stays_inside(text: str) -> None:
    try:
        path = safe_path(text, "x")
    except UsageError:
        return
    inside = Path("/root/folder") / path
    assert ".." not in inside.parts
    assert inside.is_relative_to("/root/folder")


@given(st.integers(0, 350), st.integers(0, 350))
def test_batches_hold_everything_once_and_no_more_than_the_limit(params: int, tags: int) -> None:
    parts = list(batches({str(n): "p" for n in range(params)}, {str(n): "t" for n in range(tags)}))
    assert sum(len(some) for some, _ in parts) == params
    assert sum(len(some) for _, some in parts) == tags
    assert all(max(len(left), len(right)) <= 100 for left, right in parts)
    assert len(parts) == math.ceil(max(params, tags) / 100)


def test_long_values_are_cut_and_named() -> None:
    assert shortened({"a": "xxxx", "b": "x"}, {"c": "yyyy"}, (3, 2)) == (
        {"a": "xxx", "b": "x"},
        {"c": "yy"},
        ["a", "c"],
    )


def test_a_run_of_any_version_of_mlflow_is_understood() -> None:
    info = {"run_uuid": "r", "experiment_id": "0", "status": "FINISHED", "artifact_uri": "u"}
    data = {
        "tags": [{"key": "mlflow.runName", "value": "old"}, {"key": "empty"}],
        "metrics": [{"key": "loss", "value": "NaN"}, {"key": "steps", "value": 3}],
    }
    run = run_info({"info": info, "data": data})
    assert (run.run_id, run.name, run.status, run.tags["empty"]) == ("r", "old", RunStatus.FINISHED, "")
    assert math.isnan(run.metrics["loss"])
    assert run.metrics["steps"] == 3.0
    with pytest.raises(TrackingError, match="not understood"):
        run_info({"info": {**info, "status": "DREAMING"}})


def test_the_error_survives_a_process_pool() -> None:
    error = pickle.loads(pickle.dumps(TrackingError("text", uri="u", status=404, code="C")))
    assert (str(error), error.uri, error.status, error.code) == ("text", "u", 404, "C")


async def test_the_fake_records_calls_and_fails_on_demand(tmp_path: Path) -> None:
    tracking = FakeTracking()
    async with tracking:
        experiment = await tracking.experiment_id("e")
        assert await tracking.experiment_id("e") == experiment
        run = await tracking.create_run(experiment, name="n", tags={"a": "1"})
        await tracking.log(run.run_id, params={"p": "1"}, tags={"b": "2"})
        await tracking.update_run(run.run_id, RunStatus.FINISHED)
        (tmp_path / "out.log").write_text("hello")
        await tracking.log_artifact(run, tmp_path / "out.log", "logs")
        (tmp_path / "here").mkdir()
        assert (await tracking.download(f"runs:/{run.run_id}/logs/out.log", tmp_path / "here")).read_text() == "hello"
        assert [
            found.run_id for found in await tracking.search_runs([experiment], "tags.a = '1' and params.p = '1'")
        ] == [run.run_id]
        tracking.fail = lambda method: TrackingError("down") if method == "update_run" else None
        with pytest.raises(TrackingError, match="down"):
            await tracking.update_run(run.run_id, RunStatus.KILLED)
        with pytest.raises(TrackingError, match="cannot change"):
            await tracking.log(run.run_id, params={"p": "2"})
    recorded = tracking.runs[run.run_id]
    assert recorded.statuses == [RunStatus.RUNNING, RunStatus.FINISHED]
    assert recorded.artifacts == {"logs/out.log": b"hello"}
    assert tracking.requests["update_run"] == 2


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("exit code 1: \x1b]0;owned\x07\x1b[31mred\r\nnext\tline\u202e", "exit code 1: red next line"),
        (
            "cannot pull https://me:pass@registry.invalid/x?sig=abc",
            "cannot pull https://***@registry.invalid/x?sig=***",
        ),
        ("the key is correct-horse, or battery-staple", "the key is ***, or ***"),
        ("x" * 496 + "correct-horse", "x" * 496 + "***"),
        ("y" * 2000, "y" * 499 + "…"),
        ("exit code 1", "exit code 1"),
        ("the folder /na\udcffme \N{GRINNING FACE}", "the folder /na?me \N{GRINNING FACE}"),
    ],
)
def test_the_reason_of_a_failure_becomes_a_short_clean_line_without_secrets(reason: str, told: str) -> None:
    secrets = ["correct-horse\nbattery-staple", "correct-horse", "1"]
    tags = failure_tags(Outcome(RunStatus.FAILED, reason=reason), secrets)
    assert tags == {"mlfleet.reason": told, "mlfleet.failure_kind": "failure"}


def test_a_run_that_others_cancelled_has_a_reason_but_no_kind() -> None:
    reason = "cancelled in Databricks (USER_CANCELED)"
    assert failure_tags(Outcome(RunStatus.KILLED, reason=reason)) == {"mlfleet.reason": reason}
    assert failure_tags(Outcome(RunStatus.KILLED, reason="cancelled")) == {}
    assert failure_tags(Outcome(RunStatus.FINISHED)) == {}

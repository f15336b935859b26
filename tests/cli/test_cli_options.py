"""How the options of the command line are read, and which exit code and place to look follow."""

from __future__ import annotations

import contextlib
import signal

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfleet._cli.options import duration, read_config, read_pairs
from mlfleet._cli.output import exit_code, where_to_look
from mlfleet.errors import (
    BackendNotFound,
    EnvironmentSetupError,
    ExecutionException,
    FetchError,
    MlfleetError,
    ParameterError,
    RunTimeout,
    SpecError,
    SubmitError,
    TrackingError,
    UsageError,
)
from mlfleet.runs import RunStatus
from mlfleet.tracking import RunInfo


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30),
        ("30s", 30),
        ("1.5", 1.5),
        (".5s", 0.5),
        ("250ms", 0.25),
        ("5m", 300),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("7d", 604800),
        ("2W", 1209600),
        ("0", 0),
        (10.0, 10),
    ],
)
def test_texts_are_read_as_durations(text: str | float, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", " ", "s", "-5", "5x", "1e3", "inf", "nan", "5 minutes", "1:30"])
def test_other_texts_are_not_durations(text: str) -> None:
    with pytest.raises(click.BadParameter, match="give seconds, or a number with a unit"):
        duration(text)


def test_a_duration_has_a_largest_value() -> None:
    assert duration("999999999d") == 999_999_999 * 86400
    for text in ("1000000000d", "9" * 400):
        with pytest.raises(click.BadParameter, match="is longer than 999999999 days"):
            duration(text)


@given(st.text())
def test_any_text_is_a_duration_or_is_refused(text: str) -> None:
    with contextlib.suppress(click.BadParameter):
        assert duration(text) >= 0


def test_pairs_keep_their_order_and_all_after_the_first_equals_sign() -> None:
    pairs = read_pairs("-P", ["b=1", "a=x=y", "c="])
    assert list(pairs.items()) == [("b", "1"), ("a", "x=y"), ("c", "")]


def test_a_flag_needs_no_value() -> None:
    assert read_pairs("-A", ["t", "gpus=all"], flags=True) == {"t": True, "gpus": "all"}


def test_a_configuration_is_a_path_or_json() -> None:
    assert read_config(None) is None
    assert read_config("some/config.json") == "some/config.json"
    assert read_config('{"image": "a", "n": 1}') == {"image": "a", "n": 1}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (UsageError("x"), 2),
        (SpecError("x"), 2),
        (ParameterError("x"), 2),
        (FetchError("x"), 2),
        (BackendNotFound("x"), 2),
        (EnvironmentSetupError("x"), 1),
        (SubmitError("x"), 1),
        (TrackingError("x"), 1),
        (ExecutionException("x"), 1),
        (RunTimeout("x"), 1),
    ],
)
def test_errors_and_signals_have_exit_codes(error: MlfleetError | None, code: int) -> None:
    assert exit_code(error) == code
    assert exit_code(error, signal.SIGINT) == 130


@pytest.mark.parametrize(
    ("tracking", "place"),
    [
        ("http://host:5000", "http://host:5000/#/experiments/7/runs/abc"),
        ("https://host/prefix/", "https://host/prefix/#/experiments/7/runs/abc"),
        ("sqlite:////tmp/a b/mlflow.db", "mlflow ui --backend-store-uri 'sqlite:////tmp/a b/mlflow.db'"),
        ("postgresql://***@host/db", 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'),
        ("databricks://profile", "the experiment 7 in the workspace of databricks://profile"),
    ],
)
def test_the_message_says_where_to_look_at_a_run(tracking: str, place: str) -> None:
    info = RunInfo("abc", "7", "name", RunStatus.FINISHED, "artifacts")
    assert where_to_look(tracking, info) == place

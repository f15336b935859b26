"""The page of a sweep: its numbers are those of the runs, and what runs logged cannot do anything in it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import anyio.to_thread
import pytest

from components.browser import Browser
from components.command_line import mlfleet
from components.html_page import Page
from components.mlflow_server import MlflowServer
from components.projects import write_metric_logger, write_project
from mlfleet import Fleet, Retry, grid
from mlfleet._reporting import SweepReport, load_sweep, render
from mlfleet.errors import UsageError
from mlfleet.runs import STARTED_TAG, RunStatus
from mlfleet.testing import FakeTracking
from mlfleet.tracking import open_tracking

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


async def page_of(report: SweepReport, *, metric: str | None = None) -> Page:
    return Page(await anyio.to_thread.run_sync(partial(render, report, metric=metric)))


@pytest.fixture
async def sweep(mlflow_server: MlflowServer, tmp_path: Path) -> SweepReport:
    """A sweep of six points, one of which fails twice."""
    folder = tmp_path / "reported"
    log = write_metric_logger(folder)
    uri = write_project(
        folder,
        f"[ {{x}} != 3 ] && {log} loss 0.$(({{x}} * 37)) && {log} gain {{x}}",
        parameters="x: string\nmode: string",
    )
    async with Fleet(tracking_uri=mlflow_server.url) as fleet:
        space = grid(x=[1, 2, 3], mode=["a", EVIL])
        retry = Retry(attempts=2, backoff=0)
        async with fleet.sweep(uri, space, name=f"of {tmp_path}", env_manager="local", retry=retry) as running:
            await running.result()
    async with open_tracking(mlflow_server.url) as tracking:
        return await load_sweep(tracking, f"of {tmp_path}", "0")


async def test_the_report_has_the_numbers_of_the_runs(
    mlflow_server: MlflowServer, sweep: SweepReport, tmp_path: Path
) -> None:
    page = await page_of(sweep, metric="loss")
    async with open_tracking(mlflow_server.url) as tracking:
        found = await tracking.search_runs(["0"], f"tags.`mlflow.parentRunId` = '{sweep.info.run_id}'")
    runs = {run.run_id: run for run in found}
    rows = page.table()
    assert len(rows) == len(runs) == 8
    links = [row["run"].all("a")[0].attributes["href"] for row in rows]
    assert {link.rpartition("/")[2] for link in links} == set(runs)
    for link, row in zip(links, rows, strict=True):
        run = runs[link.rpartition("/")[2]]
        assert link == f"{mlflow_server.url}/#/experiments/0/runs/{run.run_id}"
        assert row["status"].text == run.status
        assert row["point"].text == run.tags["mlfleet.sweep.index"]
        assert row["attempt"].text == run.tags["mlfleet.sweep.attempt"]
        why = "exit code 1" if run.status == "FAILED" else None
        assert row["status"].attributes.get("title") == run.tags.get("mlfleet.reason") == why
        assert row["x"].text == run.params["x"]
        assert row["mode"].attributes["data-value"] == run.params["mode"]
        for metric in ("loss", "gain"):
            text = row[metric].attributes.get("data-value")
            assert (None if text is None else float(text)) == run.metrics.get(metric)
        assert run.start_time is not None
        assert run.end_time is not None
        waited, ran = (float(row[name].attributes["data-value"]) for name in ("waited", "ran"))
        assert waited + ran == pytest.approx((run.end_time - run.start_time) / 1000)
    assert [row["loss"].text for row in rows if row["point"].text == "0"] == ["0.37"]
    assert "6: 4 finished, 2 failed, 2 earlier attempts" in page.root.text


def test_a_browser_draws_all_runs_and_runs_no_code_of_theirs(
    sweep: SweepReport, browser: Browser, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    file.write_text(render(sweep, metric="loss", goal="max"))
    page = Page(browser(file))
    measured = {run.run_id: run for run in sweep.runs if "loss" in run.metrics}
    assert len(measured) == 4
    assert page.root.all("title")[0].text == f"Sweep {sweep.info.name}"
    assert not page.root.all("img")
    assert len(page.root.all("script")) == 2
    dots = page.root.all("circle")
    for number, name in enumerate(("x", "mode")):
        panel = dots[number * 4 : number * 4 + 4]
        drawn = {dot.attributes["data-run"]: dot.attributes for dot in panel}
        assert {run_id: float(each["data-y"]) for run_id, each in drawn.items()} == {
            run_id: run.metrics["loss"] for run_id, run in measured.items()
        }
        assert all(each["data-x"] == measured[run_id].params[name] for run_id, each in drawn.items())
        # What is higher is drawn higher.
        heights = sorted((float(each["data-y"]), -float(each["cy"])) for each in drawn.values())
        assert heights == sorted(heights, key=lambda pair: pair[1])
    assert {path.attributes["data-run"] for path in page.root.all("path")} == set(measured)
    bars = [rect.attributes["data-run"] for rect in page.root.all("rect")]
    assert set(bars) == {run.run_id for run in sweep.runs}
    best = max(measured.values(), key=lambda run: run.metrics["loss"])
    assert f"with {best.metrics['loss']}" in page.root.text


def test_the_page_needs_nothing_from_elsewhere(sweep: SweepReport) -> None:
    text = render(sweep)
    page = Page(text)
    [policy] = [meta.attributes["content"] for meta in page.root.all("meta") if "http-equiv" in meta.attributes]
    assert policy.startswith("default-src 'none';")
    assert not [
        each for tag in ("script", "img", "link", "iframe") for each in page.root.all(tag) if "src" in each.attributes
    ]
    assert "owned" not in "".join(script.text for script in page.root.all("script")[1:])
    data = json.loads(page.root.all("script")[0].text)
    assert {run["params"]["mode"] for run in data["runs"]} == {"a", EVIL}


async def test_waiting_and_running_are_shown_apart() -> None:
    tracking = FakeTracking()
    parent = await tracking.create_run("0", name="s", tags={"mlfleet.sweep.name": "s", "mlfleet.sweep.space": "{}"})
    for index, wait in enumerate((0, 4000)):
        tags = {"mlfleet.sweep.id": parent.run_id, "mlfleet.sweep.index": str(index)}
        if wait:
            tags[STARTED_TAG] = str(10_000 + wait)
        run = await tracking.create_run("0", name=None, tags=tags, start_time=10_000)
        await tracking.update_run(run.run_id, RunStatus.FINISHED, end_time=16_500)
    rows = (await page_of(await load_sweep(tracking, "s", "0"))).table()
    assert [(row["waited"].text, row["ran"].text) for row in rows] == [("0.0 s", "6.5 s"), ("4.0 s", "2.5 s")]


async def test_tags_that_somebody_else_wrote_harm_no_report() -> None:
    tracking = FakeTracking()
    tags = {"mlfleet.sweep.name": "s", "mlfleet.sweep.space": "[" * 100_000}
    parent = await tracking.create_run("0", name="s", tags=tags)
    for text in ("²", "9" * 5000, "-1", "many"):
        numbers = {"mlfleet.sweep.index": text, "mlfleet.sweep.attempt": text, STARTED_TAG: text}
        await tracking.create_run("0", name=None, tags={"mlfleet.sweep.id": parent.run_id, **numbers}, start_time=1)
    rows = (await page_of(await load_sweep(tracking, "s", "0"))).table()
    assert [(row["point"].text, row["attempt"].text, row["waited"].text) for row in rows] == [("0", "1", "0.0 s")] * 4


async def test_a_sweep_that_has_not_begun_has_a_report_too() -> None:
    tracking = FakeTracking()
    await tracking.create_run("0", name="empty", tags={"mlfleet.sweep.name": "empty", "mlfleet.sweep.space": "{}"})
    page = await page_of(await load_sweep(tracking, "empty", "0"))
    assert page.table() == []
    assert "empty RUNNING" in page.root.text


async def test_other_runs_are_refused() -> None:
    tracking = FakeTracking()
    run = await tracking.create_run("0", name="alone", tags={})
    with pytest.raises(UsageError, match=f"the run {run.run_id} is not a sweep"):
        await load_sweep(tracking, run.run_id, "0")
    with pytest.raises(UsageError, match="there is no sweep 'nothing' in the experiment 0"):
        await load_sweep(tracking, "nothing", "0")


def test_the_command_writes_the_page(
    mlflow_server: MlflowServer, sweep: SweepReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    assert sweep.info.name
    for wanted in (sweep.info.name, sweep.info.run_id):
        done = mlfleet("report", wanted, "-o", "page.html", "--metric", "gain", "--goal", "max", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert (tmp_path / "page.html").read_text() == render(sweep, metric="gain", goal="max")
        (tmp_path / "page.html").unlink()
    wrong = mlfleet("report", sweep.info.name, "--metric", "los", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "no run of the sweep has the metric 'los'; the metrics are: gain, loss" in wrong.stderr
    assert not (tmp_path / "report.html").exists()

"""What notebooks show of runs, events and sweeps: the facts, and nothing that could do anything there."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

import mlfleet
from components.browser import Browser
from components.html_page import Element, Page
from components.mlflow_server import MlflowServer
from components.projects import write_project
from fakes.scripted_server import scripted
from fakes.small_mlflow import SmallMlflow
from mlfleet import (
    Fleet,
    PointResult,
    Report,
    RunEvent,
    RunStatus,
    Stage,
    SweepCounts,
    SweepResult,
    TrackedRun,
    UsageError,
    grid,
)
from mlfleet.testing import FakeTracking

EVIL = "</td></script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
SECRET = "s3://user:pass-word@host/x"


def html(thing: object) -> Page:
    shown = thing._repr_html_()  # type: ignore[attr-defined]
    assert isinstance(shown, str)
    shown.encode()
    page = Page(shown)
    # Nothing but text in boxes, whose colours the theme decides.
    every = [element for tag in page.root.inside for element in _all(tag)]
    assert {element.tag for element in every} <= {
        "a", "b", "div", "span", "table", "tbody", "td", "th", "thead", "tr",
    }  # fmt: skip
    assert not [each for each in every if set(each.attributes) - {"style", "href", "target", "rel"}]
    assert not re.search(r"(?<!-)color:(black|white|#000|#fff)|background(-color)?:(?!none)", shown)
    assert "pass-word" not in shown
    return page


def _all(element: Element) -> list[Element]:
    return [element, *(each for child in element.inside for each in _all(child))]


def rows(table: Element) -> list[list[str]]:
    return [[cell.text for cell in [*row.all("th"), *row.all("td")]] for row in table.all("tr")]


async def test_a_run_is_shown_with_its_facts(tmp_path: Path) -> None:
    mlflow = SmallMlflow()
    uri = write_project(tmp_path / "demo", "test {x} = 1", parameters="x: string\nwhere: string")
    async with scripted(mlflow.script) as server, Fleet(tracking_uri=f"http://{server.place}") as fleet:
        parameters = {"x": EVIL, "where": SECRET}
        run = await fleet.submit(uri, parameters=parameters, env_manager="local")
        assert "queued" in html(run).root.text or "starting" in html(run).root.text
        await run.wait()
    page = html(run)
    async with scripted(mlflow.script) as again, Fleet(tracking_uri=f"http://{again.place}") as other:
        found = await other.get(run.run_id)
        assert isinstance(found, TrackedRun)
        assert f"FAILEDreasonexit code 1MLflow run{run.run_id}" in html(found).root.text
    facts = dict(rows(page.root.all("table")[0]))
    assert page.root.text.startswith(f"Run {run.info.name} FAILED")
    assert facts["reason"] == "exit code 1"
    assert facts["project"] == "demo (main) on local"
    assert facts["parameters"].startswith("x=</td></script><script>document.title")
    assert "***" in facts["parameters"]
    assert [link.attributes["href"] for link in page.root.all("a")] == [
        f"http://{server.place}/#/experiments/0/runs/{run.run_id}"
    ]


async def test_a_run_without_a_server_has_no_link(tmp_path: Path) -> None:
    async with Fleet(tracking=FakeTracking()) as fleet:
        run = await fleet.submit(write_project(tmp_path / "demo", "true"), env_manager="local")
    page = html(run)
    assert page.root.text.startswith(f"Run {run.info.name} FINISHED")
    assert run.run_id in page.root.text
    assert page.root.all("a") == []


def test_an_event_is_shown_in_a_line() -> None:
    event = RunEvent(
        Stage.RETRIED, "demo", run_id="r1", run_name=EVIL, detail=f"exit code 3 {EVIL}", status=RunStatus.FAILED,
        index=7, attempt=2,
    )  # fmt: skip
    text = html(event).root.text
    assert text == f"retried FAILED {EVIL} run=r1 point=7 attempt=2exit code 3 {EVIL}"
    assert "fetching" in html(RunEvent(Stage.FETCHING, f"{SECRET}\udcff")).root.text


def result_of(points: list[PointResult], **facts: object) -> SweepResult:
    counts = SweepCounts(
        total=len(points),
        finished=sum(point.status is RunStatus.FINISHED for point in points),
        failed=sum(point.status is RunStatus.FAILED for point in points),
    )
    status = RunStatus.FAILED if counts.failed else RunStatus.FINISHED
    given = {"name": EVIL, "run_id": "parent", "status": status, "stopped": None, "counts": counts, **facts}
    return SweepResult(results=tuple(points), **given)  # type: ignore[arg-type]


def point(index: int, loss: float | None = None, reason: str | None = None) -> PointResult:
    point = {"x": index, "note": EVIL}
    return PointResult(
        index=index,
        point=point,
        parameters=point,
        status=RunStatus.FAILED if reason else RunStatus.FINISHED,
        run_id=f"run{index}",
        reason=reason,
        seconds=61.0,
        metrics={} if loss is None else {"loss": loss, "accuracy": -loss},
    )


def test_a_sweep_is_shown_with_its_best_points_and_its_failures() -> None:
    points = [point(index, 100.0 - index) for index in range(12)]
    points += [point(20 + index, reason=f"{EVIL} of {SECRET}") for index in range(11)]
    result = result_of(points, metric="loss", stopped=f"too much {EVIL}", tracking_uri="http://host", experiment_id="5")
    page = html(result)
    best, failed = (rows(table) for table in page.root.all("table"))
    assert f"Sweep {EVIL} FAILED 12 finished, 11 failed" in page.root.text
    assert f"ended early: too much {EVIL}" in page.root.text
    assert "lowest loss" in page.root.text
    assert best[0] == ["loss", "x", "note", "time", "run"]
    assert [row[:2] for row in best[1:]] == [[f"{89 + index}", f"{11 - index}"] for index in range(10)]
    assert best[1][3:] == ["1m 01s", "run11"]
    assert [link.attributes["href"] for link in page.root.all("a")][:2] == [
        "http://host/#/experiments/5/runs/parent",
        "http://host/#/experiments/5/runs/run11",
    ]
    assert "11 did not finish, the first 10" in page.root.text
    assert len(failed) == 11
    assert failed[1][:2] == ["20", "20"]
    assert failed[1][3:5] == ["FAILED", f"{EVIL} of s3://***@host/x"]


def test_the_good_values_of_a_sweep_may_be_the_high_ones() -> None:
    points = [point(index, float(index)) for index in range(3)]
    page = html(result_of(points, metric="loss", goal="max"))
    assert "highest loss" in page.root.text
    assert [row[0] for row in rows(page.root.all("table")[0])] == ["loss", "2", "1", "0"]
    assert "lowest accuracy" in html(result_of(points)).root.text  # the first by name
    assert "no finished run has the metric recall" in html(result_of(points, metric="recall")).root.text
    assert html(result_of([point(0)])).root.all("table") == []


def test_a_browser_runs_nothing_of_theirs(browser: Browser, tmp_path: Path) -> None:
    shown = result_of([point(0, 1.0), point(1, reason=EVIL)])._repr_html_()
    file = tmp_path / "output.html"
    file.write_text(f"<!doctype html><title>safe</title>{shown}{Report(f'<p>{EVIL}</p>')._repr_html_()}")
    page = Page(browser(file))
    assert page.root.all("title")[0].text == "safe"
    assert [frame.attributes["sandbox"] for frame in page.root.all("iframe")] == [
        "allow-scripts allow-popups allow-popups-to-escape-sandbox"
    ]


async def test_the_report_of_a_result_is_that_of_the_command(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "test {x} != 2", parameters="x: string")
    result = await mlfleet.sweep_async(uri, grid(x=[1, 2]), tracking_uri=mlflow_server.url, env_manager="local")
    report = await asyncio.to_thread(result.report)
    page = Page(report.html)
    assert [(row["point"].text, row["status"].text, row["x"].text) for row in page.table()] == [
        ("0", "FINISHED", "1"),
        ("1", "FAILED", "2"),
    ]
    saved = await asyncio.to_thread(report.save, tmp_path / "report.html")
    assert await asyncio.to_thread(saved.read_text) == report.html
    [frame] = Page(report._repr_html_()).root.all("iframe")
    assert frame.attributes["srcdoc"] == report.html
    assert mlflow_server.url in html(result).root.all("a")[0].attributes["href"]
    with pytest.raises(UsageError, match="no run of the sweep has the metric 'loss'"):
        await asyncio.to_thread(lambda: result.report(metric="loss"))


async def test_a_tracking_object_cannot_be_opened_again(tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "true", parameters="x: string")
    async with (
        Fleet(tracking=FakeTracking()) as fleet,
        fleet.sweep(uri, grid(x=[1]), env_manager="local") as sweep,
    ):
        result = await sweep.result()
    with pytest.raises(UsageError, match=f"mlfleet report {result.run_id} --tracking-uri URI"):
        result.report()

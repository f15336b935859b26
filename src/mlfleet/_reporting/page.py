"""The report as self-contained HTML. Values that runs logged are data in it, never markup and never code."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from typing import Any

from mlfleet._engine.options import Goal
from mlfleet._reporting.sweep import ReportedRun, SweepReport
from mlfleet._text.html import link
from mlfleet._text.plain import duration_text
from mlfleet.errors import UsageError
from mlfleet.runs import RunStatus
from mlfleet.tracking.links import run_url

__all__ = ["render"]


def render(report: SweepReport, *, metric: str | None = None, goal: Goal = "min") -> str:
    """Return the report about a sweep as HTML. Blocking; takes seconds for thousands of runs.

    Args:
        report: The sweep and its runs.
        metric: The metric that the page shows first; None for the first one by name.
        goal: Whether low (``min``) or high (``max``) values are the best.

    Raises:
        UsageError: None of the runs has that metric.
    """
    if metric is not None and metric not in report.metrics:
        known = ", ".join(report.metrics) or "none"
        raise UsageError(f"no run of the sweep has the metric {metric!r}; the metrics are: {known}")
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The browser runs only the script with this hash, and loads nothing from elsewhere.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return _PAGE.format(
        policy=policy,
        title=escape(f"Sweep {report.info.name}"),
        style=_asset("report.css"),
        head=_head(report),
        table=_table(report),
        data=_embedded(_data(report, metric, goal)),
        script=script,
    )


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{head}
<main id="charts"></main>
{table}
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return (files("mlfleet._reporting") / name).read_text(encoding="utf-8")


def _embedded(data: Any) -> str:
    """Return JSON that an HTML parser cannot take for markup."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(report: SweepReport, metric: str | None, goal: Goal) -> dict[str, Any]:
    return {
        "metrics": report.metrics,
        "params": report.varied,
        "metric": metric or next(iter(report.metrics), None),
        "goal": goal,
        "runs": [
            {
                "id": run.run_id,
                "index": run.index,
                "attempt": run.attempt,
                "latest": run.latest,
                "status": run.status.value,
                "created": run.created,
                "started": run.started,
                "ended": run.ended,
                "params": {name: run.params[name] for name in report.varied if name in run.params},
                "metrics": dict(run.metrics),
            }
            for run in report.runs
        ],
    }


# ---- the head -------------------------------------------------------------------------------------------------------


def _head(report: SweepReport) -> str:
    info = report.info
    url = run_url(report.tracking, info.experiment_id, info.run_id)
    facts = [
        ("points", _counts(report)),
        ("when", _when(report)),
        ("project", escape(info.tags.get("mlflow.source.name", ""))),
        ("space", escape(_space(report.space))),
        ("fixed", escape(", ".join(f"{name} = {value}" for name, value in report.fixed.items()))),
        ("ended early", escape(report.stopped or "")),
        ("MLflow run", link(info.run_id, url) + f" in {escape(report.tracking)}"),
    ]
    rows = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts if text)
    return f"<header><h1>{escape(info.name)} {_status(info.status)}</h1><dl>{rows}</dl></header>"


def _counts(report: SweepReport) -> str:
    latest = [run for run in report.runs if run.latest]
    counts = [(status, sum(run.status is status for run in latest)) for status in RunStatus]
    parts = [f"{count} {status.value.lower()}" for status, count in counts if count]
    again = len(report.runs) - len(latest)
    return ", ".join(
        [f"{len(latest)}: " + ", ".join(parts) if parts else "none"] + ([f"{again} earlier attempts"] * bool(again))
    )


def _when(report: SweepReport) -> str:
    began = [run.created for run in report.runs if run.created is not None]
    ended = [run.ended for run in report.runs if run.ended is not None]
    if not began:
        return ""
    first = datetime.fromtimestamp(min(began) / 1000, UTC)
    text = f"{first:%Y-%m-%d %H:%M:%S} UTC"
    return f"{text}, {_seconds((max(ended) - min(began)) / 1000)}" if ended else text


def _space(space: Any) -> str:
    match space:
        case {"grid": dict(axes)}:
            sizes = " × ".join(str(len(values)) for values in axes.values())
            return f"grid of {sizes}: " + ", ".join(axes)
        case {"sample": count, "seed": seed, "axes": dict(axes)}:
            return f"{count} random points (seed {seed}): " + ", ".join(f"{name} {axis}" for name, axis in axes.items())
        case {"rows": rows}:
            return f"rows: {rows}"
        case {"zip": dict(axes)}:
            return "together: " + ", ".join(axes)
        case _:
            return json.dumps(space) if space else ""


# ---- the table ------------------------------------------------------------------------------------------------------


def _table(report: SweepReport) -> str:
    metrics = [name for name in report.metrics if not name.startswith("system/")]
    heads = [("point", "n"), ("attempt", "n"), ("status", "t"), ("run", "t")]
    heads += [(name, "p") for name in report.varied] + [(name, "n") for name in metrics]
    heads += [("waited", "n"), ("ran", "n")]
    head = "".join(f'<th scope="col" class="{kind}"><button>{escape(name)}</button></th>' for name, kind in heads)
    body = "\n".join(_row(report, run, metrics) for run in report.runs)
    return (
        '<section id="runs"><h2>Runs</h2><div class="wide"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div></section>"
    )


def _row(report: SweepReport, run: ReportedRun, metrics: Sequence[str]) -> str:
    url = run_url(report.tracking, report.info.experiment_id, run.run_id)
    name = link(run.name or run.run_id, url)
    reason = f' title="{escape(f"after: {run.reason}")}"' if run.reason else ""
    failure = f' title="{escape(run.failure)}"' if run.failure else ""
    cells = [
        _cell(run.index, str(run.index)),
        f'<td class="n" data-value="{run.attempt}"{reason}>{run.attempt}</td>',
        f'<td data-value="{run.status.value}"{failure}>{_status(run.status)}</td>',
        f'<td data-value="{escape(run.name)}">{name}</td>',
    ]
    for param in report.varied:
        text = run.params.get(param)
        cells.append("<td></td>" if text is None else f'<td data-value="{escape(text)}">{escape(_short(text))}</td>')
    for metric in metrics:
        value = run.metrics.get(metric)
        cells.append("<td></td>" if value is None else _cell(value, f"{value:.6g}"))
    for seconds in (run.waited, run.ran):
        cells.append("<td></td>" if seconds is None else _cell(seconds, _seconds(seconds)))
    return f'<tr data-run="{escape(run.run_id)}">{"".join(cells)}</tr>'


def _cell(value: float, text: str) -> str:
    return f'<td class="n" data-value="{value!r}">{text}</td>'


def _status(status: RunStatus) -> str:
    return f'<span class="status {status.value}">{status.value}</span>'


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return duration_text(seconds)

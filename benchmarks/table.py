"""Rewrite the table of figures in README.md from the files in results/.

Each of these files was written by a script's ``--json``. A figure above its limit is marked.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from _figures import LIMITS

HERE = Path(__file__).parent
BEGIN, END = "<!-- table.py: begin -->", "<!-- table.py: end -->"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the result files, sorted by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def render(results: list[dict[str, Any]]) -> str:
    """Return the table in Markdown: the figures that have a limit in the order of `LIMITS`, then the others."""
    header = ("figure", "measured", "at most", "by", "Python", "CPUs", "rounds")
    order = {figure: position for position, figure in enumerate(LIMITS)}
    recorded = {figure for result in results for figure in result["figures"]}
    rows = [
        (order[figure], (figure, "not recorded", f"{limit:g}", "", "", "", ""))
        for figure, limit in LIMITS.items()
        if figure not in recorded
    ]
    for result in results:
        about = (f"`{result['name']}`", result["python"], str(result["cpus"]), str(result["rounds"]))
        for figure, each in result["figures"].items():
            value, limit = each["value"], each["limit"]
            measured = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
            if limit is None:
                cells = (figure, measured, "")
            else:
                cells = (figure, measured if value <= limit else f"**{measured}** (above)", f"{limit:g}")
            rows.append((order.get(figure, len(order)), (*cells, *about)))
    rows.sort(key=lambda row: row[0])
    lines = [header, ("---", "---:", "---:", "---", "---", "---:", "---:"), *(cells for _, cells in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rewrite(text: str, table: str) -> str:
    """Return the page with the table between the markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the page has no place for the table: {BEGIN} and {END} on lines of their own")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the table is not up to date")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="the folder of the result files")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md", help="the page that has the table")
    options = parser.parse_args()
    text = options.readme.read_text()
    made = rewrite(text, render(read_results(options.results)))
    if not options.check:
        options.readme.write_text(made)
    elif made != text:
        sys.exit(f"{options.readme} does not show {options.results}: run 'python benchmarks/table.py'")


if __name__ == "__main__":
    main()

"""The report about a sweep, as its result gives it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Report"]


@dataclass(frozen=True, slots=True)
class Report:
    """The report about a sweep: one HTML page that needs no network. A notebook shows it.

    Attributes:
        html: The page.
    """

    html: str = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, completely or not at all, and return the path of the file. Blocking.

        Raises:
            OSError: The file cannot be written.
        """
        file = Path(path)
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            unfinished.write_text(self.html, encoding="utf-8", errors="replace")
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
        return file

    def _repr_html_(self) -> str:
        from html import escape

        # A page of its own: its styles must not reach the notebook, and its script must not reach the notebook's page.
        return (
            f'<iframe srcdoc="{escape(self.html)}" title="Report about a sweep" width="100%" height="800" '
            'sandbox="allow-scripts allow-popups allow-popups-to-escape-sandbox" style="border:0"></iframe>'
        )

"""Running Python scripts, for tests of a whole program."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

__all__ = ["Script"]


class Script:
    """A running Python script that tracks to a sqlite file."""

    def __init__(self, folder: Path, code: str, store: str) -> None:
        self.database = store.removeprefix("sqlite:///")
        environ = {**os.environ, "MLFLOW_TRACKING_URI": store}
        (folder / "script.py").write_text(textwrap.dedent(code))
        self.process = subprocess.Popen(
            [sys.executable, "script.py"],
            cwd=folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=50)
        return self.process.returncode, out, err

    def statuses(self) -> list[str]:
        with sqlite3.connect(self.database) as connection:
            rows = connection.execute("select status from runs order by start_time").fetchall()
        connection.close()
        return [row[0] for row in rows]

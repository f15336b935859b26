"""A small Python package in a folder, whose build needs no network and can be watched, held up and made to fail."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from anyio import to_thread

_PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "{name}"
version = "{version}"
"""

# PEP 517, https://peps.python.org/pep-0517/
_BACKEND = """\
import base64
import hashlib
import os
import zipfile
from pathlib import Path

NAME, VERSION = "{name}", "{version}"
HERE = Path(__file__).parent


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    with open(HERE / "builds.log", "a") as log:
        log.write(f"{{os.getpid()}}\\n")
    if (HERE / "broken").exists():
        raise SystemExit((HERE / "broken").read_text())
    if (HERE / "gate").exists():
        with open(HERE / "gate") as gate:
            gate.read()
    info = f"{{NAME}}-{{VERSION}}.dist-info"
    files = {{
        f"{{NAME}}.py": (HERE / f"{{NAME}}.py").read_text(),
        f"{{info}}/METADATA": f"Metadata-Version: 2.1\\nName: {{NAME}}\\nVersion: {{VERSION}}\\n",
        f"{{info}}/WHEEL": "Wheel-Version: 1.0\\nGenerator: tests\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }}
    if (HERE / "entry_points.txt").exists():
        files[f"{{info}}/entry_points.txt"] = (HERE / "entry_points.txt").read_text()
    record = "".join(
        f"{{path}},sha256={{base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip('=')}},{{len(text)}}\\n"
        for path, text in files.items()
    )
    wheel = f"{{NAME}}-{{VERSION}}-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory, wheel), "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{{info}}/RECORD", record + f"{{info}}/RECORD,,\\n")
    return wheel
"""


@dataclass(frozen=True)
class Package:
    """A package with one module of its own name that holds ``VALUE``."""

    folder: Path
    name: str

    @property
    def builds(self) -> int:
        """The number of builds of its wheel that were started."""
        log = self.folder / "builds.log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def set_value(self, value: str) -> None:
        (self.folder / f"{self.name}.py").write_text(f"VALUE = {value!r}\n")

    def break_build(self, reason: str) -> None:
        (self.folder / "broken").write_text(reason)

    def mend(self) -> None:
        (self.folder / "broken").unlink()

    def hold_builds(self) -> None:
        """Let the next builds wait in their middle (see `reached`)."""
        os.mkfifo(self.folder / "gate")

    async def reached(self) -> int:
        """Wait until a build is in its middle; it goes on when the returned descriptor is closed.

        Writing to it raises BrokenPipeError once the process of the build is gone.
        """
        return await to_thread.run_sync(os.open, self.folder / "gate", os.O_WRONLY)

    def let_builds_through(self) -> None:
        """Let builds that start from now on run without waiting; builds that already wait keep waiting."""
        (self.folder / "gate").unlink()


def make_package(folder: Path, name: str = "tinypkg", version: str = "1.0", value: str = "1") -> Package:
    """Create a package in a new folder."""
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(_PYPROJECT.format(name=name, version=version))
    (folder / "backend.py").write_text(_BACKEND.format(name=name, version=version))
    package = Package(folder, name)
    package.set_value(value)
    return package

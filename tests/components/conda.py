"""A real conda assembled from PyPI, and a channel of four packages; needs no network except PyPI.

conda is not a package of PyPI, but conda-lock contains its code. The channel's Python is a link to this interpreter.
"""

from __future__ import annotations

import bz2
import glob
import hashlib
import io
import json
import platform
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from components import missing

_SUBDIR = {"x86_64": "linux-64", "aarch64": "linux-aarch64"}.get(platform.machine(), "linux-64")
_PLACEHOLDER = "/opt/anaconda1anaconda2anaconda3"
_NEEDED = (
    *("pycosat", "pluggy", "tqdm", "boltons>=23", "archspec", "conda-package-handling", "packaging", "platformdirs"),
    *("requests<3", "ruamel.yaml<0.18", "setuptools<81", "truststore", "charset-normalizer"),
)
_CONDARC = """\
default_channels: []
offline: true
solver: classic
auto_update_conda: false
notify_outdated_conda: false
number_channel_notices: 0
repodata_threads: 1
"""


@dataclass(frozen=True)
class Channel:
    """A conda channel in a folder: hello-tool 1.0 and 2.0, python, pip."""

    folder: Path
    python: str

    @property
    def url(self) -> str:
        return self.folder.as_uri()


@pytest.fixture(scope="session")
def conda_channel(tmp_path_factory: pytest.TempPathFactory) -> Channel:
    """The channel."""
    folder = tmp_path_factory.mktemp("channel")
    home = Path(sys.base_prefix)
    # Debian keeps ensurepip's wheels in a folder of its own.
    wheels = sysconfig.get_config_var("WHEEL_PKG_DIR") or home / "lib" / f"python{_short()}" / "ensurepip" / "_bundled"
    bundled = glob.glob(str(Path(wheels) / "pip-*.whl"))
    if not bundled:
        missing("ensurepip's pip", "use a Python that has ensurepip")
    records = [_add(folder, "hello-tool", version, _hello(version)) for version in ("1.0", "2.0")]
    records.append(_add(folder, "python", platform.python_version(), _python(home), links=_python_links(home)))
    records.append(
        _add(folder, "pip", Path(bundled[0]).name.split("-")[1], _pip(Path(bundled[0])), depends=("python",))
    )
    _write_index(folder, dict(records))
    return Channel(folder, platform.python_version())


@pytest.fixture(scope="session")
def conda_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of a conda installation of its own."""
    base = tmp_path_factory.mktemp("conda") / "base"
    venv.create(base, with_pip=True, symlinks=True)
    pip = [str(base / "bin" / "python"), "-m", "pip", "--quiet"]
    try:
        subprocess.run([*pip, "install", *_NEEDED], check=True, capture_output=True)
        subprocess.run(
            [*pip, "download", "--no-deps", "-d", str(base / "wheels"), "conda-lock==4.0.3"],
            check=True,
            capture_output=True,
        )
    except subprocess.CalledProcessError as error:
        missing("conda", f"PyPI must be reachable for pip\n{error.stderr.decode()}")
    _unpack_conda(base)
    return base / "bin" / "conda"


def _unpack_conda(base: Path) -> None:
    """Extract conda from conda-lock's wheel, and write the files that its installer would write."""
    packages = base / "lib" / f"python{_short()}" / "site-packages"
    vendored = "conda_lock/_vendor/conda/"
    with zipfile.ZipFile(next((base / "wheels").glob("conda_lock-*.whl"))) as wheel:
        for name in wheel.namelist():
            if name.startswith(vendored) and not name.endswith("/"):
                path = packages / "conda" / name.removeprefix(vendored)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(wheel.read(name).replace(b"conda_lock._vendor.conda", b"conda"))
    (base / "conda-meta").mkdir()
    (base / "conda-meta" / "history").touch()
    (base / ".condarc").write_text(_CONDARC)
    program = base / "bin" / "conda"
    program.write_text(
        f"#!{base}/bin/python\nimport sys\nfrom conda.cli import main\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )
    program.chmod(0o755)


def _short() -> str:
    return ".".join(platform.python_version_tuple()[:2])


Files = Mapping[str, tuple[bytes, int]]


def _hello(version: str) -> Files:
    return {
        "bin/hello-tool": (f"#!/bin/sh\necho hello {version} $CONDA_PREFIX\n".encode(), 0o755),
        "etc/conda/activate.d/hello.sh": (
            b'export HELLO_ACTIVATED=yes\nexport HELLO_FLAGS="-O2 ${HELLO_FLAGS:-}"\nunset HELLO_REMOVED\n',
            0o644,
        ),
    }


def _python(home: Path) -> Files:
    config = f"home = {home}/bin\ninclude-system-site-packages = false\nversion = {platform.python_version()}\n"
    return {
        "pyvenv.cfg": (config.encode(), 0o644),
        f"lib/python{_short()}/site-packages/README.txt": (b"", 0o644),
    }


def _python_links(home: Path) -> Mapping[str, str]:
    return {
        "bin/python": f"{home}/bin/python{_short()}",
        "bin/python3": "python",
        f"bin/python{_short()}": "python",
    }


def _pip(wheel: Path) -> Files:
    with zipfile.ZipFile(wheel) as archive:
        files = {
            f"lib/python{_short()}/site-packages/{name}": (archive.read(name), 0o644)
            for name in archive.namelist()
            if not name.endswith("/")
        }
    script = f"#!{_PLACEHOLDER}/bin/python\nimport sys\nfrom pip._internal.cli.main import main\nsys.exit(main())\n"
    return files | {"bin/pip": (script.encode(), 0o755)}


def _add(
    folder: Path,
    name: str,
    version: str,
    files: Files,
    *,
    depends: Sequence[str] = (),
    links: Mapping[str, str] | None = None,
) -> tuple[str, dict[str, Any]]:
    """Write a package into the channel, and return its file name and its record in the index."""
    build = "0"
    index = {
        "name": name,
        "version": version,
        "build": build,
        "build_number": 0,
        "depends": list(depends),
        "subdir": _SUBDIR,
        "license": "MIT",
        "timestamp": 1700000000000,
    }
    paths = [_path_entry(path, data) for path, (data, _) in files.items()]
    paths += [
        {"_path": path, "path_type": "softlink", "sha256": hashlib.sha256(b"").hexdigest(), "size_in_bytes": 0}
        for path in links or {}
    ]
    info = {
        "info/index.json": json.dumps(index),
        "info/files": "".join(f"{path['_path']}\n" for path in paths),
        "info/paths.json": json.dumps({"paths": paths, "paths_version": 1}),
        "info/about.json": json.dumps({"summary": name}),
    }
    target = folder / _SUBDIR / f"{name}-{version}-{build}.tar.bz2"
    target.parent.mkdir(exist_ok=True)
    with tarfile.open(target, "w:bz2") as archive:
        for path, text in info.items():
            _add_file(archive, path, text.encode(), 0o644)
        for path, (data, mode) in files.items():
            _add_file(archive, path, data, mode)
        for path, link in (links or {}).items():
            entry = tarfile.TarInfo(path)
            entry.type, entry.linkname = tarfile.SYMTYPE, link
            archive.addfile(entry)
    raw = target.read_bytes()
    sums = {"md5": hashlib.md5(raw).hexdigest(), "sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
    return target.name, index | sums


def _path_entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "_path": path,
        "path_type": "hardlink",
        "sha256": hashlib.sha256(data).hexdigest(),
        "size_in_bytes": len(data),
    }
    if _PLACEHOLDER.encode() in data:
        entry |= {"file_mode": "text", "prefix_placeholder": _PLACEHOLDER}
    return entry


def _add_file(archive: tarfile.TarFile, path: str, data: bytes, mode: int) -> None:
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode, entry.mtime = len(data), mode, 1700000000
    archive.addfile(entry, io.BytesIO(data))


def _write_index(folder: Path, records: Mapping[str, dict[str, Any]]) -> None:
    for subdir, packages in ((_SUBDIR, records), ("noarch", {})):
        index = {"info": {"subdir": subdir}, "packages": packages, "packages.conda": {}, "repodata_version": 1}
        data = json.dumps(index).encode()
        (folder / subdir).mkdir(exist_ok=True)
        (folder / subdir / "repodata.json").write_bytes(data)
        (folder / subdir / "repodata.json.bz2").write_bytes(bz2.compress(data))


_STAND_IN = """\
#!/bin/bash
# {name}, as far as its command line goes: it refuses what {name} refuses, and lets conda do the rest.
printf '%s\\n' "$*" >> {log}
{translate}
exec {conda} "$@"
"""
# https://mamba.readthedocs.io: mamba's command line is conda's; micromamba has no `env create` before version 2, but a
# `create` that takes files.
_TRANSLATE = {
    "mamba": "",
    "micromamba": """\
if [ "$1" != create ]; then echo "The following argument was not expected: $1" >&2; exit 109; fi
shift
arguments=()
for argument in "$@"; do [ "$argument" = --yes ] || arguments+=("$argument"); done
set -- env create "${arguments[@]}\"""",
}


@dataclass(frozen=True)
class StandIn:
    """A stand-in program for mamba or micromamba.

    Attributes:
        path: The program.
        log: The file with the command lines that it got, one in each line.
    """

    path: Path
    log: Path


def make_stand_in(name: str, folder: Path, conda: Path) -> StandIn:
    """mamba or micromamba are in none of PyPI, Debian and npm: a stand-in that has the real conda do the work."""
    folder.mkdir(parents=True, exist_ok=True)
    made = StandIn(folder / name, folder / f"{name}.log")
    made.path.write_text(_STAND_IN.format(name=name, log=made.log, conda=conda, translate=_TRANSLATE[name]))
    made.path.chmod(0o755)
    return made

"""Reads lines for pip: the files that they name, the contents of those, and the arguments for pip or uv.

Relative paths follow pip: ``-r`` and ``-c`` are relative to the file that names them, and so are the paths of
``--find-links``; those of packages (``./package``, ``-e .``) are relative to the project's folder everywhere.
https://pip.pypa.io/en/stable/reference/requirements-file-format/

All of these files but wheels and other archives must be in the project's repository (see `mlfleet._project.boundary`).
pip quotes lines that it cannot read, so whatever could make it open another file is refused here, and so are lines of
requirements files that are not requirements. The errors have none of their text.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from mlfleet._project.boundary import find_root, is_inside
from mlfleet._text.documents import Node, Report
from mlfleet.errors import SpecError

__all__ = ["PipInput", "Reader", "content_of", "failure"]

MAX_FILES = 200
MAX_SIZE = 4 * 2**20
MAX_SOURCES = 50_000

_OPTION = re.compile(
    r"(?P<option>-r|--requirement|-c|--constraint|-e|--editable|-f|--find-links)(?:\s+|=|(?<=^-[rcef])(?=[^\s=]))(?P<value>.+)$"
)
_LONG = {"--requirement": "-r", "--constraint": "-c", "--editable": "-e", "--find-links": "-f"}
# optparse takes abbreviations, and several options on one line.
_HIDDEN_OPTION = re.compile(r"-[rce].*|--(r|re|req\w*|c|co|con|cons\w*|e|ed\w*)(=.*)?", re.S)
_FILE_URL = re.compile(r"file:(//(localhost)?(?=/))?", re.I)
_CODING = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
_ASCII = frozenset({"ascii", "us-ascii", "utf-8", "utf8", "utf_8", "utf-8-sig"})
_REQUIREMENT = re.compile(r"[A-Za-z0-9][\w.-]*\s*(\[[^\]]*\]\s*)?($|[=!~]=|[<>;(]|--?\w)", re.A)
_COMMENT = re.compile(r"(^|\s+)#.*$")
_VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")
_EXTRAS = re.compile(r"(?P<path>.*?)(?P<extras>\[[^\]]*\])?$")
_ARCHIVE = re.compile(r"\.(whl|zip|tar\.gz|tgz|tar\.bz2|tar\.xz)$", re.I)
_SOURCE_SUFFIXES = {".py", ".pyi", ".pyx", ".pxd", ".c", ".cc", ".cpp", ".h", ".hpp", ".rs", ".toml", ".cfg", ".in"}
_NOT_SOURCE = {"__pycache__", "build", "dist", "node_modules", "mlruns", "mlartifacts", "venv", "site-packages"}
_BUILD_FILES = ("pyproject.toml", "setup.py", "setup.cfg")

Fail = Callable[[str], NoReturn]


@dataclass(frozen=True, slots=True)
class PipInput:
    """The packages that one call of pip installs.

    Attributes:
        lines: The lines for a requirements file of its own, as they were written.
        arguments: The arguments for the command line: options and packages that name files, with absolute paths.
        contents: The part of the environment's key that stands for `arguments`: hashes of what those files hold. It has
            paths only where what is installed depends on them, so that copies of a project share an environment.
        nested: The lines of the requirements files among `arguments`, and of those that they name.
        constraints: The lines of the constraints files.
        local: What only this machine has, named anywhere: packages in folders, archives, folders of wheels.
    """

    lines: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()
    nested: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    local: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.lines or self.arguments)


@dataclass(slots=True)
class Reader:
    """Reads lines for pip in one project. Blocking; it opens the files that they name.

    The key takes the text of every requirements and constraints file. Of a package in a local folder it takes the
    sources (not the data beside them, which runs may write), or, if it is editable, only what its build is
    configured by, since changes of its sources need no new environment. Files behind URLs are not looked at.

    Attributes:
        folder: The project's folder. Paths of packages, and of files that the items of a list name, are relative to it.
        root: The folder that those files must be in; None: the Git working tree of `folder`, else `folder`.
        report: Gets the mistakes.
    """

    folder: Path
    root: Path | None = None
    report: Report = field(default_factory=Report)
    _lines: list[str] = field(default_factory=list)
    _arguments: list[str] = field(default_factory=list)
    _contents: list[str] = field(default_factory=list)
    _nested: list[str] = field(default_factory=list)
    _constraints: list[str] = field(default_factory=list)
    _local: list[str] = field(default_factory=list)
    _seen: set[tuple[str, Path]] = field(default_factory=set)

    def read(self, nodes: Iterable[Node]) -> PipInput:
        """Read the items of a list in a YAML file.

        Raises:
            SpecError: An item is not a line, or names a file that does not exist.
        """
        for node in nodes:
            with self.report.part():
                text = node.string(expected="a requirement, as pip takes it")
                if len(text.strip().splitlines()) > 1 or text.rstrip().endswith("\\"):  # pip would see several lines
                    node.fail("a requirement is one line")
                if line := _COMMENT.sub("", text).strip():
                    self._read_item(line, node.fail)
        return self._result()

    def read_file(self, path: Path) -> PipInput:
        """Read the lines of a requirements file in the project's folder as if they were the items of a list.

        Raises:
            SpecError: The file cannot be read, a line is not one for pip, or names a file that does not exist.
        """
        fail = failure(path)
        try:
            data = _read(path)
        except (OSError, ValueError) as error:
            fail(f"cannot be read: {error.strerror if isinstance(error, OSError) else error}")
        self._seen.add(("-r", path))
        for number, line in _logical_lines(_decode(data, fail, path.name)):
            with self.report.part():
                self._read_item(line, failure(path, number), is_item=False)
        return self._result()

    def _result(self) -> PipInput:
        found = (self._lines, self._arguments, self._contents, self._nested, self._constraints, self._local)
        return PipInput(*map(tuple, found))

    def _read_item(self, line: str, fail: Fail, *, is_item: bool = True) -> None:
        """Read a line of the project's list: its paths become absolute."""
        option, value = _split(line)
        _refuse_hidden(line, option, value, fail)
        local: str | None = None
        if option in ("-r", "-c"):
            local = self._requirements(option, value, self.folder, option, fail)
        elif option == "-e":
            local = self._package(value, True, fail, is_item=is_item)
        elif option == "-f":
            local = self._wheels(value, fail)
        elif not line.startswith("-"):
            local = self._package(line, False, fail, is_item=is_item)
            if local is None and not is_item:
                _check_requirement(line, fail)
        if local is None:
            # URLs among them may hold passwords, which must not be seen in the list of processes.
            self._lines.append(line)
        else:
            self._arguments += [option, local] if option else [local]
            if option not in ("-r", "-c"):
                self._local.append(f"{option} {local}".strip())

    def _requirements(self, option: str, value: str, base: Path, kind: str, fail: Fail) -> str | None:
        """Add the text of a requirements file and of those it names; return its path, unless it is a URL.

        Args:
            option: The option that names it.
            value: Its path.
            base: The folder that this is relative to.
            kind: ``-c`` if its lines are constraints, since it is named by a constraints file or as one; else ``-r``.
            fail: A function that raises the error.
        """
        shown = _FILE_URL.sub("", value, count=1)  # what a variable stands for may be a secret
        value = _FILE_URL.sub("", _expand(value), count=1)
        if "://" in value:
            return None
        path = _join(base, value)
        self._check_inside(path, f"the requirements file {shown!r}", fail)
        if (kind, path) in self._seen:
            return str(path)
        self._seen.add((kind, path))
        if len(self._seen) > MAX_FILES:
            fail(f"more than {MAX_FILES} requirements files")
        try:
            data = _read(path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            fail(f"the requirements file {shown!r} cannot be read: {reason}{f' ({path})' if shown == value else ''}")
        self._contents.append(f"{option} {hashlib.sha256(data).hexdigest()}")
        for number, line in _logical_lines(_decode(data, fail, shown)):
            with self.report.part():
                self._read_nested(line, path.parent, kind, failure(path, number))
        return str(path)

    def _read_nested(self, line: str, base: Path, kind: str, fail: Fail) -> None:
        """Read a line of a file that pip reads itself, and the files that it names."""
        option, value = _split(line)
        _refuse_hidden(line, option, value, fail)
        if option in ("-r", "-c"):
            inner = "-c" if "-c" in (kind, option) else "-r"
            if self._requirements(option, value, base, inner, fail) is not None:
                return
        is_local = option in ("-e", "-f")
        if option == "-e":
            self._package(value, True, fail)
        elif not line.startswith("-"):
            is_local = self._package(line, False, fail) is not None
            if not is_local:
                _check_requirement(line, fail)
        (self._local if is_local else self._constraints if kind == "-c" else self._nested).append(line)

    def _check_inside(self, path: Path, what: str, fail: Fail) -> None:
        root = self.root or find_root(self.folder)
        if not is_inside(path, root):
            fail(f"{what} is outside of the project's repository {root}: copy it there")

    def _wheels(self, value: str, fail: Fail) -> str | None:
        """Add the names in a folder of wheels; return its path, unless it is a URL."""
        if "://" in value or not _exists(path := _join(self.folder, _expand(value)), fail):
            return None
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        self._contents += [f"-f {path}", *(f"{each.name} {each.stat().st_size}" for each in found if each.is_file())]
        return str(path)

    def _package(self, line: str, editable: bool, fail: Fail, *, is_item: bool = False) -> str | None:
        """Return the line with an absolute path, if it names a local package, and add its content."""
        spec, marker = _split_marker(_expand(line))
        match = _EXTRAS.match(spec)
        path_text, extras = (match["path"], match["extras"] or "") if match else (spec, "")
        if not _is_local(path_text):
            return None
        path = _join(self.folder, path_text)
        # A line of a file with a slash that is not a path is not what it should be, and is not shown.
        is_path = is_item or path_text.startswith(".") or _exists(path, fail)
        # What a variable stands for may be a secret.
        shown = repr(path_text if _expand(line) == line else _split_marker(line)[0]) if is_path else "that path"
        if not _ARCHIVE.search(path_text):
            self._check_inside(path, f"the package at {shown}", fail)
            for name in _BUILD_FILES:  # what builds a package quotes lines of these
                self._check_inside(path / name, f"{name} of the package at {shown}", fail)
        if not _exists(path, fail):
            fail(f"there is no package at {shown}")
        self._contents.append(f"{'-e ' if editable else ''}{path}{extras} {content_of(path, editable, fail)}")
        return f"{path}{extras}{marker}"


def _split(line: str) -> tuple[str, str]:
    """Return the option of a line that names a file, in its short form, and its value; without one, an empty option."""
    match = _OPTION.match(line)
    if match is None:
        return "", line
    value = match["value"].strip()
    if value[:1] in ("'", '"'):
        # pip takes the values of options apart as a shell does.
        with contextlib.suppress(ValueError, IndexError):
            value = shlex.split(value)[0]
    return _LONG.get(match["option"], match["option"]), value


def _refuse_hidden(line: str, option: str, value: str, fail: Fail) -> None:
    """Refuse options that name a file where pip would see them, and this reader would not."""
    if not line.startswith("-"):
        return
    words = (value if option else line).split()
    if any(_HIDDEN_OPTION.fullmatch(word) for word in words):
        fail("-r, -c and -e must stand on lines of their own, with one file each, and must not be abbreviated")


def _check_requirement(line: str, fail: Fail) -> None:
    """Refuse a line that pip would refuse, and show."""
    if not ("://" in line or " @" in line or _REQUIREMENT.match(line)):
        fail("this is not a requirement, as pip takes it")


def _decode(data: bytes, fail: Fail, value: str) -> str:
    """Return the text as pip and uv read it."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")):
        fail(f"the requirements file {value!r} is not UTF-8: save it as UTF-8")
    for line in data.split(b"\n")[:2]:
        coding = _CODING.match(line)
        if coding and coding[1].decode("ascii", "replace").lower() not in _ASCII:
            fail(f"the requirements file {value!r} names a coding that is not UTF-8: save it as UTF-8")
    return data.decode("utf-8-sig", "replace")


def _logical_lines(text: str) -> Iterable[tuple[int, str]]:
    """Return the lines of a requirements file with their numbers: continued ones joined, without comments."""
    joined, first = "", 0
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        first = first or number
        if line.endswith("\\") and not _COMMENT.match(line):
            joined += line[:-1]
            continue
        complete = _COMMENT.sub("", joined + line).strip()
        if complete:
            yield first, complete
        joined, first = "", 0


def _join(folder: Path, path: str) -> Path:
    return Path(os.path.normpath(folder / path))


def _exists(path: Path, fail: Fail) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        fail(f"the path {str(path)[:200]!r} cannot be looked at: {error}")


def _read(path: Path) -> bytes:
    """Read a regular file: a device or a pipe would never end."""
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        data = file.read(MAX_SIZE + 1)
    if len(data) > MAX_SIZE:
        raise ValueError(f"larger than {MAX_SIZE} bytes")
    return data


def failure(path: Path, line: int | None = None) -> Fail:
    """Return a function that raises a SpecError with this place."""

    def fail(message: str) -> NoReturn:
        raise SpecError(message, path=path, line=line)

    return fail


def _expand(text: str) -> str:
    """Replace ``${NAME}`` by variables of the environment, as pip does; an unknown one stays."""
    return _VARIABLE.sub(lambda match: os.environ.get(match[1]) or match[0], text)


def _split_marker(line: str) -> tuple[str, str]:
    """Split a requirement before its marker (``; python_version < "3.9"``) or options."""
    cut = min((at for at in (line.find(";"), line.find(" --")) if at >= 0), default=len(line))
    return line[:cut].strip(), f" {line[cut:].strip()}" if cut < len(line) else ""


def _is_local(text: str) -> bool:
    """Return True if pip takes this for a path rather than a name."""
    if "://" in text or " @" in text:
        return False
    return text.startswith(".") or "/" in text or _ARCHIVE.search(text) is not None


def content_of(path: Path, editable: bool, fail: Fail) -> str:
    """Hash what the installation of a local package depends on: its sources, or only what configures its build.

    Args:
        path: A folder, or a wheel or other archive.
        editable: True if changes of its sources have an effect without installing it again.
        fail: A function that raises the error.
    """
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = [path / name for name in _BUILD_FILES if (path / name).is_file()] if editable else _sources(path, fail)
    for file_path in files:
        digest.update(str(file_path.relative_to(path)).encode())
        try:
            digest.update(hashlib.sha256(file_path.read_bytes()).digest())
        except OSError as error:
            fail(f"the package's file {file_path} cannot be read: {error.strerror}")
    return digest.hexdigest()


def _sources(folder: Path, fail: Fail) -> list[Path]:
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [
            name for name in folders if name not in _NOT_SOURCE and not name.startswith(".") and "egg-info" not in name
        ]
        # Data beside the sources does not count: it may be large, and is not hashed.
        found += [Path(parent, name) for name in files if Path(name).suffix in _SOURCE_SUFFIXES]
        if len(found) > MAX_SOURCES:
            fail(f"the package in {folder} has more than {MAX_SOURCES} source files: build a wheel of it")
    return sorted(path for path in found if path.is_file())

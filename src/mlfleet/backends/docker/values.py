"""Readers for the values of flags of ``docker run``: sizes, volumes, ports, devices. Pure, except for named files."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "FlagValueError",
    "add_volume",
    "at_home",
    "boolean",
    "device",
    "duration",
    "expand",
    "extra_host",
    "gpus",
    "is_cdi_device",
    "lines_of",
    "mount",
    "nano_cpus",
    "ports",
    "published",
    "size",
    "text_of",
    "ulimit",
    "whole",
]

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgtp]?)i?b?", re.I)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h)")
_NANOSECONDS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
# The first two groups are the name of a variable, the third is other syntax of the shell.
_EXPANDED = re.compile(r"\$\{(\w+)\}|\$(\w+)|\$\(\s*pwd\s*\)|`\s*pwd\s*`|(\$[({]|`)")
_CDI = re.compile(r"[\w.-]+/[\w.-]+=[\w.:-]+")
_LARGEST_FILE = 2**20


class FlagValueError(ValueError):
    """A value that a flag cannot have. Internal to this package."""


def boolean(text: str) -> bool:
    """Read ``true`` or ``false``."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise FlagValueError(f"{text!r} should be true or false")
    return text.lower() in ("true", "1")


def whole(text: str) -> int:
    """Read a whole number."""
    try:
        return _bounded(int(text), text)
    except ValueError:
        raise FlagValueError(f"{text!r} should be a whole number") from None


def _bounded(number: float, text: str) -> int:
    """Return a number as the engine can read it.

    Raises:
        FlagValueError: It is too large.
    """
    if abs(number) >= 2**63:
        raise FlagValueError(f"{text[:20]!r}… is too large a number" if len(text) > 20 else f"{text!r} is too large")
    return int(number)


def size(text: str) -> int:
    """Read a number of bytes: ``2g``, ``512m``, ``1.5GiB``, ``1048576``; -1: unlimited. A k is 1024, as in docker."""
    if text == "-1":
        return -1
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise FlagValueError(f"{text!r} should be a size such as 512m or 2g")
    return _bounded(float(match[1]) * 1024 ** " kmgtp".index(match[2].lower() or " "), text)


def nano_cpus(text: str) -> int:
    """Read a number of CPUs, in billionths of one."""
    try:
        cpus = float(text)
    except ValueError:
        cpus = -1.0
    if not 0 < cpus < 1e6:
        raise FlagValueError(f"{text!r} should be a number of CPUs such as 1.5")
    return round(cpus * 1e9)


def duration(text: str) -> int:
    """Read a duration such as ``30s`` or ``1m30s``, in nanoseconds."""
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise FlagValueError(f"{text!r} should be a time such as 30s or 1m30s")
    return _bounded(sum(float(number) * _NANOSECONDS[unit] for number, unit in parts), text)


def ulimit(text: str) -> dict[str, object]:
    """Read a limit such as ``nofile=1024:2048``."""
    name, given, limits = text.partition("=")
    soft, _, hard = limits.partition(":")
    if not name or not given:
        raise FlagValueError(f"{text!r} should be NAME=SOFT[:HARD]")
    return {"Name": name, "Soft": whole(soft), "Hard": whole(hard or soft)}


def extra_host(text: str) -> str:
    """Read ``name:address``, also written ``name=address``."""
    name, mark, address = text.partition("=") if "=" in text else text.partition(":")
    if not name or not mark or not address:
        raise FlagValueError(f"{text!r} should be HOST:ADDRESS")
    return f"{name}:{address}"


def gpus(text: str) -> dict[str, object]:
    """Read ``all``, a number, or ``"device=0,1",capabilities=utility``.

    https://docs.docker.com/engine/containers/gpu/
    """
    request: dict[str, Any] = {"Driver": "", "Count": 0, "DeviceIDs": None, "Capabilities": [["gpu"]], "Options": {}}
    # docker's documentation quotes twice because of the shell; people write a bare device=0,1 here.
    fields = [text] if re.fullmatch(r"device=[^=]*", text) else _fields(text)
    for item in fields:
        name, given, value = item.partition("=")
        if not given:
            request["Count"] = -1 if item == "all" else whole(item)
        elif name == "count":
            request["Count"] = -1 if value == "all" else whole(value)
        elif name == "device":
            request["DeviceIDs"] = value.split(",")
        elif name == "driver":
            request["Driver"] = value
        elif name == "capabilities":
            parts = value.split(",")
            request["Capabilities"] = [parts if "gpu" in parts else [*parts, "gpu"]]
        elif name == "options":
            request["Options"] = dict(part.partition("=")[::2] for part in value.split(","))
        else:
            raise FlagValueError(f"{name!r} is not known of GPUs: count, device, driver, capabilities and options are")
    if not request["DeviceIDs"] and request["Count"] == 0:
        request["Count"] = -1
    return request


def is_cdi_device(text: str) -> bool:
    """Return True if a device is named as in ``nvidia.com/gpu=0``."""
    return not text.startswith("/") and _CDI.fullmatch(text) is not None


def device(text: str) -> dict[str, str]:
    """Read ``/dev/here[:/dev/there][:rwm]``."""
    source, *rest = text.split(":")
    permissions = rest.pop() if rest and re.fullmatch("[rwm]+", rest[-1]) else "rwm"
    if not source.startswith("/") or len(rest) > 1:
        raise FlagValueError(f"{text!r} should be DEVICE[:DEVICE IN THE CONTAINER][:PERMISSIONS]")
    return {
        "PathOnHost": source,
        "PathInContainer": rest[0] if rest else source,
        "CgroupPermissions": permissions,
    }


def expand(text: str, environ: Mapping[str, str], folder: Path) -> str:
    """Replace the variables in a path, as bash does when mlflow has it run ``docker run`` in the project's folder.

    ``PWD``, ``$(pwd)`` and the same in backticks are that folder, wherever the caller is.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if match[3]:
            raise FlagValueError(f"{text!r}: only $NAME, ${{NAME}} and $(pwd) are replaced in it")
        if name is None or name == "PWD":
            return str(folder)
        if name not in environ:
            raise FlagValueError(f"{text!r} refers to the variable {name}, which is not set here")
        return environ[name]

    return _EXPANDED.sub(value, text)


def add_volume(
    config: dict[str, Any], host: dict[str, Any], text: str, *, environ: Mapping[str, str], folder: Path
) -> None:
    """Add ``source:target[:options]``, or the target alone for a volume without a name."""
    if not text.strip():
        raise FlagValueError("it is empty; expected SOURCE:TARGET")
    text = expand(text, environ, folder)
    source, given, rest = text.partition(":")
    if not given:
        if not text.startswith("/"):
            raise FlagValueError(f"{text!r} should be SOURCE:TARGET with an absolute TARGET")
        config.setdefault("Volumes", {})[text] = {}
        return
    target = rest.partition(":")[0]
    if not target.startswith("/"):
        raise FlagValueError(f"{text!r}: the target {target!r} should be an absolute path")
    host.setdefault("Binds", []).append(f"{_source(source, folder)}:{rest}")


def _source(text: str, folder: Path) -> str:
    """Return an absolute path of this machine, or the name of a volume."""
    expanded = str(at_home(Path(text))) if text.startswith("~") else text
    if expanded.startswith(("/", ".")):
        return os.path.normpath(folder / expanded)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", expanded):
        raise FlagValueError(f"{text!r} is neither a path (/data, ./data) nor the name of a volume")
    return expanded


def mount(text: str, *, environ: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Read ``type=bind,source=/a,target=/b,readonly`` (https://docs.docker.com/engine/storage/bind-mounts/)."""
    made: dict[str, Any] = {"Type": "volume"}
    for item in _fields(text):
        name, given, value = item.partition("=")
        found = _MOUNT.get(name.lower())
        if found is None:
            raise FlagValueError(f"{name!r} is not known of mounts")
        group, key, read = found
        into = made.setdefault(group, {}) if group else made
        *outer, key = key.split(".")
        for part in outer:
            into = into.setdefault(part, {})
        if read is None:
            name, _, value = value.partition("=")
            into.setdefault(key, {})[name] = value
        else:
            into[key] = read(value if given else "true")
    if not str(made.get("Target", "")).startswith("/"):
        raise FlagValueError(f"{text!r} needs target=/an/absolute/path")
    if made["Type"] == "bind":
        if not made.get("Source"):
            raise FlagValueError(f"{text!r} needs source=/a/path")
        made["Source"] = os.path.normpath(folder / at_home(Path(expand(made["Source"], environ, folder))))
    return made


# The group and key in the API, and the reader of the value; None: the value is a NAME=VALUE of a mapping.
_MOUNT: dict[str, tuple[str, str, Callable[[str], object] | None]] = {
    "type": ("", "Type", str),
    "source": ("", "Source", str),
    "src": ("", "Source", str),
    "target": ("", "Target", str),
    "dst": ("", "Target", str),
    "destination": ("", "Target", str),
    "readonly": ("", "ReadOnly", boolean),
    "ro": ("", "ReadOnly", boolean),
    "consistency": ("", "Consistency", str),
    "bind-propagation": ("BindOptions", "Propagation", str),
    "bind-nonrecursive": ("BindOptions", "NonRecursive", boolean),
    "volume-nocopy": ("VolumeOptions", "NoCopy", boolean),
    "volume-label": ("VolumeOptions", "Labels", None),
    "volume-driver": ("VolumeOptions", "DriverConfig.Name", str),
    "volume-opt": ("VolumeOptions", "DriverConfig.Options", None),
    "tmpfs-size": ("TmpfsOptions", "SizeBytes", size),
    "tmpfs-mode": ("TmpfsOptions", "Mode", lambda text: _octal(text)),
}


def published(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Read ``[address:][port here:]port there[/protocol]``, with ranges of equal length."""
    match = re.fullmatch(r"(?:(\[[^]]*\]|[^:]*):)??(?:([\d-]*):)?([\d-]+)(?:/(\w+))?", text)
    if match is None:
        raise FlagValueError(f"{text!r} should be [ADDRESS:][PORT:]PORT[/tcp]")
    address, here, there, protocol = match.groups()
    inside = list(_range(there))
    outside = [str(port) for port in _range(here)] if here else [""] * len(inside)
    if len(outside) != len(inside):
        raise FlagValueError(f"{text!r}: both ranges of ports should be of one length")
    for port, host_port in zip(inside, outside, strict=True):
        binding = {"HostPort": host_port}
        if address:
            binding["HostIp"] = address.strip("[]")
        yield f"{port}/{protocol or 'tcp'}", binding


def ports(text: str) -> Iterator[str]:
    """Read ``80`` or ``8000-8010/udp``."""
    numbers, _, protocol = text.partition("/")
    for port in _range(numbers):
        yield f"{port}/{protocol or 'tcp'}"


def lines_of(path: Path) -> list[str]:
    """Return the lines of a file of variables or labels, without comments. Blocking."""
    lines = [line.lstrip() for line in text_of(path).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def text_of(path: Path) -> str:
    """Return the text of a file that a flag names. Blocking."""
    try:
        with at_home(path).open("rb") as file:
            return file.read(_LARGEST_FILE).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise FlagValueError(f"the file {path} cannot be read: {reason}") from error


def at_home(path: Path) -> Path:
    """Return a path with the home folder in place of ``~``."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise FlagValueError(f"{str(path)!r}: {error}") from error


def _octal(text: str) -> int:
    if not re.fullmatch("[0-7]+", text):
        raise FlagValueError(f"{text!r} should be a mode such as 1777")
    return int(text, 8)


def _range(text: str) -> range:
    first, mark, last = text.partition("-")
    start = whole(first)
    end = whole(last) if mark else start
    if not 0 < start <= end < 2**16:
        raise FlagValueError(f"{text!r} is neither a port nor a range of ports")
    return range(start, end + 1)


def _fields(text: str) -> list[str]:
    try:
        return [field for field in next(csv.reader([text], strict=True), []) if field]
    except csv.Error as error:
        raise FlagValueError(f"{text!r}: {error}") from None

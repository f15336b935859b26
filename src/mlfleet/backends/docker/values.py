"""The texts that flags of ``docker run`` take: sizes, volumes, ports, devices. All pure but for the files they name."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "Wrong",
    "add_volume",
    "boolean",
    "device",
    "duration",
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
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_CDI = re.compile(r"[\w.-]+/[\w.-]+=[\w.:-]+")
_LARGEST_FILE = 2**20


class Wrong(ValueError):
    """A text that a flag cannot have. Never leaves this package."""


def boolean(text: str) -> bool:
    """``true`` or ``false``."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise Wrong(f"{text!r} should be true or false")
    return text.lower() in ("true", "1")


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise Wrong(f"{text!r} should be a whole number") from None


def size(text: str) -> int:
    """Bytes: ``2g``, ``512m``, ``1.5GiB``, ``1048576``; -1 is no limit. A k is 1024, as docker has it."""
    if text == "-1":
        return -1
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise Wrong(f"{text!r} should be a size such as 512m or 2g")
    return int(float(match[1]) * 1024 ** " kmgtp".index(match[2].lower() or " "))


def nano_cpus(text: str) -> int:
    """CPUs, in billionths of one."""
    try:
        cpus = float(text)
    except ValueError:
        cpus = -1.0
    if not 0 < cpus < 1e6:
        raise Wrong(f"{text!r} should be a number of CPUs such as 1.5")
    return round(cpus * 1e9)


def duration(text: str) -> int:
    """Nanoseconds: ``30s``, ``1m30s``."""
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise Wrong(f"{text!r} should be a time such as 30s or 1m30s")
    return sum(int(float(number) * _NANOSECONDS[unit]) for number, unit in parts)


def ulimit(text: str) -> dict[str, object]:
    """``nofile=1024:2048``."""
    name, given, limits = text.partition("=")
    soft, _, hard = limits.partition(":")
    if not name or not given:
        raise Wrong(f"{text!r} should be NAME=SOFT[:HARD]")
    return {"Name": name, "Soft": whole(soft), "Hard": whole(hard or soft)}


def extra_host(text: str) -> str:
    """``name:address``, also written ``name=address``."""
    name, mark, address = text.partition("=") if "=" in text else text.partition(":")
    if not name or not mark or not address:
        raise Wrong(f"{text!r} should be HOST:ADDRESS")
    return f"{name}:{address}"


def gpus(text: str) -> dict[str, object]:
    """``all``, a number, or ``"device=0,1",capabilities=utility`` (https://docs.docker.com/engine/containers/gpu/)."""
    request: dict[str, Any] = {"Driver": "", "Count": 0, "DeviceIDs": None, "Capabilities": [["gpu"]], "Options": {}}
    # Shells eat the outer quotes that docker's documentation has; a bare device=0,1 is what people write here.
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
            raise Wrong(f"{name!r} is not known of GPUs: count, device, driver, capabilities and options are")
    if not request["DeviceIDs"] and request["Count"] == 0:
        request["Count"] = -1
    return request


def is_cdi_device(text: str) -> bool:
    """Whether a device is named as in ``nvidia.com/gpu=0``."""
    return not text.startswith("/") and _CDI.fullmatch(text) is not None


def device(text: str) -> dict[str, str]:
    """``/dev/here[:/dev/there][:rwm]``."""
    source, *rest = text.split(":")
    permissions = rest.pop() if rest and re.fullmatch("[rwm]+", rest[-1]) else "rwm"
    if not source.startswith("/") or len(rest) > 1:
        raise Wrong(f"{text!r} should be DEVICE[:DEVICE IN THE CONTAINER][:PERMISSIONS]")
    return {
        "PathOnHost": source,
        "PathInContainer": rest[0] if rest else source,
        "CgroupPermissions": permissions,
    }


def add_volume(
    config: dict[str, Any], host: dict[str, Any], text: str, *, environ: Mapping[str, str], folder: Path
) -> None:
    """``source:target[:options]``, or the target alone for a volume without a name."""
    if not text.strip():
        raise Wrong("it is empty; expected SOURCE:TARGET")
    source, given, rest = text.partition(":")
    if not given:
        if not text.startswith("/"):
            raise Wrong(f"{text!r} should be SOURCE:TARGET with an absolute TARGET")
        config.setdefault("Volumes", {})[text] = {}
        return
    target = rest.partition(":")[0]
    if not target.startswith("/"):
        raise Wrong(f"{text!r}: the target {target!r} should be an absolute path")
    host.setdefault("Binds", []).append(f"{_source(source, environ, folder)}:{rest}")


def _source(text: str, environ: Mapping[str, str], folder: Path) -> str:
    """A path on this machine, with what a shell would do to it; a name is that of a volume."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in environ:
            raise Wrong(f"{text!r} refers to the variable {name}, which is not set here")
        return environ[name]

    expanded = str(Path(_VARIABLE.sub(value, text)).expanduser()) if text[:1] in "~$" else text
    if expanded.startswith(("/", ".")):
        return os.path.normpath(folder / expanded)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", expanded):
        raise Wrong(f"{text!r} is neither a path (/data, ./data) nor the name of a volume")
    return expanded


def mount(text: str, *, folder: Path) -> dict[str, Any]:
    """``type=bind,source=/a,target=/b,readonly`` (https://docs.docker.com/engine/storage/bind-mounts/)."""
    made: dict[str, Any] = {"Type": "volume"}
    for item in _fields(text):
        name, given, value = item.partition("=")
        found = _MOUNT.get(name.lower())
        if found is None:
            raise Wrong(f"{name!r} is not known of mounts")
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
        raise Wrong(f"{text!r} needs target=/an/absolute/path")
    if made["Type"] == "bind":
        if not made.get("Source"):
            raise Wrong(f"{text!r} needs source=/a/path")
        made["Source"] = os.path.normpath(folder / Path(made["Source"]).expanduser())
    return made


# Where it goes, and how its value is read; None: it is a NAME=VALUE of a mapping.
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
    """``[address:][port here:]port there[/protocol]``, with ranges of equal length."""
    match = re.fullmatch(r"(?:(\[[^]]*\]|[^:]*):)??(?:([\d-]*):)?([\d-]+)(?:/(\w+))?", text)
    if match is None:
        raise Wrong(f"{text!r} should be [ADDRESS:][PORT:]PORT[/tcp]")
    address, here, there, protocol = match.groups()
    inside = list(_range(there))
    outside = [str(port) for port in _range(here)] if here else [""] * len(inside)
    if len(outside) != len(inside):
        raise Wrong(f"{text!r}: both ranges of ports should be of one length")
    for port, host_port in zip(inside, outside, strict=True):
        binding = {"HostPort": host_port}
        if address:
            binding["HostIp"] = address.strip("[]")
        yield f"{port}/{protocol or 'tcp'}", binding


def ports(text: str) -> Iterator[str]:
    """``80``, ``8000-8010/udp``."""
    numbers, _, protocol = text.partition("/")
    for port in _range(numbers):
        yield f"{port}/{protocol or 'tcp'}"


def lines_of(path: Path) -> list[str]:
    """The lines of a file of variables or labels, without comments. Blocking."""
    lines = [line.lstrip() for line in text_of(path).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def text_of(path: Path) -> str:
    """The text of a file that a flag names. Blocking."""
    try:
        with path.expanduser().open("rb") as file:
            return file.read(_LARGEST_FILE).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise Wrong(f"the file {path} cannot be read: {reason}") from error


def _octal(text: str) -> int:
    if not re.fullmatch("[0-7]+", text):
        raise Wrong(f"{text!r} should be a mode such as 1777")
    return int(text, 8)


def _range(text: str) -> range:
    first, mark, last = text.partition("-")
    start = whole(first)
    end = whole(last) if mark else start
    if not 0 < start <= end < 2**16:
        raise Wrong(f"{text!r} is no port, or no range of ports")
    return range(start, end + 1)


def _fields(text: str) -> list[str]:
    try:
        return [field for field in next(csv.reader([text], strict=True), []) if field]
    except csv.Error as error:
        raise Wrong(f"{text!r}: {error}") from None

"""The flags of ``docker run`` in ``docker_args``, and their equivalents in the engine's API.

https://docs.docker.com/reference/cli/docker/container/run/ and
https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerCreate
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlfleet._text.documents import nearest
from mlfleet._text.plain import UNENCODABLE
from mlfleet.backends.docker import values
from mlfleet.backends.docker.values import FlagValueError
from mlfleet.errors import UsageError

__all__ = ["ContainerOptions", "parse_arguments"]


@dataclass(slots=True)
class ContainerOptions:
    """The container settings that the flags ask for.

    Attributes:
        config: The container's configuration, in the API's words.
        host: The container's ``HostConfig``.
        endpoint: The settings of its one network.
        environ: Variables to set.
        name: The name of the container; None: a name from the run's id.
        platform: The platform of the image; None: the engine's.
        pull: ``missing``, ``always`` or ``never``.
    """

    config: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    endpoint: dict[str, Any] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    platform: str | None = None
    pull: str = "missing"


@dataclass(frozen=True, slots=True)
class _Context:
    """The variables and the folder that the text of a flag may refer to."""

    environ: Mapping[str, str]
    folder: Path
    missing: set[str]

    def path(self, text: str) -> Path:
        """Return the path of a file that a flag names."""
        return self.folder / values.at_home(Path(values.expand(text, self.environ, self.folder)))


_Apply = Callable[[ContainerOptions, str, _Context], None]


@dataclass(frozen=True, slots=True)
class _Flag:
    apply: _Apply
    bare: bool = False


def parse_arguments(args: Mapping[str, Any], *, environ: Mapping[str, str], folder: Path) -> ContainerOptions:
    """Read ``docker_args``. Blocking only for the flags that name a file (``env-file``, a seccomp profile).

    Args:
        args: Flag (long or short, without dashes) → value. True is a bare flag, False is that flag's ``=false``, None
            leaves a flag out, and so does False for a flag that has a value; a list repeats it.
        environ: The variables that ``env: NAME`` copies, and that are replaced in paths of volumes and files.
        folder: The folder at which relative paths of volumes and files start, and which ``$PWD`` in them is.

    Raises:
        UsageError: An unknown flag (the message names the nearest), a value that it cannot have, or a flag that makes
            no sense for a run.
    """
    options = ContainerOptions()
    context = _Context(environ, folder, set())
    for key, value in args.items():
        name = str(key).lstrip("-").replace("_", "-")
        name = _SHORT.get(name, name)
        if name in _REFUSED:
            if value is not False and value is not None and not (name == "restart" and value == "no"):
                raise UsageError(f"docker_args: {key!r} cannot be used: {_REFUSED[name]}")
            continue
        flag = _FLAGS.get(name)
        if flag is None:
            raise UsageError(f"docker_args: 'docker run' has no flag {key!r}{nearest(name, [*_FLAGS, *_SHORT])}")
        for text in _texts(str(key), value, flag):
            try:
                flag.apply(options, text, context)
            except FlagValueError as error:
                raise UsageError(f"docker_args: {key!r}: {error}") from error
    if context.missing:
        names = ", ".join(sorted(context.missing))
        raise UsageError(f"docker_args copies variables that are not set here: {names}")
    return options


def _texts(key: str, value: object, flag: _Flag) -> list[str]:
    texts: list[str] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if item is None or (item is False and not flag.bare):
            continue
        if item is False:
            texts.append("false")
            continue
        if item is True:
            if not flag.bare:
                raise UsageError(f"docker_args: {key!r} needs a value, not True")
            texts.append("true")
        elif isinstance(item, str | int | float | Path):
            texts.append(str(item))
            if UNENCODABLE.search(texts[-1]):
                raise UsageError(f"docker_args: {key!r} holds a NUL character or half a character, which no text can")
        else:
            raise UsageError(f"docker_args: {key!r} is {type(item).__name__}: give a text, a number, True, or a list")
    return texts


# ---- one function for each form of flag ------------------------------------------------------------------------------


def _part(options: ContainerOptions, path: str) -> dict[str, Any]:
    """Return a part of the settings, such as ``host.LogConfig``, which is made if it is not there."""
    name, *keys = path.split(".")
    part: dict[str, Any] = getattr(options, name)
    for key in keys:
        part = part.setdefault(key, {})
    return part


def _set(part: str, key: str, read: Callable[[str], object] = str) -> _Flag:
    """Return a flag whose last value counts."""

    def apply(options: ContainerOptions, text: str, context: _Context) -> None:
        _part(options, part)[key] = read(text)

    return _Flag(apply, bare=read is values.boolean)


def _add(part: str, key: str, read: Callable[[str], object] = str) -> _Flag:
    """Return a flag that makes a list."""

    def apply(options: ContainerOptions, text: str, context: _Context) -> None:
        _part(options, part).setdefault(key, []).append(read(text))

    return _Flag(apply)


def _map(part: str, key: str) -> _Flag:
    """Return a flag ``name=value`` that makes a mapping."""

    def apply(options: ContainerOptions, text: str, context: _Context) -> None:
        name, _, value = text.partition("=")
        if not name:
            raise FlagValueError(f"{text!r} should be NAME=VALUE")
        _part(options, f"{part}.{key}")[name] = value

    return _Flag(apply)


def _attribute(name: str, choices: tuple[str, ...] = ()) -> _Flag:
    def apply(options: ContainerOptions, text: str, context: _Context) -> None:
        if not text or (choices and text not in choices):
            raise FlagValueError(f"{text!r} should be " + (" or ".join(choices) if choices else "a name"))
        setattr(options, name, text)

    return _Flag(apply)


_IGNORED = _Flag(lambda options, text, context: None, bare=True)


# ---- the flags that do more ------------------------------------------------------------------------------------------


def _env(options: ContainerOptions, text: str, context: _Context) -> None:
    name, given, value = text.partition("=")
    if not name:
        raise FlagValueError("expected NAME=VALUE, or the NAME of a variable to copy")
    if given:
        options.environ[name] = value
    elif name in context.environ:
        options.environ[name] = context.environ[name]
    else:
        context.missing.add(name)


def _env_file(options: ContainerOptions, text: str, context: _Context) -> None:
    for line in values.lines_of(context.path(text)):
        name, given, value = line.partition("=")
        if given:
            options.environ[name.strip()] = value
        elif name in context.environ:  # docker, too, leaves out a variable that is not set
            options.environ[name] = context.environ[name]


def _label_file(options: ContainerOptions, text: str, context: _Context) -> None:
    for line in values.lines_of(context.path(text)):
        name, _, value = line.partition("=")
        _part(options, "config.Labels")[name.strip()] = value


def _volume(options: ContainerOptions, text: str, context: _Context) -> None:
    values.add_volume(options.config, options.host, text, environ=context.environ, folder=context.folder)


def _mount(options: ContainerOptions, text: str, context: _Context) -> None:
    options.host.setdefault("Mounts", []).append(values.mount(text, environ=context.environ, folder=context.folder))


def _publish(options: ContainerOptions, text: str, context: _Context) -> None:
    for port, binding in values.published(text):
        options.config.setdefault("ExposedPorts", {})[port] = {}
        options.host.setdefault("PortBindings", {}).setdefault(port, []).append(binding)


def _expose(options: ContainerOptions, text: str, context: _Context) -> None:
    for port in values.ports(text):
        options.config.setdefault("ExposedPorts", {})[port] = {}


def _device(options: ContainerOptions, text: str, context: _Context) -> None:
    if values.is_cdi_device(text):
        options.host.setdefault("DeviceRequests", []).append({"Driver": "cdi", "DeviceIDs": [text]})
    else:
        options.host.setdefault("Devices", []).append(values.device(text))


def _tmpfs(options: ContainerOptions, text: str, context: _Context) -> None:
    path, _, settings = text.partition(":")
    if not path.startswith("/"):
        raise FlagValueError(f"{text!r} should begin with an absolute path")
    options.host.setdefault("Tmpfs", {})[path] = settings


def _security(options: ContainerOptions, text: str, context: _Context) -> None:
    name, given, value = text.partition("=")
    if given and name == "seccomp" and value not in ("unconfined", "builtin"):
        text = f"seccomp={values.text_of(context.path(value))}"
    options.host.setdefault("SecurityOpt", []).append(text)


def _throttle(name: str, read: Callable[[str], object], key: str = "Rate") -> _Flag:
    """Return a flag that limits one device: ``/dev/sda:1mb``."""

    def apply(options: ContainerOptions, text: str, context: _Context) -> None:
        path, _, limit = text.rpartition(":")
        if not path.startswith("/"):
            raise FlagValueError(f"{text!r} should be DEVICE:{key.upper()}")
        options.host.setdefault(name, []).append({"Path": path, key: read(limit)})

    return _Flag(apply)


def _no_health(options: ContainerOptions, text: str, context: _Context) -> None:
    if values.boolean(text):
        options.config["Healthcheck"] = {"Test": ["NONE"]}


def _log_option(options: ContainerOptions, text: str, context: _Context) -> None:
    name, given, value = text.partition("=")
    if not given:
        raise FlagValueError(f"{text!r} should be NAME=VALUE")
    _part(options, "host.LogConfig.Config")[name] = value


_FLAGS: dict[str, _Flag] = {
    "add-host": _add("host", "ExtraHosts", values.extra_host),
    "annotation": _map("host", "Annotations"),
    "blkio-weight": _set("host", "BlkioWeight", values.whole),
    "blkio-weight-device": _throttle("BlkioWeightDevice", values.whole, "Weight"),
    "cap-add": _add("host", "CapAdd"),
    "cap-drop": _add("host", "CapDrop"),
    "cgroup-parent": _set("host", "CgroupParent"),
    "cgroupns": _set("host", "CgroupnsMode"),
    "cpu-period": _set("host", "CpuPeriod", values.whole),
    "cpu-quota": _set("host", "CpuQuota", values.whole),
    "cpu-rt-period": _set("host", "CpuRealtimePeriod", values.whole),
    "cpu-rt-runtime": _set("host", "CpuRealtimeRuntime", values.whole),
    "cpu-shares": _set("host", "CpuShares", values.whole),
    "cpus": _set("host", "NanoCpus", values.nano_cpus),
    "cpuset-cpus": _set("host", "CpusetCpus"),
    "cpuset-mems": _set("host", "CpusetMems"),
    "device": _Flag(_device),
    "device-cgroup-rule": _add("host", "DeviceCgroupRules"),
    "device-read-bps": _throttle("BlkioDeviceReadBps", values.size),
    "device-read-iops": _throttle("BlkioDeviceReadIOps", values.whole),
    "device-write-bps": _throttle("BlkioDeviceWriteBps", values.size),
    "device-write-iops": _throttle("BlkioDeviceWriteIOps", values.whole),
    "disable-content-trust": _IGNORED,
    "dns": _add("host", "Dns"),
    "dns-opt": _add("host", "DnsOptions"),
    "dns-option": _add("host", "DnsOptions"),
    "dns-search": _add("host", "DnsSearch"),
    "domainname": _set("config", "Domainname"),
    "entrypoint": _set("config", "Entrypoint", lambda text: [text]),
    "env": _Flag(_env),
    "env-file": _Flag(_env_file),
    "expose": _Flag(_expose),
    "gpus": _add("host", "DeviceRequests", values.gpus),
    "group-add": _add("host", "GroupAdd"),
    "health-cmd": _set("config.Healthcheck", "Test", lambda text: ["CMD-SHELL", text]),
    "health-interval": _set("config.Healthcheck", "Interval", values.duration),
    "health-retries": _set("config.Healthcheck", "Retries", values.whole),
    "health-start-period": _set("config.Healthcheck", "StartPeriod", values.duration),
    "health-timeout": _set("config.Healthcheck", "Timeout", values.duration),
    "hostname": _set("config", "Hostname"),
    "init": _set("host", "Init", values.boolean),
    "interactive": _IGNORED,
    "ip": _set("endpoint.IPAMConfig", "IPv4Address"),
    "ip6": _set("endpoint.IPAMConfig", "IPv6Address"),
    "ipc": _set("host", "IpcMode"),
    "isolation": _set("host", "Isolation"),
    "kernel-memory": _set("host", "KernelMemory", values.size),
    "label": _map("config", "Labels"),
    "label-file": _Flag(_label_file),
    "link": _add("host", "Links"),
    "link-local-ip": _add("endpoint.IPAMConfig", "LinkLocalIPs"),
    "log-driver": _set("host.LogConfig", "Type"),
    "log-opt": _Flag(_log_option),
    "mac-address": _set("config", "MacAddress"),
    "memory": _set("host", "Memory", values.size),
    "memory-reservation": _set("host", "MemoryReservation", values.size),
    "memory-swap": _set("host", "MemorySwap", values.size),
    "memory-swappiness": _set("host", "MemorySwappiness", values.whole),
    "mount": _Flag(_mount),
    "name": _attribute("name"),
    "net": _set("host", "NetworkMode"),
    "net-alias": _add("endpoint", "Aliases"),
    "network": _set("host", "NetworkMode"),
    "network-alias": _add("endpoint", "Aliases"),
    "no-healthcheck": _Flag(_no_health, bare=True),
    "oom-kill-disable": _set("host", "OomKillDisable", values.boolean),
    "oom-score-adj": _set("host", "OomScoreAdj", values.whole),
    "pid": _set("host", "PidMode"),
    "pids-limit": _set("host", "PidsLimit", values.whole),
    "platform": _attribute("platform"),
    "privileged": _set("host", "Privileged", values.boolean),
    "publish": _Flag(_publish),
    "publish-all": _set("host", "PublishAllPorts", values.boolean),
    "pull": _attribute("pull", ("missing", "always", "never")),
    "quiet": _IGNORED,
    "read-only": _set("host", "ReadonlyRootfs", values.boolean),
    "rm": _IGNORED,
    "runtime": _set("host", "Runtime"),
    "security-opt": _Flag(_security),
    "shm-size": _set("host", "ShmSize", values.size),
    "stop-signal": _set("config", "StopSignal"),
    "storage-opt": _map("host", "StorageOpt"),
    "sysctl": _map("host", "Sysctls"),
    "tmpfs": _Flag(_tmpfs),
    "tty": _set("config", "Tty", values.boolean),
    "ulimit": _add("host", "Ulimits", values.ulimit),
    "user": _set("config", "User"),
    "userns": _set("host", "UsernsMode"),
    "uts": _set("host", "UTSMode"),
    "volume": _Flag(_volume),
    "volume-driver": _set("host", "VolumeDriver"),
    "volumes-from": _add("host", "VolumesFrom"),
    "workdir": _set("config", "WorkingDir"),
}
_SHORT = {
    "a": "attach",
    "c": "cpu-shares",
    "d": "detach",
    "e": "env",
    "h": "hostname",
    "i": "interactive",
    "l": "label",
    "m": "memory",
    "p": "publish",
    "P": "publish-all",
    "q": "quiet",
    "t": "tty",
    "u": "user",
    "v": "volume",
    "w": "workdir",
}
_REFUSED = {
    "attach": "the output is captured already; use output='inherit' to see it here",
    "cidfile": "the container is named after the run: mlfleet-<run id>",
    "detach": "a run ends when its container does; submit() returns at once",
    "detach-keys": "a run has no terminal to detach from",
    "restart": "a run has one end, and its status is written when it has come; submit it again instead",
    "sig-proxy": "a run is ended with cancel()",
    "stop-timeout": "set the time between SIGTERM and SIGKILL with Timeouts(cancel_grace=…)",
}

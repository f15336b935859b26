"""Flags of ``docker run`` in the engine's words."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfleet.backends.docker.run_options import _FLAGS, _REFUSED, _SHORT, ContainerOptions, parse_arguments
from mlfleet.errors import UsageError

FOLDER = Path("/projects/demo")


def parse(environ: dict[str, str] | None = None, /, **args: Any) -> ContainerOptions:
    return parse_arguments(args, environ=environ or {}, folder=FOLDER)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"memory": "2g", "memory-swap": -1}, {"Memory": 2 * 2**30, "MemorySwap": -1}),
        ({"m": "1.5GiB"}, {"Memory": 3 * 2**29}),
        ({"shm-size": "64m"}, {"ShmSize": 64 * 2**20}),
        ({"shm_size": 65536}, {"ShmSize": 65536}),
        ({"cpus": 1.5, "c": 512}, {"NanoCpus": 1_500_000_000, "CpuShares": 512}),
        ({"network": "host"}, {"NetworkMode": "host"}),
        ({"net": "none"}, {"NetworkMode": "none"}),
        ({"ipc": "host", "pid": "host"}, {"IpcMode": "host", "PidMode": "host"}),
        ({"cap-add": ["SYS_PTRACE", "NET_ADMIN"]}, {"CapAdd": ["SYS_PTRACE", "NET_ADMIN"]}),
        ({"cap-drop": "ALL", "privileged": True}, {"CapDrop": ["ALL"], "Privileged": True}),
        ({"privileged": False, "read-only": "true", "memory": False}, {"Privileged": False, "ReadonlyRootfs": True}),
        ({"ulimit": "nofile=1024:2048"}, {"Ulimits": [{"Name": "nofile", "Soft": 1024, "Hard": 2048}]}),
        ({"tmpfs": "/run:size=64m"}, {"Tmpfs": {"/run": "size=64m"}}),
        ({"add-host": "db:10.0.0.1"}, {"ExtraHosts": ["db:10.0.0.1"]}),
        ({"add-host": "v6=::1"}, {"ExtraHosts": ["v6:::1"]}),
        ({"dns": ["1.1.1.1"], "security-opt": "no-new-privileges"}, None),
        ({"runtime": "nvidia", "init": False}, {"Runtime": "nvidia", "Init": False}),
        ({"init": "false"}, {"Init": False}),
        (
            {"device": "/dev/fuse:/dev/other:rw"},
            {"Devices": [{"PathOnHost": "/dev/fuse", "PathInContainer": "/dev/other", "CgroupPermissions": "rw"}]},
        ),
        ({"device": "nvidia.com/gpu=0"}, {"DeviceRequests": [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=0"]}]}),
        ({"volume": ["/a:/b:ro", "./data:/data", "cache:/cache"]}, {
            "Binds": ["/a:/b:ro", "/projects/demo/data:/data", "cache:/cache"]
        }),
        ({"log-driver": "local", "log-opt": "max-size=1m"}, {
            "LogConfig": {"Type": "local", "Config": {"max-size": "1m"}}
        }),
        ({"mount": "type=bind,src=/a,dst=/b,readonly"}, {
            "Mounts": [{"Type": "bind", "Source": "/a", "Target": "/b", "ReadOnly": True}]
        }),
        ({"sysctl": "net.core.somaxconn=1024"}, {"Sysctls": {"net.core.somaxconn": "1024"}}),
        ({"device-read-bps": "/dev/sda:1mb"}, {"BlkioDeviceReadBps": [{"Path": "/dev/sda", "Rate": 2**20}]}),
        ({"rm": True, "i": True}, {}),
    ],
)  # fmt: skip
def test_host_settings(args: dict[str, Any], expected: dict[str, Any] | None) -> None:
    host = parse(**args).host
    if expected is not None:
        assert host == expected


@pytest.mark.parametrize(
    ("value", "count", "ids"),
    [
        ("all", -1, None),
        (2, 2, None),
        ("device=0,1", 0, ["0", "1"]),
        ('"device=0,2",capabilities=utility', 0, ["0", "2"]),
    ],
)
def test_gpus(value: object, count: int, ids: list[str] | None) -> None:
    (request,) = parse(gpus=value).host["DeviceRequests"]
    assert (request["Count"], request["DeviceIDs"]) == (count, ids)
    assert "gpu" in request["Capabilities"][0]


def test_published_ports() -> None:
    options = parse(p=["8080:80", "127.0.0.1:53:53/udp", "[::1]:9000-9001:9000-9001", "443"])
    assert options.host["PortBindings"] == {
        "80/tcp": [{"HostPort": "8080"}],
        "53/udp": [{"HostPort": "53", "HostIp": "127.0.0.1"}],
        "9000/tcp": [{"HostPort": "9000", "HostIp": "::1"}],
        "9001/tcp": [{"HostPort": "9001", "HostIp": "::1"}],
        "443/tcp": [{"HostPort": ""}],
    }
    assert set(options.config["ExposedPorts"]) == set(options.host["PortBindings"])


def test_settings_of_the_container_itself() -> None:
    options = parse(
        t=True, u="1000:1000", w="/w", h="box", l=["a=b", "c"], entrypoint="/init", name="mine", platform="linux/arm64"
    )
    assert options.config == {
        "Tty": True,
        "User": "1000:1000",
        "WorkingDir": "/w",
        "Hostname": "box",
        "Labels": {"a": "b", "c": ""},
        "Entrypoint": ["/init"],
    }
    assert (options.name, options.platform, options.pull) == ("mine", "linux/arm64", "missing")


def test_variables(tmp_path: Path) -> None:
    (tmp_path / "vars").write_text("# a comment\n\nONE=1\nHERE\nNOT_HERE\nTWO=a=b c\n")
    options = parse({"HERE": "yes", "COPIED": "too"}, e=["A=1", "COPIED", "EMPTY="], env_file=str(tmp_path / "vars"))
    assert options.environ == {"A": "1", "COPIED": "too", "EMPTY": "", "ONE": "1", "HERE": "yes", "TWO": "a=b c"}


def test_home_and_variables_are_expanded_in_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    options = parse({"DATA": "/mnt/data"}, volume=["~/x:/x", "$DATA/y:/y", "${DATA}:/z:ro"])
    assert options.host["Binds"] == ["/home/me/x:/x", "/mnt/data/y:/y", "/mnt/data:/z:ro"]


def test_the_working_folder_in_paths_is_that_of_the_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    texts = ["$PWD:/a", "${PWD}/b:/b", "$(pwd)/c:/c", "`pwd`:/d", "/mnt/$USER:$PLACE/e"]
    options = parse({"PWD": "/elsewhere", "USER": "me", "PLACE": "/place"}, volume=texts)
    assert options.host["Binds"] == [
        f"{FOLDER}:/a", f"{FOLDER}/b:/b", f"{FOLDER}/c:/c", f"{FOLDER}:/d", "/mnt/me:/place/e"
    ]  # fmt: skip
    mounted = parse({"PWD": "/elsewhere"}, mount="type=bind,source=$PWD/data,target=/data")
    assert mounted.host["Mounts"][0]["Source"] == f"{FOLDER}/data"
    (tmp_path / "vars").write_text("A=1\n")
    assert parse({"HERE": str(tmp_path)}, env_file="$HERE/vars").environ == {"A": "1"}


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"volume": "$(id -un):/a"}, r"only \$NAME, \${NAME} and \$\(pwd\) are replaced"),
        ({"volume": "${A:-/b}:/a"}, r"only \$NAME, \${NAME} and \$\(pwd\) are replaced"),
        ({"memroy": "2g"}, "no flag 'memroy', did you mean 'memory'"),
        ({"restart": "always"}, "'restart' cannot be used: a run has one end"),
        ({"d": True}, "'d' cannot be used"),
        ({"memory": "lots"}, "'memory': 'lots' should be a size such as 512m or 2g"),
        ({"memory": True}, "'memory' needs a value"),
        ({"cpus": 0}, "'cpus': '0' should be a number of CPUs"),
        ({"volume": "data"}, "SOURCE:TARGET"),
        ({"volume": "/a:b"}, "'b' should be an absolute path"),
        ({"volume": "$NOWHERE/a:/b"}, "NOWHERE, which is not set"),
        ({"publish": "80:"}, "should be .ADDRESS:.*PORT"),
        ({"publish": "1-3:1-2"}, "of one length"),
        ({"env": ["A", "B"]}, "not set here: A, B"),
        ({"env-file": "nothing"}, "nothing cannot be read: No such file"),
        ({"pull": "sometimes"}, "missing or always or never"),
        ({"mount": "type=bind,src=/a"}, "needs target="),
        ({"mount": "typ=bind"}, "'typ' is not known of mounts"),
        ({"ulimit": "nofile"}, "NAME=SOFT"),
        ({"gpus": "some"}, "'some' should be a whole number"),
        ({"tty": {}}, "'tty' is dict: give a text"),
        ({"health-interval": "soon"}, "should be a time such as 30s"),
    ],
)
def test_mistakes_are_usage_errors(args: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        parse(**args)


def test_errors_do_not_show_values_of_variables() -> None:
    with pytest.raises(UsageError) as caught:
        parse(env="=hush-hush")
    assert "hush-hush" not in str(caught.value)


TEXTS = st.text(max_size=30) | st.from_regex(r"[/\w.:=,\[\]\"-]{0,30}", fullmatch=True)


@given(
    name=st.sampled_from(
        [
            "volume",
            "mount",
            "publish",
            "gpus",
            "device",
            "tmpfs",
            "ulimit",
            "memory",
            "cpus",
            "add-host",
            "env",
            "label",
        ]
    )
    | st.text(max_size=12),
    value=TEXTS | st.booleans() | st.floats() | st.integers() | st.lists(TEXTS, max_size=3),
)
def test_every_input_is_accepted_or_a_usage_error(name: str, value: object) -> None:
    with contextlib.suppress(UsageError):
        parse_arguments({name: value}, environ={}, folder=FOLDER)


WRONG = [
    True, False, None, 7, -1, 1.5, float("nan"), 10**30, "", "x", "=", "=x", "x=", ":", "a:b:c", "/a:/b",
    "~nobody-here/x:/y", "~nobody-here/x", "a\0b", "/a\0:/b", "\ud800", "9" * 400, "9" * 400 + "k", "9" * 400 +
    "s", "9" * 5000, "-", "65536", "/dev/a:", "type=bind,source=~nobody-here/x,target=/a",
    "target=/a,volume-driver=x,volume-opt", '"a', "device=", "count=", "seccomp=~nobody-here/x", "seccomp=/a\0",
    "nofile=1:b", "[::1]:80:80", "80:90-91", {}, {"a": "b"}, {"x"}, [], ["x", 7], [None], [[1]], b"x",
    Path("x"),
]  # fmt: skip


def test_every_wrong_value_of_every_flag_is_a_mistake_of_the_call() -> None:
    """No value ends in an error of Python, or in a request that cannot be sent."""
    crashed: list[str] = []
    for flag in (*_FLAGS, *_SHORT, *_REFUSED, "no-such-flag", "", 7, None):
        for value in WRONG:
            try:
                made = parse_arguments({flag: value}, environ={"A": "b"}, folder=FOLDER)  # type: ignore[dict-item]
                json.dumps([made.config, made.host, made.endpoint, made.environ], allow_nan=False).encode()
            except UsageError:
                continue
            except Exception as error:
                crashed.append(f"{flag} {value!r:.40}: {error!r:.80}")
    assert crashed == []

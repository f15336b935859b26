"""docker_args against the docker command itself: the same flags ask the engine for the same container."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from components import missing
from mlfleet.backends.docker.run_options import parse_arguments

Body = dict[str, Any]


class Recorder(ThreadingHTTPServer):
    """Takes the request for a container as an engine would, and keeps its body."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.body: Body = {}
        self.url = f"tcp://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Recorder

    def do_HEAD(self) -> None:
        self._answer(200, {})

    def do_GET(self) -> None:
        self._answer(200, {"Os": "linux"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.body = body
        self._answer(201, {"Id": "0" * 64, "Warnings": []})

    def _answer(self, status: int, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Api-Version", "1.41")
        self.send_header("Ostype", "linux")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    with Recorder() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def asked_by_docker(recorder: Recorder, folder: Path, flags: list[str]) -> Body:
    program = shutil.which("docker") or missing("the docker command", "apt-get install docker.io")
    command = [program, "--host", recorder.url, "create", *flags, "image"]
    environ = {"HOME": str(folder), "PATH": "/usr/bin:/bin", "COPIED": "too"}
    done = subprocess.run(command, cwd=folder, env=environ, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return recorder.body


def flat(value: object, prefix: str = "") -> dict[str, object]:
    """Every setting by its path; what says nothing is left out."""
    if isinstance(value, Mapping):
        parts = [flat(item, f"{prefix}/{key}") for key, item in value.items()]
        found = {name: item for part in parts for name, item in part.items()}
        return found if found or prefix in _NEEDLESS else {prefix: {}}
    if isinstance(value, list):
        items = [_without_nothing(item) for item in value]
        return {prefix: sorted(items, key=str) if prefix in _IN_ANY_ORDER else items}
    return {} if prefix.startswith("/NetworkingConfig") and not value else {prefix: value}


# Docker's own command takes these out of a map, whose order is another one each time.
_IN_ANY_ORDER = ("/Env", "/HostConfig/Binds")
_NEEDLESS = ("", "/HostConfig", "/NetworkingConfig", "/NetworkingConfig/EndpointsConfig")


def _without_nothing(item: object) -> object:
    if not isinstance(item, dict):
        return item
    cleaned = {key: _without_nothing(part) for key, part in item.items()}
    return {key: part for key, part in cleaned.items() if part not in (None, False, "", {}, [])}


ARGUMENTS: list[dict[str, Any]] = [
    {"gpus": "all"},
    {"gpus": 2},
    {"gpus": "device=1"},
    {"gpus": '"device=0,2",capabilities=utility'},
    {"gpus": "driver=nvidia,count=1,options=a=b"},
    {
        "memory": "1.5g", "memory-swap": "-1", "memory-reservation": "512m", "memory-swappiness": 10, "shm-size": "1gb",
        "cpus": 1.5, "cpu-shares": 512, "cpuset-cpus": "0-1", "cpuset-mems": "0", "pids-limit": 100,
        "oom-kill-disable": True, "oom-score-adj": 500, "blkio-weight": 300, "blkio-weight-device": "/dev/vda:200",
        "device-read-bps": "/dev/vda:1mb", "device-write-iops": "/dev/vda:7", "ulimit": ["core=0", "nofile=1024:2048"],
    },
    {"m": "64m", "c": 7, "cpu-period": 1000, "cpu-quota": 2000, "u": "me", "v": "/a:/b", "e": "A=1", "w": "/w"},
    {"network": "host", "ipc": "host", "pid": "host", "uts": "host", "userns": "host", "cgroupns": "host"},
    {"net": "none", "h": "box", "P": True, "l": "a=b=c", "t": True, "p": "127.0.0.1::80", "expose": ["1-2/udp", "123"]},
    {"network": "mine", "network-alias": ["a", "b"], "ip": "10.1.1.1", "ip6": "fd00::1", "link-local-ip": "fe80::1"},
    {"volume": ["/a:/b:ro", "named:/c", "/only-inside"], "volume-driver": "local", "volumes-from": "other:ro"},
    {"mount": ["type=bind,src=/a,dst=/b,readonly,bind-propagation=rslave", "type=bind,src=/a,dst=/c,readonly=false"]},
    {"mount": ["source=v,target=/v,volume-nocopy", "type=tmpfs,destination=/t,tmpfs-size=1m,tmpfs-mode=1700"]},
    {"mount": 'src=v,dst=/v,volume-driver=local,volume-opt=type=nfs,"volume-opt=o=addr=10.0.0.1,rw",volume-label=a=b'},
    {"env": ["A=1", "COPIED", "EMPTY=", "EQUALS=a=b"], "label": ["a=b", "c"], "stop-signal": "SIGINT"},
    {"publish": ["8080:80", "127.0.0.1:53:53/udp", "443", "9000-9001:9000-9001"]},
    {"entrypoint": "/init", "workdir": "/w", "hostname": "box", "domainname": "example.com", "user": "1000:1000"},
    {"entrypoint": "", "init": False, "privileged": True, "read-only": True, "tty": False},
    {"device": ["/dev/fuse", "/dev/null:/dev/other", "/dev/zero:/dev/zero:r", "/dev/full:rw"]},
    {"device-cgroup-rule": "c 1:3 mr", "cap-add": ["CAP_NET_ADMIN", "CAP_SYS_PTRACE"], "cap-drop": "ALL", "init": True},
    {"tmpfs": ["/run", "/x:size=64m,mode=1777"], "runtime": "nvidia", "group-add": ["audio", "100"]},
    {"add-host": ["db:10.0.0.1", "v6:::1", "me:host-gateway"], "dns": "1.1.1.1", "dns-search": "example.com"},
    {"security-opt": ["no-new-privileges", "label=disable", "apparmor=unconfined", "seccomp=unconfined"]},
    {"sysctl": "net.core.somaxconn=1024", "log-driver": "local", "log-opt": ["max-size=1m", "max-file=2"]},
    {"health-cmd": "true", "health-interval": "1m30s", "health-timeout": "5s", "health-retries": 3},
    {"no-healthcheck": True, "storage-opt": "size=1G", "link": "db:db", "cgroup-parent": "/here", "dns-option": "a:1"},
]  # fmt: skip


@pytest.mark.parametrize("args", ARGUMENTS, ids=lambda args: next(iter(args)))
def test_the_same_container_as_of_docker_run(recorder: Recorder, tmp_path: Path, args: dict[str, Any]) -> None:
    flags = []
    for name, value in args.items():
        for item in value if isinstance(value, list) else [value]:
            text = str(item).lower() if isinstance(item, bool) else str(item)
            flags.append(f"--{name}={text}" if len(name) > 1 else f"-{name}={text}")
    without, asked = flat(asked_by_docker(recorder, tmp_path, [])), flat(asked_by_docker(recorder, tmp_path, flags))
    options = parse_arguments(args, environ={"COPIED": "too"}, folder=tmp_path)
    body: Body = {**options.config, "HostConfig": options.host}
    if options.environ:
        body["Env"] = [f"{name}={value}" for name, value in options.environ.items()]
    if options.endpoint:
        body["NetworkingConfig"] = {"EndpointsConfig": {options.host["NetworkMode"]: options.endpoint}}
    ours = flat(body)
    assert ours == {name: item for name, item in asked.items() if without.get(name) != item or name in ours}

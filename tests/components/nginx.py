"""nginx before an MLflow server, below a path of its own, as in common deployments."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from components import free_port, missing, stop
from components.mlflow_server import MlflowServer

__all__ = ["mlflow_behind_nginx"]

_STARTS_WITHIN = 30.0
_CONFIG = """\
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ }}
http {{
  access_log off;
  {temporary}
  server {{
    listen 127.0.0.1:{port};
    location /team/mlflow/ {{
      proxy_pass {upstream}/;
      client_max_body_size 0;
      auth_basic "MLflow";
      auth_basic_user_file {folder}/users;
    }}
    location /small/ {{
      proxy_pass {upstream}/;
    }}
    location /gone/ {{
      proxy_pass http://127.0.0.1:{nobody}/;
    }}
  }}
}}
"""


@pytest.fixture(scope="session")
def mlflow_behind_nginx(
    mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowServer]:
    """The server at ``/team/mlflow``, with a password that nginx asks for.

    Below ``/small`` it asks for none, and takes no large files, which is its default; below ``/gone`` it finds no
    server.
    """
    program = shutil.which("nginx", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin")))
    if program is None:
        missing("nginx", "apt-get install nginx")
    folder = tmp_path_factory.mktemp("nginx")
    username, password = "ada", secrets.token_hex(8)
    (folder / "users").write_text(f"{username}:{{PLAIN}}{password}\n")
    port = free_port()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    config = _CONFIG.format(
        folder=folder,
        port=port,
        nobody=free_port(),
        upstream=mlflow_server.url,
        temporary=" ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds),
    )
    # Workers of root's nginx are nobody's, who may not look into a temporary folder of root's.
    (folder / "nginx.conf").write_text(("user root;\n" if os.geteuid() == 0 else "") + config)
    argv = [program, "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(folder / "nginx.conf")]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_it_answers(f"http://127.0.0.1:{port}/small/health", process, folder / "error.log")
        url = f"http://127.0.0.1:{port}/team/mlflow"
        yield replace(mlflow_server, url=url, username=username, password=password)
    finally:
        stop(process)


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with opener.open(url, timeout=5):
                return
        except urllib.error.URLError:
            time.sleep(0.05)
    raise RuntimeError(f"nginx did not start:\n{log.read_text(errors='replace')[-2000:] if log.exists() else ''}")

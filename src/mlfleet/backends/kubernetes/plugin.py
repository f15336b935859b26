"""Credential plugins of a kubeconfig, such as those of the cloud providers.

https://kubernetes.io/docs/reference/access-authn-authz/authentication/#client-go-credential-plugins
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import anyio

from mlfleet._process.process import run_process
from mlfleet.backends.kubernetes.kubeconfig import Entry
from mlfleet.errors import BackendError

__all__ = ["Plugin", "PluginLogin", "ask_plugin", "exec_of"]

_TIME = 120.0  # seconds; a plugin may ask a person to log in with a browser
_SHORTEST = 1.0  # seconds between two calls that an expiry asks for
_CLUSTER_INFO = ("server", "tls-server-name", "insecure-skip-tls-verify", "certificate-authority-data", "proxy-url")


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin of a context.

    Attributes:
        argv: the program and its arguments.
        environ: more variables for it.
        version: of the protocol.
        cluster: what it wants to know of the cluster.
        hint: how to install it.
    """

    argv: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)
    version: str
    cluster: Mapping[str, Any] | None = None
    hint: str = ""


@dataclass(frozen=True, slots=True)
class PluginLogin:
    """What a plugin has said.

    Attributes:
        user: as a kubeconfig has it.
        renew_at: on the monotonic clock; None: only when the server refuses it.
    """

    user: Mapping[str, str] = field(repr=False)
    renew_at: float | None = None


def exec_of(cluster: Entry, user: Entry) -> Plugin | None:
    """The plugin of a user of the kubeconfig; None if there is none. Blocking."""
    given = user.value.get("exec")
    if not given:
        return None
    program = str(given["command"])
    if "/" in program:
        program = str(user.folder / program)
    return Plugin(
        argv=(program, *(str(each) for each in given.get("args") or ())),
        environ={str(each["name"]): str(each["value"]) for each in given.get("env") or ()},
        version=str(given["apiVersion"]),
        cluster=_told(cluster) if given.get("provideClusterInfo") else None,
        hint=str(given.get("installHint") or ""),
    )


def _told(cluster: Entry) -> dict[str, Any]:
    """What ``provideClusterInfo`` asks for."""
    told = {name: cluster.value[name] for name in _CLUSTER_INFO if name in cluster.value}
    authority = cluster.content("certificate-authority")
    if authority is not None:
        told["certificate-authority-data"] = base64.b64encode(authority).decode()
    for each in cluster.value.get("extensions") or ():
        if each.get("name") == "client.authentication.k8s.io/exec":
            told["config"] = each.get("extension")
    return told


async def ask_plugin(plugin: Plugin, context: str) -> PluginLogin:
    """Run a plugin. A cancelled call ends it.

    Args:
        plugin: of the context.
        context: for the error.

    Raises:
        BackendError: it is not there, failed, or said nothing that can be used.
    """
    spec: dict[str, Any] = {"interactive": False}
    if plugin.cluster is not None:
        spec["cluster"] = plugin.cluster
    info = {"apiVersion": plugin.version, "kind": "ExecCredential", "spec": spec}
    environ = {**os.environ, **plugin.environ, "KUBERNETES_EXEC_INFO": json.dumps(info)}
    name = f"the credential plugin {plugin.argv[0]!r} of the context {context!r}"
    try:
        with anyio.fail_after(_TIME):
            done = await run_process(plugin.argv, env=environ)
    except TimeoutError as error:
        raise BackendError(f"{name} gave nothing within {_TIME:g} s", backend="kubernetes") from error
    except (OSError, ValueError) as error:
        hint = f". {plugin.hint.strip()}" if plugin.hint else ""
        raise BackendError(f"{name} cannot be started: {error}{hint}", backend="kubernetes") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-500:]
        raise BackendError(f"{name} failed (exit code {done.returncode}): {said}", backend="kubernetes")
    try:
        status: dict[str, Any] = json.loads(done.stdout)["status"]
        return PluginLogin(_user(status), _renewal(status.get("expirationTimestamp")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackendError(f"{name} gave no ExecCredential with a status", backend="kubernetes") from error


def _user(status: Mapping[str, Any]) -> dict[str, str]:
    user: dict[str, str] = {}
    if status.get("token"):
        user["token"] = str(status["token"])
    if status.get("clientCertificateData"):
        user["client-certificate-data"] = base64.b64encode(str(status["clientCertificateData"]).encode()).decode()
        user["client-key-data"] = base64.b64encode(str(status["clientKeyData"]).encode()).decode()
    if not user:
        raise KeyError("token")
    return user


def _renewal(expiry: Any) -> float | None:
    if not expiry:
        return None
    left = datetime.fromisoformat(str(expiry)).timestamp() - time.time()
    return time.monotonic() + max(_SHORTEST, left * 0.8)

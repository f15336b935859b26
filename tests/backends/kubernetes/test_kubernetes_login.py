"""Logging in to a cluster: tokens, plugins, certificates, the account of a pod, proxies. The fake speaks real TLS."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import ssl
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
import trustme
from cryptography import x509

from components.fake_kubernetes import FakeCluster
from fakes.kubernetes import KubernetesApi, serving
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.backends.kubernetes.client import ApiError, KubernetesClient, Pool
from mlfleet.backends.kubernetes.login import IN_CLUSTER, Cluster, find_cluster, proxy_for
from mlfleet.errors import BackendError, UsageError

PODS = "/api/v1/namespaces/default/pods"


@dataclass
class Secured:
    """A fake cluster with a certificate of an authority of its own."""

    api: KubernetesApi
    authority: trustme.CA
    folder: Path

    @property
    def port(self) -> str:
        return self.api.url.rpartition(":")[2]

    async def cluster(self, user: Mapping[str, Any] | None = None, **entry: Any) -> Cluster:
        """A kubeconfig with that user; the authority by a file next to it, if `entry` has none."""
        path = self.folder / "kubeconfig"
        entry = entry or {"certificate-authority": "ca.pem"}
        await anyio.to_thread.run_sync(lambda: self.api.kubeconfig(path, user=user, cluster=entry))
        return await anyio.to_thread.run_sync(find_cluster, None, {"KUBECONFIG": str(path)})

    async def account(self, token: str) -> Path:
        """The folder of a service account, as the kubelet makes it."""
        folder = self.folder / "account"
        folder.mkdir(exist_ok=True)
        (folder / "token").write_text(token)
        (folder / "namespace").write_text("team")
        self.authority.cert_pem.write_to_path(folder / "ca.crt")
        return folder


@pytest.fixture
async def secured(tmp_path: Path) -> AsyncIterator[Secured]:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "cluster.test").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_OPTIONAL  # as the API server does: a client without a certificate may have a token
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with serving(KubernetesApi(), tls=context) as api:
        yield Secured(api, authority, tmp_path)


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def client(secured: Secured, folder: Path) -> str:
    """A certificate for a client, as client.pem and client.key; gives its serial number."""
    made = secured.authority.issue_cert("me@example.com")
    made.cert_chain_pems[0].write_to_path(folder / "client.pem")
    made.private_key_pem.write_to_path(folder / "client.key")
    number = x509.load_pem_x509_certificate(made.cert_chain_pems[0].bytes()).serial_number
    text = f"{number:X}"
    return text if len(text) % 2 == 0 else f"0{text}"


def embedded(folder: Path, names: Mapping[str, str]) -> dict[str, str]:
    """What a kubeconfig says of files, with their contents in their place."""
    return {f"{key}-data": base64.b64encode((folder / name).read_bytes()).decode() for key, name in names.items()}


async def look(cluster: Cluster) -> None:
    async with KubernetesClient(cluster) as api:
        await api.call("looking", "GET", PODS)


# --- certificates


@pytest.mark.parametrize("inline", [True, False])
async def test_client_certificate_login_with_a_private_authority(secured: Secured, inline: bool) -> None:
    """The certificates are files next to the kubeconfig, or are embedded in it."""
    secured.api.certificates = {client(secured, secured.folder)}
    user: dict[str, str] = {"client-certificate": "client.pem", "client-key": "client.key"}
    entry: dict[str, str] = {"certificate-authority": "ca.pem"}
    if inline:
        user, entry = embedded(secured.folder, user), embedded(secured.folder, entry)
    await look(await secured.cluster(user, **entry))
    assert secured.api.shown == [""]
    secured.api.certificates = {"00"}
    with pytest.raises(ApiError, match=r"401 Unauthorized.*log in to the cluster again"):
        await look(await secured.cluster(user, **entry))


async def test_renewed_client_certificate_is_presented(secured: Secured) -> None:
    """The kubelet and cert-manager overwrite the old certificate file with the new one."""
    secured.api.certificates = {client(secured, secured.folder)}
    cluster = await secured.cluster({"client-certificate": "client.pem", "client-key": "client.key"})
    async with KubernetesClient(cluster) as api:
        await api.call("looking", "GET", PODS)
        secured.api.certificates = {client(secured, secured.folder)}
        await api.call("looking", "GET", PODS)


async def test_several_kubeconfig_files_are_merged(secured: Secured) -> None:
    """Paths are relative to the file that contains them; the first file wins for an entry defined twice."""
    secured.api.certificates = {client(secured, secured.folder)}
    one, two = secured.folder / "one", secured.folder / "two"
    for folder, names in ((one, ("ca.pem",)), (two, ("client.pem", "client.key"))):
        folder.mkdir()
        for name in names:
            (secured.folder / name).rename(folder / name)
    entry = {"server": secured.api.url, "certificate-authority": "ca.pem"}
    context = {"cluster": "mine", "user": "me", "namespace": "team"}
    first = {
        "current-context": "",
        "clusters": [{"name": "mine", "cluster": entry}],
        "contexts": [{"name": "here", "context": context}],
        "users": None,
    }
    second = {
        "current-context": "here",
        "clusters": [{"name": "mine", "cluster": {"server": "https://another.test"}}],
        "users": [{"name": "me", "user": {"client-certificate": "client.pem", "client-key": "client.key"}}],
    }
    (one / "config").write_text(json.dumps(first))
    (two / "config").write_text(json.dumps(second))
    paths = f"{one / 'config'}:{secured.folder / 'none'}:{two / 'config'}"
    cluster = await anyio.to_thread.run_sync(find_cluster, None, {"KUBECONFIG": paths})
    assert (cluster.context, cluster.namespace) == ("here", "team")
    await look(cluster)


async def test_untrusted_authority_fails_at_once(secured: Secured) -> None:
    """The failure is permanent, so the request is not repeated."""
    trustme.CA().cert_pem.write_to_path(secured.folder / "ca.pem")
    with pytest.raises(ApiError, match=r"the certificate of fake is not trusted.*certificate-authority"):
        await look(await secured.cluster())
    assert secured.api.requests == []


async def test_tls_server_name_and_skipped_verification(secured: Secured) -> None:
    authority: dict[str, Any] = {"certificate-authority": "ca.pem"}
    await look(await secured.cluster(None, **authority, **{"tls-server-name": "cluster.test"}))
    with pytest.raises(ApiError, match="is not trusted"):
        await look(await secured.cluster(None, **authority, **{"tls-server-name": "another.test"}))
    await look(await secured.cluster(None, **{"insecure-skip-tls-verify": True}))


# --- tokens


async def test_static_token_login(secured: Secured) -> None:
    secured.api.tokens = {"given"}
    await look(await secured.cluster({"token": "given"}))
    assert secured.api.shown == ["Bearer given"]
    with pytest.raises(ApiError, match="401 Unauthorized") as caught:
        await look(await secured.cluster({"token": "hush-hush"}))
    assert "hush-hush" not in str(caught.value)
    assert secured.api.shown == ["Bearer given", "Bearer hush-hush", "Bearer hush-hush"], "asked for once more, no more"


async def test_username_and_password_login(secured: Secured) -> None:
    await look(await secured.cluster({"username": "me", "password": "hush"}))
    assert secured.api.shown == ["Basic bWU6aHVzaA=="]


async def test_openid_provider_token_login(secured: Secured) -> None:
    token = f"e30.{base64.b64encode(b'{}').decode()}.signed"
    provider = {"name": "oidc", "config": {"id-token": token}}
    await look(await secured.cluster({"auth-provider": provider}))
    assert secured.api.shown == [f"Bearer {token}"]
    with pytest.raises(BackendError, match="auth-provider 'azure' is not known: use the credential plugin"):
        await look(await secured.cluster({"auth-provider": {"name": "azure"}}))


async def test_token_file_is_read_again(secured: Secured) -> None:
    secured.api.tokens = {"one"}
    (secured.folder / "token").write_text("one\n")
    cluster = await secured.cluster({"tokenFile": "token"})
    async with KubernetesClient(cluster) as api:
        await api.call("looking", "GET", PODS)
        (secured.folder / "token").write_text("two\n")
        await api.call("looking", "GET", PODS)  # the token is valid for another minute
        secured.api.tokens = {"two"}
        await api.call("looking", "GET", PODS)
    assert secured.api.shown == ["Bearer one", "Bearer one", "Bearer one", "Bearer two"]


async def test_plugin_token_is_renewed_before_it_expires(secured: Secured) -> None:
    """The server never has to refuse a token."""
    executable(
        secured.folder / "plugin",
        f"cd {secured.folder}; echo x >> calls; until=$(cat until)\n"
        'printf \'{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":\'\n'
        'printf \'{"token":"number-%s","expirationTimestamp":"%s"}}\' "$(grep -c x calls)" "$until"',
    )
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "./plugin"}}
    soon = (datetime.now(UTC) + timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    (secured.folder / "until").write_text(soon)
    async with KubernetesClient(await secured.cluster(user)) as api:
        (secured.folder / "until").write_text("2999-01-01T00:00:00Z")
        while "Bearer number-2" not in secured.api.shown:
            await api.call("looking", "GET", PODS)
            await anyio.sleep(0.05)
        await api.call("looking", "GET", PODS)
    assert set(secured.api.shown) == {"Bearer number-1", "Bearer number-2"}


@pytest.mark.parametrize("token", [{}, {"token": "given"}])
async def test_plugin_receives_cluster_info_and_may_return_a_certificate(
    secured: Secured, token: dict[str, str]
) -> None:
    """A plugin may return a certificate and a token, too."""
    secured.api.certificates, secured.api.tokens = {client(secured, secured.folder)}, set(token.values())
    status = {
        **token,
        "clientCertificateData": (secured.folder / "client.pem").read_text(),
        "clientKeyData": (secured.folder / "client.key").read_text(),
    }
    answer = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}
    (secured.folder / "answer").write_text(json.dumps(answer))
    executable(secured.folder / "plugin", f'cd {secured.folder}; echo "$KUBERNETES_EXEC_INFO" > info; cat answer')
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "./plugin",
        "provideClusterInfo": True,
        "args": None,
        "env": [{"name": "A", "value": "b"}],
    }
    await look(await secured.cluster({"exec": plugin}))
    told = json.loads((secured.folder / "info").read_text())["spec"]
    assert told["cluster"]["server"] == secured.api.url
    assert told["cluster"]["certificate-authority-data"]


async def test_plugin_error_does_not_show_the_plugin_output(secured: Secured) -> None:
    executable(secured.folder / "plugin", "echo token=hush-hush; echo the login has expired >&2; exit 3")
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "./plugin"}}
    with pytest.raises(BackendError, match=r"failed \(exit code 3\): the login has expired") as caught:
        await look(await secured.cluster(user))
    assert "hush-hush" not in str(caught.value)


async def test_plugin_is_not_interactive_and_cannot_read_the_terminal(secured: Secured) -> None:
    """By default kubernetes-asyncio lets the plugin inherit standard input, which may be the user's terminal."""
    executable(
        secured.folder / "plugin",
        f'cd {secured.folder}; readlink /proc/self/fd/0 > stdin; echo "$KUBERNETES_EXEC_INFO" > info\n'
        'printf \'{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential",'
        '"status":{"token":"given"}}\'',
    )
    await look(
        await secured.cluster({"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "./plugin"}})
    )
    assert (secured.folder / "stdin").read_text().strip() == "/dev/null"
    assert json.loads((secured.folder / "info").read_text())["spec"] == {"interactive": False}
    assert secured.api.shown == ["Bearer given"]


async def test_cancelled_login_stops_its_plugin(secured: Secured) -> None:
    fifo = secured.folder / "fifo"
    os.mkfifo(fifo)
    executable(secured.folder / "plugin", f"cd {secured.folder}; echo $$ > fifo; exec sleep 600")
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "./plugin"}}
    looking = asyncio.create_task(look(await secured.cluster(user)))
    pid = int(await anyio.to_thread.run_sync(fifo.read_text))
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("by_plugin", [False, True])
async def test_keys_are_not_left_on_the_disk(
    secured: Secured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_plugin: bool
) -> None:
    """The TLS library reads keys from files only; those of embedded ones do not outlast the login."""
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    secured.api.certificates = {client(secured, secured.folder)}
    user: dict[str, Any] = embedded(secured.folder, {"client-certificate": "client.pem", "client-key": "client.key"})
    if by_plugin:
        names = {"clientCertificateData": "client.pem", "clientKeyData": "client.key"}
        status = {key: (secured.folder / name).read_text() for key, name in names.items()}
        executable(secured.folder / "plugin", f"cat <<'END'\n{json.dumps({'status': status})}\nEND")
        user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "./plugin"}}
    cluster = await secured.cluster(user, **embedded(secured.folder, {"certificate-authority": "ca.pem"}))
    for _ in range(2):
        async with KubernetesClient(cluster) as first, KubernetesClient(cluster) as second:
            assert list(temporary.iterdir()) == []
            for each in (first, second):
                await each.call("looking", "GET", PODS)
    assert list(temporary.iterdir()) == []


async def test_open_streams_survive_a_replaced_certificate(secured: Secured) -> None:
    """New certificates need new clients; an open watch keeps its connection until the server ends it."""
    secured.api.certificates = {client(secured, secured.folder)}
    cluster = await secured.cluster({"client-certificate": "client.pem", "client-key": "client.key"})
    async with KubernetesClient(cluster) as api:
        params = {"watch": "true", "resourceVersion": str(secured.api.version)}
        async with api.stream("watching", PODS, pool=Pool.WATCH, params=params, read_timeout=None) as watching:
            secured.api.certificates = {client(secured, secured.folder)}
            # The server knows a client by its connection: a request on a new one is needed.
            async with api.stream("watching", PODS, pool=Pool.LOGS, params=params, read_timeout=None):
                secured.api.create("pods", "default", {"metadata": {"name": "a"}, "spec": {"containers": []}})
                assert b'"ADDED"' in await watching.content.readline()


# --- in a pod


async def test_service_account_login_inside_a_pod(
    secured: Secured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is read again before the server refuses the old one; proxy variables are ignored."""
    account = await secured.account("one")
    environ = {
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": secured.port,
        "HTTPS_PROXY": "http://127.0.0.1:1",
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    config = {**environ, "KUBECONFIG": str(tmp_path / "none")}
    cluster = await anyio.to_thread.run_sync(find_cluster, None, config, account)
    assert (cluster.context, cluster.namespace) == (IN_CLUSTER, "team")
    secured.api.tokens = {"one", "two"}
    async with KubernetesClient(cluster, account=account, reread=0.0) as api:
        await api.call("looking", "GET", PODS)
        await secured.account("two")
        await api.call("looking", "GET", PODS)
        secured.api.tokens = {"three"}
        await secured.account("three")
        await api.call("looking", "GET", PODS)
    assert secured.api.shown == ["Bearer one", "Bearer two", "Bearer three"]


async def test_refused_service_account_token_is_read_again(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    account = await secured.account("one")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", secured.port)
    cluster = Cluster(IN_CLUSTER, "team")
    secured.api.tokens = {"one"}
    async with KubernetesClient(cluster, account=account) as api:
        await api.call("looking", "GET", PODS)
        await secured.account("two")
        await api.call("looking", "GET", PODS)
        secured.api.tokens = {"two"}
        await api.call("looking", "GET", PODS)
    assert secured.api.shown == ["Bearer one", "Bearer one", "Bearer one", "Bearer two"]


async def test_mistyped_context_does_not_fall_back_to_the_surrounding_cluster(secured: Secured) -> None:
    account = await secured.account("one")
    environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBECONFIG": str(secured.folder / "kubeconfig")}
    await secured.cluster()
    with pytest.raises(UsageError, match="no context 'fakr'; it has fake"):
        await anyio.to_thread.run_sync(find_cluster, "fakr", environ, account)


# --- proxies


async def test_proxy_from_the_environment_is_used(fake_cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake is its own proxy: the name cannot be resolved."""
    path, entry = fake_cluster.folder / "kubeconfig", {"server": "http://cluster.invalid"}
    await anyio.to_thread.run_sync(lambda: fake_cluster.api.kubeconfig(path, cluster=entry))
    monkeypatch.setenv("http_proxy", fake_cluster.api.url)
    async with KubernetesBackend() as backend:
        assert await (await backend.submit(fake_cluster.job(await fake_cluster.config()))).wait() is True


@pytest.mark.parametrize(
    ("host", "spared", "proxied"),
    [
        ("https://10.96.0.1:443", "10.0.0.0/8", True),
        ("https://10.96.0.1:443", "192.168.0.0/16,10.96.0.0/12", True),
        ("https://10.96.0.1:443", "10.97.0.1", False),
        ("https://10.96.0.1:443", "10.96.0.1", True),
        ("https://[fd00::1]:443", "fd00::/8", True),
        ("https://api.example.com:6443", "example.com", True),
        ("https://api.example.com:6443", ".example.com", True),
        ("https://api.example.com:6443", "*.example.com", True),
        ("https://api.example.com:6443", "ample.com", False),
        ("https://api.example.com:6443", "api.example.com:6443", True),
        ("https://api.example.com:6443", "api.example.com:443", False),
        ("https://api.example.com:6443", "*", True),
        ("https://127.0.0.1:6443", "", True),
        ("https://localhost:6443", "", True),
        ("https://api.example.com:6443", "", False),
    ],
)
def test_no_proxy_excludes_matching_hosts(host: str, spared: str, proxied: bool) -> None:
    found = proxy_for(host, {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": spared})
    assert found == (None if proxied else "http://proxy:3128")

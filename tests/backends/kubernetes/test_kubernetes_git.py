"""Projects that pods clone themselves: a real git, a real Git server with a password, containers as real processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from components.git_http import GitServer
from components.git_repository import Repository, git, make_repository
from fakes.kubernetes import KubernetesApi, serving
from fakes.kubernetes_node import Cluster, Processes
from mlfleet import Fleet
from mlfleet.backends.base import Job
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.backends.kubernetes.config import parse_config
from mlfleet.backends.kubernetes.run import KubernetesRun
from mlfleet.errors import SubmitError
from mlfleet.testing import FakeTracking


@dataclass
class Place:
    """A cluster with real processes, and a project in a repository that is served over HTTP.

    Attributes:
        api: The API server of the cluster.
        server: The Git server.
        repository: The repository of the project.
        folder: The folder for files.
    """

    api: KubernetesApi
    server: GitServer
    repository: Repository
    folder: Path

    @property
    def url(self) -> str:
        return f"{self.server.url}/project.git"

    async def checkout(self, name: str = "mine") -> Path:
        """Clone the project with the password in the URL, as many people do."""
        folder = self.folder / name
        credentials = self.server.credentials
        url = self.url.replace("://", f"://{credentials}@") if credentials else self.url
        await anyio.to_thread.run_sync(lambda: git(self.folder, "clone", "--quiet", url, str(folder)))
        return folder

    async def job(self, folder: Path, command: str, **given: Any) -> Job:
        keys = {"code-delivery": "git", "image": "busybox:1", **given}
        environ = {"KUBECONFIG": str(self.folder / "kubeconfig")}
        config = await anyio.to_thread.run_sync(parse_config, keys, environ)
        run_id = f"{len(self.api.requests):032x}"
        return Job(
            run_id=run_id, experiment_id="0", project_name="p", project_dir=folder, command=command, config=config,
            output=self.folder / run_id / "output.log",
        )  # fmt: skip


@pytest.fixture
async def place(tmp_path: Path, git_http: GitServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    # Ignore the git settings of this machine, as a container does.
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    repository = await anyio.to_thread.run_sync(make_repository, git_http.root)
    api = KubernetesApi()
    node = Cluster(api, Processes(api, tmp_path / "node"), pace=0.001)
    async with serving(api):
        await anyio.to_thread.run_sync(api.kubeconfig, tmp_path / "kubeconfig")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield Place(api, git_http, repository, tmp_path)
        await node.close()


async def printed(run: KubernetesRun) -> list[str]:
    return [line async for line in run.logs()]


async def test_private_repository_is_cloned_at_the_commit_of_the_working_copy(place: Place) -> None:
    """Later commits have no effect. The password is in a Secret and nowhere else."""
    place.server.credentials = "me:hush-hush"
    folder = await place.checkout()
    before = place.repository.head
    place.repository.commit(MLproject="name: later\n")
    login = {"metadata": {"name": "git-login"}, "stringData": {"username": "me", "password": "hush-hush"}}
    place.api.create("secrets", "default", login)
    async with KubernetesBackend() as backend:
        command = "cat MLproject; git rev-parse HEAD; ./run.sh; git config credential.helper; cat steps/train.py"
        run = await backend.submit(await place.job(folder, command, **{"git-secret": "git-login"}))
        assert await run.wait() is True
        assert await printed(run) == ["name: project", before, "run", "print('step')"]
    (made,) = place.api.of_kind("jobs")
    assert "hush-hush" not in str(made)
    assert "hush-hush" not in "\n".join(place.server.requests)


async def test_project_in_a_subfolder_at_a_commit_of_a_branch(place: Place) -> None:
    """If the server does not serve single commits, all branches are fetched."""
    repository = place.repository
    git(repository.work, "checkout", "--quiet", "-b", "side")
    commit = repository.commit(MLproject="name: side\n")
    git(repository.work, "checkout", "--quiet", "main")
    repository.commit(MLproject="name: main\n")
    for name in ("allowTipSHA1InWant", "allowReachableSHA1InWant", "allowAnySHA1InWant"):
        git(repository.bare, "config", f"uploadpack.{name}", "false")
    folder = await place.checkout()
    git(folder, "-c", "advice.detachedHead=false", "checkout", "--quiet", commit)
    async with KubernetesBackend() as backend:
        run = await backend.submit(await place.job(folder / "steps", "ls; git rev-parse HEAD || true"))
        assert (await printed(run))[0] == "train.py"
        assert await run.wait() is True


async def test_project_given_by_git_uri(place: Place) -> None:
    """The pods clone the requested version of a project that a Fleet fetched."""
    wanted = place.repository.commit(
        MLproject='name: demo\nentry_points: {main: {command: "cat version"}}', version="1"
    )
    place.repository.commit(version="2")
    config = {"code-delivery": "git", "image": "busybox:1", "tracking-uri": "http://mlflow:5000"}
    async with Fleet(tracking=FakeTracking()) as fleet:
        run = await fleet.submit(place.url, version=wanted, backend="kubernetes", backend_config=config)
        assert await run.wait() is True
        assert [line async for line in run.logs()][-1] == "1"


async def test_uncommitted_changes_are_refused(place: Place) -> None:
    folder = await place.checkout()
    (folder / "new.py").write_text("")
    async with KubernetesBackend() as backend:
        with pytest.raises(SubmitError, match=r"differs from its commit .*\?\? new\.py.*commit and push it"):
            await backend.submit(await place.job(folder, "true"))
    assert place.api.of_kind("jobs") == []


async def test_wrong_password_fails_the_run_with_a_clear_reason(place: Place) -> None:
    place.server.credentials = "me:right"
    folder = await place.checkout()
    login = {"metadata": {"name": "git-login"}, "stringData": {"username": "me", "password": "wrong"}}
    place.api.create("secrets", "default", login)
    async with KubernetesBackend() as backend:
        run = await backend.submit(await place.job(folder, "true", **{"git-secret": "git-login"}))
        outcome = await run.outcome()
    assert (outcome.reason or "").startswith("the init container 'mlfleet-code' failed: exit code 1")
    assert any("Authentication failed" in line for line in outcome.output)
    assert "me:right" not in str(outcome)


async def test_unpushed_commit_fails_the_run(place: Place) -> None:
    folder = await place.checkout()
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "mine alone")
    async with KubernetesBackend() as backend:
        outcome = await (await backend.submit(await place.job(folder, "true"))).outcome()
    assert "the init container 'mlfleet-code' failed" in (outcome.reason or "")


@pytest.mark.parametrize("remote", [None, "/srv/git/project.git"])
async def test_repository_that_pods_cannot_reach_is_refused(place: Place, remote: str | None) -> None:
    folder = await place.checkout()
    git(folder, *(["remote", "remove", "origin"] if remote is None else ["remote", "set-url", "origin", remote]))
    told = "in a repository without a remote" if remote is None else "is on this machine, where no pod reaches it"
    async with KubernetesBackend() as backend:
        with pytest.raises(SubmitError, match=told):
            await backend.submit(await place.job(folder, "true"))

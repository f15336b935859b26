"""Bringing the project's code to the cluster, in the way that ``code-delivery`` names."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import LOGINS, PROJECTS
from mlfleet._oci.references import parse_reference
from mlfleet._project.content import content_hash, pack
from mlfleet._project.git import Checkouts, run_git
from mlfleet._text.masking import mask_uri
from mlfleet.backends.base import Job
from mlfleet.backends.kubernetes.client import ApiError, KubernetesClient
from mlfleet.backends.kubernetes.config import CodeDelivery, KubernetesConfig
from mlfleet.backends.kubernetes.manifest import PROJECT_FOLDER, Code, escape
from mlfleet.backends.kubernetes.state import MANAGED_BY
from mlfleet.errors import SubmitError

__all__ = ["Deliveries", "configmap_code", "preview_code"]

_LARGEST = 900 * 1024
_ARCHIVE = "/mlflow/projects/archive"
_VOLUME, _ARCHIVE_VOLUME, _GIT_VOLUME = "mlfleet-code", "mlfleet-archive", "mlfleet-git"
_UNPACK = f"tar -xzf {_ARCHIVE}/project.tar.gz -C {PROJECT_FOLDER}"

# Everything comes in by variables, so that nothing of it is code for the shell. A password never gets into argv or
# .git/config: Git asks this shell's helper for it.
_CLONE = f"""\
set -e
export GIT_TERMINAL_PROMPT=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -f /mlflow/git/ssh-privatekey ]; then
  cp /mlflow/git/ssh-privatekey "$work/key" && chmod 600 "$work/key"
  export GIT_SSH_COMMAND="ssh -i $work/key -o IdentitiesOnly=yes -o StrictHostKeyChecking=accept-new"
fi
helper='!f() {{ [ "$1" = get ] || exit 0; echo "username=$(cat /mlflow/git/username)"; \
echo "password=$(cat /mlflow/git/password)"; }}; f'
git init -q "$work/clone"
cd "$work/clone"
[ ! -f /mlflow/git/password ] || git config credential.helper "$helper"
git fetch -q --depth 1 -- "$MLFLEET_GIT_URL" "$MLFLEET_GIT_COMMIT" ||
  git fetch -q -- "$MLFLEET_GIT_URL" '+refs/heads/*:refs/remotes/origin/*' '+refs/tags/*:refs/tags/*'
git -c advice.detachedHead=false checkout -q --detach "$MLFLEET_GIT_COMMIT"
git config --unset credential.helper || true
cp -RP "./$MLFLEET_GIT_FOLDER/." {PROJECT_FOLDER}/
"""


def configmap_code(image: str, name: str) -> Code:
    """Return a project that is unpacked from a ConfigMap by the image itself, which needs sh, tar and gzip."""
    code_mount = {"name": _VOLUME, "mountPath": PROJECT_FOLDER}
    unpack = {
        "name": "mlfleet-code",
        "image": image,
        "command": ["sh", "-c", _UNPACK],
        "volumeMounts": [code_mount, {"name": _ARCHIVE_VOLUME, "mountPath": _ARCHIVE, "readOnly": True}],
    }
    volumes: list[dict[str, Any]] = [
        {"name": _VOLUME, "emptyDir": {}},
        {"name": _ARCHIVE_VOLUME, "configMap": {"name": name}},
    ]
    return Code(image=image, init=[unpack], volumes=volumes, mounts=[code_mount], folder=PROJECT_FOLDER)


def git_code(image: str, config: KubernetesConfig, source: GitSource) -> Code:
    """Return a project that an init container clones at a commit.

    Args:
        image: The image of the run.
        config: The configuration, with the image that has git and the Secret for the Git host.
        source: The folder to clone; its URL must be as the cluster reaches it.
    """
    code_mount = {"name": _VOLUME, "mountPath": PROJECT_FOLDER}
    values = {
        "MLFLEET_GIT_URL": source.url,
        "MLFLEET_GIT_COMMIT": source.commit,
        "MLFLEET_GIT_FOLDER": source.inside,
    }
    clone: dict[str, Any] = {
        "name": "mlfleet-code",
        "image": config.git_image,
        "command": ["sh", "-c", escape(_CLONE)],
        "env": [{"name": name, "value": escape(value)} for name, value in values.items()],
        "volumeMounts": [code_mount],
    }
    volumes: list[dict[str, Any]] = [{"name": _VOLUME, "emptyDir": {}}]
    if config.git_secret is not None:
        clone["volumeMounts"].append({"name": _GIT_VOLUME, "mountPath": "/mlflow/git", "readOnly": True})
        volumes.append({"name": _GIT_VOLUME, "secret": {"secretName": config.git_secret}})
    return Code(image=image, init=[clone], volumes=volumes, mounts=[code_mount], folder=PROJECT_FOLDER)


class Deliveries:
    """Brings each content to a place once, for all runs that need it."""

    def __init__(self) -> None:
        self._configmaps: SingleFlight[tuple[str, str, str], str] = SingleFlight(keep=True)
        self._sources: SingleFlight[Path, GitSource] = SingleFlight()  # not kept, since files change
        self._checkouts = Checkouts()
        self._pushes: SingleFlight[tuple[str, ...], str] = SingleFlight(keep=True)

    async def deliver(self, client: KubernetesClient, job: Job, config: KubernetesConfig, image: str) -> Code:
        """Bring the code to the cluster.

        Args:
            client: The client of the cluster.
            job: The job of the run.
            config: The configuration of the backend.
            image: The image to run in, or to build on.

        Raises:
            MlfleetError: The code cannot be brought there; the text says why.
        """
        match config.delivery:
            case CodeDelivery.NONE:
                return Code(image=image)
            case CodeDelivery.CONFIGMAP:
                return configmap_code(image, await self._store(client, job, config.namespace))
            case CodeDelivery.GIT:
                folder = job.project_dir
                source = await self._sources(folder, partial(git_source, self._checkouts, folder))
                return git_code(image, config, source)
            case CodeDelivery.IMAGE:
                return Code(image=await self._push(job, config, image))

    async def _store(self, client: KubernetesClient, job: Job, namespace: str) -> str:
        """Store the project in a ConfigMap, and return its name."""
        key = (client.cluster.context, namespace, await content_hash(job.project_dir))
        return await self._configmaps(key, partial(_make_configmap, client, job, namespace))

    async def _push(self, job: Job, config: KubernetesConfig, base: str) -> str:
        digest = await content_hash(job.project_dir)
        key = (config.builder, base, str(config.repository_uri), config.platform, digest)
        push_image = await LOGINS.run(_import_image)
        return await self._pushes(key, partial(push_image, job, config, base))


def _import_image() -> Callable[[Job, KubernetesConfig, str], Awaitable[str]]:
    """Import the clients of registries and of Docker, which most deliveries do not need. Blocking."""
    from mlfleet.backends.kubernetes.image import push_image

    return push_image


def preview_code(job: Job, config: KubernetesConfig, image: str) -> Code:
    """Return the same as `Deliveries.deliver`, as far as it is known before anything is made."""
    match config.delivery:
        case CodeDelivery.NONE:
            return Code(image=image)
        case CodeDelivery.CONFIGMAP:
            return configmap_code(image, "mlfleet-code-of-the-run")
        case CodeDelivery.GIT:
            return git_code(image, config, GitSource("(of the project)", job.commit or "(of the project)", "."))
        case CodeDelivery.IMAGE:
            return Code(image=f"{parse_reference(config.repository_uri or '').name}:of-the-run")


# ---- by a ConfigMap ------------------------------------------------------------------------------------------------


async def _make_configmap(client: KubernetesClient, job: Job, namespace: str) -> str:
    """Store a project in a ConfigMap, and return its name.

    Raises:
        SubmitError: The project is too large for a ConfigMap.
        ApiError: The ConfigMap cannot be made.
        FetchError: The project's files cannot be read.
    """
    packed = await pack(job.project_dir)
    with closing(packed.file):
        data = await PROJECTS.run(partial(_compress, packed.file))
    name = f"mlfleet-code-{packed.digest[:40]}"
    if len(data) > _LARGEST:
        raise SubmitError(
            f"the project is {len(data) // 1024} KiB when packed, and a ConfigMap holds {_LARGEST // 1024} KiB:"
            " leave files out by .dockerignore, or use code-delivery: 'image' or 'git'",
            backend="kubernetes",
        )
    body = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": {MANAGED_BY: "mlfleet", "mlfleet.content": packed.digest[:63]}},
        "immutable": True,
        "binaryData": {"project.tar.gz": await PROJECTS.run(lambda: base64.b64encode(data).decode())},
    }
    try:
        await client.call("storing the project", "POST", f"/api/v1/namespaces/{namespace}/configmaps", body=body)
    except ApiError as error:
        if error.status != 409:  # made before: the same content has the same name
            raise
    return name


def _compress(file: IO[bytes]) -> bytes:
    return gzip.compress(file.read(), mtime=0)


# ---- by Git --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GitSource:
    """A folder of a repository at a commit.

    Attributes:
        url: The URL of the repository, without credentials.
        commit: The full commit id.
        inside: The folder; ``.`` for the top.
    """

    url: str
    commit: str
    inside: str


async def git_source(checkouts: Checkouts, folder: Path) -> GitSource:
    """Return where a pod can clone a project from.

    Args:
        checkouts: The cache of the commits of folders.
        folder: The folder of the project.

    Raises:
        SubmitError: The project is in no repository with a remote, or differs from its commit.
    """
    found = await checkouts.find(folder)
    if found is None or found.commit is None or found.repo_url is None:
        lacks = "in no Git repository" if found is None or found.commit is None else "in a repository without a remote"
        text = f"code-delivery is 'git', and the project is {lacks}: give a Git URI, or code-delivery: 'configmap'"
        raise SubmitError(text, backend="kubernetes")
    url = found.repo_url
    if url.startswith(("/", ".", "file:")):
        raise SubmitError(
            f"code-delivery is 'git', and the repository {mask_uri(url)} is on this machine, where no pod reaches it",
            backend="kubernetes",
        )
    changed = await run_git(folder, "status", "--porcelain", "--", ".")
    if changed.returncode or changed.stdout.strip():
        names = changed.stdout.decode(errors="replace").split("\n")[:3]
        raise SubmitError(
            "code-delivery is 'git', and the project differs from its commit "
            f"{found.commit[:12]} ({', '.join(name.strip() for name in names if name)}): commit and push it, or use"
            " code-delivery: 'configmap' or 'image'",
            backend="kubernetes",
        )
    return GitSource(url, found.commit, found.inside)

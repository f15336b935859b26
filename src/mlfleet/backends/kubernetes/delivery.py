"""Getting the project's files into the container without a registry: not at all, by a ConfigMap, by Git."""

from __future__ import annotations

import base64
import gzip
from contextlib import closing
from functools import partial
from typing import IO, Any

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import PROJECTS
from mlfleet._project.content import content_hash, pack
from mlfleet.backends.base import Job
from mlfleet.backends.kubernetes.client import ApiError, KubernetesClient
from mlfleet.backends.kubernetes.config import KubernetesConfig
from mlfleet.backends.kubernetes.launch import escape
from mlfleet.backends.kubernetes.manifest import Code
from mlfleet.backends.kubernetes.state import MANAGED_BY
from mlfleet.errors import SubmitError

__all__ = ["FOLDER", "ConfigMaps", "configmap_code", "git_code"]

FOLDER = "/mlflow/projects/code"
"""Where the project is in the container, as in the reference."""
_LARGEST = 900 * 1024
_ARCHIVE = "/mlflow/projects/archive"
_VOLUME, _ARCHIVE_VOLUME, _GIT_VOLUME = "mlfleet-code", "mlfleet-archive", "mlfleet-git"
_UNPACK = f"tar -xzf {_ARCHIVE}/project.tar.gz -C {FOLDER}"

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
cp -RP "./$MLFLEET_GIT_FOLDER/." {FOLDER}/
"""


def configmap_code(image: str, name: str) -> Code:
    """The project unpacked from the ConfigMap of that name, by the image itself: it needs sh, tar and gzip."""
    code_mount = {"name": _VOLUME, "mountPath": FOLDER}
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
    return Code(image=image, init=[unpack], volumes=volumes, mounts=[code_mount], folder=FOLDER)


def git_code(image: str, config: KubernetesConfig, *, url: str, commit: str, folder: str) -> Code:
    """The project cloned at a commit.

    Args:
        image: of the run.
        config: names the image with git, and the Secret for the Git host.
        url: as the cluster reaches it, without credentials.
        commit: in full.
        folder: of the project in the repository.
    """
    code_mount = {"name": _VOLUME, "mountPath": FOLDER}
    values = {"MLFLEET_GIT_URL": url, "MLFLEET_GIT_COMMIT": commit, "MLFLEET_GIT_FOLDER": folder or "."}
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
    return Code(image=image, init=[clone], volumes=volumes, mounts=[code_mount], folder=FOLDER)


class ConfigMaps:
    """Packed projects, one ConfigMap for all runs with the same content."""

    def __init__(self) -> None:
        self._made: SingleFlight[tuple[str, str, str], str] = SingleFlight(keep=True)

    async def put(self, client: KubernetesClient, job: Job, namespace: str) -> str:
        """The name of the ConfigMap with the project.

        Raises:
            SubmitError: the project is too large for one.
            ApiError: it cannot be made.
            FetchError: the project's files cannot be read.
        """
        digest = await content_hash(job.project_dir)
        key = (client.cluster.context, namespace, digest)
        return await self._made(key, partial(self._make, client, job, namespace))

    async def _make(self, client: KubernetesClient, job: Job, namespace: str) -> str:
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
            if error.status != 409:  # somebody made it before: the same content has the same name
                raise
        return name


def _compress(file: IO[bytes]) -> bytes:
    return gzip.compress(file.read(), mtime=0)

"""What activating a conda environment does, found out once, so that no run needs ``conda run`` or ``conda activate``.

The steps are those of conda's own activator: a few variables, ``bin`` before PATH, the variables of the environment,
and the scripts that packages put into ``etc/conda/activate.d``.
https://docs.conda.io/projects/conda/en/stable/dev-guide/deep-dives/activation.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from anyio import to_thread

from mlfleet._environments.base import PreparedEnvironment
from mlfleet._process.process import run_process
from mlfleet.errors import EnvironmentSetupError

__all__ = ["activate"]

_SCRIPT = 'for script in "$@"; do . "$script" || exit; done 1>&2; exec env -0'
# What bash sets for itself.
_OF_BASH = {"_", "SHLVL", "PWD", "OLDPWD"}


async def activate(root: Path, variables: Mapping[str, str]) -> PreparedEnvironment:
    """The environment at `root`, activated on top of this process's variables.

    Args:
        root: a conda prefix.
        variables: more to set, which win over those that its packages set.

    Raises:
        EnvironmentSetupError: an activation script fails.
    """
    packages, scripts = await to_thread.run_sync(_read, root)
    basic = PreparedEnvironment(
        "conda",
        root,
        path=(str(root / "bin"),),
        environ={
            **packages,
            **variables,
            "CONDA_PREFIX": str(root),
            "CONDA_DEFAULT_ENV": str(root),
            "CONDA_SHLVL": "1",
            "CONDA_PROMPT_MODIFIER": f"({root}) ",
            "PYTHONHOME": None,
            "VIRTUAL_ENV": None,
        },
    )
    return await _with_scripts(basic, scripts) if scripts else basic


def _read(root: Path) -> tuple[dict[str, str], list[Path]]:
    """The variables and the scripts that packages bring."""
    variables: dict[str, str] = {}
    for path in sorted((root / "etc" / "conda" / "env_vars.d").glob("*.json")):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EnvironmentSetupError(f"{path} cannot be read: {error}", manager="conda") from error
        variables |= {str(name): str(value) for name, value in raw.items()}
    return variables, sorted((root / "etc" / "conda" / "activate.d").glob("*.sh"))


async def _with_scripts(basic: PreparedEnvironment, scripts: list[Path]) -> PreparedEnvironment:
    """Run the scripts, and take over whatever they changed."""
    before = basic.apply(os.environ)
    completed = await run_process(["bash", "-c", _SCRIPT, "activate", *map(str, scripts)], cwd=basic.root, env=before)
    if completed.returncode != 0:
        output = tuple(completed.stderr.decode("utf-8", "replace").splitlines()[-20:])
        raise EnvironmentSetupError(
            "\n  ".join((f"a script in {scripts[0].parent} failed with exit code {completed.returncode}", *output)),
            manager="conda",
            output=output,
        )
    entries = (entry.partition("=") for entry in os.fsdecode(completed.stdout).split("\0") if entry)
    after = {name: value for name, _, value in entries}
    environ = dict(basic.environ)
    for name in (before.keys() | after.keys()) - _OF_BASH - {"PATH"}:
        if before.get(name) != after.get(name):
            environ[name] = after.get(name)
    caller, path = os.environ.get("PATH", ""), after.get("PATH", "")
    if path.endswith(f":{caller}"):
        folders = path.removesuffix(f":{caller}").split(":")
        return PreparedEnvironment(basic.manager, basic.root, tuple(folders), environ)
    return PreparedEnvironment(basic.manager, basic.root, (), {**environ, "PATH": path})

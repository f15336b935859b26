"""The requirements of a project, as lines for pip that Databricks installs."""

from __future__ import annotations

from collections.abc import Iterable

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from mlfleet._environments.env_files import read_python_requirements
from mlfleet._run_log import get_logger
from mlfleet.backends.base import Job
from mlfleet.errors import SubmitError

__all__ = ["read_requirements"]

_log = get_logger("mlfleet.databricks")


def read_requirements(job: Job) -> tuple[str, ...]:
    """Return the project's requirements as lines for pip. Blocking.

    Raises:
        MlfleetError: A file of the environment is wrong.
        SubmitError: The environment has packages that are files of the project.
    """
    spark = tuple((job.spark_job or {}).get("python_libraries", ()))
    needs = read_python_requirements(job.project_dir, job.environment_file)
    packages = needs.packages
    if packages.local:
        text = (
            f"the project's environment has {' '.join(packages.local)[:200]!r}, which Databricks cannot install: name"
            " packages of an index there"
        )
        raise SubmitError(text, backend="databricks")
    if needs.python is not None:
        _log.info(
            "Python %s of the project is not installed: the cluster or environment_version decides on the version",
            needs.python,
        )
    return (*spark, *_constrain((*packages.lines, *packages.nested), packages.constraints))


def _constrain(requirements: Iterable[str], constraints: Iterable[str]) -> tuple[str, ...]:
    """Return lines for pip that install the same versions without a constraints file, which Databricks does not take.

    A constraint on a required package becomes a part of that requirement. The others are required, too, since
    dependencies that are not listed may need them.
    """
    lines = [line.strip() for line in requirements if line.strip() and not line.strip().startswith("#")]
    places = {canonicalize_name(found.name): at for at, line in enumerate(lines) if (found := _parse(line)) is not None}
    for line in constraints:
        constraint = _parse(line)
        at = None if constraint is None else places.get(canonicalize_name(constraint.name))
        required = None if at is None else _parse(lines[at])
        if constraint is None or at is None or required is None or constraint.marker or required.url or constraint.url:
            lines.append(line)
            continue
        required.specifier &= constraint.specifier
        lines[at] = str(required)
    return tuple(lines)


def _parse(line: str) -> Requirement | None:
    """Return a requirement; None for an option of pip, or a line with options."""
    try:
        return Requirement(line)
    except InvalidRequirement:
        return None

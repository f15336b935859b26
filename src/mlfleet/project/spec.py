"""MLproject: what a project says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

__all__ = [
    "DockerEnv",
    "EntryPoint",
    "EnvironmentFile",
    "EnvironmentFileKind",
    "Parameter",
    "ProjectSpec",
    "read_project",
]


class EnvironmentFileKind(StrEnum):
    """Which file of a project tells what it needs."""

    PYTHON_ENV = "python_env"
    CONDA = "conda"


@dataclass(frozen=True, slots=True)
class EnvironmentFile:
    """The file of a project that tells what it needs.

    Attributes:
        kind: its format.
        path: absolute.
    """

    kind: EnvironmentFileKind
    path: Path


@dataclass(frozen=True, slots=True)
class Parameter:
    """A declared parameter of an entry point.

    Attributes:
        name: as in ``{name}`` in the command.
        type: ``string``, ``float``, ``path`` or ``uri``; any other is taken as a string.
        default: its text; None: the parameter is required.
    """

    name: str
    type: str = "string"
    default: str | None = None


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """Something of the project that can be run.

    Attributes:
        name: its name, or the path of a script inside the project.
        command: a format string for ``bash -c``.
        parameters: the declared ones, in their order.
    """

    name: str
    command: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DockerEnv:
    """``docker_env`` of MLproject.

    Attributes:
        image: the base image.
        volumes: as ``docker run -v`` takes them.
        environment: name and value to set; a value of None copies the caller's.
    """

    image: str
    volumes: tuple[str, ...] = ()
    environment: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True, slots=True)
class ProjectSpec:
    """What MLproject says, or what stands for it where there is none.

    Attributes:
        folder: the project's folder, absolute.
        name: from MLproject; None if it says none.
        path: the MLproject file; None if there is none.
        entry_points: the declared ones.
        environment: the file that tells what Python and libraries it needs.
        docker: ``docker_env``.
        databricks_spark_job: as it stands there.
    """

    folder: Path
    name: str | None = None
    path: Path | None = None
    entry_points: Mapping[str, EntryPoint] = field(default_factory=dict)
    environment: EnvironmentFile | None = None
    docker: DockerEnv | None = None
    databricks_spark_job: Mapping[str, Any] | None = None

    def entry_point(self, name: str) -> EntryPoint:
        """The entry point of that name, declared or a script of the project.

        Raises:
            SpecError: there is none; the text lists those there are.
        """
        raise NotImplementedError


def read_project(folder: Path) -> ProjectSpec:
    """Read the project in `folder`. Blocking; call it in a thread.

    Raises:
        SpecError: MLproject is wrong; with file, line, column and what was expected.
    """
    raise NotImplementedError

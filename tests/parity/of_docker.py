"""Cases of projects with a docker_env; what their containers see goes into ``@case/inside``."""

from __future__ import annotations

from typing import Any

from parity.case import Case

__all__ = ["CASES"]

LOOK = "sh -c 'pwd > /inside/folder; env > /inside/variables'"
LIST = "sh -c 'pwd > /inside/folder; ls > /inside/files'"
PRINT = "sh -c 'echo $0 $1 $2 $3 > /inside/values' {a} {b}"
VOLUMES = '["@case/inside:/inside"]'
VARIABLES = '[["MODE", "fast"], "COPIED"]'


def case(
    name: str,
    *differs: str,
    command: str = LOOK,
    docker_args: dict[str, Any] | None = None,
    given: dict[str, object] | None = None,
    environ: dict[str, str | None] | None = None,
    mlproject: dict[str, str] | None = None,
    files: dict[str, str] | None = None,
    **arguments: object,
) -> Case:
    """Return a case with one entry point in a container.

    Args:
        name: The name of the case.
        differs: The differences that it shows, as in `Case`.
        command: The command of the entry point, which declares ``a`` and ``b`` if there are parameters.
        docker_args: The ``docker_args`` of the call besides the network; some engines have no default network.
        given: the parameters of the call.
        environ: Variables of the caller, as in `Case`.
        mlproject: keys of docker_env as YAML in one line, and the name; an empty text leaves one out.
        files: More files of the project.
        arguments: more of the call.
    """
    keys = {"name": "@unique", "image": "'@image'", "volumes": VOLUMES, **(mlproject or {})}
    project_name = keys.pop("name")
    lines = [f"name: {project_name}"] if project_name else []
    lines += ["docker_env:", *(f"  {key}: {value}" for key, value in keys.items() if value)]
    declared = "{a: float, b: string}" if given else "{}"
    lines += ["entry_points:", "  main:", f"    parameters: {declared}", "    command: |-", f"      {command}"]
    options = {"docker_args": {"network": "host", **(docker_args or {})}, "parameters": given or {}, **arguments}
    text = "\n".join(lines) + "\n"
    return Case(name, differs, mlproject=text, files=files or {}, arguments=options, environ=environ or {}, docker=True)


API = "docker-engine-api"
SEEN = (API, "docker-init")

CASES = [
    case("docker-image", *SEEN),
    case("docker-image-missing", mlproject={"image": ""}),
    case("docker-image-unknown", "no-run-left", mlproject={"image": "127.0.0.1:1/nowhere:1"}),
    case("docker-without-name", "docker-name", mlproject={"name": ""}),
    case("docker-environment", *SEEN, mlproject={"environment": VARIABLES}, environ={"COPIED": "a"}),
    case(
        "docker-environment-spaces",
        "docker-values-quoted",
        mlproject={"environment": VARIABLES},
        environ={"COPIED": "a b"},
    ),
    case("docker-environment-missing", "no-run-left", mlproject={"environment": VARIABLES}),
    case("docker-environment-wrong", mlproject={"environment": "{MODE: fast}"}),
    case("docker-volumes-wrong", mlproject={"volumes": "'@case/inside:/inside'"}),
    case(
        "docker-volumes-of-the-project",
        API,
        command="sh -c 'cat /a/file /b/file /c/file /d/file > /inside/content'",
        mlproject={"volumes": '["@case/inside:/inside", "${PWD}/data:/a", "$(pwd)/data:/b", "`pwd`/data:/c"]'},
        docker_args={"v": "$PWD/data:/d"},
        files={"data/file": "content\n"},
    ),
    case(
        "docker-environment-of-the-caller",
        *SEEN,
        "docker-values-as-written",
        mlproject={"environment": '[["MODE", "${CALLER}/x"]]'},
    ),
    case("docker-args", *SEEN, docker_args={"workdir": "/tmp", "e": "MODE=slow", "t": True}),
    case("docker-args-number", "docker-args-values", docker_args={"cpu-shares": 512}),
    case("docker-args-list", "docker-args-values", docker_args={"e": ["A=1", "B=2"]}),
    case("docker-args-unknown", "docker-args-checked", docker_args={"nonsense": "1"}),
    case("docker-parameters", API, command=PRINT, given={"a": 1, "b": "x y", "c": 2}),
    case("docker-shell-syntax", "docker-shell", command="echo $PWD > /inside/folder && echo second > /inside/second"),
    case("docker-fails", API, command="sh -c 'exit 3'"),
    case("docker-build-image", API, "docker-image-name", "docker-build-file", command=LIST, build_image=True),
    case(
        "docker-auth-unreachable",
        "docker-auth-when-needed",
        docker_auth={"username": "a", "password": "b", "registry": "127.0.0.1:1"},
    ),
]

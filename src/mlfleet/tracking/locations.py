"""Parsing of tracking URIs and artifact URIs, without any request."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from mlfleet._text.masking import mask_uri
from mlfleet.errors import TrackingError, UsageError

__all__ = [
    "ModelRef",
    "RunRef",
    "absolute_uri",
    "join",
    "local_path",
    "parse_model_uri",
    "parse_run_uri",
    "safe_name",
    "safe_path",
    "split_uri",
]


@dataclass(frozen=True, slots=True)
class RunRef:
    """``runs:/<run id>/<path>``.

    Attributes:
        run_id: The id of the run.
        path: The path inside its artifacts; empty: all of them.
    """

    run_id: str
    path: str


@dataclass(frozen=True, slots=True)
class ModelRef:
    """``models:/<name>/<version or stage>``, ``models:/<name>@<alias>`` or ``models:/<model id>``, and a path.

    Attributes:
        name: The name of the registered model; empty for a model id.
        version: The number of the version.
        stage: ``Production``, … or ``latest``.
        alias: The alias of a version.
        model_id: The id of a logged model (MLflow 3).
        path: The path inside the model; empty: all of it.
    """

    name: str = ""
    version: str = ""
    stage: str = ""
    alias: str = ""
    model_id: str = ""
    path: str = ""


def split_uri(uri: str) -> SplitResult:
    """Split a URI into its parts.

    Raises:
        UsageError: The text is not a URI.
    """
    try:
        return urlsplit(uri)
    except ValueError as error:
        raise UsageError(f"{mask_uri(uri)!r} is not a URI: {error}") from None


def parse_run_uri(uri: str) -> RunRef:
    """Parse ``runs:/…``.

    Raises:
        UsageError: The URI names no run, or a path that leads out of its artifacts.
    """
    run_id, _, path = split_uri(uri).path.strip("/").partition("/")
    if not run_id or split_uri(uri).netloc:
        raise UsageError(f"{uri!r} names no run: it should look like runs:/<run id>/<path>")
    return RunRef(run_id=run_id, path=safe_path(path, uri))


def parse_model_uri(uri: str) -> ModelRef:
    """Parse ``models:/…``.

    Raises:
        UsageError: The URI names no model, or a path that leads out of it.
    """
    parts = split_uri(uri)
    first, _, rest = parts.path.strip("/").partition("/")
    if not first or parts.netloc:
        raise UsageError(
            f"{uri!r} names no model: it should look like models:/<name>/<version or stage>, models:/<name>@<alias> "
            "or models:/<model id>"
        )
    name, at, alias = first.rpartition("@")
    if at and name and alias:
        return ModelRef(name=name, alias=alias, path=safe_path(rest, uri))
    if first.startswith("m-") and not rest.partition("/")[0].isdigit():
        return ModelRef(model_id=first, path=safe_path(rest, uri))
    which, _, path = rest.partition("/")
    if not which:
        raise UsageError(f"{uri!r} names no version of the model {first!r}: add /<version>, /<stage> or @<alias>")
    path = safe_path(path, uri)
    return (
        ModelRef(name=first, version=which, path=path)
        if which.isdigit()
        else ModelRef(name=first, stage=which, path=path)
    )


def local_path(uri: str) -> Path | None:
    """Return the path of a ``file:`` URI or of a plain path; None for any other URI."""
    parts = split_uri(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return Path(uri) if not parts.scheme else None


def join(root: str, path: str) -> str:
    """Return the URI of `path` inside `root`; a query of `root` stays at its end."""
    if not path:
        return root
    parts = split_uri(root)
    return parts._replace(path=posixpath.join(parts.path, path)).geturl()


def safe_path(path: str, uri: str) -> str:
    """Return `path` without empty parts.

    Raises:
        UsageError: The path leads out of the folder in which it begins.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if any(part == ".." or "\\" in part or "\0" in part for part in parts):
        raise UsageError(f"{mask_uri(uri)!r} leads out of the artifacts: '..' and '\\' cannot be part of the path")
    return "/".join(parts)


def safe_name(name: object) -> str:
    """Return the name of a file or folder as a server listed it.

    Raises:
        TrackingError: A file of that name would be written to another folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise TrackingError(f"the tracking server lists an artifact with the name {name!r}, which is not safe to write")
    return name


def absolute_uri(uri: str, folder: Path = Path()) -> str:
    """Return a tracking URI that means the same store in any working directory; it blocks: use a thread.

    Args:
        uri: The URI.
        folder: The folder from which a relative path starts. Default: the working directory.
    """
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        path, mark, query = uri.removeprefix("sqlite:///").partition("?")
        in_memory = path in ("", ":memory:")
        return uri if in_memory else f"sqlite:///{(folder / path).absolute()}{mark}{query}"
    local = local_path(uri)
    # "databricks" is a name, although it looks like that of a folder.
    if local is None or uri == "databricks":
        return uri
    return (folder / local.expanduser()).absolute().as_uri()

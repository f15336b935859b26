"""Parses the URI of a project: where the project is and how it is fetched. Nothing here reads the disk.

    what it looks like                                    kind
    ──────────────────────────────────────────────────    ────────────────────────────────────────────
    ext::…, <name>::…, any other <scheme>://              refused
    http(s)://…/x.zip                                     ARCHIVE, downloaded
    http(s)://…, ssh://…, git://…                         GIT
    file://…                                              LOCAL, percent-escapes decoded
    [user@]host:path, no slash before the colon           GIT over ssh, as Git itself reads it
    anything else                                         LOCAL, ``~`` expanded

Only the disk can tell what a LOCAL path is (folder, bare repository, zip). The first ``#`` begins the sub-folder.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePosixPath
from urllib.parse import SplitResult, unquote, unquote_to_bytes, urlsplit

from mlfleet._text.masking import MASK, mask_uri
from mlfleet.errors import FetchError

__all__ = ["Credentials", "ProjectUri", "UriKind", "check_version", "parse_uri", "without_credentials"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SCHEME = re.compile(r"(?P<scheme>[^/:\s]*)://")
_ONE_SLASH = re.compile(r"(https?|ssh|git|file):(?=/)", re.I)
_TRANSPORT = re.compile(r"[^/:\[\]]*::")
# The colon must come before any slash, as in Git; brackets hold an IPv6 address.
_SCP = re.compile(r"(?:(?P<user>[^/:]*)@)?(?P<host>\[[^\]/]*\]|[^/:]*):(?P<path>.*)")
_GIT_SCHEMES = ("http", "https", "ssh", "git")
# What `git check-ref-format` forbids in names; `^`, `~` and `:` would also make an expression of it.
_NO_REF = re.compile(r"[\s~^:?*\[\\]|\.\.|@\{|//|/$|\.$|\.lock(/|$)")


class UriKind(StrEnum):
    """The ways to fetch a project."""

    LOCAL = "local"
    GIT = "git"
    ARCHIVE = "archive"


@dataclass(frozen=True, slots=True)
class Credentials:
    """The user name and password or token of a URI. They must not reach a command line, log or error.

    Attributes:
        username: The user name; it may be a token if there is no password.
        password: The password; None if only a user name was given.
    """

    username: str = field(repr=False)
    password: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class ProjectUri:
    """The parts of a URI.

    Attributes:
        text: The URI as it was given, without quotes, credentials and query, so that it may be shown.
        kind: The way to fetch the project.
        location: A path, or a URL without credentials. The query of an archive's URL may be a secret, too.
        subdir: The folder inside, with single slashes; empty for the top.
        credentials: The credentials in the URL.
    """

    text: str
    kind: UriKind
    location: str = field(repr=False)
    subdir: str = ""
    credentials: Credentials | None = field(default=None, repr=False)

    @property
    def secrets(self) -> tuple[str, ...]:
        """The texts to mask in every message about this URI."""
        given = self.credentials
        words = [given.password or given.username] if given else []
        if self.kind is UriKind.ARCHIVE:
            words.append(urlsplit(self.location).query)
        return tuple(word for word in words if word)


def parse_uri(uri: str) -> ProjectUri:
    """Parse the URI of a project.

    Raises:
        FetchError: The URI is refused, or has no meaning.
    """
    text = uri.strip("'\"")
    _check_text(text, "the URI of the project")
    base, _, fragment = text.partition("#")
    if not base:
        raise FetchError(
            f"the URI {mask_uri(text)} names a sub-folder, but no project to look for it in", uri=mask_uri(text)
        )
    if _TRANSPORT.match(base):
        raise FetchError(
            f"the transport {base.split('::')[0]!r} of the URI is not allowed: {_allowed()}", uri=base.split("::")[0]
        )
    if scheme := _SCHEME.match(base):
        return _parse_url(base, scheme["scheme"].lower(), fragment)
    if one_slash := _ONE_SLASH.match(base):
        raise FetchError(f"after {one_slash[0]!r} a URI needs two slashes: {_allowed()}")
    if scp := _SCP.fullmatch(base):
        return _parse_scp(base, scp, fragment)
    return ProjectUri(_with(base, fragment), UriKind.LOCAL, os.path.expanduser(base), _subdir(fragment, base))  # noqa: PTH111


def check_version(version: str) -> None:
    """Check that a version can be the name of a commit, branch or tag.

    Raises:
        FetchError: The version is refused.
    """
    _check_text(version, "the version")
    if _NO_REF.search(version) or version.startswith(("/", ".")):
        raise FetchError(f"the version {version!r} is not the name of a commit, a branch or a tag")


def without_credentials(url: str) -> str:
    """Return the URL of a Git remote as it may be shown: without user information, except for the user name of ssh."""
    masked = mask_uri(url)
    return masked.replace(f"://{MASK}@", "://", 1)


def _check_text(text: str, what: str) -> None:
    if not text.strip():
        raise FetchError(f"{what} is empty")
    if _CONTROL.search(text):
        raise FetchError(f"{what} has a control character in it (a line break, a tab, …)")
    if text.startswith("-"):
        hint = "; for a folder of that name write ./-…" if "URI" in what else ""
        raise FetchError(f"{what} begins with '-' and would be taken for an option: refused{hint}")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise FetchError(f"{what} has a character in it that no file name can have (a lone surrogate)") from error


def _parse_url(base: str, scheme: str, fragment: str) -> ProjectUri:
    if scheme == "file":
        return _parse_file(base, fragment)
    if scheme not in _GIT_SCHEMES:
        raise FetchError(f"the scheme {scheme + '://'!r} of the URI is not allowed: {_allowed()}", uri=f"{scheme}://")
    parts, host = _split(base, scheme)
    is_archive = scheme in ("http", "https") and parts.path.lower().endswith(".zip")
    _, colons, rest = base.partition("://")
    userinfo, at, _ = parts.netloc.rpartition("@")
    clean = f"{scheme}{colons}{rest[len(userinfo) + len(at) :]}"
    if scheme == "ssh" and at:
        clean = f"{scheme}{colons}{_ssh_user(userinfo, host)}@{rest[len(userinfo) + len(at) :]}"
    if is_archive:
        shown = clean.partition("?")[0] + (f"?{MASK}" if parts.query else "")
        kind = UriKind.ARCHIVE
    elif "?" in rest:
        raise FetchError(
            f"the URL of a Git repository has no query, but this one of {host} goes on after a '?': remove that part",
            uri=f"{scheme}://{host}",
        )
    else:
        shown, kind = clean, UriKind.GIT
    given = _credentials(userinfo) if at and scheme != "ssh" else None
    return ProjectUri(_with(shown, fragment), kind, clean, _subdir(fragment, shown), given)


def _split(url: str, scheme: str) -> tuple[SplitResult, str]:
    # What is wrong with a URL may be a password with an unescaped '/', '#' or ':' in it: never repeat such a URL.
    broken = FetchError(
        f"the URI is not a valid {scheme}:// URL (in a user name or password, escape '#', '/', '@' and ':' by %XX)",
        uri=f"{scheme}://{MASK}",
    )
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError:
        raise broken from None  # its text may repeat the password
    if not host or re.search(r"[\s\\]", parts.netloc):
        raise broken
    if not parts.path.strip("/"):
        raise FetchError(
            f"the URI names a host of {scheme}://, but no repository or zip on it", uri=f"{scheme}://{MASK}"
        )
    _refuse_option(host, "host")
    return parts, host


def _credentials(userinfo: str) -> Credentials | None:
    username, colon, password = userinfo.partition(":")
    if not userinfo.strip(":"):
        return None
    result = Credentials(unquote(username), unquote(password) if colon else None)
    if _CONTROL.search(result.username + (result.password or "")):
        raise FetchError("the user name or password in the URI has a control character in it")
    return result


def _ssh_user(userinfo: str, host: str) -> str:
    if ":" in userinfo:
        raise FetchError(
            f"ssh takes no password from a URI: remove it from the ssh:// URI of {host} and use a key (ssh-agent, "
            "~/.ssh/config)",
            uri=f"ssh://{MASK}@{host}",
        )
    _refuse_option(userinfo, "user name")
    return userinfo


def _parse_file(base: str, fragment: str) -> ProjectUri:
    host, slash, path = base[len("file://") :].partition("/")
    decoded = os.fsdecode(unquote_to_bytes(slash + path))
    if host.lower() not in ("", "localhost") or not slash:
        raise FetchError(
            f"a file:// URI needs three slashes and an absolute path (file:///home/me/project), not {mask_uri(base)!r}",
            uri=mask_uri(base),
        )
    if _CONTROL.search(decoded):
        raise FetchError("the file:// URI has an escaped control character in it", uri=_with(base, fragment))
    return ProjectUri(_with(base, fragment), UriKind.LOCAL, decoded, _subdir(fragment, base))


def _parse_scp(base: str, match: re.Match[str], fragment: str) -> ProjectUri:
    user, host, path = match["user"], match["host"], match["path"]
    if "@" in path.partition("/")[0]:
        raise FetchError(
            "the URI looks like user:password@host:path, but ssh takes no password from a URI: write git@host:path and "
            "use a key",
            uri=MASK,
        )
    if not host.strip("[]") or not path.strip("/") or re.search(r"[\s\\@]", host):
        raise FetchError(f"{base!r} is neither a folder nor a Git repository (host:path)", uri=base)
    for text, what in ((host, "host"), (user or "", "user name"), (path, "path")):
        _refuse_option(text, what)
    return ProjectUri(_with(base, fragment), UriKind.GIT, base, _subdir(fragment, base))


def _refuse_option(text: str, what: str) -> None:
    if text.startswith("-"):
        raise FetchError(f"the {what} in the URI begins with '-' and would be taken for an option: refused")


def _subdir(fragment: str, base: str) -> str:
    segments = [segment for segment in fragment.split("/") if segment]
    if fragment.startswith("/") or any(segment in (".", "..") for segment in segments):
        raise FetchError(
            f"the sub-folder {fragment!r} must be a path inside the project, without '.' and '..'",
            uri=_with(base, fragment),
        )
    return str(PurePosixPath(*segments)) if segments else ""


def _with(base: str, fragment: str) -> str:
    return f"{base}#{fragment}" if fragment else base


def _allowed() -> str:
    return (
        "give a folder, a file://, https://, http://, ssh:// or git:// URI, git@host:path, or a .zip "
        "(a local path with a colon in it begins with ./)"
    )

"""The meaning of project URIs, and the URIs that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlfleet._project.uri import Credentials, UriKind, check_version, parse_uri, without_credentials
from mlfleet.errors import FetchError

URIS = [
    ("projects/one", UriKind.LOCAL, "projects/one", ""),
    ("/abs/one#steps/train", UriKind.LOCAL, "/abs/one", "steps/train"),
    ("'./one'", UriKind.LOCAL, "./one", ""),
    ('"one#a//b/"', UriKind.LOCAL, "one", "a/b"),
    ("one#v1.2/my.step", UriKind.LOCAL, "one", "v1.2/my.step"),
    ("./odd:name", UriKind.LOCAL, "./odd:name", ""),
    ("file:///a%20b/c%23d", UriKind.LOCAL, "/a b/c#d", ""),
    ("file://localhost/srv/x.git#sub", UriKind.LOCAL, "/srv/x.git", "sub"),
    ("https://host/team/project", UriKind.GIT, "https://host/team/project", ""),
    ("HTTPS://host/project.git#sub", UriKind.GIT, "https://host/project.git", "sub"),
    ("ssh://git@host:2222/team/project.git", UriKind.GIT, "ssh://git@host:2222/team/project.git", ""),
    ("git@host:team/project.git#sub", UriKind.GIT, "git@host:team/project.git", "sub"),
    ("alias:project", UriKind.GIT, "alias:project", ""),
    ("git@[::1]:project.git", UriKind.GIT, "git@[::1]:project.git", ""),
    ("git@host:project.zip", UriKind.GIT, "git@host:project.zip", ""),
    ("https://host/a.zip#project-main", UriKind.ARCHIVE, "https://host/a.zip", "project-main"),
    ("project.zip", UriKind.LOCAL, "project.zip", ""),
]


@pytest.mark.parametrize(("uri", "kind", "location", "subdir"), URIS)
def test_uri_gives_the_kind_and_location_of_a_project(uri: str, kind: UriKind, location: str, subdir: str) -> None:
    parsed = parse_uri(uri)
    assert (parsed.kind, parsed.location, parsed.subdir) == (kind, location, subdir)


def test_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert Path(parse_uri("~/project").location) == Path("/home/someone/project")


REFUSED = [
    ("ext::sh -c 'touch /tmp/owned'", "transport 'ext' of the URI is not allowed"),
    ("fd::17/foo", "transport 'fd' of the URI is not allowed"),
    ("https::https://host/x", "transport 'https' of the URI is not allowed"),
    ("s3://bucket/project", "scheme 's3://' of the URI is not allowed"),
    ("git+ssh://host/x", "is not allowed"),
    ("javascript://x", "is not allowed"),
    ("http:/host/x", "needs two slashes"),
    ("", "is empty"),
    ("  ", "is empty"),
    ("''", "is empty"),
    ("#sub", "names a sub-folder, but no project"),
    ("-upload-pack=touch", "begins with '-'"),
    ("ssh://-oProxyCommand=touch/x", "host in the URI begins with '-'"),
    ("ssh://-oProxyCommand=touch@host/x", "user name in the URI begins with '-'"),
    ("git@-oProxyCommand=touch:x", "host in the URI begins with '-'"),
    ("host:-x", "path in the URI begins with '-'"),
    ("a\nb", "control character"),
    ("file:///a%0Ab", "control character"),
    ("file:///a%00b", "control character"),
    ("https://user:a%0Ahost=evil@host/x", "control character"),
    ("\ud800", "lone surrogate"),
    ("file://host/share", "three slashes"),
    ("file://relative", "three slashes"),
    ("https://host", "no repository or zip on it"),
    ("https:///project", "not a valid https:// URL"),
    ("https://[::1/project", "not a valid https:// URL"),
    ("https://host:port/project", "not a valid https:// URL"),
    ("https://good\\@evil/project", "not a valid https:// URL"),
    ("https://host/project?ref=main", "no query"),
    ("ssh://git:secret@host/x", "takes no password"),
    ("git:secret@host:x", "takes no password"),
    ("host:", "neither a folder nor a Git repository"),
    ("one#../other", "without '.' and '..'"),
    ("one#a/./b", "without '.' and '..'"),
    ("one#/etc", "inside the project"),
]


@pytest.mark.parametrize(("uri", "message"), REFUSED)
def test_dangerous_and_meaningless_uris_are_refused(uri: str, message: str) -> None:
    with pytest.raises(FetchError) as caught:
        parse_uri(uri)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:s3cr3t@host/x.git#sub",
        "https://me:s3cr3t@host/x.zip?token=s3cr3t",
        "https://me:s3cr3t@host/x?token=s3cr3t",
        "https://me:s3cr3t/with/slash@host/x",
        "https://me:s3cr3t@host:bad/x",
        "https://me:s3cr3t@",
        "file://me:s3cr3t@host/x",
        "s3://me:s3cr3t@bucket/x",
        "#https://me:s3cr3t@host",
        "ssh://me:s3cr3t@host/x",
    ],
)
def test_password_in_a_uri_is_never_shown(uri: str) -> None:
    try:
        parsed = parse_uri(uri)
        shown = f"{parsed!r} {parsed.text}"
    except FetchError as error:
        shown = f"{error} {error.uri}"
    assert "s3cr3t" not in shown


def test_credentials_are_taken_out_of_the_url_and_unescaped() -> None:
    parsed = parse_uri("https://me%40corp:p%3Aw@host:8443/x.git")
    assert parsed.credentials == Credentials("me@corp", "p:w")
    assert parsed.location == parsed.text == "https://host:8443/x.git"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:token@host/x.git", "https://host/x.git"),
        ("git@host:x.git", "git@host:x.git"),
        ("ssh://git@host/x.git", "ssh://git@host/x.git"),
    ],
)
def test_url_of_a_remote_is_shown_without_credentials(url: str, shown: str) -> None:
    assert without_credentials(url) == shown


@pytest.mark.parametrize("version", ["main", "v1.2", "feature/x", "refs/pull/3/head", "1a2b3c4", "HEAD", "ü"])
def test_names_of_commits_branches_and_tags_are_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("", "the version is empty"),
        ("--upload-pack=touch", "begins with '-'"),
        ("a\0b", "control character"),
        ("main~2", "not the name of a commit"),
        ("HEAD^", "not the name of a commit"),
        ("main:file", "not the name of a commit"),
        ("refs/heads/*", "not the name of a commit"),
        ("a..b", "not the name of a commit"),
        ("@{-1}", "not the name of a commit"),
        ("a b", "not the name of a commit"),
    ],
)
def test_invalid_names_are_refused_as_versions(version: str, message: str) -> None:
    with pytest.raises(FetchError, match="version") as caught:
        check_version(version)
    assert message in str(caught.value)


_pieces = st.sampled_from(
    [":", "/", "//", "#", "@", "://", "::", "-", "..", "?", "%00", "[", "]", "~", "'", "\\", "ssh", "file", "https"]
)


@given(st.one_of(st.text(st.characters(codec=None)), st.lists(st.one_of(_pieces, st.text(max_size=4))).map("".join)))
@example("https://a:b:c@[fe80::1%25eth0]/x")
@example("//℀@host/x")
def test_any_uri_raises_only_fetch_errors(text: str) -> None:
    for parse in (parse_uri, check_version):
        try:
            parse(text)
        except FetchError as error:
            str(error).encode("utf-8", "surrogatepass")

"""Projects from real Git repositories: over HTTP, over ssh and from this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from components.git_http import GitServer
from components.git_repository import Repository, git, make_repository
from components.ssh_server import SshServer
from mlfleet._project.fetch import ProjectFetcher
from mlfleet.errors import FetchError


@pytest.fixture(autouse=True)
def own_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without the settings of the person who runs the tests, and temporary files where they can be counted."""
    home, tmp = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    tmp.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp))
    for name in ("XDG_CONFIG_HOME", "GIT_ASKPASS", "SSH_ASKPASS", "GIT_SSH_COMMAND", "SSH_AUTH_SOCK"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture
def served(git_http: GitServer) -> Repository:
    return make_repository(git_http.root)


@pytest.fixture
def local(tmp_path: Path) -> Repository:
    return make_repository(tmp_path / "repositories")


def cached_files() -> list[Path]:
    root = Path(os.environ["MLFLEET_CACHE_DIR"])
    return [path for path in root.rglob("*") if path.is_file()]


async def test_every_form_of_version_is_resolved(git_http: GitServer, served: Repository) -> None:
    first = served.head
    git(served.work, "tag", "light")
    git(served.work, "tag", "--annotate", "heavy", "--message", "a release")
    git(served.work, "branch", "feature/x")
    second = served.commit(MLproject="name: two\n")
    git(served.work, "push", "--quiet", "origin", f"{first}:refs/pull/7/head")
    fetcher = ProjectFetcher(fresh=0)
    uri = f"{git_http.url}/project.git"
    cases: list[tuple[str | None, str, str | None]] = [
        (None, second, None),
        ("HEAD", second, None),
        ("main", second, "main"),
        ("refs/heads/main", second, "main"),
        ("feature/x", first, "feature/x"),
        ("light", first, None),
        ("heavy", first, None),
        ("refs/tags/heavy", first, None),
        ("refs/pull/7/head", first, None),
        (first, first, None),
        (first.upper(), first, None),
        (first[:7], first, None),
        (second[:10], second, None),
    ]
    for version, commit, branch in cases:
        project = await fetcher.fetch(uri, version)
        assert (project.commit, project.branch, project.repo_url) == (commit, branch, uri), version
        name = "name: two\n" if commit == second else "name: project\n"
        assert (project.folder / "MLproject").read_text() == name
        assert project.cached
        assert project.source_name == uri


async def test_tag_is_preferred_to_a_branch_of_the_same_name(local: Repository) -> None:
    tagged = local.head
    git(local.work, "tag", "both")
    git(local.work, "branch", "both")
    git(local.work, "switch", "--quiet", "both", "--")
    branched = local.commit(a__txt="later")
    fetcher = ProjectFetcher()
    by_name = await fetcher.fetch(str(local.bare), "both")
    by_ref = await fetcher.fetch(str(local.bare), "refs/heads/both")
    assert (by_name.commit, by_name.branch) == (tagged, None)
    assert (by_ref.commit, by_ref.branch) == (branched, "both")


async def test_commit_behind_no_branch_is_found(git_http: GitServer, served: Repository) -> None:
    lost = served.commit(a__txt="lost")
    git(served.work, "reset", "--quiet", "--hard", "HEAD~1")
    served.push()
    project = await ProjectFetcher().fetch(f"{git_http.url}/project.git", lost)
    assert (project.folder / "a.txt").read_text() == "lost"


async def test_five_hundred_callers_make_one_clone(git_http: GitServer, served: Repository) -> None:
    fetcher = ProjectFetcher()
    uri = f"{git_http.url}/project.git#steps"
    projects = await asyncio.gather(*[fetcher.fetch(uri) for _ in range(500)])
    assert len(set(projects)) == 1
    assert projects[0].folder.name == "steps"
    asked = git_http.discoveries
    assert asked <= 3  # refs, history, files
    for _ in range(20):
        await fetcher.fetch(uri)
    assert git_http.discoveries == asked


async def test_a_request_to_a_busy_server_is_repeated(git_http: GitServer, served: Repository) -> None:
    git_http.busy = 1
    assert (await ProjectFetcher().fetch(f"{git_http.url}/project.git")).commit == served.head
    git_http.busy = 100
    with pytest.raises(FetchError, match=r"cannot read the Git repository .*503"):
        await ProjectFetcher().fetch(f"{git_http.url}/project.git")
    assert git_http.busy == 100 - 3


async def test_known_commit_needs_no_network(git_http: GitServer, served: Repository) -> None:
    uri = f"{git_http.url}/project.git"
    commit = (await ProjectFetcher().fetch(uri)).commit
    git_http.down = True
    assert (await ProjectFetcher().fetch(uri, commit)).commit == commit
    with pytest.raises(FetchError, match="503"):
        await ProjectFetcher().fetch(uri, "main")


async def test_branch_that_moved_is_fetched_again(git_http: GitServer, served: Repository) -> None:
    uri = f"{git_http.url}/project.git"
    fetcher = ProjectFetcher(fresh=0)
    old = await fetcher.fetch(uri, "main")
    new_commit = served.commit(MLproject="name: new\n")
    new = await fetcher.fetch(uri, "main")
    assert new.commit == new_commit
    assert (new.folder / "MLproject").read_text() == "name: new\n"
    assert (old.folder / "MLproject").read_text() == "name: project\n"


async def test_branch_that_was_rewritten_is_fetched_again(local: Repository) -> None:
    fetcher = ProjectFetcher(fresh=0)
    await fetcher.fetch(str(local.bare))
    git(local.work, "commit", "--quiet", "--amend", "--message", "another past")
    local.push()
    assert (await fetcher.fetch(str(local.bare))).commit == local.head


async def test_working_copies_are_private_and_removed(local: Repository, tmp_path: Path) -> None:
    git(local.work, "tag", "v1")
    local.push()
    fetcher = ProjectFetcher()
    project = await fetcher.fetch(f"file://{local.bare}#steps")
    async with fetcher.working_copy(project) as one, fetcher.working_copy(project) as two:
        assert one != two
        top = one.parent
        assert one.name == "steps"
        assert os.access(top / "run.sh", os.X_OK)
        assert (top / "link").readlink() == Path("steps/train.py")
        assert git(one, "rev-parse", "HEAD") == project.commit
        assert git(one, "describe", "--tags") == "v1"
        assert git(one, "status", "--porcelain") == ""
        (one / "train.py").write_text("changed")
        (one / "closed").mkdir()
        (one / "closed" / "file").touch()
        (one / "closed").chmod(0)
        assert (two / "train.py").read_text() == "print('step')\n"
    assert (project.folder / "train.py").read_text() == "print('step')\n"
    assert list((tmp_path / "tmp").iterdir()) == []


async def test_working_copy_is_removed_when_its_run_is_cancelled(local: Repository, tmp_path: Path) -> None:
    fetcher = ProjectFetcher()
    project = await fetcher.fetch(str(local.bare))
    entered = asyncio.Event()

    async def run() -> None:
        async with fetcher.working_copy(project):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list((tmp_path / "tmp").iterdir()) == []


async def test_bare_repository_is_not_written_to(local: Repository) -> None:
    before = {path: path.stat().st_mtime_ns for path in local.bare.rglob("*")}
    fetcher = ProjectFetcher()
    project = await fetcher.fetch(f"file://{local.bare}", "main")
    async with fetcher.working_copy(project):
        pass
    assert {path: path.stat().st_mtime_ns for path in local.bare.rglob("*")} == before


async def test_submodules_are_fetched_too(git_http: GitServer, served: Repository) -> None:
    make_repository(git_http.root, "library")
    git(served.work, "submodule", "--quiet", "add", f"{git_http.url}/library.git", "vendor/library")
    git(served.work, "config", "--file", ".gitmodules", "submodule.vendor/library.url", "../library.git")
    served.commit(MLproject="name: with\n")
    fetcher = ProjectFetcher()
    project = await fetcher.fetch(f"{git_http.url}/project.git")
    async with fetcher.working_copy(project) as folder:
        assert (folder / "vendor" / "library" / "MLproject").read_text() == "name: library\n"
        assert git(folder / "vendor" / "library", "log", "--format=%s") == "work"
        assert git(folder, "status", "--porcelain") == ""


async def test_submodule_from_elsewhere_cannot_reach_into_this_machine(
    git_http: GitServer, served: Repository, local: Repository
) -> None:
    git(served.work, "submodule", "--quiet", "add", str(local.bare), "stolen")
    served.commit()
    with pytest.raises(FetchError, match=r"cannot fetch the submodules of .*transport 'file' not allowed"):
        await ProjectFetcher().fetch(f"{git_http.url}/project.git")
    assert not [path for path in cached_files() if "trees" in path.parts]


async def test_hooks_of_a_template_do_not_run(local: Repository, own_git: Path, tmp_path: Path) -> None:
    hooks = tmp_path / "template" / "hooks"
    hooks.mkdir(parents=True)
    for name in ("post-checkout", "reference-transaction", "post-index-change"):
        (hooks / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/hook-ran\n")
        (hooks / name).chmod(0o755)
    (own_git / ".gitconfig").write_text(f"[init]\n templateDir = {tmp_path}/template\n[core]\n hooksPath = {hooks}\n")
    await ProjectFetcher().fetch(str(local.bare))
    assert not (tmp_path / "hook-ran").exists()


async def test_password_in_the_uri_works_and_is_written_nowhere(
    git_http: GitServer, served: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_repository(git_http.root, "library")
    git(served.work, "submodule", "--quiet", "add", f"{git_http.url}/library.git", "library")
    served.commit()
    git_http.credentials = "me@corp:s3cr3t/t0ken"
    host = git_http.url.removeprefix("http://")
    uri = f"http://me%40corp:s3cr3t%2Ft0ken@{host}/project.git"
    with monkeypatch.context() as patch:
        # git tells of every command line, its children's too.
        patch.setenv("GIT_TRACE", str(tmp_path / "trace"))
        # The person's own settings in variables count as before.
        for name, value in (("COUNT", "1"), ("KEY_0", "http.userAgent"), ("VALUE_0", "git/mine")):
            patch.setenv(f"GIT_CONFIG_{name}", value)
        git_http.agents.clear()
        project = await ProjectFetcher().fetch(uri)
    assert "s3cr3t" not in (tmp_path / "trace").read_text()
    assert git_http.agents == {"git/mine"}
    assert (project.folder / "library" / "MLproject").exists()
    assert project.uri == project.repo_url == f"{git_http.url}/project.git"
    assert "s3cr3t" not in repr(project)
    assert not [path for path in cached_files() if b"s3cr3t" in path.read_bytes()]


async def test_token_in_place_of_a_user_name_works(git_http: GitServer, served: Repository) -> None:
    git_http.credentials = "t0ken:"
    host = git_http.url.removeprefix("http://")
    assert (await ProjectFetcher().fetch(f"http://t0ken@{host}/project.git")).commit == served.head


async def test_password_of_a_credential_helper_works(git_http: GitServer, served: Repository, own_git: Path) -> None:
    git_http.credentials = "me:s3cr3t"
    host = git_http.url.removeprefix("http://")
    (own_git / ".gitconfig").write_text("[credential]\n helper = store\n")
    (own_git / ".git-credentials").write_text(f"http://me:s3cr3t@{host}\n")
    assert (await ProjectFetcher().fetch(f"{git_http.url}/project.git")).commit == served.head
    assert (await ProjectFetcher(fresh=0).fetch(f"http://me@{host}/project.git", "main")).commit == served.head


async def test_missing_credentials_are_an_error_that_says_how(
    git_http: GitServer, served: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    git_http.credentials = "me:s3cr3t"
    asking = tmp_path / "ask"
    asking.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n")
    asking.chmod(0o755)
    for name in ("GIT_ASKPASS", "SSH_ASKPASS"):
        monkeypatch.setenv(name, str(asking))
    with pytest.raises(FetchError, match=r"git has none: configure a credential helper"):
        await ProjectFetcher().fetch(f"{git_http.url}/project.git")
    assert not (tmp_path / "asked").exists()


async def test_wrong_credentials_fail_at_once_and_are_masked(git_http: GitServer, served: Repository) -> None:
    git_http.credentials = "me:right"
    host = git_http.url.removeprefix("http://")
    with pytest.raises(FetchError, match="refused the credentials") as caught:
        await ProjectFetcher().fetch(f"http://me:wr0ng@{host}/project.git")
    assert "wr0ng" not in f"{caught.value} {caught.value.uri} {caught.value.__cause__}"


async def test_password_in_the_uri_is_preferred_to_a_credential_helper(
    git_http: GitServer, served: Repository, own_git: Path
) -> None:
    git_http.credentials = "me:right"
    host = git_http.url.removeprefix("http://")
    (own_git / ".gitconfig").write_text("[credential]\n helper = store\n")
    (own_git / ".git-credentials").write_text(f"http://me:stale@{host}\n")
    assert (await ProjectFetcher().fetch(f"http://me:right@{host}/project.git")).commit == served.head
    assert "stale" in (own_git / ".git-credentials").read_text()


async def test_ssh_by_url_and_by_host_colon_path(
    ssh_server: SshServer, local: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_SSH_COMMAND", f"{ssh_server.command} -p {ssh_server.port}")
    user = ssh_server.user
    for uri in (f"ssh://{user}@127.0.0.1:{ssh_server.port}{local.bare}", f"{user}@127.0.0.1:{local.bare}"):
        project = await ProjectFetcher().fetch(uri, "main")
        assert (project.commit, project.branch, project.repo_url) == (local.head, "main", uri)


async def test_ssh_without_a_key_fails_at_once_and_says_why(
    ssh_server: SshServer, local: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri = f"ssh://{ssh_server.user}@127.0.0.1:{ssh_server.port}{local.bare}"
    hosts = ssh_server.known_hosts
    monkeypatch.setenv("GIT_SSH_COMMAND", f"ssh -F none -o UserKnownHostsFile={tmp_path}/none")
    with pytest.raises(FetchError, match="key of the ssh host is not known"):
        await ProjectFetcher().fetch(uri)
    monkeypatch.setenv("GIT_SSH_COMMAND", f"ssh -F none -o IdentityFile=none -o UserKnownHostsFile={hosts}")
    with pytest.raises(FetchError, match="accepts none of your keys"):
        await ProjectFetcher().fetch(uri)


async def test_short_hash_of_two_commits_asks_for_more_digits(local: Repository) -> None:
    # Always the same hashes, since names and times are given; among 600 some begin alike.
    commits = "".join(
        f"commit refs/heads/many\ncommitter A <a@example.org> {number} +0000\ndata 1\nx\n" for number in range(600)
    )
    subprocess.run(["git", "fast-import", "--quiet"], cwd=local.bare, input=commits.encode(), check=True)
    hashes = git(local.bare, "rev-list", "many").splitlines()
    alike = next(one for one in hashes if sum(other.startswith(one[:4]) for other in hashes) > 1)
    with pytest.raises(FetchError, match=f"short hash {alike[:4]} names several objects .*more digits"):
        await ProjectFetcher().fetch(str(local.bare), alike[:4])
    assert (await ProjectFetcher().fetch(str(local.bare), alike[:12])).commit == alike


async def test_unknown_versions_suggest_similar_names(local: Repository) -> None:
    git(local.work, "branch", "development")
    local.push()
    for version in ("developement", "refs/heads/nowhere", "abcdef1", "0" * 40):
        with pytest.raises(FetchError, match=f"no commit, branch or tag '{version}'; it has .*development"):
            await ProjectFetcher().fetch(str(local.bare), version)


async def test_repository_that_is_empty_or_not_there(tmp_path: Path, git_http: GitServer) -> None:
    git(tmp_path, "init", "--quiet", "--bare", "empty.git")
    with pytest.raises(FetchError, match="is empty: push a commit first"):
        await ProjectFetcher().fetch(str(tmp_path / "empty.git"))
    with pytest.raises(FetchError, match="there is no such Git repository"):
        await ProjectFetcher().fetch(f"{git_http.url}/nothing.git")
    with pytest.raises(FetchError, match=r"cannot read the Git repository http://127\.0\.0\.1:9/x"):
        await ProjectFetcher().fetch("http://127.0.0.1:9/x")


async def test_missing_subfolder_lists_those_there(local: Repository) -> None:
    (local.work / "out").symlink_to("/etc")
    local.commit()
    with pytest.raises(FetchError, match=r"no sub-folder 'stps' .*it has out, steps"):
        await ProjectFetcher().fetch(f"{local.bare}#stps")
    with pytest.raises(FetchError, match="leads out of the project"):
        await ProjectFetcher().fetch(f"{local.bare}#out")


async def test_without_git_the_error_says_what_to_install(
    local: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match="git is not installed"):
        await ProjectFetcher().fetch(str(local.bare))
    folder = await ProjectFetcher().fetch(str(local.work))
    assert (folder.folder, folder.commit) == (local.work, None)


async def test_locked_mirror_of_a_killed_process_is_replaced(git_http: GitServer, served: Repository) -> None:
    uri = f"{git_http.url}/project.git"
    project = await ProjectFetcher().fetch(uri)
    mirror = project.folder.parents[3] / "mirror"
    new = served.commit(a__txt="new")
    (mirror / "packed-refs.lock").touch()
    (mirror / "HEAD.lock").touch()
    (mirror / "refs" / "heads").mkdir(parents=True, exist_ok=True)
    (mirror / "refs" / "heads" / "main.lock").touch()
    assert (await ProjectFetcher().fetch(uri)).commit == new


_FETCH = textwrap.dedent(
    """
    import asyncio, sys
    from mlfleet._project.fetch import ProjectFetcher

    async def main():
        fetcher = ProjectFetcher()
        print("began", flush=True)
        project = await fetcher.fetch(sys.argv[1])
        async with fetcher.working_copy(project) as folder:
            print(project.commit, (folder / "MLproject").read_text(), flush=True)

    asyncio.run(main())
    """
)


def start_fetching(uri: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", _FETCH, uri], stdout=subprocess.PIPE, text=True)


async def test_processes_that_race_share_one_mirror(git_http: GitServer, served: Repository) -> None:
    uri = f"{git_http.url}/project.git"
    processes = [start_fetching(uri) for _ in range(4)]
    printed = [(await asyncio.to_thread(process.communicate))[0] for process in processes]
    assert printed == [f"began\n{served.head} name: project\n\n"] * 4
    assert [process.returncode for process in processes] == [0] * 4
    posts = sum(path.endswith("/git-upload-pack") for path in git_http.requests)
    assert posts <= 4 + 2 * 2 + 2  # each asks for refs; one fetches history and files


async def test_killed_clone_leaves_a_usable_cache(git_http: GitServer, served: Repository) -> None:
    uri = f"{git_http.url}/project.git"
    for requests in (1, 2, 3, 5):
        process = start_fetching(uri)
        for _ in range(requests):  # those that come when it is killed already count, too
            git_http.requested.clear()
            await asyncio.to_thread(git_http.requested.wait, 5)
        process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(process.communicate)
    project = await ProjectFetcher().fetch(uri)
    assert project.commit == served.head
    assert (project.folder / "steps" / "train.py").read_text() == "print('step')\n"
    assert not list(project.folder.parents[3].glob("tmp-*"))


async def test_a_fetch_that_fails_leaves_nothing(git_http: GitServer, served: Repository) -> None:
    git_http.down = True
    with pytest.raises(FetchError, match="cannot fetch the Git repository"):
        await ProjectFetcher().fetch(f"{git_http.url}/project.git", served.head)
    assert {path.name for path in cached_files()} == {"shelf.json", "lock"}
    (place,) = (Path(os.environ["MLFLEET_CACHE_DIR"]) / "projects").iterdir()
    assert {path.name for path in place.iterdir()} == {"shelf.json", "lock"}
    git_http.down = False
    fetcher = ProjectFetcher()
    project = await fetcher.fetch(f"{git_http.url}/project.git", served.head)
    unknown = "0" * 40
    with pytest.raises(FetchError, match="has no commit"):
        await fetcher.fetch(f"{git_http.url}/project.git", unknown)
    assert {path.name for path in place.iterdir()} == {"shelf.json", "lock", "mirror", "trees"}
    assert list((place / "trees").iterdir()) == [project.folder.parents[1]]


async def test_host_messages_lose_their_control_characters(local: Repository, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.git"
    git(tmp_path, "clone", "--quiet", "--bare", str(local.bare), str(hostile))
    (hostile / "config").write_text("[core]\n\x1b[2J\x07 = broken\n")
    with pytest.raises(FetchError) as caught:
        await ProjectFetcher().fetch(str(hostile))
    assert str(caught.value).isprintable()


async def test_cancelled_fetch_leaves_no_tree_and_the_next_one_works(git_http: GitServer, served: Repository) -> None:
    uri = f"{git_http.url}/project.git"
    fetcher = ProjectFetcher()
    task = asyncio.create_task(fetcher.fetch(uri))
    assert await asyncio.to_thread(git_http.requested.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [path for path in cached_files() if "trees" in path.parts]
    assert (await fetcher.fetch(uri)).commit == served.head

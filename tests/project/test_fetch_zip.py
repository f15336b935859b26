"""Projects in zip files, from this machine and over HTTP, and those zips that nobody should unpack."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from components.http_files import FileServer
from mlfleet._project.cache import list_entries, prune
from mlfleet._project.fetch import ProjectFetcher
from mlfleet.errors import FetchError

FILES = {"MLproject": "name: zipped\n", "steps/train.py": "print(1)\n"}


def make_zip(files: dict[str, str] | None = None, *, modes: dict[str, int] | None = None) -> bytes:
    """A zip as Info-ZIP makes them: with the modes of files, and links as files of their own mode."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (FILES if files is None else files).items():
            member = zipfile.ZipInfo(name)
            member.create_system = 3
            member.compress_type = zipfile.ZIP_DEFLATED
            member.external_attr = (modes or {}).get(name, stat.S_IFREG | 0o644) << 16
            archive.writestr(member, text)
    return packed.getvalue()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write_zip(data: bytes) -> Path:
        path = tmp_path / "project.zip"
        path.write_bytes(data)
        return path

    return write_zip


def trees() -> list[Path]:
    return list(Path(os.environ["MLFLEET_CACHE_DIR"]).glob("projects/*/trees/*"))


LINK = stat.S_IFLNK | 0o777


async def test_local_zip_with_modes_and_links(write: Callable[[bytes], Path]) -> None:
    files = FILES | {"run.sh": "echo\n", "link": "steps/train.py", "steps/up": "../MLproject", "empty/": ""}
    modes = {"run.sh": stat.S_IFREG | 0o4755, "link": LINK, "steps/up": LINK, "empty/": stat.S_IFDIR | 0o755}
    path = write(make_zip(files, modes=modes))
    fetcher = ProjectFetcher()
    for uri in (str(path), f"file://{path}", f"'{path}'"):
        project = await fetcher.fetch(uri)
        assert (project.cached, project.commit, project.source_name) == (True, None, str(path))
        async with fetcher.working_copy(project) as folder:
            assert folder.name == "project"
            assert (folder / "link").read_text() == "print(1)\n"
            assert (folder / "steps" / "up").readlink() == Path("../MLproject")
            assert stat.S_IMODE((folder / "run.sh").stat().st_mode) == 0o755
            assert (folder / "empty").is_dir()
    async with fetcher.working_copy(await fetcher.fetch(f"{path}#steps")) as folder:
        assert [each.name for each in folder.iterdir()] == ["train.py", "up"] or (folder / "train.py").exists()
    assert len(trees()) == 1


async def test_changed_zip_is_unpacked_again(write: Callable[[bytes], Path]) -> None:
    fetcher = ProjectFetcher()
    await fetcher.fetch(str(write(make_zip())))
    project = await fetcher.fetch(str(write(make_zip({"MLproject": "name: changed\n"}))))
    assert (project.folder / "MLproject").read_text() == "name: changed\n"


async def test_the_url_of_a_zip_with_secrets_is_not_logged(
    http_files: FileServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    http_files.files["/secret.zip"] = make_zip()
    http_files.credentials = "user:PASSWORD"
    await ProjectFetcher().fetch(f"{http_files.url.replace('://', '://user:PASSWORD@')}/secret.zip?sig=SIGNED")
    assert "SIGNED" not in caplog.text
    assert "PASSWORD" not in caplog.text


async def test_zip_over_http_is_downloaded_once_and_then_revalidated(http_files: FileServer) -> None:
    http_files.files["/p.zip"] = make_zip()
    http_files.redirects["/latest.zip"] = f"{http_files.url}/p.zip"
    uri = f"{http_files.url}/latest.zip"
    projects = await asyncio.gather(*[ProjectFetcher().fetch(uri) for _ in range(3)])
    fetcher = ProjectFetcher(fresh=0)
    projects += await asyncio.gather(*[fetcher.fetch(uri) for _ in range(50)])
    assert len(set(projects)) == 1
    assert projects[0].source_name == uri
    assert (projects[0].folder / "MLproject").read_text() == "name: zipped\n"
    assert [status for path, status in http_files.answers if path == "/p.zip"] == [200, 304, 304, 304]
    http_files.files["/p.zip"] = make_zip({"MLproject": "name: newer\n"})
    assert ((await fetcher.fetch(uri)).folder / "MLproject").read_text() == "name: newer\n"


async def test_a_request_to_a_busy_server_is_repeated(http_files: FileServer) -> None:
    http_files.files["/p.zip"] = make_zip()
    http_files.busy = 1
    assert (await ProjectFetcher().fetch(f"{http_files.url}/p.zip")).cached
    assert http_files.answers == [("/p.zip", 503), ("/p.zip", 200)]


async def test_a_zip_in_the_cache_of_the_first_version_is_used_and_pruned(write: Callable[[bytes], Path]) -> None:
    path = write(make_zip())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    folder = Path(os.environ["MLFLEET_CACHE_DIR"]) / "projects" / f"zip-{digest[:32]}"
    tree = folder / "trees" / digest
    (tree / "project").mkdir(parents=True)
    (tree / "project" / "MLproject").write_text("name: kept")
    (tree / "in-use").touch()
    (tree / "tree.json").write_text('{"name": "project"}')
    (folder / "shelf.json").write_text('{"uri": "/old/project.zip"}')
    (folder / "lock").touch()
    fetcher = ProjectFetcher()
    async with fetcher.working_copy(await fetcher.fetch(str(path))) as copy:
        assert (copy.name, (copy / "MLproject").read_text()) == ("project", "name: kept")
    fetcher.close()
    (folder / "trees" / "broken").mkdir()
    (folder / "tmp-0123").mkdir()
    removed = await asyncio.to_thread(prune)
    assert {(entry.kind, entry.uri, entry.path) for entry in removed} == {
        ("zip", "/old/project.zip", tree),
        ("leftover", "/old/project.zip", folder / "trees" / "broken"),
        ("leftover", "/old/project.zip", folder / "tmp-0123"),
    }
    assert await asyncio.to_thread(list_entries) == []


@pytest.mark.parametrize(
    ("files", "suffix", "inside"),
    [
        ({"repo-main/MLproject": "", "repo-main/steps/a.py": ""}, "", "repo-main"),
        ({"repo-main/README.md": "", "repo-main/train.py": ""}, "", "repo-main"),
        ({"p/mlproject": "", "__MACOSX/p/._mlproject": "", ".DS_Store": ""}, "", "p"),
        ({"repo-main/MLproject": "", "repo-main/steps/a.py": ""}, "#steps", "repo-main/steps"),
        ({"repo-main/MLproject": ""}, "#repo-main", "repo-main"),
        ({"src/train.py": ""}, "", "."),
        ({"steps/MLproject": "", "train.py": ""}, "", "."),
    ],
)
async def test_a_zip_with_one_folder_that_holds_the_project(
    write: Callable[[bytes], Path], files: dict[str, str], suffix: str, inside: str
) -> None:
    path = write(make_zip(files))
    fetcher = ProjectFetcher()
    project = await fetcher.fetch(f"{path}{suffix}")
    assert str(project.folder).endswith(f"/{Path('project') / inside}")
    async with fetcher.working_copy(project) as copy:
        assert {entry.name for entry in copy.iterdir()} == {entry.name for entry in project.folder.iterdir()}
        assert str(copy).endswith(f"/{Path('project') / inside}")


async def test_zip_without_validators_is_downloaded_again(http_files: FileServer) -> None:
    http_files.etags = False
    http_files.files["/p.zip"] = make_zip()
    fetcher = ProjectFetcher(fresh=0)
    for text in ("one", "two"):
        http_files.files["/p.zip"] = make_zip({"MLproject": text})
        assert ((await fetcher.fetch(f"{http_files.url}/p.zip")).folder / "MLproject").read_text() == text


async def test_password_and_query_of_a_download_are_shown_nowhere(
    http_files: FileServer, caplog: pytest.LogCaptureFixture
) -> None:
    http_files.credentials = "me:s3cr3t"
    http_files.files["/p.zip"] = make_zip()
    host = http_files.url.removeprefix("http://")
    caplog.set_level("DEBUG", "mlfleet")
    project = await ProjectFetcher().fetch(f"http://me:s3cr3t@{host}/p.zip?token=t0ken#steps")
    with pytest.raises(FetchError, match=r"p\.zip\?\*\*\*: HTTP 401") as caught:
        await ProjectFetcher().fetch(f"http://me:wr0ng@{host}/p.zip?token=t0ken")
    cache = Path(os.environ["MLFLEET_CACHE_DIR"])
    written = b"".join(path.read_bytes() + str(path).encode() for path in cache.rglob("*") if path.is_file())
    for secret in ("s3cr3t", "wr0ng", "t0ken"):
        assert secret not in f"{project!r} {caught.value} {caught.value.uri} {caplog.text}"
        assert secret.encode() not in written


async def test_password_is_read_from_netrc(
    http_files: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    http_files.credentials = "me:s3cr3t"
    http_files.files["/p.zip"] = make_zip()
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password s3cr3t\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (await ProjectFetcher().fetch(f"{http_files.url}/p.zip")).cached


async def test_downloads_that_fail_say_why(http_files: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    http_files.redirects["/round.zip"] = f"{http_files.url}/round.zip"
    http_files.redirects["/away.zip"] = "ftp://127.0.0.1/x.zip"
    http_files.files["/page.zip"] = b"<html>please log in</html>"
    http_files.files["/large.zip"] = bytes(5000)
    monkeypatch.setenv("MLFLEET_MAX_ARCHIVE_BYTES", "4096")
    for name, message in (
        ("none.zip", r"none\.zip: HTTP 404 Not Found"),
        ("round.zip", r"round\.zip: .*redirects"),
        ("away.zip", r"away\.zip: .*protocol"),
        ("page.zip", r"page\.zip is not a zip file"),
        ("large.zip", r"larger than 4096 bytes \(MLFLEET_MAX_ARCHIVE_BYTES\)"),
    ):
        with pytest.raises(FetchError, match=message):
            await ProjectFetcher().fetch(f"{http_files.url}/{name}")
    with pytest.raises(FetchError, match=r"cannot download http://127\.0\.0\.1:9/x\.zip"):
        await ProjectFetcher().fetch("http://127.0.0.1:9/x.zip")
    assert not list(Path(os.environ["MLFLEET_CACHE_DIR"]).rglob("*.part"))


ESCAPES: list[tuple[dict[str, str], dict[str, int], str]] = [
    ({"../evil": ""}, {}, "'../evil', which would be written outside"),
    ({"a/../../evil": ""}, {}, "written outside"),
    ({"/etc/evil": ""}, {}, "written outside"),
    ({"C:evil": ""}, {}, "written outside"),
    ({"..\\evil": ""}, {}, "written outside"),
    ({"a\nb": ""}, {}, "impossible name"),
    ({"out": "/etc/passwd"}, {"out": LINK}, "'out', which leads out"),
    ({"a/out": "../../x"}, {"a/out": LINK}, "'a/out', which leads out"),
    ({"out": "."}, {"out": LINK}, ""),
    ({"d/e/b": "../..", "out": "d/e/b/.."}, {"d/e/b": LINK, "out": LINK}, "'out', which leads out"),
    ({"d": "steps", "d/x": "y", "steps/z": ""}, {"d": LINK, "d/x": LINK}, "'d/x' below a symbolic link"),
    ({"d": "steps", "d/x": "", "steps/z": ""}, {"d": LINK}, "holds 'd' twice"),
    ({"out": ""}, {"out": LINK}, "points nowhere"),
    ({"pipe": ""}, {"pipe": stat.S_IFIFO | 0o644}, "neither a file, a folder nor"),
    ({"a": "", "a/b": ""}, {}, "cannot be unpacked"),
    ({"x" * 300: ""}, {}, "cannot be unpacked: File name too long"),
]


@pytest.mark.parametrize(("files", "modes", "message"), ESCAPES)
async def test_members_that_leave_the_folder_are_refused(
    write: Callable[[bytes], Path], files: dict[str, str], modes: dict[str, int], message: str, tmp_path: Path
) -> None:
    path = write(make_zip(files, modes=modes))
    if not message:
        assert (await ProjectFetcher().fetch(str(path))).cached
        return
    with pytest.raises(FetchError) as caught:
        await ProjectFetcher().fetch(str(path))
    assert message in str(caught.value)
    assert trees() == []
    cache = Path(os.environ["MLFLEET_CACHE_DIR"])
    assert not list(cache.rglob("tmp-*"))
    assert not list(cache.rglob("evil"))


async def test_member_that_comes_twice_is_refused(write: Callable[[bytes], Path]) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a", "1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a", "2")
    with pytest.raises(FetchError, match="holds 'a' twice"):
        await ProjectFetcher().fetch(str(write(packed.getvalue())))


async def test_zip_bombs_are_refused(write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = make_zip({"zeros": "\0" * 150 * 2**20})
    with pytest.raises(FetchError, match=r"more than 200 times its own size \(MLFLEET_MAX_ARCHIVE_RATIO\)"):
        await ProjectFetcher().fetch(str(write(bomb)))
    monkeypatch.setenv("MLFLEET_MAX_ARCHIVE_BYTES", "1000000")
    # A header that claims one byte does not help.
    size = (150 * 2**20).to_bytes(4, "little")
    with pytest.raises(FetchError, match=r"more than 1000000 bytes|broken"):
        await ProjectFetcher().fetch(str(write(bomb.replace(size, (1).to_bytes(4, "little")))))
    with pytest.raises(FetchError, match=r"more than 1000000 bytes \(MLFLEET_MAX_ARCHIVE_BYTES\)"):
        await ProjectFetcher().fetch(str(write(bomb)))
    monkeypatch.setenv("MLFLEET_MAX_ARCHIVE_FILES", "3")
    with pytest.raises(FetchError, match=r"4 members, and 3 are allowed \(MLFLEET_MAX_ARCHIVE_FILES\)"):
        await ProjectFetcher().fetch(str(write(make_zip({str(i): "" for i in range(4)}))))
    with pytest.raises(FetchError, match="directory is larger than MLFLEET_MAX_ARCHIVE_FILES"):
        await ProjectFetcher().fetch(str(write(make_zip({f"{i:060000}": "" for i in range(20)}))))
    monkeypatch.setenv("MLFLEET_MAX_ARCHIVE_FILES", "many")
    with pytest.raises(FetchError, match="MLFLEET_MAX_ARCHIVE_FILES is 'many': give a positive whole number"):
        await ProjectFetcher().fetch(str(write(make_zip())))
    assert trees() == []


async def test_broken_and_encrypted_zips_are_refused(write: Callable[[bytes], Path]) -> None:
    whole = make_zip({"a": "some text " * 100})
    encrypted = bytearray(whole)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[whole.index(signature) + offset] |= 1
    damaged = bytearray(whole)
    damaged[40] ^= 0xFF
    odd = bytearray(whole)
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        odd[whole.index(signature) + offset] = 99
    for data, message in (
        (bytes(encrypted), "is encrypted: unpack it yourself"),
        (whole[:-30], "is not a zip file, or is broken"),
        (b"", "is not a zip file, or is broken"),
        (bytes(damaged), "is not a zip file, or is broken"),
        (bytes(odd), "packed in a way that cannot be read"),
    ):
        with pytest.raises(FetchError, match=message):
            await ProjectFetcher().fetch(str(write(data)))
    assert trees() == []


async def test_zip_has_no_versions_and_may_lack_the_subfolder(write: Callable[[bytes], Path]) -> None:
    path = write(make_zip())
    with pytest.raises(FetchError, match="only for a Git repository"):
        await ProjectFetcher().fetch(str(path), "main")
    with pytest.raises(FetchError, match=r"no sub-folder 'nowhere' .*it has steps"):
        await ProjectFetcher().fetch(f"{path}#nowhere")

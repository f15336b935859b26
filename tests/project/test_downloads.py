"""Downloads of path parameters, from servers on loopback."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from components.s3 import S3
from mlfleet._project.downloads import download_all
from mlfleet._project.parameters import Download
from mlfleet.errors import FetchError, TrackingError

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


async def no_artifacts(uri: str, folder: Path) -> Path:
    raise AssertionError(f"{uri} is no artifact")


def plain(data: bytes, headers: str = "", status: str = "200 OK") -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n{headers}\r\n".encode() + data)

    return answer


@asynccontextmanager
async def http(answers: Mapping[str, Answer | list[Answer]]) -> AsyncIterator[str]:
    """A server that gives these answers: path → answer, or one after the other."""
    waiting = {path: list(given) if isinstance(given, list) else [given] for path, given in answers.items()}

    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        try:
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode().partition("?")[0]
            left = waiting.get(path, [plain(b"", status="404 Not Found")])
            await (left.pop(0) if len(left) > 1 else left[0])(writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            # Newer Pythons wait for them.
            for handler in handlers:
                handler.cancel()
            await asyncio.gather(*handlers, return_exceptions=True)


async def download(uri: str, storage: Path) -> Path:
    paths = await download_all([Download("data", uri, 2)], storage, no_artifacts)
    return Path(paths["data"])


async def failure(uri: str, storage: Path) -> FetchError:
    with pytest.raises(FetchError) as caught:
        await download(uri, storage)
    assert "of the parameter 'data'" in str(caught.value)
    assert list(storage.iterdir()) == []
    return caught.value


async def test_http_with_and_without_a_known_size(tmp_path: Path) -> None:
    large = os.urandom(3 * 2**20)

    async def chunked(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(large), 700_000):
            piece = large[start : start + 700_000]
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async with http({"/a/known.bin": plain(large), "/chunked.bin": chunked}) as url:
        downloads = [Download("a", f"{url}/a/known.bin?x=1", 0), Download("b", f"{url}/chunked.bin", 3)]
        paths = await download_all(downloads, tmp_path, no_artifacts)
    assert paths == {"a": str(tmp_path / "param_0/known.bin"), "b": str(tmp_path / "param_3/chunked.bin")}
    assert Path(paths["a"]).read_bytes() == Path(paths["b"]).read_bytes() == large


@pytest.mark.parametrize(
    ("path", "header", "name"),
    [
        ("/data.csv", "", "data.csv"),
        ("/a%20b%2Fc.csv", "", "c.csv"),
        ("/", "", "download"),
        ("/..", "", "download"),
        ("/x", 'Content-Disposition: attachment; filename="real name.csv"\r\n', "real name.csv"),
        ("/x", "Content-Disposition: attachment; filename*=UTF-8''%c3%a9.csv\r\n", "é.csv"),
        ("/x", 'Content-Disposition: attachment; filename="../../etc/passwd"\r\n', "passwd"),
        ("/x", 'Content-Disposition: attachment; filename=".."\r\n', "x"),
        ("/x", 'Content-Disposition: attachment; filename="C:\\\\evil.csv"\r\n', "evil.csv"),
        ("/" + "y" * 300 + ".csv", "", "y" * 196 + ".csv"),
    ],
)
async def test_http_file_names_never_leave_their_folder(tmp_path: Path, path: str, header: str, name: str) -> None:
    async with http({path: plain(b"x", header), "/": plain(b"x", header)}) as url:
        assert await download(url + path, tmp_path) == tmp_path / "param_2" / name


async def test_urls_with_secrets_are_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with http({"/a": plain(b"", "Location: /b?sig=SIGNED\r\n", "302 Found"), "/b": plain(b"here")}) as url:
        await download(f"{url.replace('://', '://user:PASSWORD@')}/a?sig=SIGNED", tmp_path)
    assert "SIGNED" not in caplog.text
    assert "PASSWORD" not in caplog.text


async def test_http_redirects_are_followed(tmp_path: Path) -> None:
    async with http({"/a": plain(b"", "Location: /b?c=d\r\n", "302 Found"), "/b": plain(b"here")}) as url:
        assert (await download(f"{url}/a", tmp_path)).read_bytes() == b"here"


async def test_http_is_tried_again_when_the_server_is_busy_or_breaks_off(tmp_path: Path) -> None:
    async def broken(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")

    async with http({"/a": [plain(b"", status="503 Busy"), broken, plain(b"whole")]}) as url:
        assert (await download(f"{url}/a", tmp_path)).read_bytes() == b"whole"


async def test_http_errors_name_the_parameter_and_hide_secrets(tmp_path: Path) -> None:
    async with http({"/loop": plain(b"", "Location: /loop\r\n", "302 Found")}) as url:
        host = url.removeprefix("http://")
        error = await failure(f"http://user:hunter2@{host}/nothing?X-Amz-Signature=hunter3", tmp_path)
        assert "the server answers 404 Not Found" in str(error)
        assert "hunter" not in str(error)
        assert error.uri == f"http://***@{host}/nothing?***"
        assert "TooManyRedirects" in str(await failure(f"{url}/loop?sig=hunter2", tmp_path))
    assert "ConnectError" in str(await failure(f"{url}/gone", tmp_path))
    assert "cannot be downloaded" in str(await failure("http://[::bad/x", tmp_path))
    assert "cannot be downloaded" in str(await failure("http://", tmp_path))


async def test_a_cancelled_download_leaves_nothing(tmp_path: Path) -> None:
    begun = asyncio.Event()

    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            await writer.drain()
            begun.set()

    async with http({"/endless": endless}) as url:
        task = asyncio.create_task(download(f"{url}/endless", tmp_path))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert list(tmp_path.iterdir()) == []
        begun.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(download, f"{url}/endless", tmp_path)
            await begun.wait()
            group.cancel_scope.cancel()
        assert list(tmp_path.iterdir()) == []


async def test_artifacts_come_from_tracking(tmp_path: Path) -> None:
    async def artifacts(uri: str, folder: Path) -> Path:
        path = anyio.Path(folder / uri.rpartition("/")[2])
        await path.write_text(uri)
        return Path(path)

    uris = ["runs:/1/model", "models:/m/1", "mlflow-artifacts:/0/1/a"]
    downloads = [Download(f"p{i}", uri, i) for i, uri in enumerate(uris)]
    paths = await download_all(downloads, tmp_path, artifacts)
    assert {name: Path(path).read_text() for name, path in paths.items()} == {
        "p0": uris[0],
        "p1": uris[1],
        "p2": uris[2],
    }
    assert paths["p1"] == str(tmp_path / "param_1" / "1")


async def test_when_one_download_fails_the_others_are_stopped_and_removed(tmp_path: Path) -> None:
    begun = asyncio.Event()

    async def stalls(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await writer.drain()
        begun.set()
        await asyncio.Event().wait()

    async def artifacts(uri: str, folder: Path) -> Path:
        await begun.wait()
        raise TrackingError("no such run")

    async with http({"/stalls": stalls}) as url:
        with pytest.raises(TrackingError, match="no such run"):
            await download_all([Download("a", f"{url}/stalls", 0), Download("b", "runs:/1/x", 1)], tmp_path, artifacts)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["weird://a/b", "memory://a/b", "github://a/b", "c:\\file"])
async def test_unknown_schemes_list_the_known_ones(tmp_path: Path, uri: str) -> None:
    assert "is unknown, give a local path or one of abfs, abfss" in str(await failure(uri, tmp_path))


@pytest.mark.parametrize(
    ("module", "uri", "advice"),
    [
        ("gcsfs", "gs://bucket/key", "a driver is missing; run: pip install 'mlfleet[remote]' gcsfs"),
        ("fsspec", "s3://bucket/key", "pip install 'mlfleet[remote]' s3fs"),
    ],
)
def test_a_missing_driver_says_what_to_install(module: str, uri: str, advice: str, tmp_path: Path) -> None:
    # In a process of its own: fsspec remembers the drivers that an earlier test has loaded.
    script = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from mlfleet._project.downloads import download_all\n"
        "from mlfleet._project.parameters import Download\n"
        f"sys.modules[{module!r}] = None\n"
        f"asyncio.run(download_all([Download('data', {uri!r}, 2)], Path({str(tmp_path)!r}), None))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    error = done.stderr.splitlines()[-1]
    assert error.startswith("mlfleet.errors.FetchError: ")
    assert "of the parameter 'data'" in error
    assert advice in error
    assert list(tmp_path.iterdir()) == []


async def test_dbfs_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("requests")
    monkeypatch.delenv("DATABRICKS_HOST", raising=False)
    assert "set DATABRICKS_HOST and DATABRICKS_TOKEN" in str(await failure("dbfs:/a/b", tmp_path))


async def test_a_storage_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match="it cannot be stored"):
        await download("http://127.0.0.1:1/x", tmp_path / "file")


async def test_s3_file(tmp_path: Path, s3: S3) -> None:
    data = os.urandom(2 * 2**20 + 1)
    s3.put("files")
    s3.put("files", "a/b c.bin", data)
    path = await download("s3://files/a/b c.bin", tmp_path)
    assert path == tmp_path / "param_2" / "b c.bin"
    assert path.read_bytes() == data


async def test_s3_prefix(tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("tree")
    files = {f"set/part-{i}/{i}.csv": str(i).encode() for i in range(12)} | {"set/empty": b"", "setting": b"no"}
    for key, data in files.items():
        s3.put("tree", key, data)
    path = await download("s3://tree/set", tmp_path)
    assert path == tmp_path / "param_2" / "set"
    found = {str(file.relative_to(path.parent)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert found == {key: data for key, data in files.items() if key.startswith("set/")}
    # What is listed once is not remembered, and MLflow's name for the endpoint counts too.
    s3.put("tree", "set/new", b"new")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", s3.url)
    (tmp_path / "again").mkdir()
    assert ((await download("s3://tree/set/", tmp_path / "again")) / "new").read_bytes() == b"new"


async def test_s3_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, s3: S3) -> None:
    s3.put("evil")
    s3.put("evil", "set/../../../out", b"x")
    assert "cannot be downloaded" in str(await failure("s3://evil/set", tmp_path))


async def test_s3_errors(tmp_path: Path, s3: S3) -> None:
    s3.put("some")
    assert "there is nothing of that name" in str(await failure("s3://some/nothing", tmp_path))
    assert "cannot be downloaded" in str(await failure("s3://no-such-bucket/x", tmp_path))
    assert "chained URLs are not supported" in str(await failure("s3://some/x::file:///etc/passwd", tmp_path))


async def test_s3_with_another_failing_leaves_nothing(tmp_path: Path, s3: S3) -> None:
    s3.put("many")
    for i in range(30):
        s3.put("many", f"set/{i}", os.urandom(1000))

    async def artifacts(uri: str, folder: Path) -> Path:
        while not await anyio.Path(tmp_path / "param_0" / "set").exists():
            await anyio.lowlevel.checkpoint()
        raise TrackingError("no such run")

    with pytest.raises(TrackingError):
        await download_all([Download("a", "s3://many/set", 0), Download("b", "runs:/1/x", 1)], tmp_path, artifacts)
    assert list(tmp_path.iterdir()) == []

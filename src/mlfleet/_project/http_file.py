"""Files of HTTP servers. Imports httpx, and so is itself imported late and in a thread."""

from __future__ import annotations

import re
from email.message import Message
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

import anyio
import httpx

from mlfleet._concurrency.threads import PROJECTS
from mlfleet._project.parameters import Download

__all__ = ["download_file"]

_ATTEMPTS = 4
_FIRST_DELAY = 0.5
_CHUNK = 2**20
_LONGEST_NAME = 200


async def download_file(download: Download, folder: Path) -> Path:
    """Download the file that ``download.uri`` names into a folder; what fails for a moment is tried again.

    Args:
        download: what to download.
        folder: an existing empty folder to put it into.

    Returns:
        The path of the file.

    Raises:
        FetchError: with the URI without its secrets.
        OSError: `folder` cannot be written to.
    """
    timeout = httpx.Timeout(60, connect=30)
    # The bytes as they are: a .gz must not arrive unpacked.
    headers = {"Accept-Encoding": "identity"}
    client = await PROJECTS.run(
        lambda: httpx.AsyncClient(timeout=timeout, headers=headers, follow_redirects=True, max_redirects=10)
    )
    async with client:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                async with client.stream("GET", download.uri) as response:
                    if response.is_success:
                        return await _store(response, folder / _file_name(download.uri, response))
                    problem = f"the server answers {response.status_code} {response.reason_phrase}".rstrip()
                    if response.status_code != 429 and response.status_code < 500:
                        break
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                if isinstance(error, httpx.UnsupportedProtocol):
                    break
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
                break
            if attempt < _ATTEMPTS:
                await anyio.sleep(_FIRST_DELAY * 2 ** (attempt - 1))
    raise download.failed(problem)


async def _store(response: httpx.Response, path: Path) -> Path:
    async with PROJECTS.open(path, "wb") as file:
        async for chunk in response.aiter_bytes(_CHUNK):
            await PROJECTS.run(partial(file.write, chunk))
    return path


def _file_name(uri: str, response: httpx.Response) -> str:
    """A name for the file, from what the server or else the URI says; never one that leaves its folder."""
    header = Message()
    header["Content-Disposition"] = response.headers.get("Content-Disposition", "")
    for candidate in (header.get_filename(), unquote(urlsplit(uri).path)):
        name = re.split(r"[/\\]", candidate or "")[-1]
        name = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "_", name).strip()
        # The end, for the sake of the suffix.
        name = name.encode()[-_LONGEST_NAME:].decode(errors="ignore")
        if name not in ("", ".", ".."):
            return name
    return "download"

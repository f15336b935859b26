"""As much of Azure's Blob service as adlfs asks for: its emulator is no package of PyPI or Debian.

https://learn.microsoft.com/rest/api/storageservices/blob-service-rest-api. It was seen to answer adlfs as Azurite does.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from fakes.flaky_proxy import Answer, FlakyProxy, Forward, Request

_PROPERTIES = {
    "last-modified": "Wed, 01 Jan 2025 00:00:00 GMT",
    "etag": '"0x1"',
    "content-type": "application/octet-stream",
    "x-ms-blob-type": "BlockBlob",
    "x-ms-version": "2024-11-04",
}


class AzureBlobs(FlakyProxy):
    """One account with any containers.

    Attributes:
        blobs: ``container/name`` → content.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rule = self._answer
        self.blobs: dict[str, bytes] = {}
        self._blocks: dict[str, bytes] = {}

    async def _answer(self, request: Request, forward: Forward) -> Answer | None:
        parts = urlsplit(request.target)
        place = unquote(parts.path).removeprefix("/account/")
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        match request.method, query.get("comp"):
            case "GET", "list":
                return self._list(place, query.get("prefix", ""), query.get("delimiter"))
            case "PUT", "block":
                self._blocks[query["blockid"]] = request.body
                return Answer(201, headers=_PROPERTIES)
            case "PUT", "blocklist":
                ids = re.findall(rb"<(?:Latest|Uncommitted)>(.*?)</", request.body)
                self.blobs[place] = b"".join(self._blocks[each.decode()] for each in ids)
                return Answer(201, headers=_PROPERTIES)
            case "PUT", None if "restype" not in query:
                self.blobs[place] = request.body
                return Answer(201, headers=_PROPERTIES)
            case "GET" | "HEAD", None if "restype" not in query:
                return self._read(request, place)
            case _:
                return Answer(200 if request.method != "PUT" else 201, headers=_PROPERTIES)

    def _list(self, container: str, prefix: str, delimiter: str | None) -> Answer:
        found: dict[str, str] = {}
        for place, content in sorted(self.blobs.items()):
            name = place.removeprefix(f"{container}/")
            if name == place or not name.startswith(prefix):
                continue
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if cut:
                folder = f"{prefix}{head}{cut}"
                found[folder] = f"<BlobPrefix><Name>{escape(folder)}</Name></BlobPrefix>"
            else:
                found[name] = (
                    f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{_PROPERTIES['last-modified']}"
                    f"</Last-Modified><Etag>0x1</Etag><Content-Length>{len(content)}</Content-Length>"
                    "<BlobType>BlockBlob</BlobType></Properties></Blob>"
                )
        text = f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults ContainerName="{escape(container)}"><Blobs>'
        text += f"{''.join(found.values())}</Blobs><NextMarker /></EnumerationResults>"
        return Answer(200, text.encode(), {**_PROPERTIES, "content-type": "application/xml"})

    def _read(self, request: Request, place: str) -> Answer:
        content = self.blobs.get(place)
        if content is None:
            body = b"<?xml version='1.0'?><Error><Code>BlobNotFound</Code><Message>no such blob</Message></Error>"
            kinds = {"content-type": "application/xml", "x-ms-error-code": "BlobNotFound"}
            return Answer(404, body, {**_PROPERTIES, **kinds})
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("x-ms-range", ""))
        if wanted is None:
            return Answer(200, content, _PROPERTIES)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        return Answer(
            206,
            content[start : end + 1],
            {**_PROPERTIES, "content-range": f"bytes {start}-{end}/{len(content)}"},
        )

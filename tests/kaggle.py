"""The part of Kaggle's API that models are read with, and its storage, on loopback.

Answers have the fields of https://github.com/Kaggle/kagglesdk (``models/types/model_api_service.py``);
``test_kaggle.py`` has the real ``kagglehub`` download from here. The storage is another origin, refuses
whoever sends an ``Authorization`` and signs links as Google Cloud Storage does.
"""

from __future__ import annotations

import base64
import hashlib
import re
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from modelfs.testing.server import HOST, Listener
from tests.releases import Answering

CREATED = "2024-03-01T12:00:00.123Z"


class Kaggle:
    """Both servers; a context manager.

    Args:
        authorization: what private models want to see; None if all are public.

    """

    def __init__(self, authorization: str | None = None) -> None:
        self.authorization = authorization
        self.refusals: list[int] = []
        """Statuses that the next questions get."""
        self.log: list[str] = []
        """Target of every question to the API."""
        self.contents: list[int] = []
        """Status of every request for content."""
        self.versions: dict[str, list[dict[str, bytes] | None]] = {}
        """``OWNER/MODEL/FRAMEWORK/VARIATION`` → the files of its versions 1, 2 …; None was deleted."""
        self._key = 0

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._api.server_address[1]}"

    @property
    def options(self) -> dict[str, Any]:
        """Of a store that asks here."""
        return {"endpoint": self.url}

    def expire_links(self) -> None:
        """Let every link handed out until now have expired."""
        self._key += 1

    def files(self, variation: str, version: str) -> dict[str, bytes] | None:
        versions = self.versions.get(variation, [])
        return versions[int(version) - 1] if 0 < int(version) <= len(versions) else None

    def link(self, place: str) -> str:
        """Return a signed link as Google Cloud Storage's (V4) look."""
        query = {
            "X-Goog-Algorithm": "GOOG4-RSA-SHA256",
            "X-Goog-Date": datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"),
            "X-Goog-Expires": "3600",
            "X-Goog-SignedHeaders": "host",
            "X-Goog-Signature": f"{self._key:064x}",
        }
        return f"http://{HOST}:{self._storage.server_address[1]}/{quote(place)}?{urlencode(query)}"

    def good(self, query: dict[str, str]) -> bool:
        return query.get("X-Goog-Signature") == f"{self._key:064x}"

    def __enter__(self) -> Self:
        world = self

        class Api(_Api):
            kaggle = world

        class Storage(_Storage):
            kaggle = world

        self._api, self._storage = Listener(0, Api), Listener(0, Storage)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._api.cut()
        self._storage.cut()


class _Api(Answering):
    kaggle: Kaggle

    def serve(self) -> None:
        world = self.kaggle
        target = urlsplit(self.path)
        world.log.append(self.path)
        query = dict(parse_qsl(target.query))
        given = self.headers.get("Authorization")
        found = re.fullmatch(
            r"/api/v1/models/((?:[^/]+/){3}[^/]+)/(get|(\d+)/(files|download)(?:/(.+))?)", target.path
        )
        if world.refusals:
            self.fail(world.refusals.pop(0))
        elif given is not None and given != world.authorization:
            self.fail(401)
        elif found is None or (world.authorization is not None and given is None):
            self.fail(404 if found is None else 403)
        elif found[2] == "get":
            self.newest(found[1])
        elif (files := world.files(found[1], found[3])) is None:
            self.fail(404)
        elif found[4] == "files":
            self.listing(files, query)
        elif (path := unquote(found[5] or "")) in files:
            self.send(302, {"Location": world.link(f"{found[1]}/{found[3]}/{path}")})
        else:
            self.fail(404)

    def fail(self, status: int) -> None:
        self.json({"code": status, "message": "refused"}, status)

    def newest(self, variation: str) -> None:
        versions = self.kaggle.versions.get(variation)
        if not versions:
            return self.fail(404)
        _, _, framework, slug = variation.split("/")
        row = {"id": 7, "slug": slug, "framework": framework, "versionId": 700 + len(versions)}
        return self.json({**row, "versionNumber": len(versions), "licenseName": "Apache 2.0"})

    def listing(self, files: dict[str, bytes], query: dict[str, str]) -> None:
        size, start = min(int(query.get("page_size", 20)), 100), int(query.get("page_token") or 0)
        rows = [
            {"name": name, "size": len(data), "creationDate": CREATED} for name, data in sorted(files.items())
        ]
        more = start + size < len(rows)
        self.json({"files": rows[start : start + size], "nextPageToken": str(start + size) if more else ""})


class _Storage(Answering):
    kaggle: Kaggle

    def serve(self) -> None:
        self.kaggle.contents.append(self.answer())

    def answer(self) -> int:
        target = urlsplit(self.path)
        *variation, version, path = unquote(target.path).lstrip("/").split("/", 5)
        data = (self.kaggle.files("/".join(variation), version) or {}).get(path)
        if "Authorization" in self.headers or not self.kaggle.good(dict(parse_qsl(target.query))):
            self.send(400, {}, b"<Error><Code>ExpiredToken</Code></Error>")
            return 400
        if data is None:
            self.send(404, {})
            return 404
        digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        facts = {
            "ETag": f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"',
            "x-goog-hash": f"md5={digest}",
        }
        return self.send_range(data, {**facts, "Accept-Ranges": "bytes"})

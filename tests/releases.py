"""A GitHub API and its content network on loopback, that tests steer: releases, tokens, limits, expiry.

Answers have the schema of https://docs.github.com/rest/releases. Like the real one the content network is
another origin, refuses whoever sends an ``Authorization``, and answers ``618 jwt:expired`` to old links.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import threading
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, parse_qsl, unquote, urlencode, urlsplit

from modelfs.testing.server import HOST, Handler, Listener

UPDATED = "2025-07-01T12:00:00Z"


class Releases:
    """Both servers; a context manager.

    Args:
        token: the one that is valid, if the repositories are private.
        page_size: most assets on one page.
        life: seconds that a link to content is good.

    """

    def __init__(self, *, token: str | None = None, page_size: int = 100, life: float = 300) -> None:
        self.token = token
        self.page_size = page_size
        self.life = life
        self.limit: tuple[int, float] | None = None
        """Questions left and the time of the reset; None for no limit."""
        self.refusals: list[tuple[int, dict[str, str], bytes]] = []
        """What the next questions get instead of an answer."""
        self.expire_after: int | None = None
        """After so many requests for content all links handed out until then expire."""
        self.direct = False
        """Whether the API sends contents itself, as GitHub Enterprise Server may."""
        self.log: list[tuple[str, int]] = []
        """(target, status) of every question to the API."""
        self.contents: list[tuple[str, str, int]] = []
        """(target without query, Range, status) of every request for content."""
        self._releases: dict[tuple[str, str], dict[str, Any]] = {}
        self._latest: dict[str, str] = {}
        self._bytes: dict[int, bytes] = {}
        self._key = 0
        self._next = 1000
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The base URL of the API."""
        return f"http://{HOST}:{self._api.server_address[1]}/api/v3"

    @property
    def options(self) -> dict[str, Any]:
        """Of a store that asks here."""
        return {"api_url": self.url}

    def publish(
        self, repo: str, tag: str, files: dict[str, bytes], *, prerelease: bool = False, digests: bool = True
    ) -> None:
        """Make a release, the latest of the repository unless it is a pre-release."""
        release = {
            "id": self._number(),
            "node_id": "MDc6UmVsZWFzZTE=",
            "tag_name": tag,
            "target_commitish": "main",
            "name": tag,
            "body": "",
            "draft": False,
            "prerelease": prerelease,
            "created_at": UPDATED,
            "published_at": UPDATED,
            "assets": [],
        }
        self._releases[repo, tag] = release
        if not prerelease:
            self._latest[repo] = tag
        for name, data in files.items():
            self.upload(repo, tag, name, data, digest=digests)

    def upload(
        self, repo: str, tag: str, name: str, data: bytes, *, state: str = "uploaded", digest: bool = True
    ) -> None:
        """Add an asset to a release, or replace the one of that name."""
        self.delete(repo, tag, name)
        number = self._number()
        self._bytes[number] = data
        self._releases[repo, tag]["assets"].append(
            {
                "url": f"{self.url}/repos/{repo}/releases/assets/{number}",
                "browser_download_url": f"https://github.com/{repo}/releases/download/{tag}/{name}",
                "id": number,
                "node_id": "MDEyOlJlbGVhc2VBc3NldDE=",
                "name": name,
                "label": None,
                "state": state,
                "content_type": "application/octet-stream",
                "size": len(data),
                "digest": f"sha256:{hashlib.sha256(data).hexdigest()}" if digest else None,
                "download_count": 42,
                "created_at": UPDATED,
                "updated_at": UPDATED,
            }
        )

    def delete(self, repo: str, tag: str, name: str) -> None:
        """Remove an asset if there is one of that name."""
        assets = self._releases[repo, tag]["assets"]
        for asset in [asset for asset in assets if asset["name"] == name]:
            assets.remove(asset)
            del self._bytes[asset["id"]]

    def expire_links(self) -> None:
        """Let every link handed out until now have expired."""
        with self._lock:
            self._key += 1

    def _number(self) -> int:
        with self._lock:
            self._next += 1
            return self._next

    def __enter__(self) -> Self:
        world = self

        class Api(_Api):
            releases = world

        class Cdn(_Cdn):
            releases = world

        self._api, self._cdn = Listener(0, Api), Listener(0, Cdn)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._api.cut()
        self._cdn.cut()

    # What the handlers need

    def link(self, number: int) -> str:
        """Return a signed link as the content network understands it."""
        end = time.time() + self.life
        claims = {
            "iss": "github.com",
            "aud": "release-assets.githubusercontent.com",
            "exp": end,
            "key": self._key,
        }
        payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
        query = {
            "sp": "r",
            "sv": "2018-11-09",
            "sr": "b",
            "se": datetime.fromtimestamp(end + 3300, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "sig": self.signature(number),
            "jwt": f"eyJhbGciOiJIUzI1NiJ9.{payload}.{self.signature(number)}",
            "response-content-type": "application/octet-stream",
        }
        port = self._cdn.server_address[1]
        return f"http://{HOST}:{port}/github-production-release-asset/1/{number}?{urlencode(query)}"

    def signature(self, number: int) -> str:
        return hmac.new(b"key", str(number).encode(), "sha256").hexdigest()

    def good(self, number: int, query: dict[str, str]) -> bool:
        """Return whether a link has not expired."""
        claims = json.loads(base64.urlsafe_b64decode(query["jwt"].split(".")[1] + "==="))
        with self._lock:
            if self.expire_after is not None:
                self.expire_after -= 1
                if self.expire_after < 0:
                    self._key, self.expire_after = self._key + 1, None
            return (
                query["sig"] == self.signature(number)
                and claims["key"] == self._key
                and claims["exp"] > time.time()
            )

    def content(self, number: int) -> bytes | None:
        return self._bytes.get(number)

    def release(self, repo: str, where: str) -> dict[str, Any] | None:
        tag = self._latest.get(repo, "") if where == "latest" else unquote(where.removeprefix("tags/"))
        return self._releases.get((repo, tag))

    def release_of(self, repo: str, number: int) -> dict[str, Any] | None:
        rows = ((name, release) for (name, _), release in self._releases.items())
        return next((release for name, release in rows if name == repo and release["id"] == number), None)


class Answering(Handler):
    """Ways of answering that servers of APIs and of contents share."""

    def send(
        self, status: int, headers: dict[str, str], body: bytes = b"", reason: str | None = None
    ) -> None:
        self.send_response(status, reason)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, data: Any, status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send(status, {"Content-Type": "application/json; charset=utf-8"}, body)

    def send_range(self, data: bytes, headers: dict[str, str]) -> int:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found is None:
            self.send(200, headers, data)
            return 200
        start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
        self.send(
            206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]
        )
        return 206


class _Api(Answering):
    releases: Releases

    def serve(self) -> None:
        releases = self.releases
        status = self._answer()
        releases.log.append((self.path.removeprefix("/api/v3"), status))

    def _answer(self) -> int:
        world = self.releases
        if world.refusals:
            status, headers, body = world.refusals.pop(0)
            self.send(status, headers, body)
            return status
        target = urlsplit(self.path)
        found = re.fullmatch(r"/api/v3/repos/([^/]+/[^/]+)/releases/(.+)", target.path)
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {world.token}":
            return self._fail(401, "Bad credentials")
        if world.limit is not None and world.limit[0] <= 0:
            return self._fail(403, "API rate limit exceeded for 127.0.0.1.")
        if found is None or (world.token is not None and given is None):
            return self._fail(404, "Not Found")
        repo, what = found[1], found[2]
        if asset := re.fullmatch(r"assets/(\d+)", what):
            return self._asset(int(asset[1]))
        if listed := re.fullmatch(r"(\d+)/assets", what):
            release = world.release_of(repo, int(listed[1]))
            return (
                self._page(release["assets"], dict(parse_qsl(target.query)))
                if release
                else self._fail(404, "")
            )
        release = world.release(repo, what)
        return self._json(release, {}) if release else self._fail(404, "Not Found")

    def _asset(self, number: int) -> int:
        data = self.releases.content(number)
        if data is None or self.headers.get("Accept") != "application/octet-stream":
            return self._fail(404, "Not Found")
        if self.releases.direct:
            return self.send_range(data, {"ETag": f'"{number}"', **self._rate(1)})
        self.send(302, {"Location": self.releases.link(number), **self._rate(1)})
        return 302

    def _page(self, rows: list[Any], query: dict[str, str]) -> int:
        size = min(int(query["per_page"]), self.releases.page_size)
        page = int(query["page"])
        more = page * size < len(rows)
        link = f'<{self.releases.url}/next?page={page + 1}>; rel="next"' if more else ""
        return self._json(rows[(page - 1) * size : page * size], {"Link": link} if link else {})

    def _json(self, data: Any, headers: dict[str, str]) -> int:
        body = json.dumps(data).encode()
        tag = f'W/"{hashlib.sha256(body + self.headers.get("Authorization", "").encode()).hexdigest()}"'
        if self.headers.get("If-None-Match") == tag:
            self.send(304, {"ETag": tag, **self._rate(0 if "Authorization" in self.headers else 1)})
            return 304
        kind = {"Content-Type": "application/json; charset=utf-8", "ETag": tag}
        self.send(200, {**kind, **headers, **self._rate(1)}, body)
        return 200

    def _fail(self, status: int, message: str) -> int:
        body = json.dumps({"message": message, "documentation_url": "https://docs.github.com/rest"}).encode()
        self.send(status, self._rate(0), body)
        return status

    def _rate(self, cost: int) -> dict[str, str]:
        world = self.releases
        if world.limit is None:
            return {}
        left, reset = world.limit[0] - cost, world.limit[1]
        world.limit = (left, reset)
        return {
            "X-RateLimit-Limit": "60",
            "X-RateLimit-Remaining": str(max(left, 0)),
            "X-RateLimit-Reset": f"{reset:.0f}",
        }


class _Cdn(Answering):
    releases: Releases

    def serve(self) -> None:
        target = urlsplit(self.path)
        number = int(target.path.rpartition("/")[2])
        status = self._answer(number, {name: values[0] for name, values in parse_qs(target.query).items()})
        self.releases.contents.append((target.path, self.headers.get("Range", ""), status))

    def _answer(self, number: int, query: dict[str, str]) -> int:
        if "Authorization" in self.headers:
            self.send(400, {}, b"<Error><Code>InvalidAuthenticationInfo</Code></Error>")
            return 400
        if not self.releases.good(number, query):
            self.send(618, {}, b"", "jwt:expired")
            return 618
        data = self.releases.content(number)
        if data is None:
            self.send(404, {})
            return 404
        return self.send_range(data, {"ETag": f'"0x8D{number}"', "Accept-Ranges": "bytes"})

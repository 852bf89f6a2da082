"""``github://OWNER/REPO@TAG[/ASSET]``: the assets of a release on GitHub or GitHub Enterprise Server.

The REST API lists them (https://docs.github.com/rest/releases) and, asked for an asset as
``application/octet-stream``, redirects to a signed link of its content network that is good for minutes.
GitHub limits an asset to 2 GiB; larger files are uploaded in parts (`modelfs.stores.parts`), shown as one.

The version of a file, ``ID:SIZE:UPDATED`` of each of its assets, is all that `GitHubStore.locate` needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, unquote

import trio

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, Stale, StoreError, Unavailable
from modelfs.stores import Options, checked_options, entry_in, redact, server_of
from modelfs.stores.parts import splits
from modelfs.stores.tokens import checked_token, read_token
from modelfs.stores.web import Answer, Web, failure, tls_context
from modelfs.types import Digest, Entry, Location, Snapshot, path_fault

OPTIONS: Mapping[str, type | tuple[type, ...]] = {"api_url": str, "token_file": str, "timeout": (int, float)}

MAX_BODY = 32 << 20
MAX_PAGES = 100
LINK_SECONDS = 240.0
"""Seconds that a link is used if it does not tell when it ends; GitHub's are good for five minutes."""
SECONDARY_SECONDS = 60.0
"""Pause after a secondary rate limit that does not tell how long to wait, as GitHub asks."""

_OFFICIAL = "https://api.github.com"
_JSON = {"accept": "application/vnd.github+json", "x-github-api-version": "2022-11-28"}
_CONTENT = {"accept": "application/octet-stream", "x-github-api-version": "2022-11-28"}
_THREADS = trio.CapacityLimiter(8)
_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?"
_URL = re.compile(
    rf"github://(?P<owner>{_NAME})/(?P<repo>{_NAME})(?:@(?P<tag>[^/@?#]+))?(?:/(?P<asset>[^/?#]*))?",
    re.IGNORECASE,
)
_UPDATED = re.compile(r"[0-9T:.+Z-]{10,40}")
_VERSION = re.compile(rf"([0-9]{{1,18}}):([0-9]{{1,18}}):({_UPDATED.pattern})")


@dataclass(frozen=True, slots=True)
class Asset:
    """One uploaded file of a release.

    Attributes:
        id: never used again, so it names these bytes for ever.
        name: as GitHub shows it.
        size: bytes.
        updated: when it was last changed, as the API writes it.
        digest: of the content; GitHub knows none of what was uploaded before June 2025.

    """

    id: int
    name: str
    size: int
    updated: str
    digest: Digest | None

    @property
    def version(self) -> str:
        """What pins it."""
        return f"{self.id}:{self.size}:{self.updated}"

    @property
    def mtime(self) -> float:
        """Time of the last change, seconds since the epoch, 0 if the API's cannot be understood."""
        try:
            return datetime.fromisoformat(self.updated).replace(tzinfo=UTC).timestamp()
        except (ValueError, OverflowError):
            return 0.0


@dataclass(slots=True)
class _Allowance:
    """What GitHub lets the holder of one token ask.

    https://docs.github.com/rest/using-the-rest-api/rate-limits-for-the-rest-api

    Attributes:
        token: whose, None for anybody at this address.
        left: questions that may still be asked, None if GitHub does not say.
        window: seconds, counted from the last answer, after which there are more.
        resumes: when anything may be asked again, seconds since the epoch.
        lists: when it is time to list again.
        why: it may not be asked now.

    """

    token: str | None
    left: float | None = None
    window: float | None = None
    resumes: float = 0.0
    lists: float = 0.0
    why: str = ""


class GitHubStore:
    """A release, or one asset of it; implements :class:`modelfs.stores.Store`.

    ``@TAG`` is a release's tag, with ``%2F`` for a slash; without it or with ``@latest`` it is the latest
    release of the repository, which is no draft and no pre-release. Options, all optional:

    - ``api_url``: of GitHub Enterprise Server (``https://HOST/api/v3``); otherwise ``GITHUB_API_URL``,
      otherwise https://api.github.com.
    - ``token_file``: holds the token; otherwise ``GH_TOKEN`` or ``GITHUB_TOKEN``. It is read anew for every
      question, so tokens can be rotated.
    - ``timeout``: seconds that one request may take (30).

    Raises:
        ConfigError: malformed URL or option.

    """

    def __init__(self, url: str, options: Options) -> None:
        found = _URL.fullmatch(url)
        if found is None:
            raise ConfigError(
                f"{redact(url)!r}: write github://OWNER/REPO@TAG or github://OWNER/REPO@TAG/ASSET"
            )
        self._tag, self._asset = unquote(found["tag"] or "latest"), unquote(found["asset"] or "")
        if (self._asset and path_fault(self._asset)) or not self._tag.isprintable():
            raise ConfigError(f"{redact(url)!r}: neither tag nor asset can have such a name")
        self._repo = f"{found['owner']}/{found['repo']}"
        below = f"/{quote(self._asset)}" if self._asset else ""
        self.url = f"github://{self._repo}@{quote(self._tag, safe='')}{below}"
        checked_options(self.url, options, OPTIONS)
        api = options.get("api_url") or os.environ.get("GITHUB_API_URL")
        self._api, self.identity = server_of(self.url, "api_url", api, _OFFICIAL)
        self._token_file: str | None = options.get("token_file")
        self._timeout: float = options.get("timeout", 30)
        self._allowance = _Allowance(None)
        self._snapshot: Snapshot | None = None
        self._answers: dict[str, Answer] = {}

    def __repr__(self) -> str:
        return f"<GitHubStore {self.url}>"

    async def snapshot(self) -> Snapshot:
        """Resolve the tag to a release and list its assets.

        With a token an unchanged release costs nothing of the rate limit. Without one, listings take at most
        half of what is left of it: a snapshot that is younger than that allows is returned as it is.
        ``rejected`` has assets that are not uploaded completely and split files that miss a part.

        Raises:
            NotFound: no such repository, release or asset, or none that this token may see.
            AccessDenied: the token is wrong or does not suffice.
            Unavailable: GitHub cannot be reached, or the rate limit is used up; then with `retry_after`.
            BadAnswer: the answer is not of this API.

        """
        async with await self._web() as web:
            if self._snapshot is not None and time.time() < self._allowance.lists:
                return self._snapshot
            known, answers = self._answers, dict[str, Answer]()

            async def ask(path: str) -> Any:
                answers[path] = await self._ask(web, path, known.get(path))
                try:
                    return json.loads(answers[path].body)
                except (ValueError, RecursionError):
                    raise self._foreign("an answer that is no JSON") from None

            where = "latest" if self._tag == "latest" else f"tags/{quote(self._tag, safe='')}"
            release = await ask(f"releases/{where}")
            number = release.get("id") if isinstance(release, dict) else None
            if type(number) is not int or number < 0:
                raise self._foreign("a release without id")
            rows: list[Any] = []
            for page in range(1, MAX_PAGES + 1):
                path = f"releases/{number}/assets?per_page=100&page={page}"
                listed = await ask(path)
                if not isinstance(listed, list):
                    raise self._foreign("no list of assets")
                rows += listed
                if 'rel="next"' not in answers[path].headers.get("link", ""):
                    break
            else:
                raise self._foreign("a list of assets that does not end")
            self._pace(len(answers))
        self._answers = answers
        self._snapshot = self._listed(number, rows)
        return self._snapshot

    async def entry(self, path: str) -> Entry:
        """Return what the latest snapshot has at `path`; NotFound if that is nothing."""
        return entry_in(self._snapshot or await self.snapshot(), path)

    async def locate(self, entry: Entry) -> Location:
        """Return the signed link to each asset of `entry`; that costs one question for each.

        Raises:
            Stale: an asset was deleted or replaced.
            StoreError: as `snapshot`.

        """
        parts = [_VERSION.fullmatch(part) for part in entry.version.split(",")]
        found: list[tuple[int, Location]] = []
        async with await self._web() as web:
            for part in parts:  # one after the other, as GitHub asks for
                if part is None:
                    raise Stale(
                        f"{self.url}: {entry.path!r} is not a version of this store: refresh the model"
                    )
                found.append((int(part[2]), await self._link(web, part[1], entry.path)))
        return found[0][1] if len(found) == 1 else Location.joined(found)

    # What is listed

    def _listed(self, release: int, rows: Iterable[Any]) -> Snapshot:
        """Return the snapshot of a release: its complete assets, parts put together."""
        assets: dict[str, Asset] = {}
        refused: dict[str, str] = {}
        for row in rows:
            asset, complete = self._asset_of(row)
            if asset.name in assets:
                raise self._foreign("two assets of one name")
            if complete:
                assets[asset.name] = asset
            else:
                refused[asset.name] = "it is not uploaded completely"
        digest = hashlib.sha256("".join(f"{a.version}\n" for a in assets.values()).encode()).hexdigest()
        files = {name: [asset] for name, asset in assets.items()}
        for split in splits([*assets, *refused]):
            for part in split.parts:
                files.pop(part, None)
            missing = [part for part in split.parts if part in refused]
            if fault := split.fault or (
                f"its part {missing[0]} is not uploaded completely" if missing else ""
            ):
                refused[split.name] = fault
            elif split.name not in assets:  # otherwise GitHub has the file in one piece as well
                files[split.name] = [assets[part] for part in split.parts]
        if self._asset:
            if self._asset not in files:
                why = refused.get(self._asset, "there is no such asset in the release")
                raise NotFound(f"{self.url}: {why}: check the release")
            files, refused = {self._asset: files[self._asset]}, {}
        snapshot = Snapshot.of(self.url, f"{release}-{digest[:16]}", map(_entry, files, files.values()))
        return replace(snapshot, rejected=tuple(sorted((*snapshot.rejected, *refused.items()))))

    def _asset_of(self, row: Any) -> tuple[Asset, bool]:
        """Return the asset in one row of the list, and whether its upload was completed."""
        try:
            number, name, size, updated = row["id"], row["name"], row["size"], row["updated_at"]
            digest, complete = row.get("digest"), row["state"] == "uploaded"
        except (TypeError, KeyError, AttributeError):
            raise self._foreign("an asset without id, name, size, state or date") from None
        numbers = type(number) is int and type(size) is int and 0 <= number < 10**18 and 0 <= size < 10**18
        dated = isinstance(updated, str) and _UPDATED.fullmatch(updated)
        if not numbers or not isinstance(name, str) or not dated:
            raise self._foreign("an asset with a malformed id, name, size or date")
        return Asset(number, name, size, updated, _digest(digest)), complete

    # Asking

    async def _web(self) -> Web:
        token, tls = await trio.to_thread.run_sync(
            lambda: (self._token(), tls_context(None)), abandon_on_cancel=True, limiter=_THREADS
        )
        if token != self._allowance.token:
            self._allowance = _Allowance(token)
        secrets = {"authorization": f"Bearer {token}"} if token else {}
        return Web(self._api, secrets, tls=tls, timeout=self._timeout, refused=self._failure)

    def _token(self) -> str | None:
        """Return today's token; blocks."""
        if self._token_file:
            return read_token(self._token_file, self.url)
        for name in ("GH_TOKEN", "GITHUB_TOKEN"):
            if token := os.environ.get(name, "").strip():
                return checked_token(token, name, self.url)
        return None

    async def _ask(self, web: Web, path: str, known: Answer | None) -> Answer:
        """Return the answer about `path` of the repository, the `known` one if nothing has changed."""
        self._may_ask()
        etag = known.headers.get("etag", "") if known else ""
        condition = {"if-none-match": etag} if etag else {}
        answer = await web.get(f"{self._api}/repos/{self._repo}/{path}", MAX_BODY, {**_JSON, **condition})
        self._note(answer)
        return known if known is not None and answer.status == 304 else answer

    async def _link(self, web: Web, number: str, path: str) -> Location:
        self._may_ask()
        url = f"{self._api}/repos/{self._repo}/releases/assets/{number}"
        try:
            return await web.location(url, _CONTENT, LINK_SECONDS)
        except NotFound as error:
            raise Stale(f"{self.url}: {path!r} was replaced or deleted: refresh the model") from error

    # The rate limit

    def _may_ask(self) -> None:
        wait = self._allowance.resumes - time.time()
        if wait > 0:
            raise Unavailable(self._allowance.why, retry_after=wait)

    def _note(self, answer: Answer) -> None:
        """Remember how much may still be asked."""
        self._allowance.left = _seconds(answer.headers.get("x-ratelimit-remaining"))
        self._allowance.window = _until_reset(answer)

    def _pace(self, cost: int) -> None:
        """Decide when to list again, for `cost` questions; with a token an unchanged list is free."""
        left, window = self._allowance.left, self._allowance.window
        if self._allowance.token is None and left is not None and window is not None:
            self._allowance.lists = time.time() + window * cost / max(left / 2, 1.0)

    def _failure(self, answer: Answer, url: str) -> StoreError:
        """Return what a failure means; a rate limit is remembered.

        https://docs.github.com/rest/using-the-rest-api/rate-limits-for-the-rest-api#exceeding-the-rate-limit
        """
        status, headers, remedy = answer.status, answer.headers, self._remedy()
        if status in (403, 429):
            wait = _seconds(headers.get("retry-after"))
            if wait is None and headers.get("x-ratelimit-remaining") == "0":
                wait = _until_reset(answer)
            if wait is None and (status == 429 or b"secondary rate limit" in answer.body):
                wait = SECONDARY_SECONDS
            if wait is not None:
                self._allowance.resumes = time.time() + wait
                until = datetime.fromtimestamp(self._allowance.resumes, UTC).strftime("%H:%M:%S UTC")
                self._allowance.why = f"{self.url}: GitHub's rate limit is used up until {until}: {remedy}"
                return Unavailable(self._allowance.why, retry_after=wait)
        match status:
            case 401:
                return AccessDenied(
                    f"{self.url}: the token was refused (401): renew GITHUB_TOKEN or token_file"
                )
            case 403:
                return AccessDenied(
                    f"{self.url}: refused (403): let the token read the contents of {self._repo}, "
                    "and authorise it for the organisation's single sign-on"
                )
            case 404:
                return NotFound(f"{self.url}: no such release, or a private one: check the URL; {remedy}")
        return failure(answer, url)

    def _remedy(self) -> str:
        return "check that the token may read it" if self._allowance.token else "set GITHUB_TOKEN"

    def _foreign(self, what: str) -> BadAnswer:
        return BadAnswer(f"{self.url}: {what} came from {self._api}: check the API's URL")


def _entry(path: str, assets: Sequence[Asset]) -> Entry:
    return Entry(
        path,
        sum(asset.size for asset in assets),
        ",".join(asset.version for asset in assets),
        assets[0].digest if len(assets) == 1 else None,
        max(asset.mtime for asset in assets),
    )


def _digest(text: Any) -> Digest | None:
    """Return the digest that the API gives, None if it gives none or one that is not known here."""
    try:
        return Digest.parse(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _seconds(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch("[0-9]{1,12}", text) else None


def _until_reset(answer: Answer) -> float | None:
    """Return the seconds until the rate limit starts anew, by the server's own clock."""
    reset = _seconds(answer.headers.get("x-ratelimit-reset"))
    if reset is None:
        return None
    try:
        now = parsedate_to_datetime(answer.headers.get("date", "")).timestamp()
    except ValueError:
        now = time.time()
    return max(1.0, reset - now)

"""``kaggle://OWNER/MODEL/FRAMEWORK/VARIATION[/VERSION]``: models of Kaggle.

The API is the one of https://github.com/Kaggle/kaggle-api and kagglehub: ``/api/v1/models/…`` resolves the
newest version (``get``), lists its files (``files``) and redirects to a signed link to each (``download``). A
version never changes once it has a number, so its number is the version of every file in it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import trio

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, Stale, StoreError
from modelfs.stores import Options, checked_options, entry_in, redact, server_of
from modelfs.stores.tokens import checked_token, read_token
from modelfs.stores.web import Answer, Web, basic_auth, failure, tls_context
from modelfs.types import Entry, Location, Snapshot

OPTIONS: Mapping[str, type | tuple[type, ...]] = {"endpoint": str, "token_file": str, "timeout": (int, float)}

MAX_BODY = 32 << 20
PAGE_SIZE, MAX_PAGES = 200, 1000

_OFFICIAL = "https://www.kaggle.com"
_THREADS = trio.CapacityLimiter(8)
_SLUG = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_])?"
_URL = re.compile(
    rf"kaggle://(?P<variation>{_SLUG}/{_SLUG}/{_SLUG}/{_SLUG})(?:/(?P<version>[1-9][0-9]{{0,8}}))?/?",
    re.IGNORECASE,
)


class KaggleStore:
    """A version of a variation of a model, by default the newest; implements :class:`modelfs.stores.Store`.

    Public models need no credentials. Otherwise they are looked for in this order, anew for every question:
    option ``token_file``, ``KAGGLE_API_TOKEN`` (a token or the path of a file), ``~/.kaggle/access_token``,
    ``KAGGLE_USERNAME`` with ``KAGGLE_KEY``, and ``kaggle.json`` in ``$KAGGLE_CONFIG_DIR`` or ``~/.kaggle``.
    Further options:

    - ``endpoint``: the server; otherwise ``KAGGLE_API_ENDPOINT``, otherwise https://www.kaggle.com.
    - ``timeout``: seconds that one request may take (30).

    Raises:
        ConfigError: malformed URL or option.

    """

    def __init__(self, url: str, options: Options) -> None:
        found = _URL.fullmatch(url)
        if found is None:
            raise ConfigError(f"{redact(url)!r}: write kaggle://OWNER/MODEL/FRAMEWORK/VARIATION[/VERSION]")
        self._variation, self._version = found["variation"], found["version"]
        self.url = f"kaggle://{self._variation}{f'/{self._version}' if self._version else ''}"
        checked_options(self.url, options, OPTIONS)
        endpoint = options.get("endpoint") or os.environ.get("KAGGLE_API_ENDPOINT")
        self._endpoint, self.identity = server_of(self.url, "endpoint", endpoint, _OFFICIAL)
        self._token_file: str | None = options.get("token_file")
        self._timeout: float = options.get("timeout", 30)
        self._snapshot: Snapshot | None = None

    def __repr__(self) -> str:
        return f"<KaggleStore {self.url}>"

    async def snapshot(self) -> Snapshot:
        """Resolve the version and list its files; an unchanged version costs at most one small request.

        Raises:
            NotFound: no such model, variation or version, or none that these credentials may see.
            AccessDenied: the credentials are wrong, or the model's licence is not accepted.
            Unavailable: Kaggle cannot be reached or is busy.
            BadAnswer: the answer is not of this API.

        """
        known = self._snapshot
        if known is not None and known.revision == self._version:
            return known  # a numbered version: nothing can have changed
        async with await self._web() as web:
            version = self._version or await self._newest(web)
            if known is not None and known.revision == version:
                return known
            rows, page = list[Any](), ""
            for _ in range(MAX_PAGES):
                asked = {"page_size": PAGE_SIZE, **({"page_token": page} if page else {})}
                question = f"{version}/files?{urlencode(asked)}"
                answer = await self._ask(web, question)
                if not isinstance(answer.get("files"), list):
                    raise self._foreign("a listing without files")
                rows += answer["files"]
                page = answer.get("nextPageToken") or ""
                if not isinstance(page, str) or not page.isprintable():
                    raise self._foreign("a listing with a malformed nextPageToken")
                if not page:
                    break
            else:
                raise self._foreign("a listing that does not end")
        entries = [self._entry(row, version) for row in rows]
        self._snapshot = await trio.to_thread.run_sync(
            Snapshot.of, self.url, version, entries, abandon_on_cancel=True, limiter=_THREADS
        )
        return self._snapshot

    async def entry(self, path: str) -> Entry:
        """Return what the latest snapshot has at `path`; NotFound if that is nothing."""
        return entry_in(self._snapshot or await self.snapshot(), path)

    async def locate(self, entry: Entry) -> Location:
        """Return the signed link to `entry` in the version that it was listed in.

        Raises:
            Stale: that version was deleted.
            StoreError: as `snapshot`.

        """
        async with await self._web() as web:
            try:
                return await web.location(
                    self._address(f"{quote(entry.version)}/download/{quote(os.fsencode(entry.path))}")
                )
            except NotFound as error:
                raise Stale(
                    f"{self.url}: version {entry.version} with {entry.path!r} was deleted: refresh the model"
                ) from error

    async def _newest(self, web: Web) -> str:
        number = (await self._ask(web, "get")).get("versionNumber")
        if type(number) is not int or not 0 < number < 10**9:
            raise self._foreign("a variation without versionNumber")
        return str(number)

    def _entry(self, row: Any, version: str) -> Entry:
        try:
            name, size, date = row["name"], row["size"], row.get("creationDate")
        except (TypeError, KeyError, AttributeError):
            raise self._foreign("a file without name or size") from None
        if not isinstance(name, str) or type(size) is not int or not 0 <= size < 1 << 63:
            raise self._foreign("a file with a malformed name or size")
        return Entry(name, size, version, mtime=_seconds(date))

    # Asking

    def _address(self, question: str) -> str:
        return f"{self._endpoint}/api/v1/models/{self._variation}/{question}"

    async def _ask(self, web: Web, question: str) -> dict[str, Any]:
        answer = await web.get(self._address(question), MAX_BODY)
        try:
            found = json.loads(answer.body)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self._foreign("an answer that is no JSON object")
        return found

    async def _web(self) -> Web:
        secret, tls = await trio.to_thread.run_sync(
            lambda: (self._authorization(), tls_context(None)), abandon_on_cancel=True, limiter=_THREADS
        )
        secrets = {"authorization": secret} if secret else {}
        return Web(self._endpoint, secrets, tls=tls, timeout=self._timeout, refused=self._failure)

    def _authorization(self) -> str | None:
        """Return what the server wants to see, from where Kaggle's own tools find it; blocks."""
        if self._token_file:
            return f"Bearer {read_token(self._token_file, self.url)}"
        given = os.environ.get("KAGGLE_API_TOKEN", "").strip()
        home = Path(os.environ.get("HOME") or "/") / ".kaggle"
        place = given or str(home / "access_token")
        if os.path.isfile(place):  # noqa: PTH113  # Path.is_file raises where a token is too long a name
            return f"Bearer {read_token(place, self.url)}"
        if given:
            return f"Bearer {checked_token(given, 'KAGGLE_API_TOKEN', self.url)}"
        user, key = os.environ.get("KAGGLE_USERNAME"), os.environ.get("KAGGLE_KEY")
        if user and key:
            return basic_auth(user, key)
        file = Path(os.environ.get("KAGGLE_CONFIG_DIR") or home) / "kaggle.json"
        try:
            found = json.loads(file.read_bytes())
            return basic_auth(found["username"], found["key"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"cannot be read ({type(error).__name__}): it must hold username and key"
            raise AccessDenied(f"{self.url}: {file} {reason}") from error

    def _failure(self, answer: Answer, url: str) -> StoreError:
        match answer.status:
            case 401:
                return AccessDenied(f"{self.url}: the credentials were refused (401): renew KAGGLE_API_TOKEN")
            case 403:
                page = f"{self._endpoint}/models/{'/'.join(self._variation.split('/')[:2])}"
                return AccessDenied(
                    f"{self.url}: refused (403): accept the licence at {page} and set KAGGLE_API_TOKEN"
                )
            case 404:
                return NotFound(
                    f"{self.url}: no such model, variation or version: check the URL and KAGGLE_API_TOKEN"
                )
        return failure(answer, url)

    def _foreign(self, what: str) -> BadAnswer:
        return BadAnswer(f"{self.url}: {what} came from {self._endpoint}: check the endpoint")


def _seconds(date: Any) -> float:
    """Return the seconds since the epoch of an ISO 8601 date in UTC, 0 if it is none."""
    try:
        return datetime.fromisoformat(str(date)).replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        return 0.0

"""``gs://BUCKET[/PREFIX/]`` and ``gs://BUCKET/KEY``: Google Cloud Storage.

An object is pinned by its generation, the number of one immutable content: every read names it, so that
nothing else can come. API: https://cloud.google.com/storage/docs/json_api/v1/objects.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, StoreError, Unavailable
from modelfs.stores import Options, checked_options, redact, require
from modelfs.stores.buckets import BucketStore, Unservable, items
from modelfs.types import Digest, Entry, Location

if TYPE_CHECKING:
    from google.cloud.storage import Blob, Client

OPTIONS: Mapping[str, type | tuple[type, ...]] = {
    "anonymous": bool,
    "endpoint": str,
    "max_entries": int,
    "user_project": str,
}

_GOOGLE = "https://storage.googleapis.com"
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
_TIMEOUT = (10, 30)
"""Seconds for a connection, and for an answer."""
_RETRYING = 10
"""Seconds that one question is asked again while the cloud is busy."""
_FIELDS = "name,size,generation,timeCreated,crc32c,md5Hash,contentEncoding,cacheControl"


class GoogleStore(BucketStore):
    """A bucket, what lies under a prefix of it, or one object; see `BucketStore`.

    Options, all optional:

    - ``anonymous``: send no credentials, for public buckets.
    - ``endpoint``: another server than Google's; ``$STORAGE_EMULATOR_HOST``, which gets no credentials.
    - ``user_project``: who pays for requests, where the bucket's owner does not.
    - ``max_entries``: what holds more (100,000) is not listed but looked up name by name.

    Raises:
        ConfigError: malformed URL or option, or the extra ``gs`` is not installed. Credentials that cannot
            be had are AccessDenied, at first use.

    """

    def __init__(self, url: str, options: Options) -> None:
        require("gs", "google.cloud.storage")
        found = re.fullmatch(r"[gG][sS]://([a-z0-9][a-z0-9._-]{1,221})(?:/(.*))?", url, re.DOTALL)
        if found is None:
            raise ConfigError(
                f"{redact(url)!r} is not a URL of Google Cloud Storage: write gs://BUCKET/PREFIX/"
            )
        name, path = found[1], found[2] or ""
        canonical = f"gs://{name}/{path}"
        checked_options(canonical, options, OPTIONS)
        endpoint, anonymous = _endpoint(canonical, options)
        super().__init__(canonical, _Bucket(canonical, name, endpoint, anonymous, options), path, options)
        self.identity = canonical if endpoint == _GOOGLE else f"{canonical} at {endpoint}"


class _Bucket:
    """The way to one bucket: a client made at first use, and made anew when the file of credentials was."""

    def __init__(self, url: str, name: str, endpoint: str, anonymous: bool, options: Options) -> None:
        self._url = url
        self._name = name
        self._endpoint = endpoint
        self._anonymous = anonymous
        self._project: str | None = options.get("user_project")
        self._connection: _Connection | None = None

    def entries(self, prefix: str, most: int) -> Iterator[tuple[str, Entry | Unservable]]:
        with _mapped(f"{self._url}: listing"):
            client = self._connected().client
            listing = client.list_blobs(
                client.bucket(self._name, user_project=self._project),
                prefix=prefix or None,
                max_results=most,
                fields=f"items({_FIELDS}),nextPageToken",
                timeout=_TIMEOUT,
                retry=_retry(),
            )
            for blob in items(listing.pages, most):
                yield blob.name, _entry(blob)

    def entry(self, key: str) -> Entry | None:
        with _mapped(f"{self._url}: {key!r}"):
            bucket = self._connected().client.bucket(self._name, user_project=self._project)
            blob = bucket.get_blob(key, timeout=_TIMEOUT, retry=_retry())
        found = _entry(blob) if blob else None
        if isinstance(found, Unservable):
            raise found
        return found

    def locate(self, key: str, entry: Entry) -> Location:
        query = {"alt": "media", "generation": entry.version}
        if self._project:
            query["userProject"] = self._project
        path = f"/download/storage/v1/b/{self._name}/o/{quote(key, safe='')}"
        url = f"{self._endpoint}{path}?{urlencode(query)}"
        with _mapped(f"{self._url}: {key!r}"):
            headers, expires = self._connected().token(url)
        return Location(url, headers, expires)

    def _connected(self) -> _Connection:
        # Threads that come at the same time each make one and the last is kept.
        stamp = None if self._anonymous else _stamp()
        connection = self._connection
        if connection is None or connection.stamp != stamp:
            connection = self._connection = _connect(self._endpoint, self._anonymous, stamp)
        return connection


@dataclass(frozen=True)
class _Connection:
    """A client, what it proves itself with, and the state of the file that this came from."""

    client: Client
    credentials: Any
    stamp: object

    def token(self, url: str) -> tuple[Mapping[str, str], float | None]:
        """Return the headers for a read of `url`, and when they run out: renewed minutes before they do."""
        from google.auth.transport.requests import Request

        headers: dict[str, str] = {}
        self.credentials.before_request(Request(), "GET", url, headers)
        expiry = self.credentials.expiry
        return headers, expiry.replace(tzinfo=UTC).timestamp() if headers and expiry else None


def _connect(endpoint: str, anonymous: bool, stamp: object) -> _Connection:
    import google.auth
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.storage import Client

    credentials: Any
    if anonymous:
        credentials = AnonymousCredentials()  # type: ignore[no-untyped-call]
    else:
        credentials, _ = google.auth.default(scopes=[_SCOPE])
    client = Client(project=None, credentials=credentials, client_options={"api_endpoint": endpoint})
    return _Connection(client, credentials, stamp)


def _stamp(env: Mapping[str, str] = os.environ) -> object:
    """Return what changes when the file of the application default credentials is written."""
    home = env.get("CLOUDSDK_CONFIG") or "~/.config/gcloud"
    path = env.get("GOOGLE_APPLICATION_CREDENTIALS") or f"{home}/application_default_credentials.json"
    try:
        status = Path(path).expanduser().stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _endpoint(url: str, options: Options) -> tuple[str, bool]:
    """Return the server, without a slash at its end, and whether to send it no credentials."""
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    if emulator and "://" not in emulator:
        emulator = f"http://{emulator}"
    endpoint = str(options.get("endpoint") or emulator or _GOOGLE)
    if not re.fullmatch(r"https?://[^/@?#\s]+/?", endpoint):
        raise ConfigError(f"{url}: endpoint must look like https://HOST:PORT")
    told = "endpoint" in options
    return endpoint.rstrip("/"), bool(options.get("anonymous") or (emulator and not told))


def _entry(blob: Blob) -> Entry | Unservable:
    if blob.content_encoding == "gzip" and "no-transform" not in (blob.cache_control or ""):
        # https://cloud.google.com/storage/docs/transcoding
        return Unservable("it is stored as gzip and sent decompressed: set Cache-Control: no-transform")
    created = blob.time_created
    mtime = float(int(created.timestamp())) if created else 0.0
    return Entry(blob.name, int(blob.size), str(int(blob.generation)), _digest(blob), mtime)


def _digest(blob: Blob) -> Digest | None:
    """Return the CRC-32C, which every object has and Google recommends, or the MD5."""
    if blob.crc32c:
        return Digest("crc32c", base64.b64decode(blob.crc32c, validate=True).hex())
    return Digest("md5", base64.b64decode(blob.md5_hash, validate=True).hex()) if blob.md5_hash else None


def _retry() -> Any:
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(_RETRYING)


@contextmanager
def _mapped(where: str) -> Iterator[None]:
    """Raise what Google's libraries raise as the StoreError that it means, beginning with `where`."""
    from google.api_core.exceptions import GoogleAPICallError, RetryError
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    try:
        yield
    except (GoogleAPICallError, GoogleAuthError, RetryError, RequestException) as error:
        raise _fault(error, where) from error


def _fault(error: Exception, where: str) -> StoreError:
    """Return what `error` of a library means; its own text, which may hold secrets, is never used."""
    from google.api_core.exceptions import RetryError
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
    from requests.exceptions import JSONDecodeError, RequestException

    if isinstance(error, RetryError) and isinstance(error.cause, Exception):
        error = error.cause
    match error:
        case DefaultCredentialsError():
            return AccessDenied(
                f"{where}: no Google credentials: set GOOGLE_APPLICATION_CREDENTIALS, or anonymous"
            )
        case JSONDecodeError():
            return BadAnswer(f"{where}: the answer makes no sense: check the endpoint")
        case TransportError() | RequestException() | RetryError():
            return Unavailable(f"{where}: Google cannot be reached ({type(error).__name__})")
        case GoogleAuthError() if error.retryable:
            return Unavailable(f"{where}: no token can be had now: try again later")
        case GoogleAuthError():
            return AccessDenied(f"{where}: the Google credentials are not accepted: renew them")
    code = int(getattr(error, "code", None) or 0)
    if code in (401, 403):
        return AccessDenied(
            f"{where}: access denied: the credentials need storage.objects.list and storage.objects.get; "
            "set anonymous for a public bucket"
        )
    if code == 404:
        return NotFound(f"{where}: there is no such bucket: check its name and the endpoint")
    if code in (408, 429) or code >= 500:
        return Unavailable(f"{where}: the store is busy or broken: try again later")
    return BadAnswer(f"{where}: unexpected answer {code}: check the endpoint")

"""``s3://BUCKET[/PREFIX/]`` and ``s3://BUCKET/KEY``: Amazon S3 and everything that speaks its protocol.

The bytes are read from presigned ``GetObject`` URLs, one of which serves every range until it expires.
Entries are pinned by their ETag, and by their VersionId where the bucket keeps versions. API:
https://docs.aws.amazon.com/AmazonS3/latest/API/.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, Stale
from modelfs.stores import Options, checked_options, redact
from modelfs.stores.aws import THREADS, Account
from modelfs.types import Algorithm, Digest, Entry, Location, Snapshot, path_fault

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")
Head = Mapping[str, Any]
"""The answer to HeadObject, as botocore parses it."""

OPTIONS: Mapping[str, type | tuple[type, ...]] = {
    "addressing_style": str,
    "anonymous": bool,
    "ca_bundle": str,
    "endpoint_url": str,
    "expires": int,
    "max_entries": int,
    "profile": str,
    "region": str,
    "requester_pays": bool,
}

_LONGEST = 7 * 24 * 3600
"""Seconds that Signature Version 4 lets a presigned URL live at most."""
_VERSION_PAGES = 10
"""Pages of 1000 versions that are searched for a pinned one."""


class S3Store:
    """A bucket, what lies under a prefix of it, or one object.

    ``s3://bucket/pre`` is the directory ``pre/`` (never ``prefix-other/``); if nothing is in it, the object
    ``pre``. Options, all optional:

    - ``endpoint_url``, ``region``, ``profile``, ``ca_bundle``: as in the AWS configuration, which they
      override. Without ``region`` the bucket is asked for its own.
    - ``anonymous``: sign nothing, for public buckets.
    - ``addressing_style``: ``path``, ``virtual``, or ``auto``: virtual at Amazon, path elsewhere.
    - ``expires``: seconds that a presigned URL is good (3600); with temporary credentials at most 600.
    - ``requester_pays``: agree to pay for requests.
    - ``max_entries``: what holds more (100,000) is not listed but looked up name by name.

    Raises:
        ConfigError: malformed URL or option. Credentials that cannot be had are AccessDenied, at first use.

    """

    def __init__(self, url: str, options: Options) -> None:
        found = re.fullmatch(r"[sS]3://([A-Za-z0-9][A-Za-z0-9._-]*)(?:/(.*))?", url, re.DOTALL)
        if found is None:
            raise ConfigError(f"{redact(url)!r} is not an S3 URL: write s3://BUCKET/PREFIX/")
        self._bucket, path = found[1], found[2] or ""
        if path and path_fault(path.removesuffix("/")):
            raise ConfigError(
                f"{redact(url)!r} is no place for a model: {path_fault(path.removesuffix('/'))}"
            )
        self.url = f"s3://{self._bucket}/{path}"
        self._prefix = f"{path.removesuffix('/')}/" if path else ""
        self._object = "" if path.endswith("/") else path
        self._options = _checked(self.url, options)
        self._payer = {"RequestPayer": "requester"} if options.get("requester_pays") else {}
        self._account = Account(self._bucket, options)
        self.identity = _identity(self.url, options)
        self._may_pin: bool | None = None

    def __repr__(self) -> str:
        return f"<S3Store {self.url}>"

    async def snapshot(self) -> Snapshot:
        """List everything; not complete if there is more than ``max_entries``.

        Raises:
            NotFound: no such bucket, or nothing of that name in it.
            StoreError: any other failure.

        """
        return await self._in_thread(self._snapshot)

    async def entry(self, path: str) -> Entry:
        """Return the object at `path` as it is now, or a directory if it is the prefix of others.

        Raises:
            NotFound: nothing is there.
            StoreError: any other failure.

        """
        return await self._in_thread(self._entry, path)

    async def locate(self, entry: Entry) -> Location:
        """Return a URL for the version that `entry` is pinned to, also one that was overwritten since.

        Raises:
            Stale: the bucket no longer has it.
            StoreError: any other failure.

        """
        return await self._in_thread(self._locate, entry)

    # The verbs, in a thread

    def _snapshot(self) -> Snapshot:
        most = self._options.get("max_entries", 100_000)
        entries: list[Entry] = []
        is_directory = not self._prefix
        try:
            for item in self._list(self._prefix):
                is_directory = True
                if entry := self._listed(item):
                    entries.append(entry)
                if len(entries) > most:
                    return Snapshot.of(self.url, "not listed", [], complete=False)
        except AccessDenied:
            # The right to read one object does not include listing the bucket.
            if not self._object or is_directory:
                raise
        if not is_directory:
            lone = self._lone_entry()
            if lone is None:
                raise NotFound(f"{self.url}: there is nothing under this name: check the bucket's listing")
            entries = [lone]
        return Snapshot.of(self.url, "", entries)

    def _entry(self, path: str) -> Entry:
        if not path_fault(path):
            key = self._prefix + path
            if head := self._head(key):
                return self._entry_of(path, head, head["ContentLength"])
            if self._any(f"{key}/"):
                return Entry(path, kind="directory")
            if self._is_lone(path) and not self._any(self._prefix) and (lone := self._lone_entry()):
                return lone
        raise NotFound(f"{self.url} has no {path!r}")

    def _locate(self, entry: Entry) -> Location:
        keys = [self._object] if self._is_lone(entry.path) else []
        keys.append(self._prefix + entry.path)
        now = (partial(self._current, key, entry) for key in keys)
        before = (partial(self._earlier, key, entry) for key in keys)
        for find in chain(now, before):
            if location := find():
                return location
        raise Stale(f"{self.url}: {entry.path!r} was changed or removed: refresh the model")

    # Keys and entries

    def _is_lone(self, path: str) -> bool:
        return bool(self._object) and path == self._object.rpartition("/")[2]

    def _lone_entry(self) -> Entry | None:
        head = self._head(self._object) if self._object else None
        return self._entry_of(self._object.rpartition("/")[2], head, head["ContentLength"]) if head else None

    def _listed(self, item: Mapping[str, Any]) -> Entry | None:
        """Return the entry of one row of a listing; None for the directory itself."""
        path = item["Key"][len(self._prefix) :]
        if not path:
            return None
        if path.endswith("/"):
            return Entry(path[:-1], kind="directory")
        return self._entry_of(path, item, item["Size"])

    def _entry_of(self, path: str, item: Mapping[str, Any], size: int) -> Entry:
        if not item.get("ETag"):
            raise BadAnswer(f"{self.url}: {path!r} has no ETag: this server cannot be read consistently")
        return Entry(path, size, item["ETag"].strip('"'), mtime=float(int(item["LastModified"].timestamp())))

    def _list(self, prefix: str) -> Iterator[Mapping[str, Any]]:
        more: dict[str, str] = {}
        while True:
            page = self._ask("listing", partial(self._page, prefix, 1000, more))
            yield from page.get("Contents", ())
            if not page.get("IsTruncated"):
                return
            token = page.get("NextContinuationToken", "")
            if not token or token == more.get("ContinuationToken"):
                raise BadAnswer(f"{self.url}: the listing does not end")
            more = {"ContinuationToken": token}

    def _any(self, prefix: str) -> bool:
        return bool(self._ask("listing", partial(self._page, prefix, 1, {})).get("Contents"))

    def _page(self, prefix: str, most: int, more: Mapping[str, str], client: S3Client) -> Mapping[str, Any]:
        arguments: Any = {"Prefix": prefix, "MaxKeys": most, **more, **self._payer}
        return client.list_objects_v2(Bucket=self._bucket, **arguments)

    def _versions(self, key: str, more: Mapping[str, str], client: S3Client) -> Mapping[str, Any]:
        arguments: Any = {"Prefix": key, **more, **self._payer}
        return client.list_object_versions(Bucket=self._bucket, **arguments)

    # Locations

    def _current(self, key: str, entry: Entry) -> Location | None:
        head = self._head(key)
        if head is None or head.get("ETag", "").strip('"') != entry.version:
            return None
        version = head.get("VersionId", "null")
        if version != "null" and self._may_pin is None:
            # Reading by VersionId needs a right of its own, s3:GetObjectVersion.
            try:
                self._may_pin = self._head(key, version) is not None
            except AccessDenied:
                self._may_pin = False
        return self._location(key, head, version if self._may_pin else "null")

    def _earlier(self, key: str, entry: Entry) -> Location | None:
        """Look for the pinned ETag among the versions that the bucket keeps, newest first."""
        more: dict[str, str] = {}
        for _ in range(_VERSION_PAGES):
            try:
                page = self._ask(repr(key), partial(self._versions, key, more))
            except (AccessDenied, BadAnswer):
                return None  # not allowed, or not implemented by this server: the bytes are out of reach
            for item in page.get("Versions", ()):
                if item["Key"] != key:
                    return None
                if item.get("ETag", "").strip('"') == entry.version:
                    head = self._head(key, item["VersionId"])
                    return self._location(key, head, item["VersionId"]) if head else None
            if not page.get("IsTruncated"):
                return None
            more = {name: page[f"Next{name}"] for name in ("KeyMarker", "VersionIdMarker")}
        return None

    def _head(self, key: str, version: str = "null") -> Head | None:
        """Return what there is to know about an object, its checksums included; None if it is not there."""
        pin = {} if version == "null" else {"VersionId": version}
        arguments: Any = {"ChecksumMode": "ENABLED", **pin, **self._payer}
        try:
            return self._ask(repr(key), lambda c: c.head_object(Bucket=self._bucket, Key=key, **arguments))
        except NotFound:
            return None

    def _location(self, key: str, head: Head, version: str) -> Location:
        archived = head.get("StorageClass") in ("GLACIER", "DEEP_ARCHIVE")
        if archived and 'ongoing-request="false"' not in head.get("Restore", ""):
            raise AccessDenied(f"{self.url}: {key!r} is archived ({head['StorageClass']}): restore it first")
        pin = {} if version == "null" else {"VersionId": version}
        parameters = {"Bucket": self._bucket, "Key": key, **pin, **self._payer}
        where, seconds = f"{self.url}: {key!r}", self._options.get("expires", 3600)
        url, expires = self._account.presign(where, parameters, seconds)
        return Location(
            url,
            # Signed along with the URL, hence to be sent with it.
            headers={"x-amz-request-payer": "requester"} if self._payer else {},
            expires=expires,
            etag=head["ETag"] if head["ETag"].startswith('"') else None,
            digest=_digest(head),
        )

    def _ask(self, what: str, question: Callable[[S3Client], T]) -> T:
        return self._account.ask(f"{self.url}: {what}", question)

    async def _in_thread(self, verb: Callable[..., T], *arguments: Any) -> T:
        def ask() -> T:
            try:
                return verb(*arguments)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                # botocore hands on what it could parse, whether or not it makes sense.
                raise BadAnswer(f"{self.url}: the answer is not S3's: check endpoint_url") from error

        # Nothing is changed by the question, so its thread may be left behind by a cancelled caller.
        return await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=THREADS)


def _identity(url: str, options: Options, env: Mapping[str, str] = os.environ) -> str:
    """Return the URL with what decides about the endpoint, if anything does: the AWS chain's own order."""
    endpoint = options.get("endpoint_url") or env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
    profile = options.get("profile") or env.get("AWS_PROFILE")
    where = (endpoint and redact(str(endpoint)).rstrip("/")) or (profile and f"profile {profile}")
    return f"{url} at {where}" if where else url


def _checked(url: str, options: Options) -> Options:
    checked_options(url, options, OPTIONS)
    style, endpoint = options.get("addressing_style", "auto"), options.get("endpoint_url")
    if style not in ("auto", "path", "virtual"):
        raise ConfigError(f"{url}: addressing_style must be auto, path or virtual")
    if endpoint is not None and not re.match(r"https?://[^/@?#]+/?$", endpoint):
        raise ConfigError(f"{url}: endpoint_url must look like https://HOST:PORT")
    if not 1 <= options.get("expires", 3600) <= _LONGEST:
        raise ConfigError(f"{url}: expires must be between 1 and {_LONGEST} seconds")
    if options.get("max_entries", 1) < 1:
        raise ConfigError(f"{url}: max_entries must be at least 1")
    return options


_CHECKSUMS: tuple[tuple[str, Algorithm], ...] = (
    ("ChecksumSHA256", "sha256"),
    ("ChecksumSHA1", "sha1"),
    ("ChecksumCRC32C", "crc32c"),
    ("ChecksumCRC32", "crc32"),
)


def _digest(head: Head) -> Digest | None:
    """Return the best checksum of the whole object; those of multipart uploads may be of the parts only."""
    multipart = "-" in head["ETag"]
    if head.get("ChecksumType", "COMPOSITE" if multipart else "FULL_OBJECT") != "FULL_OBJECT":
        return None
    for name, algorithm in _CHECKSUMS:
        try:
            return Digest(algorithm, base64.b64decode(head[name], validate=True).hex())
        except (KeyError, ValueError, binascii.Error):
            continue  # not published, or not what it says it is: the next best will do
    return None

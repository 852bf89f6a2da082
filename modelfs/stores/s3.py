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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, Stale
from modelfs.stores import Options, checked_options, redact
from modelfs.stores.aws import Account
from modelfs.stores.buckets import BucketStore, items
from modelfs.types import Algorithm, Digest, Entry, Location

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
_PAGE = 1000
"""Most objects in one page of a listing."""
_VERSION_PAGES = 10
"""Pages of 1000 versions that are searched for a pinned one."""


class S3Store(BucketStore):
    """A bucket, what lies under a prefix of it, or one object; see `BucketStore`.

    Options, all optional:

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
        name, path = found[1], found[2] or ""
        canonical = f"s3://{name}/{path}"
        super().__init__(canonical, _Bucket(canonical, name, _checked(canonical, options)), path, options)
        self.identity = _identity(canonical, options)


class _Bucket:
    """The way to one bucket, with the rights and the region of an account."""

    def __init__(self, url: str, name: str, options: Options) -> None:
        self._url = url
        self._name = name
        self._payer = {"RequestPayer": "requester"} if options.get("requester_pays") else {}
        self._seconds: int = options.get("expires", 3600)
        self._account = Account(name, options)
        self._may_pin: bool | None = None

    def entries(self, prefix: str, most: int) -> Iterator[tuple[str, Entry]]:
        for item in items(self._pages(prefix, min(most, _PAGE)), most):
            key = item["Key"]
            yield key, Entry(key, kind="directory") if key.endswith("/") else self._entry(key, item, "Size")

    def entry(self, key: str) -> Entry | None:
        head = self._head(key)
        return self._entry(key, head, "ContentLength") if head else None

    def locate(self, key: str, entry: Entry) -> Location:
        location = self._current(key, entry) or self._earlier(key, entry)
        if location is None:
            raise Stale(f"{self._url}: {entry.path!r} was changed or removed: refresh the model")
        return location

    def _entry(self, key: str, item: Mapping[str, Any], size: str) -> Entry:
        if not item.get("ETag"):
            raise BadAnswer(f"{self._url}: {key!r} has no ETag: this server cannot be read consistently")
        mtime = float(int(item["LastModified"].timestamp()))
        return Entry(key, item[size], item["ETag"].strip('"'), mtime=mtime)

    def _pages(self, prefix: str, size: int) -> Iterator[Sequence[Mapping[str, Any]]]:
        more: dict[str, str] = {}
        while True:
            page = self._ask("listing", partial(self._page, prefix, size, more))
            yield page.get("Contents", ())
            if not page.get("IsTruncated"):
                return
            token = page.get("NextContinuationToken", "")
            if not token or token == more.get("ContinuationToken"):
                raise BadAnswer(f"{self._url}: the listing does not end")
            more = {"ContinuationToken": token}

    def _page(self, prefix: str, size: int, more: Mapping[str, str], client: S3Client) -> Mapping[str, Any]:
        arguments: Any = {"Prefix": prefix, "MaxKeys": size, **more, **self._payer}
        return client.list_objects_v2(Bucket=self._name, **arguments)

    def _versions(self, key: str, more: Mapping[str, str], client: S3Client) -> Mapping[str, Any]:
        arguments: Any = {"Prefix": key, **more, **self._payer}
        return client.list_object_versions(Bucket=self._name, **arguments)

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
            return self._ask(repr(key), lambda c: c.head_object(Bucket=self._name, Key=key, **arguments))
        except NotFound:
            return None

    def _location(self, key: str, head: Head, version: str) -> Location:
        archived = head.get("StorageClass") in ("GLACIER", "DEEP_ARCHIVE")
        if archived and 'ongoing-request="false"' not in head.get("Restore", ""):
            raise AccessDenied(f"{self._url}: {key!r} is archived ({head['StorageClass']}): restore it first")
        pin = {} if version == "null" else {"VersionId": version}
        parameters = {"Bucket": self._name, "Key": key, **pin, **self._payer}
        url, expires = self._account.presign(f"{self._url}: {key!r}", parameters, self._seconds)
        return Location(
            url,
            # Signed along with the URL, hence to be sent with it.
            headers={"x-amz-request-payer": "requester"} if self._payer else {},
            expires=expires,
            etag=head["ETag"] if head["ETag"].startswith('"') else None,
            digest=_digest(head),
        )

    def _ask(self, what: str, question: Callable[[S3Client], T]) -> T:
        return self._account.ask(f"{self._url}: {what}", question)


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

"""Frozen values that every layer shares: Span, Digest, Entry, Snapshot, Location.

Sizes and offsets are bytes, times are seconds since the epoch unless the name ends in ``_ns``, spans are
half-open.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import crc32c as _crc32c

BLOCK = 8 * 1024 * 1024
"""Bytes in one block, the unit of fetching and caching; the last block of an object is shorter."""

MAX_NAME = 255
"""Longest name of one path component in bytes: ``NAME_MAX`` of Linux file systems."""

MAX_PATH = 4095
"""Longest path in bytes: ``PATH_MAX`` without the terminating NUL."""


PicklePolicy = Literal["allow", "warn", "deny"]
"""What becomes of a file whose unpickling would import more than is known to be harmless."""


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """The bytes ``[start, stop)`` of an object; never negative, possibly empty."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"not a span: [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    def blocks(self) -> range:
        """Return the indexes of the blocks that hold any byte of this span."""
        if self.start == self.stop:
            return range(0)
        return range(self.start // BLOCK, (self.stop - 1) // BLOCK + 1)


def block_span(index: int, size: int) -> Span:
    """Return the bytes of block `index` in an object of `size` bytes."""
    return Span(index * BLOCK, min((index + 1) * BLOCK, size))


def block_count(size: int) -> int:
    """Return how many blocks an object of `size` bytes has."""
    return -(-size // BLOCK)


class Hasher(Protocol):
    """The part of :mod:`hashlib`'s objects that digests need."""

    def update(self, data: Any, /) -> None:
        """Take in the next bytes."""

    def hexdigest(self) -> str:
        """Return the digest of everything so far in lower-case hex."""


class _Crc32:
    """CRC-32 as of zlib, in the shape of a hash object; S3 calls it ``CRC32``."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


class _Crc32c:
    """CRC-32C (Castagnoli), in the shape of a hash object; S3 and GCS call it ``CRC32C``."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        self._value = crc32c(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def crc32c(data: Any, value: int = 0) -> int:
    """Return the CRC-32C of `data` (any buffer), continuing from `value`; long buffers release the GIL."""
    return _crc32c.crc32c(data, value)


Algorithm = Literal["sha256", "sha512", "sha1", "md5", "git-sha1", "crc32", "crc32c"]

_HEX_LENGTH: Mapping[str, int] = {
    "sha256": 64,
    "sha512": 128,
    "sha1": 40,
    "md5": 32,
    "git-sha1": 40,
    "crc32": 8,
    "crc32c": 8,
}


@dataclass(frozen=True, slots=True)
class Digest:
    r"""What a store publishes about the content of one object, written ``algorithm:hex``.

    ``git-sha1`` is the id of a git blob: SHA-1 over ``blob SIZE\0`` and the content
    (https://git-scm.com/book/en/v2/Git-Internals-Git-Objects).
    """

    algorithm: Algorithm
    value: str

    def __post_init__(self) -> None:
        length = _HEX_LENGTH.get(self.algorithm)
        if length is None or not re.fullmatch(rf"[0-9a-f]{{{length}}}", self.value):
            raise ValueError(f"not a digest: {self.algorithm}:{self.value[:140]}")

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.value}"

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Return the digest written ``algorithm:hex``.

        Raises:
            ValueError: if `text` is not of that form.

        """
        algorithm, _, value = text.partition(":")
        return cls(algorithm, value.lower())  # type: ignore[arg-type]  # __post_init__ checks it

    def hasher(self, size: int) -> Hasher:
        """Return a fresh hash object of this algorithm for content of `size` bytes."""
        match self.algorithm:
            case "crc32":
                return _Crc32()
            case "crc32c":
                return _Crc32c()
            case "git-sha1":
                hasher = hashlib.sha1(usedforsecurity=False)
                hasher.update(b"blob %d\0" % size)
                return hasher
            case algorithm:
                return hashlib.new(algorithm, usedforsecurity=False)


def path_fault(path: str) -> str | None:
    """Return why `path` must not appear in a tree, or None if it may.

    Paths come from strangers. Accepted are relative POSIX paths without empty, ``.`` or ``..``
    components, NUL or other control characters, that Linux can name (255 bytes a component, 4095 in all).
    """
    try:
        raw = os.fsencode(path)
    except UnicodeEncodeError:
        return "it is not valid text"
    if not raw:
        return "the name is empty"
    if len(raw) > MAX_PATH:
        return f"the path is longer than {MAX_PATH} bytes"
    if any(byte < 0x20 or byte == 0x7F for byte in raw):
        return "it holds a control character"
    for part in raw.split(b"/"):
        if part in (b"", b".", b".."):
            return f"it holds the component {part.decode()!r}"
        if len(part) > MAX_NAME:
            return f"a component is longer than {MAX_NAME} bytes"
    return None


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, directory or symbolic link of a snapshot.

    Attributes:
        path: relative to the model's root, ``/``-separated.
        size: bytes; 0 for directories.
        version: opaque name of this very content at its store (ETag, blob id, generation …). Two entries
            of one store and path with the same version have the same bytes.
        digest: what the store publishes about the content, if it does.
        mtime: seconds since the epoch; part of the snapshot, hence stable.
        kind: what it is. Directories need no entry of their own unless they are empty.
        target: of a symbolic link, relative and inside the model.

    """

    path: str
    size: int = 0
    version: str = ""
    digest: Digest | None = None
    mtime: float = 0.0
    kind: Literal["file", "directory", "symlink"] = "file"
    target: str = ""

    def to_json(self) -> list[Any]:
        """Return a compact form for the metadata cache; `from_json` reverses it."""
        digest = str(self.digest) if self.digest else ""
        return [self.path, self.size, self.version, digest, self.mtime, self.kind, self.target]

    @classmethod
    def from_json(cls, row: list[Any]) -> Entry:
        """Return the entry that `to_json` wrote.

        Raises:
            ValueError: if `row` was not written by `to_json`.

        """
        path, size, version, digest, mtime, kind, target = row
        if kind not in ("file", "directory", "symlink"):
            raise ValueError(f"not a kind of entry: {kind!r}")
        parsed = Digest.parse(digest) if digest else None
        return cls(str(path), int(size), str(version), parsed, float(mtime), kind, str(target))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The immutable listing of a model at one resolved revision.

    Build one with :meth:`of`, which refuses hostile and contradictory names.

    Attributes:
        url: of the store, without secrets.
        revision: what the mutable name was resolved to (commit sha, digest, a hash of the listing …).
        entries: by path, sorted, unique, safe.
        rejected: ``(path, reason)`` of what the store listed and the tree must not show.
        complete: False if the store is too large to list: entries then come from ``Store.entry``.

    """

    url: str
    revision: str
    entries: Mapping[str, Entry]
    rejected: tuple[tuple[str, str], ...] = ()
    complete: bool = True

    @classmethod
    def of(cls, url: str, revision: str, entries: Iterable[Entry], *, complete: bool = True) -> Snapshot:
        """Return a snapshot of those `entries` that may be shown.

        Refused, each with its reason in `rejected`: unsafe paths, a path listed twice, a negative size, a
        file where another entry needs a directory, and symbolic links that leave the model.
        An empty `revision` is derived from the listing itself.
        """
        rejected: list[tuple[str, str]] = []
        good: dict[str, Entry] = {}
        for entry in sorted(entries, key=lambda e: e.path):
            fault = path_fault(entry.path)
            if fault is None and entry.path in good:
                fault = "the path is listed twice"
            if fault is None and entry.size < 0:
                fault = "its size is negative"
            if fault is None and entry.kind == "symlink":
                fault = _link_fault(entry)
            if fault is None:
                good[entry.path] = entry
            else:
                rejected.append((entry.path, fault))
        parents = {parent for path in good for parent in _parents(path)}
        for path in sorted(parents & good.keys()):
            if good[path].kind != "directory":
                del good[path]
                rejected.append((path, "another entry needs a directory of this name"))
        return cls(url, revision or _fingerprint(good.values())[:40], good, tuple(rejected), complete)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.entries.values())

    @property
    def digest(self) -> str:
        """``sha256:…`` over path, size, version and digest of every entry: equal listings, equal digest."""
        return f"sha256:{_fingerprint(self.entries.values())}"

    def to_json(self) -> dict[str, Any]:
        """Return a form for the metadata cache; `from_json` reverses it."""
        return {
            "url": self.url,
            "revision": self.revision,
            "entries": [entry.to_json() for entry in self.entries.values()],
            "rejected": [list(pair) for pair in self.rejected],
            "complete": self.complete,
        }

    @classmethod
    def from_json(cls, data: Any) -> Snapshot:
        """Return the snapshot that `to_json` wrote; what lies on disk is checked like a store's answer.

        Raises:
            ValueError: if `data` was not written by `to_json`.

        """
        try:
            entries = [Entry.from_json(row) for row in data["entries"]]
            listed = cls.of(str(data["url"]), str(data["revision"]), entries, complete=bool(data["complete"]))
            rejected = tuple((str(path), str(reason)) for path, reason in data["rejected"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a snapshot: {error!r}") from error
        return cls(listed.url, listed.revision, listed.entries, rejected, listed.complete)


def _parents(path: str) -> Iterator[str]:
    cut = path.rfind("/")
    while cut > 0:
        path = path[:cut]
        yield path
        cut = path.rfind("/")


def _link_fault(entry: Entry) -> str | None:
    if not entry.target or entry.target.startswith("/") or "\0" in entry.target:
        return "its link target is empty, absolute or malformed"
    depth = entry.path.count("/")
    for part in entry.target.split("/"):
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        if depth < 0:
            return "its link target leaves the model"
    return None


def _fingerprint(entries: Iterable[Entry]) -> str:
    hasher = hashlib.sha256()
    for entry in entries:
        row = "\0".join((entry.path, str(entry.size), entry.version, str(entry.digest or ""), entry.target))
        raw = row.encode("utf-8", "surrogateescape")
        hasher.update(struct.pack("<I", len(raw)) + raw)
    return hasher.hexdigest()


@dataclass(frozen=True, slots=True)
class Location:
    """Where the bytes of one entry can be had by range reads, for a while.

    Attributes:
        url: ``http(s)://`` (possibly signed: a secret), ``file://`` or ``data:`` (RFC 2397, tiny content).
        headers: to be sent with each request; may hold secrets.
        expires: when the signature or token runs out, seconds since the epoch; None if never.
        etag: strong validator that the answer must carry and ``If-Match`` asks for; None if there is none.
        last_modified: ``Last-Modified`` that the answer must carry, where there is no ETag.
        digest: of the content, if the store tells it only here (S3 checksums).
        token: for ``file://``: ``dev:inode:size:mtime_ns`` that the file must still have.
        public: the store is on the Internet and chose the URL: it must not lead to a private address.

    `url` and `headers` stay out of `repr`: they hold secrets.
    """

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    expires: float | None = None
    etag: str | None = None
    last_modified: str | None = None
    digest: Digest | None = None
    token: str | None = None
    public: bool = False

    @classmethod
    def inline(cls, data: bytes) -> Location:
        """Return the location of tiny content that travels in the URL itself (RFC 2397)."""
        return cls("data:application/octet-stream;base64," + base64.b64encode(data).decode())

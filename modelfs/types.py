"""Frozen values that every layer shares: Span, Digest, Entry, Snapshot, Location.

Sizes and offsets are bytes, times are seconds since the epoch unless the name ends in ``_ns``, spans are
half-open.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from modelfs.digest import Algorithm as Algorithm
from modelfs.digest import Digest as Digest
from modelfs.digest import Hasher as Hasher
from modelfs.digest import crc32c as crc32c
from modelfs.listing import CONTROL, Listing, Totals, in_order, parents
from modelfs.listing import Entry as Entry
from modelfs.listing import path_fault as path_fault

BLOCK = 8 * 1024 * 1024
"""Bytes in one block, the unit of fetching and caching; the last block of an object is shorter."""


MAX_SIZE = (1 << 63) - 1
"""Bytes of the largest file that Linux can show (``off_t``)."""

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

    def __and__(self, other: Span) -> Span:
        """Return the bytes of both, an empty span if there are none."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))

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
        hidden: how many files the configuration leaves out.

    """

    url: str
    revision: str
    entries: Mapping[str, Entry]
    rejected: tuple[tuple[str, str], ...] = ()
    complete: bool = True
    hidden: int = 0

    @classmethod
    def of(cls, url: str, revision: str, entries: Iterable[Entry], *, complete: bool = True) -> Snapshot:
        """Return a snapshot of those `entries` that may be shown.

        Refused, each with its reason in `rejected`: unsafe paths, a path listed twice, an impossible
        size, a file where another entry needs a directory, and symbolic links that leave the model.
        An empty `revision` is derived from the listing itself. With many entries this takes a while: call it
        in a thread.
        """
        rejected: list[tuple[str, str]] = []
        good: dict[str, Entry] = {}
        for entry in in_order(entries, attrgetter("path")):
            fault = path_fault(entry.path)
            if fault is None and entry.path in good:
                fault = "the path is listed twice"
            if fault is None:
                fault = entry_fault(entry)
            if fault is None:
                good[entry.path] = entry
            else:
                rejected.append((entry.path, fault))
        needed = {parent for path in good for parent in parents(path)}
        for path in sorted(needed & good.keys()):
            if good[path].kind != "directory":
                del good[path]
                rejected.append((path, "another entry needs a directory of this name"))
        listing = Listing.of(good.values())
        revision = revision or listing.totals.digest.removeprefix("sha256:")[:40]
        return cls(url, revision, listing, tuple(rejected), complete)

    @property
    def listing(self) -> Listing:
        """The entries in the form that the tree shows."""
        return self.entries if isinstance(self.entries, Listing) else Listing.of(self.entries.values())

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return self.listing.totals.size

    @property
    def digest(self) -> str:
        """``sha256:…`` over path, size, version and digest of every entry: equal listings, equal digest."""
        return self.listing.totals.digest

    def packed(self) -> Snapshot:
        """Return this snapshot with its sums and in little memory, as `of` makes it."""
        listing = self.listing
        _ = listing.totals
        return replace(self, entries=listing)

    def to_json(self) -> dict[str, Any]:
        """Return a form for the metadata cache; `from_json` reverses it."""
        return {
            "url": self.url,
            "revision": self.revision,
            "lines": list(self.listing.lines),
            "totals": list(self.listing.totals),
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
            listing = Listing.checked(data["lines"], Totals(*data["totals"]))
            rejected = tuple((str(path), str(reason)) for path, reason in data["rejected"])
            return cls(str(data["url"]), str(data["revision"]), listing, rejected, bool(data["complete"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a snapshot: {error!r}") from error


def entry_fault(entry: Entry) -> str | None:
    """Return why `entry` must not be shown, although its path may, or None if it may."""
    if entry.size < 0:
        return "its size is negative"
    if entry.size > MAX_SIZE:
        return "no file can be so large"
    if CONTROL.search(entry.version):
        return "its version holds a control character"
    return _link_fault(entry) if entry.kind == "symlink" else None


def _link_fault(entry: Entry) -> str | None:
    if not entry.target or entry.target.startswith("/") or CONTROL.search(entry.target):
        return "its link target is empty, absolute or malformed"
    depth = entry.path.count("/")
    for part in entry.target.split("/"):
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        if depth < 0:
            return "its link target leaves the model"
    return None


@dataclass(frozen=True, slots=True)
class Location:
    """Where the bytes of one entry can be had by range reads, for a while.

    Attributes:
        url: ``http(s)://`` (possibly signed: a secret), ``file://`` or ``data:`` (RFC 2397, tiny content);
            with a `reader` of any other scheme, and without secrets.
        headers: to be sent with each request; may hold secrets.
        expires: when the signature or token runs out, seconds since the epoch; None if never.
        etag: strong validator that the answer must carry and ``If-Match`` asks for; None if there is none.
        last_modified: ``Last-Modified`` that the answer must carry, where there is no ETag.
        digest: of the content, if the store tells it only here (S3 checksums).
        token: for ``file://``: ``dev:inode:size:mtime_ns`` that the file must still have.
        public: the store is on the Internet and chose the URL: it must not lead to a private address.
        reader: of bytes that no URL leads to: returns those of a span, all of them and of the pinned version.
            It blocks, is called by several threads at once, and raises StoreErrors only.
        parts: of content that lies in several places, one behind the other: size and location of each.
            Then only they say where the bytes are; build it with `joined`.

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
    reader: Callable[[Span], bytes] | None = field(default=None, repr=False)
    parts: tuple[tuple[int, Location], ...] = ()

    @classmethod
    def joined(cls, parts: Iterable[tuple[int, Location]]) -> Location:
        """Return the location of what lies in `parts`, at least one; it expires with the first of them."""
        parts = tuple(parts)
        ends = [part.expires for _, part in parts if part.expires is not None]
        return cls(parts[0][1].url, expires=min(ends, default=None), parts=parts)

    def pieces(self, span: Span, size: int) -> Iterator[Piece]:
        """Yield where the bytes of `span` are, in order, of an object of `size` bytes.

        Raises:
            ValueError: the parts are not `size` bytes together.

        """
        parts = self.parts or ((size, self),)
        if sum(length for length, _ in parts) != size:
            raise ValueError(f"parts of {sum(length for length, _ in parts)} bytes instead of {size}")
        offset = 0
        for length, place in parts:
            found = span & Span(offset, offset + length)
            if found:
                yield Piece(place, offset, Span(found.start - offset, found.stop - offset), length)
            offset += length

    @classmethod
    def inline(cls, data: bytes) -> Location:
        """Return the location of tiny content that travels in the URL itself (RFC 2397)."""
        return cls("data:application/octet-stream;base64," + base64.b64encode(data).decode())


class Piece(NamedTuple):
    """What one place has of a span.

    Attributes:
        location: the place; it has no parts itself.
        offset: where in the object its first byte belongs.
        span: the bytes there, counted from the place's own first byte.
        size: of everything at the place.

    """

    location: Location
    offset: int
    span: Span
    size: int

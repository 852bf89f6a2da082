"""Entries, and many of them in little memory.

A daemon may show millions of entries and be asked for few. Objects for all of them would take seconds to
make at every start, and to collect; a listing keeps a line of text for each and takes apart what is looked
at.
"""

from __future__ import annotations

import heapq
import os
import re
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from operator import lt
from typing import Any, Literal, NamedTuple, Self, TypeVar

from modelfs.digest import Digest

T = TypeVar("T")

MAX_NAME = 255
"""Longest name of one path component in bytes: ``NAME_MAX`` of Linux file systems."""

MAX_PATH = 4095
"""Longest path in bytes: ``PATH_MAX`` without the terminating NUL."""

CONTROL = re.compile(r"[\x00-\x1f\x7f]")

RUN = 4096
"""Items sorted or compared at once: a thread that does this keeps the others waiting meanwhile."""

_PART = r"(?!\.{1,2}(?:/|\Z))[^/\x00-\x1f\x7f]+"
_PLAIN = re.compile(rf"{_PART}(?:/{_PART})*")


def path_fault(path: str) -> str | None:
    """Return why `path` must not appear in a tree, or None if it may.

    Paths come from strangers. Accepted are relative POSIX paths without empty, ``.`` or ``..``
    components, NUL or other control characters, that Linux can name (255 bytes a component, 4095 in all).
    """
    if len(path) <= MAX_NAME and path.isascii() and _PLAIN.fullmatch(path):
        return None  # as almost all are; the others are looked at more closely
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


class Line(NamedTuple):
    """The fields of a line of a `Listing`, as text.

    `latest` and `directories` are of directories only: the latest time of all below, and how many
    directories are directly in it. A `kind` that is empty is a directory without an entry of its own.
    """

    path: str
    kind: str
    size: str
    mtime: str
    version: str
    digest: str
    target: str
    latest: str = ""
    directories: str = ""

    @classmethod
    def parse(cls, text: str) -> Line:
        """Take a line apart."""
        return cls(*text.split("\0"))

    @classmethod
    def of(cls, entry: Entry) -> Line:
        """Return the line of `entry`."""
        digest = str(entry.digest) if entry.digest else ""
        mtime = repr(float(entry.mtime))
        return cls(entry.path, entry.kind, str(entry.size), mtime, entry.version, digest, entry.target)

    def __str__(self) -> str:
        return "\0".join(self if self.is_directory else self[:7])

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory, with an entry or without."""
        return self.kind in ("", "directory")

    @property
    def entry(self) -> Entry:
        """The entry that this is the line of.

        Raises:
            ValueError: it lay on disk and is not what was written.

        """
        if path_fault(self.path) or self.kind not in ("file", "directory", "symlink"):
            raise ValueError(f"not the line of an entry: {self.path[:140]!r}")
        digest = Digest.parse(self.digest) if self.digest else None
        kind: Any = self.kind
        return Entry(self.path, int(self.size), self.version, digest, float(self.mtime), kind, self.target)


class Totals(NamedTuple):
    """What is known of all entries together: how many, how many are files, their bytes, and a digest."""

    entries: int
    files: int
    size: int
    digest: str


class Listing(Mapping[str, Entry]):
    """Entries by path, sorted and unique: an immutable mapping that makes its values when they are asked for.

    Attributes:
        lines: one for each entry, the root and every other directory: fields as of `Line`, separated by NUL,
            which no field holds and which sorts before everything. Hence lines are sorted by path.

    """

    __slots__ = ("_totals", "lines")

    def __init__(self, lines: Sequence[str], totals: Totals | None = None) -> None:
        self.lines = lines
        self._totals = totals

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Self:
        """Return the listing of `entries`, whose paths are safe and unique."""
        lines: list[str] = []
        own: dict[str, Line] = {}
        latest: dict[str, float] = {"": 0.0}
        times: dict[str, float] = {}
        for entry in entries:
            line = Line.of(entry)
            if entry.kind == "directory":
                own[entry.path] = line
                latest[entry.path] = 0.0
                continue
            lines.append(str(line))
            parent = entry.path.rpartition("/")[0]
            times[parent] = max(times.get(parent, entry.mtime), entry.mtime)
        for path in [*own, *times]:
            latest.update(dict.fromkeys((path, *parents(path)), 0.0))
        directories = dict.fromkeys(latest, 0)
        for path in sorted(latest, key=lambda path: path.count("/") if path else -1, reverse=True):
            latest[path] = times.get(path, 0.0)
            if path:
                parent = path.rpartition("/")[0]
                times[parent] = max(times.get(parent, latest[path]), latest[path])
                directories[parent] += 1
        for path, time in latest.items():
            line = own.get(path) or Line(path, "", "0", "0.0", "", "", "")
            lines.append(str(line._replace(latest=repr(float(time)), directories=str(directories[path]))))
        return cls(list(in_order(lines, str)))

    @classmethod
    def checked(cls, lines: Any, totals: Totals) -> Self:
        """Return a listing of lines that lay on disk; what is in a line is checked when it is looked at.

        Raises:
            ValueError: they are no such lines.

        """
        if not lines or not lines[0].startswith("\0\0"):
            raise ValueError("not a listing")
        for start in range(0, len(lines), RUN):
            if not all(map(lt, lines[start : start + RUN], islice(lines, start + 1, start + RUN + 1))):
                raise ValueError("the lines are not in order")
        return cls(lines, totals)

    def line(self, path: str) -> Line | None:
        """Return the line of an entry or directory; None if there is none at `path`."""
        index = bisect_left(self.lines, f"{path}\0")
        if index < len(self.lines) and self.lines[index].startswith(f"{path}\0"):
            return Line.parse(self.lines[index])
        return None

    def children(self, path: str, start: int = 0) -> Iterator[tuple[Line, int]]:
        """Yield the lines of what is directly in the directory `path`, and where to go on after each.

        Args:
            path: of the directory, empty for the root.
            start: 0, or where to go on; equal listings have equal places.

        """
        lines = self.lines
        prefix = f"{path}/" if path else ""
        index = start or (bisect_left(lines, prefix) if path else 1)
        while index < len(lines) and lines[index].startswith(prefix):
            line = lines[index]
            below = line.find("/", len(prefix), line.index("\0"))
            if below < 0:
                index += 1
                yield Line.parse(line), index
            else:
                index = bisect_left(lines, f"{line[:below]}0", index)  # "0" follows "/"

    @property
    def totals(self) -> Totals:
        """Sums over all entries."""
        if self._totals is None:
            self._totals = _totals(self._entry_lines())
        return self._totals

    def _entry_lines(self) -> Iterator[Line]:
        return (line for line in map(Line.parse, self.lines) if line.kind)

    def __getitem__(self, path: str) -> Entry:
        line = self.line(path)
        if line is None or not line.kind:
            raise KeyError(path)
        return line.entry

    def values(self) -> ValuesView[Entry]:
        """Return all entries, by path."""
        return _Values(self)

    def __iter__(self) -> Iterator[str]:
        return (line.path for line in self._entry_lines())

    def __len__(self) -> int:
        return self.totals.entries

    def __eq__(self, other: object) -> bool:
        return self.lines == other.lines if isinstance(other, Listing) else super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]  # as all mappings

    def __repr__(self) -> str:
        return f"<Listing of {len(self)} entries>"


class _Values(ValuesView[Entry]):
    """Entries line by line: looking each one up would take twice as long."""

    _mapping: Listing

    def __iter__(self) -> Iterator[Entry]:
        return (line.entry for line in self._mapping._entry_lines())


def in_order(items: Iterable[T], key: Callable[[T], str]) -> Iterator[T]:
    """Yield `items` sorted by `key`, those with equal keys in the order they came.

    Like ``sorted``, which keeps every other thread waiting until it is done.
    """
    source = iter(items)
    runs = iter(lambda: sorted(islice(source, RUN), key=key), [])
    return heapq.merge(*runs, key=key)


def parents(path: str) -> Iterator[str]:
    """Yield the directories that `path` is in, innermost first, without the root."""
    cut = path.rfind("/")
    while cut > 0:
        path = path[:cut]
        yield path
        cut = path.rfind("/")


def _totals(lines: Iterable[Line]) -> Totals:
    hasher = sha256()
    entries = files = size = 0
    for line in lines:
        raw = "\0".join((line.path, line.size, line.version, line.digest, line.target)).encode(
            "utf-8", "surrogateescape"
        )
        hasher.update(struct.pack("<I", len(raw)) + raw)
        entries += 1
        files += line.kind == "file"
        size += int(line.size)
    return Totals(entries, files, size, f"sha256:{hasher.hexdigest()}")

"""Archives as lists of members: formats, bounds, and what no member may be. Pure, but for the file it reads.

Whoever has an archive, from wherever, as a file (``read`` and ``seek``) gets its members one by one from
`tar.members` or `zips.members`, puts them into `Contents`, and knows what may be shown and why the rest may
not. Members come from strangers: nothing in a header is believed before it was compared with a bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from modelfs.errors import BadArchive
from modelfs.listing import parents, path_fault
from modelfs.types import Entry, entry_fault

Format = Literal["tar", "tar.gz", "tar.zst", "zip"]

SUFFIXES: dict[str, Format] = {
    ".tar": "tar",
    ".tar.gz": "tar.gz",
    ".tgz": "tar.gz",
    ".tar.zst": "tar.zst",
    ".tzst": "tar.zst",
    ".zip": "zip",
}
"""What the name of an archive ends in."""

FREE = 64 * 1024**2
"""Unpacked bytes up to which the ratio does not matter: whatever they are, they fit."""


def format_of(path: str) -> Format | None:
    """Return the format of the archive that `path` names; None if it names no archive."""
    name = path.lower()
    return next((known for suffix, known in SUFFIXES.items() if name.endswith(suffix)), None)


@dataclass(frozen=True, slots=True)
class Limits:
    """What an archive must not exceed.

    Attributes:
        members: how many it may have, refused ones included.
        size: bytes of all members together.
        ratio: unpacked bytes for each packed one; for the first `FREE` bytes it does not matter.
        depth: components of a path.

    """

    members: int = 100_000
    size: int = 1024**4
    ratio: int = 250
    depth: int = 32

    def check_size(self, unpacked: int) -> None:
        """Raise BadArchive if `unpacked` bytes are too many."""
        if unpacked > self.size:
            raise BadArchive(f"it unpacks to more than {self.size} bytes: raise archives.size if it may")

    def check_ratio(self, unpacked: int, packed: int) -> None:
        """Raise BadArchive if `unpacked` bytes are too many to come out of `packed`."""
        if unpacked > FREE and unpacked > self.ratio * packed:
            raise BadArchive(
                f"it unpacks to more than {self.ratio} times its size: raise archives.ratio if it may"
            )


class Member(NamedTuple):
    """One member of an archive.

    Attributes:
        path: as it is written, made relative to the archive's root by `Contents`.
        kind: what it is; ``hardlink`` becomes a file when `Contents` knows what it is a link to.
        size: bytes of its content.
        offset: where its content begins: in the unpacked stream of a tar; of its local header in a zip.
        mtime: seconds since the epoch.
        target: of a link.
        packed: bytes that its content takes in a zip.
        method: how it is packed in a zip: 0 stored, 8 deflated.
        digest: of its content, as far as the archive or reading it told.
        fault: why it must not be shown, if its header already says so.

    """

    path: str
    kind: Literal["file", "directory", "symlink", "hardlink"]
    size: int = 0
    offset: int = 0
    mtime: float = 0.0
    target: str = ""
    packed: int = 0
    method: int = 0
    digest: str = ""
    fault: str = ""

    def entry(self, prefix: str, version: str) -> Entry:
        """Return what a snapshot shows of this member of the archive at `prefix`."""
        path = f"{prefix}/{self.path}" if prefix else self.path
        kind: Any = self.kind
        if kind == "file":
            return Entry(path, self.size, version, None, self.mtime)
        return Entry(path, kind=kind, mtime=self.mtime, target=self.target)

    def is_again(self, other: Member) -> bool:
        """Return whether this is `other`, seen another time, or a directory like it."""
        place = (self.kind, self.size, self.offset)
        return self.kind == other.kind == "directory" or place == (other.kind, other.size, other.offset)

    @classmethod
    def checked(cls, fields: Any) -> Member:
        """Return a member that lay on disk as a list of its fields.

        Raises:
            ValueError: it is not what was written.

        """
        member = cls(*fields) if isinstance(fields, list) and len(fields) == len(cls._fields) else None
        if (
            member is None
            or any(
                type(value) is not type(given) and not (isinstance(given, float) and isinstance(value, int))
                for value, given in zip(member[2:], _PLAIN[2:], strict=True)
            )
            or min(member.size, member.offset, member.packed) < 0
            or member.kind not in ("file", "directory", "symlink")
            or path_fault(member.path)
            or entry_fault(member.entry("", ""))
        ):
            raise ValueError(f"not a member: {str(fields)[:140]}")
        return member


_PLAIN = Member("", "file")


class File(Protocol):
    """What a parser needs of an archive; all in bytes of the archive, for a packed tar of what is in it."""

    def read(self, size: int, /) -> bytes:
        """Return the next `size` bytes, fewer only at the end."""

    def seek(self, offset: int, /) -> object:
        """Go on at `offset`; the parser of a tar never goes back."""


class Contents:
    """What may be shown of an archive, as its members come by; the first of a name wins.

    Attributes:
        members: by path, all of them safe and not in each other's way.
        rejected: ``(path, reason)`` of the others.

    """

    def __init__(self, limits: Limits) -> None:
        self.members: dict[str, Member] = {}
        self.rejected: list[tuple[str, str]] = []
        self._limits = limits
        self._directories: set[str] = set()
        self._size = 0
        self._count = 0

    def restart(self) -> None:
        """Expect all members from the first on, again; those that are known stay."""
        self.rejected = []
        self._size = self._count = 0

    def add(self, member: Member) -> Member | None:
        """Take a member in; return it as it is shown, None if it is not.

        Raises:
            BadArchive: the archive as a whole exceeds a limit.

        """
        self._count += 1
        if self._count > self._limits.members:
            raise BadArchive(
                f"it has more than {self._limits.members} members: raise archives.members if it may"
            )
        if member.kind != "hardlink":
            self._size += max(0, member.size)
            self._limits.check_size(self._size)
        path = relative(member.path)
        if path == "" and member.kind == "directory" and not member.fault:
            return None  # the root itself
        if member.kind == "hardlink" and not member.fault:
            member = self._linked(member)
        member = member._replace(path=path)
        known = self.members.get(path)
        if known is not None and not member.fault and member.is_again(known):
            return known
        fault = member.fault or self._fault(member)
        if fault:
            self.rejected.append((member.path, fault))
            return None
        self.members[path] = member
        self._directories.update(parents(path))
        if member.kind == "directory":
            self._directories.add(path)
        return member

    def _linked(self, member: Member) -> Member:
        target = self.members.get(relative(member.target))
        if target is None or target.kind != "file":
            return member._replace(kind="file", fault="it is a hard link to what is not a file before it")
        return target._replace(mtime=member.mtime)

    def _fault(self, member: Member) -> str | None:
        path = member.path
        if path.startswith("/"):
            return "its path is absolute"
        if path.count("/") >= self._limits.depth:
            return f"its path has more than {self._limits.depth} components: raise archives.depth if it may"
        fault = path_fault(path) or entry_fault(member.entry("", ""))
        if fault:
            return fault
        if member.kind == "directory":
            return "its name is taken by a file" if path in self.members else None
        if path in self.members or path in self._directories:
            return "the archive has this name twice"
        above = (self.members.get(parent) for parent in parents(path))
        inside = any(found is not None and found.kind != "directory" for found in above)
        return "it is inside of what is no directory" if inside else None

    def holds(self, path: str) -> bool:
        """Return whether `path` is a member, or a directory that one is in."""
        return path in self.members or path in self._directories

    def restore(self, members: Iterator[Member]) -> None:
        """Take in members that `add` once let pass, on disk in between."""
        for member in members:
            self.members[member.path] = member
            self._directories.update(parents(member.path))
            if member.kind == "directory":
                self._directories.add(member.path)

    def note(self, path: str, digest: str) -> None:
        """Note the digest of a file whose content has been read."""
        self.members[path] = self.members[path]._replace(digest=digest)


def relative(path: str) -> str:
    """Return `path` without the ``./`` in front that tar writes, and the ``/`` behind a directory."""
    while path.startswith("./"):
        path = path[2:]
    return "" if path == "." else path.removesuffix("/") if path != "/" else path

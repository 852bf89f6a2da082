"""The tree as FUSE operations; knows no transport.

Every operation answers or raises :class:`OSError` with the errno for the kernel: errors of modelfs carry
theirs, anything unexpected is logged with its traceback and becomes ``EIO``. Times are in seconds, names are
text decoded with the file system encoding (``surrogateescape``).
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Concatenate, ParamSpec, TypeVar

from modelfs.cache import Loan, Place
from modelfs.catalog import Catalog
from modelfs.errors import ModelfsError
from modelfs.fetch.reader import Buffer, Reader
from modelfs.metrics import INTERNAL, Metrics
from modelfs.tree import Branch, Directory, File, Link, Names, Node, Text, Tree
from modelfs.types import MAX_SIZE

log = logging.getLogger(__name__)

LONG = 3600.0
"""Seconds the kernel may keep what it was told: snapshots are immutable, refreshing invalidates changes."""

SHORT = 5.0
"""Seconds the kernel may keep that an on-demand namespace has no such name."""

NAME_MAX = 255
"""Bytes of the longest name in a directory, as on a disk; the kernel would ask for up to 1024."""

PAGE = 256
"""Most names in one answer: the kernel has room for thousands, and others wait while they are made."""

OURS = "user.modelfs."
"""What the names of all extended attributes begin with."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Attributes:
    """What the kernel learns of a node; `ino` 0 says that there is none, and for how long that holds."""

    ino: int
    mode: int = 0
    size: int = 0
    mtime: float = 0.0
    links: int = 1
    timeout: float = LONG


@dataclass(frozen=True, slots=True)
class Opened:
    """An open file: its handle, and whether the kernel may keep the pages it already has."""

    handle: int
    keep_cache: bool


@dataclass(frozen=True, slots=True)
class Listed:
    """One name of a directory; `next` is where a listing goes on after it."""

    name: str
    attributes: Attributes
    node: Node
    next: int


def answering(
    operation: Callable[Concatenate[Operations, P], T],
) -> Callable[Concatenate[Operations, P], T]:
    """Return `operation` with every exception turned into the OSError that the kernel gets."""

    @functools.wraps(operation)
    def guarded(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return operation(self, *args, **kwargs)
        except Exception as error:
            raise self.answer_to(error, operation.__name__) from error

    return guarded


def answering_later(
    operation: Callable[Concatenate[Operations, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, T]]:
    """Return `operation`, which may wait, with every exception turned into such an OSError too."""

    @functools.wraps(operation)
    async def guarded(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await operation(self, *args, **kwargs)
        except Exception as error:
            raise self.answer_to(error, operation.__name__) from error

    return guarded


class Operations:
    """The operations of one mount; all belong to the trio thread.

    Args:
        tree: names and nodes.
        catalog: what is behind them.
        metrics: what is counted.
        first: the first number of a handle; who takes a mount over needs others than were given before.

    Those that are plain functions never wait. `lookup`, `open`, `read`, `place` and `lend` may wait for a
    store or a disk; `lookup_now` and `place_now` do what they can without, for transports that use it.
    """

    def __init__(self, tree: Tree, catalog: Catalog, metrics: Metrics, *, first: int = 1) -> None:
        self.metrics = metrics
        self._tree = tree
        self._catalog = catalog
        self._handles: dict[int, Reader | bytes] = {}
        self._listings: dict[int, Names | Directory] = {}
        self._numbers = count(first)
        self.owner = (os.getuid(), os.getgid())

    def answer_to(self, error: Exception, operation: str) -> OSError:
        """Return what the kernel gets for `error`; count and log what is more than an answer."""
        if isinstance(error, OSError):
            return OSError(error.errno or errno.EIO, str(error))
        kind = type(error).__name__ if isinstance(error, ModelfsError) else INTERNAL
        self.metrics.read_errors.labels(kind).inc()
        if isinstance(error, ModelfsError):
            log.warning("%s: %s", operation, error)
            return OSError(error.errno, str(error))
        log.error("%s failed", operation, exc_info=error)
        return OSError(errno.EIO, "internal error")

    def _node(self, ino: int) -> Node:
        node = self._tree.node(ino)
        if node is None:
            raise OSError(errno.ESTALE, f"no inode {ino}")
        return node

    def _directory(self, ino: int) -> Directory:
        node = self._node(ino)
        if not isinstance(node, Directory):
            raise OSError(errno.ENOTDIR, f"inode {ino} is not a directory")
        return node

    def attributes(self, node: Node) -> Attributes:
        """Return what the kernel learns of `node`."""
        match node:
            case Directory():
                return Attributes(node.ino, stat.S_IFDIR | 0o555, 0, node.mtime, node.links)
            case File():
                return Attributes(node.ino, stat.S_IFREG | 0o444, node.size, node.mtime)
            case Text():
                return Attributes(node.ino, stat.S_IFREG | 0o444, len(node.content), node.mtime)
            case Link():
                return Attributes(node.ino, stat.S_IFLNK | 0o777, len(os.fsencode(node.target)), node.mtime)
            case _:
                raise TypeError(f"not a kind of node: {node!r}")

    @answering_later
    async def lookup(self, parent: int, name: str) -> Attributes:
        """Return the attributes of a name and count the lookup; `ino` 0 if there is no such name."""
        known = self.lookup_now(parent, name)
        if known is not None:
            return known
        node = await self._catalog.find(self._directory(parent), name)
        return Attributes(0, timeout=SHORT) if node is None else self._introduced(node)

    @answering
    def lookup_now(self, parent: int, name: str) -> Attributes | None:
        """Do `lookup` if that needs no store, else return None."""
        directory = self._directory(parent)
        node = directory if name == "." else directory.children.get(name)
        if node is not None:
            return self._introduced(node)
        if len(os.fsencode(name)) > NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, "a name has at most 255 bytes")
        return Attributes(0) if directory.resolver is None else None

    def _introduced(self, node: Node) -> Attributes:
        self._tree.remember(node)
        return self.attributes(node)

    @answering
    def getattr(self, ino: int) -> Attributes:
        """Return the attributes of an inode."""
        return self.attributes(self._node(ino))

    @answering
    def readlink(self, ino: int) -> str:
        """Return the target of a symbolic link."""
        node = self._node(ino)
        if not isinstance(node, Link):
            raise OSError(errno.EINVAL, f"inode {ino} is not a symbolic link")
        return node.target

    @answering_later
    async def open(self, ino: int, flags: int) -> Opened:
        """Open a file for reading; ``O_DIRECT`` is fine, anything that writes is ``EROFS``."""
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise OSError(errno.EROFS, "the tree is read-only")
        return await self._open(ino, next(self._numbers))

    async def _open(self, ino: int, handle: int) -> Opened:
        node = self._node(ino)
        content: Reader | bytes
        match node:
            case File():
                content, keep = await self._catalog.files.open(node)
            case Text():
                content, keep = node.content, True
            case _:
                raise OSError(errno.EISDIR if isinstance(node, Directory) else errno.EINVAL, "not a file")
        self._handles[handle] = content
        self.metrics.opens.inc()
        self.metrics.open_handles.inc()
        return Opened(handle, keep)

    @answering_later
    async def recall(self, inos: set[int]) -> None:
        """Know nodes again that the kernel has open and that an earlier daemon knew, as far as possible."""
        await self._catalog.recall(inos)

    @answering_later
    async def adopt(self, ino: int, handle: int) -> None:
        """Open a file under the handle that an earlier daemon gave it."""
        await self._open(ino, handle)

    def _content(self, handle: int) -> Reader | bytes:
        try:
            return self._handles[handle]
        except KeyError:
            raise OSError(errno.ESTALE, f"no handle {handle}") from None

    @answering_later
    async def read(self, handle: int, offset: int, size: int) -> Buffer:
        """Return the bytes ``[offset, offset + size)`` of an open file, fewer only at its end."""
        content = self._content(handle)
        if isinstance(content, bytes):
            return content[offset : offset + size]
        return await content.read(offset, size)

    @answering
    def place_now(self, handle: int, offset: int, size: int) -> Place | Buffer | None:
        """Return where the bytes that `read` returns lie, or the bytes; None if that needs waiting."""
        content = self._content(handle)
        if isinstance(content, bytes):
            return content[offset : offset + size]
        return content.place_now(offset, size)

    @answering_later
    async def place(self, handle: int, offset: int, size: int) -> Place | Buffer:
        """Return where the bytes that `read` returns lie, or the bytes."""
        content = self._content(handle)
        if isinstance(content, bytes):
            return content[offset : offset + size]
        return await content.place(offset, size)

    @answering_later
    async def lend(self, handle: int) -> Loan | None:
        """Return the data file behind an open file for the kernel to read, or None; see `Reader.lend`."""
        content = self._content(handle)
        return None if isinstance(content, bytes) else await content.lend()

    @answering
    def release(self, handle: int) -> None:
        """Close an open file."""
        content = self._content(handle)
        del self._handles[handle]
        self.metrics.open_handles.dec()
        if not isinstance(content, bytes):
            content.close()

    @answering
    def opendir(self, ino: int) -> int:
        """Open a directory; what it lists stays as it is when it is first listed until it is closed."""
        handle = next(self._numbers)
        self.adopt_directory(ino, handle)
        return handle

    @answering
    def adopt_directory(self, ino: int, handle: int) -> None:
        """Open a directory under the handle that an earlier daemon gave it."""
        directory = self._directory(ino)
        waits = isinstance(directory, Branch) and directory.resolver is not None
        self._listings[handle] = directory if waits else directory.names()

    @answering
    def lists_now(self, handle: int) -> bool:
        """Return whether `readdir` can answer; otherwise `list_later` has to be waited for."""
        return not isinstance(self._listings.get(handle), Directory)

    @answering_later
    async def list_later(self, handle: int) -> None:
        """Wait until all names of an open directory are known, as they are not of an archive at first."""
        directory = self._listings.get(handle)
        if isinstance(directory, Directory):
            await self._catalog.complete(directory)
            self._listings[handle] = directory.names()

    @answering
    def readdir(self, handle: int, start: int) -> Iterator[Listed]:
        """Return the next names of an open directory from position `start` on, `PAGE` at most.

        They are made as they are asked for.
        """
        listing = self._listings.get(handle)
        if listing is None or isinstance(listing, Directory):
            raise OSError(errno.ESTALE, f"no handle {handle}")
        page = islice(listing(start), PAGE)
        return (Listed(name, self.attributes(node), node, place) for name, node, place in page)

    @answering
    def releasedir(self, handle: int) -> None:
        """Close an open directory."""
        self._listings.pop(handle, None)

    def remember(self, node: Node) -> None:
        """Count that a listing taught the kernel `node`'s number."""
        self._tree.remember(node)

    def forget(self, inodes: list[tuple[int, int]]) -> None:
        """Count what the kernel dropped: pairs of inode number and references."""
        for ino, references in inodes:
            self._tree.forget(ino, references)

    @answering
    def statfs(self) -> dict[str, int]:
        """Return ``struct statvfs`` values: everything there is, all of it used, in blocks of 4 KiB."""
        snapshots = [model.snapshot for model in self._catalog.models.values() if model.snapshot]
        return {
            "f_bsize": 4096,
            "f_frsize": 4096,
            "f_blocks": min(sum(-(-snapshot.size // 4096) for snapshot in snapshots), MAX_SIZE),
            "f_files": sum(len(snapshot.entries) for snapshot in snapshots),
            "f_namemax": NAME_MAX,
        }

    def _xattrs(self, ino: int) -> dict[str, Callable[[], str]]:
        node: Any = self._node(ino)
        return self._catalog.files.attributes(node) if isinstance(node, File) else {}

    @answering
    def getxattr(self, ino: int, name: str) -> bytes:
        """Return the value of an extended attribute; ``ENODATA`` if there is none of this name."""
        if not name.startswith(OURS):  # `ls -l` asks for two of others for every file
            raise OSError(errno.ENODATA, f"no attribute {name}")
        value = self._xattrs(ino).get(name)
        if value is None:
            raise OSError(errno.ENODATA, f"no attribute {name}")
        return os.fsencode(value())

    @answering
    def listxattr(self, ino: int) -> list[str]:
        """Return the names of the extended attributes."""
        return sorted(self._xattrs(ino))

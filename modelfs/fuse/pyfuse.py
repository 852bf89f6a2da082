"""The transport over pyfuse3: works on every kernel and for unprivileged users.

pyfuse3 ends the mount on any exception but ``FUSEError``; :mod:`modelfs.fuse.operations` raises nothing but
``OSError``, and this module maps one to the other.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from modelfs.errors import MountError
from modelfs.fuse.operations import Attributes, Operations
from modelfs.tree import Change

log = logging.getLogger(__name__)

MAX_READ = 1024 * 1024
"""Bytes of the largest read request, the kernel's default of 256 pages.

libfuse asks for it unbidden; the mount option ``max_read`` would also have to be set in its init handler,
which pyfuse3 does not offer.
"""

P = ParamSpec("P")
T = TypeVar("T")


def _fuse(
    operation: Callable[Concatenate[_Adapter, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[_Adapter, P], Coroutine[Any, Any, T]]:
    """Return `operation` with its requests counted, and its errors turned into those of pyfuse3."""
    name = operation.__name__

    @functools.wraps(operation)
    async def mapped(self: _Adapter, /, *args: P.args, **kwargs: P.kwargs) -> T:
        self.requests.labels(name).inc()
        try:
            return await operation(self, *args, **kwargs)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    return mapped


class _Adapter(pyfuse3.Operations):
    """pyfuse3's view of :class:`Operations`: translates arguments and answers, decides nothing."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self._ops = operations
        self.requests = operations.metrics.fuse_requests

    def _attr(self, attributes: Attributes) -> pyfuse3.EntryAttributes:
        attr = pyfuse3.EntryAttributes()
        attr.st_ino = pyfuse3.InodeT(attributes.ino)
        attr.entry_timeout = attr.attr_timeout = attributes.timeout
        if attributes.ino:
            nanoseconds = int(attributes.mtime * 1e9)
            attr.st_mode = pyfuse3.ModeT(attributes.mode)
            attr.st_nlink = attributes.links
            attr.st_uid, attr.st_gid = self._ops.owner
            attr.st_size = attributes.size
            attr.st_blksize = MAX_READ
            attr.st_blocks = -(-attributes.size // 512)
            attr.st_atime_ns = attr.st_mtime_ns = attr.st_ctime_ns = nanoseconds
        return attr

    @_fuse
    async def lookup(self, parent_inode: Any, name: Any, ctx: Any) -> Any:
        return self._attr(await self._ops.lookup(parent_inode, os.fsdecode(name)))

    @_fuse
    async def getattr(self, inode: Any, ctx: Any) -> Any:
        return self._attr(self._ops.getattr(inode))

    @_fuse
    async def readlink(self, inode: Any, ctx: Any) -> Any:
        return os.fsencode(self._ops.readlink(inode))

    @_fuse
    async def open(self, inode: Any, flags: Any, ctx: Any) -> Any:
        opened = await self._ops.open(inode, flags)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(opened.handle), keep_cache=opened.keep_cache)

    @_fuse
    async def read(self, fh: Any, off: int, size: int) -> Any:
        return await self._ops.read(fh, off, size)

    @_fuse
    async def release(self, fh: Any) -> None:
        self._ops.release(fh)

    @_fuse
    async def opendir(self, inode: Any, ctx: Any) -> Any:
        return self._ops.opendir(inode)

    @_fuse
    async def readdir(self, fh: Any, start_id: int, token: Any) -> None:
        await self._ops.list_later(fh)
        for listed in self._ops.readdir(fh, start_id):
            name = pyfuse3.FileNameT(os.fsencode(listed.name))
            if not pyfuse3.readdir_reply(token, name, self._attr(listed.attributes), listed.next):
                break
            self._ops.remember(listed.node)

    @_fuse
    async def releasedir(self, fh: Any) -> None:
        self._ops.releasedir(fh)

    @_fuse
    async def statfs(self, ctx: Any) -> Any:
        answer = pyfuse3.StatvfsData()
        for name, value in self._ops.statfs().items():
            setattr(answer, name, value)
        return answer

    @_fuse
    async def getxattr(self, inode: Any, name: Any, ctx: Any) -> bytes:
        return self._ops.getxattr(inode, os.fsdecode(name))

    @_fuse
    async def listxattr(self, inode: Any, ctx: Any) -> Sequence[Any]:
        return [os.fsencode(name) for name in self._ops.listxattr(inode)]

    async def forget(self, inode_list: Any) -> None:
        self.requests.labels("forget").inc()
        self._ops.forget(list(inode_list))


class Transport:
    """A mount through pyfuse3; at most one in a process, because pyfuse3's session is global.

    Args:
        operations: what answers.
        mountpoint: an existing directory.
        allow_other: other users may read too.

    Raises:
        MountError: the kernel or ``fusermount3`` refused.

    """

    name = "pyfuse3"
    passthrough = False

    def __init__(self, operations: Operations, mountpoint: Path, *, allow_other: bool) -> None:
        self._notices = trio.CapacityLimiter(1)
        options = {"fsname=modelfs", "subtype=modelfs", "ro", "nosuid", "nodev", "default_permissions"}
        if allow_other:
            options.add("allow_other")
        try:
            pyfuse3.init(_Adapter(operations), str(mountpoint), options)
        except RuntimeError as error:
            raise MountError(f"{mountpoint}: cannot mount: {error}; {_remedy(allow_other)}") from error

    async def run(self) -> None:
        """Answer requests until the tree is unmounted or the caller is cancelled."""
        await pyfuse3.main()

    async def invalidate(self, changes: Iterable[Change]) -> None:
        """Make the kernel look up the changed names anew; waits in a thread, not here.

        The kernel needs the parent's lock for this, which a lookup there that waits for us may hold.
        Cancelled, it leaves the thread to itself, which ends when the kernel has taken the present notice.
        """
        await trio.to_thread.run_sync(_invalidate, changes, limiter=self._notices, abandon_on_cancel=True)

    def leave(self) -> None:
        """Do nothing: this mount ends with its process, so nobody asks."""

    def close(self, *, unmount: bool) -> None:
        """Give the session up, and unmount if that has not happened yet."""
        pyfuse3.close(unmount=unmount)


def _invalidate(changes: Iterable[Change]) -> None:
    """Tell the kernel of changes; it may know nothing of them."""
    for change in changes:
        trio.from_thread.check_cancelled()  # the session may be closed then
        parent, name = pyfuse3.InodeT(change.parent), pyfuse3.FileNameT(os.fsencode(change.name))
        try:
            if change.name:
                pyfuse3.invalidate_entry(parent, name)
            else:
                pyfuse3.invalidate_inode(parent, attr_only=True)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                log.warning("a name or inode could not be invalidated: %s", error)


def _remedy(allow_other: bool) -> str:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return (
            "/dev/fuse is missing or not accessible: load the fuse module, or give the container the device"
        )
    if allow_other and os.getuid():
        return "--allow-other needs user_allow_other in /etc/fuse.conf"
    return "the lines above, printed by libfuse, say why"

"""The transport that speaks to ``/dev/fuse`` itself, from trio.

What it has over libfuse: complete files are read by the kernel without us (passthrough, Linux 6.9), requests
that need no waiting are answered without a task, and no C library is needed. It needs CAP_SYS_ADMIN.

Passthrough
-----------
An inode is either *cached* (its reads come here and fill the page cache) or *backed* (the kernel reads our
data file) while any handle of it is open; a reply that breaks this makes the kernel fail the open. So the
inode's first open handle decides, and all others follow until the last one is closed. Deciding and replying
happen without a pause between them, and a handle is counted until its RELEASE, which the kernel sends only
after it has dropped the handle itself.

A backing id is registered once per backed inode and given back with its last handle: ids are the kernel's
memory and would otherwise stay until the unmount. The loan from the cache lives as long, so that neither
eviction nor hole punching touches what the kernel reads.

Who reads while nothing may wait
--------------------------------
All of this belongs to the trio thread. Requests are read one after the other; those that need no store and
no disk are answered on the spot, the others in tasks of their own. Replies are written without waiting: a
write to the device only copies. Notifications are the exception, they take locks of the kernel that a
request waiting for us may hold: they are written in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import stat
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import trio

from modelfs.cache import Loan, Place
from modelfs.errors import MountError
from modelfs.fuse import ledger as ledgers
from modelfs.fuse import mountpoint as mountpoints
from modelfs.fuse import wire
from modelfs.fuse.device import MAX_READ, Device
from modelfs.fuse.ledger import Ledger
from modelfs.fuse.operations import Attributes, Operations
from modelfs.fuse.wire import Opcode, Opening, Request
from modelfs.tree import Change

log = logging.getLogger(__name__)

BATCH = 32
"""Requests read before other tasks get their turn."""

BATCH_SECONDS = 0.005
"""How long requests are read before other tasks get their turn: a page of a listing takes a millisecond."""

LINGER_SECONDS = 50e-6
"""How long it is looked whether who got an answer asks on at once: waking a core that sleeps takes longer."""

LEAVE_SECONDS = 10.0
"""How long what was begun may take when a successor waits; the kernel asks the successor for the rest."""

KILLED_SECONDS = 0.2
"""How often it is looked whether a process that got a signal while it waits was killed."""

FOREIGN_SECONDS = 30.0
"""After a signal to a process whose PID namespace we do not see, its request goes on for so long.

Whether the signal was fatal cannot be told: giving up at once would fail what living ones do with EINTR,
which nobody expects of a file, and not giving up would leave killed ones in state D until the deadline.
"""


class Reply(NamedTuple):
    """The parts of a reply's body, and what takes back what it said if nobody wants it any more."""

    body: tuple[bytes | bytearray, ...] = ()
    undo: Callable[[], None] | None = None


Outcome = Reply | Coroutine[Any, Any, Reply | None] | None
"""What a handler returns; None if the request has no reply, or was answered."""


@dataclass(slots=True)
class _Inode:
    """An inode with open handles: how many, and the id of what backs them, 0 if they are read through us."""

    handles: int = 0
    backing: int = 0
    loan: Loan | None = None


class Transport:
    """A mount made by ourselves, answered by trio.

    Made by `mount` or `adopt`; `run` then answers.

    Args:
        operations: what answers.
        mountpoint: an existing directory.
        device: the conversation with the kernel; closed in the end.
        ledger: what a successor must know.

    Attributes:
        passthrough: whether complete files are read by the kernel itself.
        why: why or why not.

    """

    name = "kernel"

    def __init__(self, operations: Operations, mountpoint: Path, device: Device, ledger: Ledger) -> None:
        self.passthrough = ledger.passthrough
        self.why = "the kernel reads complete files without the daemon"
        self._ops = operations
        self._mountpoint = mountpoint
        self._device = device
        self._ledger = ledger
        self._inodes: dict[int, _Inode] = {}
        self._running: dict[int, tuple[int, trio.CancelScope]] = {}
        self._notices = trio.CapacityLimiter(1)
        self._leaving = trio.Event()
        requests = operations.metrics.fuse_requests
        self._counted = {opcode: requests.labels(Opcode(opcode).name.lower()) for opcode in _HANDLERS}
        self._others = requests.labels("other")

    @classmethod
    def mount(
        cls,
        operations: Operations,
        mountpoint: Path,
        device: Device,
        ledger: Ledger,
        *,
        allow_other: bool,
        cache: Path,
        demanding: bool,
    ) -> Self:
        """Mount, and agree on terms with the kernel.

        Args:
            operations: what answers.
            mountpoint: an existing directory.
            device: one that was not used yet; closed in the end.
            ledger: an empty one.
            allow_other: other users may read too.
            cache: the directory with the data files: can the kernel read from there without us?
            demanding: whether a mount without passthrough is none.

        Raises:
            MountError: the kernel refused; nothing is mounted.

        """
        own = cls(operations, mountpoint, device, ledger)
        try:
            device.mount(mountpoint, allow_other=allow_other)
        except BaseException:
            device.close()
            raise
        try:
            flags = device.negotiate(mountpoint)
            refusal = device.refusal(flags, cache)
            if refusal and demanding:
                raise MountError(refusal)
            own.passthrough, own.why = refusal is None, refusal or own.why
            ledger.begin(flags, passthrough=own.passthrough)
        except BaseException:
            own.close(unmount=True)
            raise
        return own

    @classmethod
    def adopt(cls, operations: Operations, mountpoint: Path, device: Device, ledger: Ledger) -> Self:
        """Go on with a mount that another process made and served until it ended."""
        own = cls(operations, mountpoint, device, ledger)
        ledger.begin(ledger.flags, passthrough=ledger.passthrough)
        return own

    def close(self, *, unmount: bool) -> None:
        """Give the device up, and unmount if that has not happened yet."""
        if unmount and self._device.connected and mountpoints.mount_at(self._mountpoint) is not None:
            mountpoints.detach(self._mountpoint, lazy=True)
        self._device.close()

    def leave(self) -> None:
        """Let `run` return once what was begun is answered; what comes from now on is a successor's."""
        self._leaving.set()

    async def _take_over(self) -> None:
        """Open again what is open, and ask for every request that our predecessor did not answer."""
        await self._ops.recall({line.node for line in self._ledger.lines()})
        for line in self._ledger.lines():
            try:
                if line.kind == ledgers.DIRECTORY:
                    self._ops.adopt_directory(line.node, line.handle)
                    continue
                await self._ops.adopt(line.node, line.handle)
            except OSError as error:
                log.warning("an open file cannot be served any more: %s", error)
            inode = self._inodes.setdefault(line.node, _Inode())
            inode.handles += 1
            if line.kind == ledgers.BACKED and not inode.backing:
                inode.backing = line.backing
                with contextlib.suppress(OSError):  # the kernel reads the file it has, whatever became of it
                    inode.loan = await self._ops.lend(line.handle)
        log.info("took the mount over with %d open handles", len(self._ledger.lines()))
        await trio.to_thread.run_sync(self._device.notify, wire.resend())

    # -- the conversation ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Answer requests until the tree is unmounted, the caller is cancelled or `leave` was called."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if self._ledger.incarnation > 1:
                await self._take_over()
            async with trio.open_nursery() as reading:
                reading.start_soon(self._stop_reading, reading.cancel_scope)
                while self._device.connected:
                    await trio.lowlevel.wait_readable(self._device.fileno())
                    self._read_some()
                reading.cancel_scope.cancel()
            nursery.cancel_scope.deadline = trio.current_time() + (
                LEAVE_SECONDS if self._device.connected else 0
            )

    async def _stop_reading(self, reading: trio.CancelScope) -> None:
        await self._leaving.wait()
        reading.cancel()

    def _read_some(self) -> None:
        """Read and begin to answer what is there, up to `BATCH` requests."""
        until = time.monotonic() + BATCH_SECONDS
        for _ in range(BATCH):
            message = self._device.read() or self._next()
            if message is None:
                return
            self._begin(message)
            if time.monotonic() > until:
                return

    def _next(self) -> memoryview | None:
        """Return the next request of somebody who sends one after the other, if it comes at once."""
        until = time.monotonic() + LINGER_SECONDS
        while self._device.connected and not self._running and time.monotonic() < until:
            message = self._device.read()
            if message is not None:
                return message
        return None

    def _begin(self, message: memoryview) -> None:
        try:
            request = wire.request(message)
        except wire.ProtocolError as error:
            log.error("from the kernel: %s", error)
            return
        self._counted.get(request.opcode, self._others).inc()
        handler = _HANDLERS.get(request.opcode)
        if handler is None:
            self._device.write(
                request.unique, (), errno.EROFS if request.opcode in _WRITING else errno.ENOSYS
            )
            return
        try:
            outcome = handler(self, request)
        except wire.ProtocolError as error:
            log.error("from the kernel: %s", error)
            self._device.write(request.unique, (), errno.EIO)
        except OSError as error:
            self._device.write(request.unique, (), error.errno or errno.EIO)
        else:
            if isinstance(outcome, Reply):
                self._reply(request, outcome)
            elif outcome is not None:
                self._nursery.start_soon(self._finish, request, outcome)

    async def _finish(self, request: Request, promise: Coroutine[Any, Any, Reply | None]) -> None:
        """Answer a request whose answer has to be waited for."""
        with trio.CancelScope() as scope:
            self._running[request.unique] = request.pid, scope
            if request.unique & wire.RESENT:  # our predecessor was told of a signal, maybe
                self._nursery.start_soon(self._give_up_if_killed, request.unique)
            try:
                reply = await promise
            except OSError as error:
                self._device.write(request.unique, (), error.errno or errno.EIO)
            else:
                if reply is not None:
                    self._reply(request, reply)
            finally:
                del self._running[request.unique]
        if scope.cancelled_caught:
            self._device.write(request.unique, (), errno.EINTR)

    def _reply(self, request: Request, reply: Reply) -> None:
        if not self._device.write(request.unique, reply.body) and reply.undo is not None:
            reply.undo()

    # -- names -----------------------------------------------------------------------------------------

    def _attr(self, attributes: Attributes) -> wire.Attr:
        uid, gid = self._ops.owner
        return wire.Attr(
            attributes.ino,
            attributes.mode,
            attributes.size,
            attributes.mtime,
            attributes.links,
            uid,
            gid,
            MAX_READ,
        )

    def _lookup(self, request: Request) -> Outcome:
        name = os.fsdecode(wire.name(request.body))
        found = self._ops.lookup_now(request.node, name)
        return self._lookup_later(request.node, name) if found is None else self._found(found)

    async def _lookup_later(self, parent: int, name: str) -> Reply:
        return self._found(await self._ops.lookup(parent, name))

    def _found(self, found: Attributes) -> Reply:
        if not found.ino:
            return Reply((wire.absent_out(found.timeout),))
        # The kernel counts a reference only if it takes the answer.
        entry = wire.entry_out(self._attr(found), found.timeout)
        return Reply((entry,), partial(self._ops.forget, [(found.ino, 1)]))

    def _forget(self, request: Request) -> None:
        (references,) = wire.fields(request.opcode, request.body)
        self._ops.forget([(request.node, references)])

    def _batch_forget(self, request: Request) -> None:
        self._ops.forget(wire.forgets(request.body))

    def _getattr(self, request: Request) -> Reply:
        wire.fields(request.opcode, request.body)
        found = self._ops.getattr(request.node)
        return Reply((wire.attr_out(self._attr(found), found.timeout),))

    def _readlink(self, request: Request) -> Reply:
        wire.fields(request.opcode, request.body)
        return Reply((os.fsencode(self._ops.readlink(request.node)),))

    def _access(self, request: Request) -> Reply:
        mask, _ = wire.fields(request.opcode, request.body)
        if mask & os.W_OK:
            raise OSError(errno.EROFS, "the tree is read-only")
        if mask & os.X_OK and not stat.S_ISDIR(self._ops.getattr(request.node).mode):
            raise OSError(errno.EACCES, "no file can be executed")
        return Reply()

    def _statfs(self, request: Request) -> Reply:
        wire.fields(request.opcode, request.body)
        values = self._ops.statfs()
        return Reply(
            (
                wire.statfs_out(
                    blocks=values["f_blocks"],
                    files=values["f_files"],
                    block=values["f_bsize"],
                    name_max=values["f_namemax"],
                ),
            )
        )

    def _getxattr(self, request: Request) -> Reply:
        room, name = wire.getxattr(request.body)
        return _sized(self._ops.getxattr(request.node, os.fsdecode(name)), room)

    def _listxattr(self, request: Request) -> Reply:
        room, _ = wire.fields(request.opcode, request.body)
        names = self._ops.listxattr(request.node)
        return _sized(b"".join(os.fsencode(name) + b"\0" for name in names), room)

    # -- directories -----------------------------------------------------------------------------------

    def _opendir(self, request: Request) -> Reply:
        wire.fields(request.opcode, request.body)
        handle = self._ops.opendir(request.node)
        self._note(request, handle, 0, ledgers.DIRECTORY)
        return Reply((wire.open_out(handle, Opening(0)),), partial(self._close_directory, handle))

    def _close_directory(self, handle: int) -> None:
        self._ops.releasedir(handle)
        self._ledger.close(handle)

    def _readdir(self, request: Request) -> Outcome:
        handle, start, room, *_ = wire.fields(request.opcode, request.body)
        page = partial(self._page, handle, start, room, plus=request.opcode == Opcode.READDIRPLUS)
        return page() if self._ops.lists_now(handle) else self._readdir_later(handle, page)

    async def _readdir_later(self, handle: int, page: Callable[[], Reply]) -> Reply:
        await self._ops.list_later(handle)
        return page()

    def _page(self, handle: int, start: int, room: int, *, plus: bool) -> Reply:
        parts: list[bytes] = []
        known: list[tuple[int, int]] = []
        for listed in self._ops.readdir(handle, start):
            found = listed.attributes
            part = wire.dirent(found.ino, listed.next, found.mode, os.fsencode(listed.name))
            if plus:
                part = wire.entry_out(self._attr(found), found.timeout) + part
            room -= len(part)
            if room < 0:
                break
            parts.append(part)
            if plus:
                self._ops.remember(listed.node)
                known.append((found.ino, 1))
        return Reply((b"".join(parts),), partial(self._ops.forget, known))

    def _releasedir(self, request: Request) -> Reply:
        handle, *_ = wire.fields(request.opcode, request.body)
        self._close_directory(handle)
        return Reply()

    # -- files -----------------------------------------------------------------------------------------

    def _open(self, request: Request) -> Outcome:
        flags, _ = wire.fields(request.opcode, request.body)
        return self._open_later(request, flags)

    def _note(self, request: Request, handle: int, backing: int, kind: int) -> None:
        self._ledger.open(ledgers.Line(handle, request.node, request.unique & ~wire.RESENT, backing, kind))

    def _forget_unanswered(self, request: Request) -> None:
        """Close what our predecessor opened for a request whose answer the kernel did not get."""
        for line in self._ledger.lines() if request.unique & wire.RESENT else ():
            if line.request == request.unique & ~wire.RESENT and line.kind != ledgers.DIRECTORY:
                self._close(line.node, line.handle)

    async def _open_later(self, request: Request, flags: int) -> Reply:
        node = request.node
        self._forget_unanswered(request)
        opened = await self._ops.open(node, flags)
        try:
            wanted = self.passthrough and node not in self._inodes
            loan = await self._ops.lend(opened.handle) if wanted else None
        except BaseException:
            self._ops.release(opened.handle)
            raise
        # From here to the reply nothing waits: what is decided is what the kernel is told.
        inode = self._inodes.get(node)
        if inode is None:
            inode = self._inodes[node] = _Inode()
            if loan is not None:
                self._back(inode, loan)
        elif loan is not None:
            self._give_back(loan)  # another open of this inode was faster
        inode.handles += 1
        kind = ledgers.BACKED if inode.backing else ledgers.CACHED
        self._note(request, opened.handle, inode.backing, kind)
        undo = partial(self._close, node, opened.handle)
        if inode.backing:
            self._ops.metrics.passthrough_opens.inc()
            flags = Opening.NOFLUSH | Opening.PASSTHROUGH
            return Reply((wire.open_out(opened.handle, flags, inode.backing),), undo)
        keep = Opening.KEEP_CACHE if opened.keep_cache else Opening(0)
        return Reply((wire.open_out(opened.handle, Opening.NOFLUSH | keep),), undo)

    def _back(self, inode: _Inode, loan: Loan) -> None:
        try:
            inode.backing = self._device.open_backing(loan.fileno())
        except OSError as error:
            log.warning("a file is read through the daemon: %s", error.strerror)
            self._give_back(loan)
        else:
            inode.loan = loan

    def _give_back(self, loan: Loan) -> None:
        self._nursery.start_soon(trio.to_thread.run_sync, loan.close)

    def _close(self, node: int, handle: int) -> None:
        if handle not in self._ledger:
            return  # a RELEASE that our predecessor had done, but not answered
        inode = self._inodes[node]
        inode.handles -= 1
        if not inode.handles:
            del self._inodes[node]
            if inode.backing:
                self._device.close_backing(inode.backing)
            if inode.loan is not None:
                self._give_back(inode.loan)
        self._ledger.close(handle)
        self._ops.release(handle)

    def _read(self, request: Request) -> Outcome:
        handle, offset, size, *_ = wire.fields(request.opcode, request.body)
        found = self._ops.place_now(handle, offset, size)
        if isinstance(found, Place):
            return (
                None
                if self._device.splice(request.unique, found)
                else self._read_copying(handle, offset, size)
            )
        return self._read_later(request.unique, handle, offset, size) if found is None else Reply((found,))

    async def _read_later(self, unique: int, handle: int, offset: int, size: int) -> Reply | None:
        found = await self._ops.place(handle, offset, size)
        if not isinstance(found, Place):
            return Reply((found,))
        return None if self._device.splice(unique, found) else await self._read_copying(handle, offset, size)

    async def _read_copying(self, handle: int, offset: int, size: int) -> Reply:
        return Reply((await self._ops.read(handle, offset, size),))

    def _release(self, request: Request) -> Reply:
        handle, *_ = wire.fields(request.opcode, request.body)
        self._close(request.node, handle)
        return Reply()

    def _lseek(self, request: Request) -> Reply:
        """Answer SEEK_DATA and SEEK_HOLE: what is not fetched yet is data as well, so there is no hole."""
        _, offset, whence, _ = wire.fields(request.opcode, request.body)
        size = self._ops.getattr(request.node).size
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, f"whence {whence}")
        if offset >= size:
            raise OSError(errno.ENXIO, "behind the end")
        return Reply((wire.lseek_out(offset if whence == os.SEEK_DATA else size),))

    # -- the rest --------------------------------------------------------------------------------------

    def _interrupt(self, request: Request) -> None:
        """Give up a request whose process is being killed.

        Others get their bytes although a signal came: a read of a file on a disk does not fail with EINTR
        either, and programs that use signals (Go's scheduler, profilers) do not expect it.
        """
        (unique,) = wire.fields(request.opcode, request.body)
        if unique in self._running:
            self._nursery.start_soon(self._give_up_if_killed, unique)

    async def _give_up_if_killed(self, unique: int) -> None:
        """Look after the process of a running request: the kernel tells of its first signal only."""
        since = trio.current_time()
        while found := self._running.get(unique):
            pid, scope = found
            if _is_dying(pid) if pid else trio.current_time() - since >= FOREIGN_SECONDS:
                scope.cancel()
                return
            await trio.sleep(KILLED_SECONDS)

    def _destroy(self, request: Request) -> Reply:
        return Reply()

    async def invalidate(self, changes: Iterable[Change]) -> None:
        """Make the kernel look up the changed names anew; waits in a thread, not here.

        Cancelled, it leaves the thread to itself, which ends when the kernel has taken the present notice.
        """
        await trio.to_thread.run_sync(self._tell, changes, limiter=self._notices, abandon_on_cancel=True)

    def _tell(self, changes: Iterable[Change]) -> None:
        for change in changes:
            trio.from_thread.check_cancelled()  # the device may be closed then
            notice = (
                wire.inval_entry(change.parent, os.fsencode(change.name))
                if change.name
                else wire.inval_attributes(change.parent)
            )
            self._device.notify(notice)


_HANDLERS: Mapping[int, Callable[[Transport, Request], Outcome]] = {
    Opcode.LOOKUP: Transport._lookup,
    Opcode.FORGET: Transport._forget,
    Opcode.BATCH_FORGET: Transport._batch_forget,
    Opcode.GETATTR: Transport._getattr,
    Opcode.READLINK: Transport._readlink,
    Opcode.ACCESS: Transport._access,
    Opcode.STATFS: Transport._statfs,
    Opcode.GETXATTR: Transport._getxattr,
    Opcode.LISTXATTR: Transport._listxattr,
    Opcode.OPENDIR: Transport._opendir,
    Opcode.READDIR: Transport._readdir,
    Opcode.READDIRPLUS: Transport._readdir,
    Opcode.RELEASEDIR: Transport._releasedir,
    Opcode.OPEN: Transport._open,
    Opcode.READ: Transport._read,
    Opcode.RELEASE: Transport._release,
    Opcode.LSEEK: Transport._lseek,
    Opcode.INTERRUPT: Transport._interrupt,
    Opcode.DESTROY: Transport._destroy,
}

_WRITING = frozenset(
    {
        Opcode.SETATTR,
        Opcode.SYMLINK,
        Opcode.MKNOD,
        Opcode.MKDIR,
        Opcode.UNLINK,
        Opcode.RMDIR,
        Opcode.RENAME,
        Opcode.LINK,
        Opcode.WRITE,
        Opcode.SETXATTR,
        Opcode.REMOVEXATTR,
        Opcode.CREATE,
        Opcode.FALLOCATE,
        Opcode.RENAME2,
        Opcode.COPY_FILE_RANGE,
        Opcode.TMPFILE,
    }
)


def _sized(value: bytes, room: int) -> Reply:
    """Return an attribute's value, or its length if `room` is 0."""
    if not room:
        return Reply((wire.xattr_size_out(len(value)),))
    if len(value) > room:
        raise OSError(errno.ERANGE, f"{len(value)} bytes do not fit into {room}")
    return Reply((value,))


def _is_dying(pid: int) -> bool:
    """Return whether a fatal signal waits for `pid`; the kernel turns each of them into a SIGKILL."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True
    pending = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(mask >> (signal.SIGKILL - 1) & 1 for mask in pending)

"""``/dev/fuse`` itself: mounting, the first exchange, and moving messages in and out.

Reading and writing never wait; a read that would is None. The ioctls are those of fuse.h for backing files.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import select
import stat
import struct
import tempfile
from pathlib import Path

from modelfs.cache import Pipe, Place
from modelfs.errors import MountError
from modelfs.fuse import mountpoint as mountpoints
from modelfs.fuse import wire
from modelfs.fuse.wire import Init
from modelfs.types import Span

log = logging.getLogger(__name__)

MAX_READ = 1020 * 1024
"""Bytes of the largest read request: with its header it fits into a pipe of 1 MiB, in pages of 4 KiB."""

MAX_BACKGROUND = 128
"""Asynchronous requests (readahead, O_DIRECT) that the kernel sends before it waits for an answer."""

STACK_DEPTH = 2
"""The cache may lie on a file system that is stacked itself, such as a container's overlayfs."""

HANDSHAKE_SECONDS = 10.0
"""How long the kernel may take to begin the conversation after mounting."""

WANTED = (
    Init.ASYNC_READ
    | Init.DO_READDIRPLUS
    | Init.PARALLEL_DIROPS
    | Init.MAX_PAGES
    | Init.CACHE_SYMLINKS
    | Init.EXPLICIT_INVAL_DATA
    | Init.INIT_EXT
    | Init.PASSTHROUGH
    | Init.HAS_RESEND
)
"""Never WRITEBACK_CACHE: with it the kernel refuses passthrough without a word. Nor ASYNC_DIO: with it nobody
who waits for a read with O_DIRECT can be killed (``fuse_direct_IO`` in fs/fuse/file.c)."""

_NEEDS_ROOT = "the kernel transport needs root; pyfuse3 does not"
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_BACKING = struct.Struct("=iIQ")
_BACKING_OPEN = 0x4010E501  # _IOW(229, 1, struct fuse_backing_map)
_BACKING_CLOSE = 0x4004E502  # _IOW(229, 2, uint32_t)

_REFUSALS = {
    errno.EPERM: "the daemon lacks CAP_SYS_ADMIN in the initial user namespace",
    errno.EINVAL: "its file system does not allow O_DIRECT",
    errno.ELOOP: "its file system lies on too many others",
    errno.EOPNOTSUPP: "its file system cannot be read this way",
}


class Device:
    """One conversation with the kernel.

    Args:
        fd: a descriptor of ``/dev/fuse``, non-blocking; closed in the end.

    Attributes:
        connected: whether requests may still come; False once the tree is unmounted.

    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = memoryview(bytearray(wire.READ_BUFFER))
        self._pipe = Pipe(MAX_READ + 4096)
        self.connected = True

    def fileno(self) -> int:
        """Return the descriptor, which is readable when a request is there."""
        return self._fd

    def close(self) -> None:
        """Give the descriptor up; the kernel ends the conversation with the last one."""
        os.close(self._fd)
        self._pipe.close()

    def mount(self, place: Path, *, allow_other: bool) -> None:
        """Mount the tree that this conversation is about; options as in the kernel's filesystems/fuse.rst.

        Raises:
            MountError: the kernel refused.

        """
        options = [
            f"fd={self._fd}",
            f"rootmode={stat.S_IFDIR:o}",
            f"user_id={os.geteuid()}",
            f"group_id={os.getegid()}",
            f"max_read={MAX_READ}",
            "default_permissions",
            *(["allow_other"] if allow_other else []),
        ]
        libc = ctypes.CDLL(None, use_errno=True)
        refused = libc.mount(
            b"modelfs",
            os.fsencode(place),
            mountpoints.FSTYPE.encode(),
            ctypes.c_ulong(_MS_RDONLY | _MS_NOSUID | _MS_NODEV),
            ",".join(options).encode(),
        )
        if refused:
            code = ctypes.get_errno()
            if code == errno.EPERM:
                raise MountError(_NEEDS_ROOT)
            raise MountError(f"{place}: cannot mount: {os.strerror(code)}; see dmesg")

    def negotiate(self, place: Path) -> Init:
        """Answer INIT, which the kernel sends first after mounting on `place`; return the terms.

        Raises:
            MountError: it sends nothing, or speaks another protocol.

        """
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if not poll.poll(HANDSHAKE_SECONDS * 1000):
            raise MountError(f"{place}: the kernel does not begin the FUSE conversation")
        request = wire.request(self._buffer[: os.readv(self._fd, (self._buffer,))])
        offer = wire.init(request.body)
        if offer.major != wire.MAJOR or offer.minor < wire.OLDEST_MINOR:
            raise MountError(
                f"{place}: FUSE {offer.major}.{offer.minor} of this kernel is not one of "
                f"{wire.MAJOR}.{wire.OLDEST_MINOR} or later: use --transport pyfuse3"
            )
        flags = offer.flags & WANTED
        terms = wire.Terms(
            minor=min(wire.MINOR, offer.minor),
            max_readahead=offer.max_readahead,
            flags=flags,
            max_background=MAX_BACKGROUND,
            max_pages=MAX_READ // 4096,
            max_stack_depth=STACK_DEPTH if Init.PASSTHROUGH in flags else 0,
        )
        self.write(request.unique, (wire.init_out(terms),))
        return flags

    def refusal(self, flags: Init, cache: Path) -> str | None:
        """Return why files in `cache` cannot back ours on terms of `flags`, or None if they can."""
        if Init.PASSTHROUGH not in flags:
            return f"Linux {os.uname().release} has no FUSE passthrough (6.9 has)"
        with tempfile.NamedTemporaryFile(dir=cache, prefix=".probe-") as file:
            try:
                # A file that is opened with O_DIRECT is opened so below, too.
                os.close(os.open(file.name, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
                self.close_backing(self.open_backing(file.fileno()))
            except OSError as error:
                why = _REFUSALS.get(error.errno or 0, error.strerror)
                return f"the kernel cannot read {cache} without the daemon: {why}"
        return None

    def read(self) -> memoryview | None:
        """Return the next request, valid until the next read; None if none is there or none will come."""
        while True:
            try:
                return self._buffer[: os.readv(self._fd, (self._buffer,))]
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno == errno.ENODEV:
                    self.connected = False
                    return None
                if error.errno != errno.ENOENT:  # taken back before it was read
                    raise

    def write(self, unique: int, body: tuple[bytes | bytearray, ...], error: int = 0) -> bool:
        """Answer a request; return whether anybody still wanted the answer."""
        head = wire.header(unique, sum(map(len, body)), error)
        try:
            os.writev(self._fd, (head, *body))
        except OSError as failure:
            if failure.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            return False  # who asked was killed, or the tree is unmounted
        return True

    def splice(self, unique: int, place: Place) -> bool:
        """Answer a READ with the bytes at `place`, which we never see; return False if that cannot be.

        Compared with reading and writing them this saves a copy and the page faults of a buffer.
        """
        length = len(place)
        if length + 4096 > self._pipe.room:
            return False
        self._pipe.put(wire.header(unique, length))
        if not self._fill(place.fileno(), place.span) or not place.holds():
            self._pipe.empty()
            return False
        try:
            self._pipe.send(self._fd)
        except OSError as failure:
            self._pipe.empty()
            if failure.errno not in (errno.ENOENT, errno.ENODEV):
                raise
        return True

    def _fill(self, file: int, span: Span) -> bool:
        """Put `span` of `file` into the pipe; return whether all of it went in."""
        start = span.start
        with contextlib.suppress(BlockingIOError):
            while start < span.stop and (moved := self._pipe.fill(file, span.stop - start, start)):
                start += moved
        return start == span.stop

    def open_backing(self, fd: int) -> int:
        """Register the file `fd` as one that the kernel may read by itself; return its id."""
        backing: int = fcntl.ioctl(self._fd, _BACKING_OPEN, bytearray(_BACKING.pack(fd, 0, 0)))
        return backing

    def close_backing(self, backing: int) -> None:
        """Give an id back."""
        fcntl.ioctl(self._fd, _BACKING_CLOSE, struct.pack("=I", backing))

    def notify(self, notice: bytes) -> None:
        """Write a notification. It may wait for a lock of the kernel: call it in a thread."""
        try:
            os.write(self._fd, notice)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # the kernel knows nothing of it
                log.warning("a name or inode could not be invalidated: %s", error.strerror)


def open_device() -> int:
    """Return a new descriptor of ``/dev/fuse``: a conversation with the kernel that begins with a mount.

    Raises:
        MountError: it is missing or not ours to use.

    """
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError:
        raise MountError(_NEEDS_ROOT) from None
    except OSError as error:
        raise MountError(
            f"/dev/fuse: {error.strerror}: load the fuse module, or give the container the device"
        ) from error

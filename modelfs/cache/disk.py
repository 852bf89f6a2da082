"""System calls the cache needs beyond :mod:`os`, and reads and writes that do all they were asked or raise.

Everything here blocks on the disk, except :func:`read_resident`, and raises OSError.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modelfs.errors import CacheError
from modelfs.types import Span, crc32c

CHUNK = 1024 * 1024
"""Bytes taken into memory at once when a block is checked or hashed."""

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}  # syscall numbers: the C library has no function for it
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_NONE, _IOPRIO_IDLE = 0, 3 << 13

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

_SYNC = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
sys.exit(ctypes.get_errno() if libc.syncfs(3) else 0)
"""
"""What a process runs to write the file system of its descriptor 3 to the disk."""


def failure(doing: str, place: Path | str, error: OSError) -> CacheError:
    """Return the error for a failed operation on the cache disk; every OSError of the cache ends here."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free space on this disk, or change cache.size or cache.min_free"
    else:
        remedy = "check this disk and its mount"
    return CacheError(f"{place}: cannot {doing}: {error.strerror or error}; {remedy}")


def read(fd: int, span: Span) -> bytes:
    """Return exactly the bytes of `span`; a file that ends before it is an EIO."""
    if not span:
        return b""
    data = os.pread(fd, len(span), span.start)
    if len(data) == len(span):
        return data
    parts = [data]
    done = span.start + len(data)
    while data and done < span.stop:  # short reads happen at 2 GiB and on some network file systems
        data = os.pread(fd, span.stop - done, done)
        parts.append(data)
        done += len(data)
    if done < span.stop:
        raise OSError(errno.EIO, "the file is shorter than it was")
    return b"".join(parts)


def read_resident(fd: int, span: Span) -> bytearray | None:
    """Return the bytes of `span` if all are in the page cache, else None; never waits for the disk.

    ``RWF_NOWAIT`` of preadv2(2). File systems that do not know it (tmpfs) always give None.
    """
    data = bytearray(len(span))
    try:
        done = os.preadv(fd, [data], span.start, os.RWF_NOWAIT)
    except OSError:  # not resident, not supported, or broken: the blocking read finds out which
        return None
    return data if done == len(data) else None


def is_resident(fd: int, span: Span) -> bool:
    """Return whether the first and the last byte of `span` are in the page cache; never waits for the disk.

    What lies between them was as a rule read or written with them.
    """
    byte = bytearray(1)
    try:
        return all(os.preadv(fd, [byte], at, os.RWF_NOWAIT) == 1 for at in (span.start, span.stop - 1))
    except OSError:  # not resident, not supported, or broken: the blocking read finds out which
        return False


class Pipe:
    """Bytes on their way from one descriptor to another that this process does not look at (splice(2)).

    They come out once, in the order in which they went in. Its length is the number of bytes in it. One
    thread at a time.
    """

    def __init__(self, capacity: int = 1024 * 1024) -> None:
        """Make an empty one.

        Args:
            capacity: bytes it shall hold; `room` is what the system allows. Beyond 1 MiB that needs root, and
                an unprivileged user has 64 MiB in all pipes by default, pipe(7).

        """
        self._out, self._in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._count = 0
        with suppress(OSError):  # then it has the size that it was made with
            fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, capacity)
        self.room: int = fcntl.fcntl(self._in, fcntl.F_GETPIPE_SZ)

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """Close it; what is in it is gone."""
        os.close(self._out)
        os.close(self._in)

    def put(self, data: bytes) -> None:
        """Take `data`, for which there must be room."""
        self._count += os.write(self._in, data)

    def fill(self, fd: int, most: int, offset: int | None = None) -> int:
        """Take up to `most` bytes from `fd`, of a file from `offset` on; return how many, 0 at its end.

        Raises:
            BlockingIOError: `fd`, which does not block, has none now, or the pipe is full.
            OSError: whatever is wrong with `fd`.

        """
        flags = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
        count = os.splice(fd, self._in, most, offset_src=offset, flags=flags)
        self._count += count
        return count

    def send(self, fd: int) -> None:
        """Hand everything over to `fd` at once, as a device wants its messages."""
        self._count -= os.splice(self._out, fd, self._count)

    def empty(self) -> None:
        """Throw away what is in it; needs no new descriptors, of which there may be none."""
        with suppress(BlockingIOError):
            while os.read(self._out, self.room):
                pass
        self._count = 0

    def move(self, fd: int, offset: int, count: int) -> None:
        """Write the next `count` bytes into the file `fd` at `offset`."""
        while count:
            try:
                done = os.splice(self._out, fd, count, offset_dst=offset, flags=os.SPLICE_F_MOVE)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                write(fd, memoryview(self.take(count)), offset)  # not every file system can splice
                return
            self._count -= done
            count -= done
            offset += done

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        parts = []
        while count:
            parts.append(os.read(self._out, count))
            count -= len(parts[-1])
            self._count -= len(parts[-1])
        return b"".join(parts)


Data = bytes | bytearray | memoryview | Pipe
"""Bytes to be kept, wherever they are now."""


def write(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    while data:
        done = os.pwrite(fd, data, offset)
        data = data[done:]
        offset += done


def crc(fd: int, span: Span) -> int:
    """Return the CRC-32C of the bytes of `span`; memory use does not depend on its length."""
    value = 0
    for part in chunks(fd, span):
        value = crc32c(part, value)
    return value


def chunks(fd: int, span: Span, *, afresh: bool = False) -> Iterator[memoryview]:
    """Yield the bytes of `span` in order, `CHUNK` at a time; each part is good until the next is asked for.

    Args:
        fd: of the file.
        span: starts at a multiple of 4096 if `afresh`.
        afresh: read what lies on the disk, past the page cache, and leave no pages there (``O_DIRECT``;
            where the file system does not know it, as always).

    """
    direct = _open_direct(fd) if afresh else -1
    with mmap.mmap(-1, CHUNK) as pages:  # O_DIRECT wants aligned memory
        buffer = memoryview(pages)
        try:
            done = span.start
            while done < span.stop:
                try:
                    if direct < 0:
                        count = os.preadv(fd, [buffer[: span.stop - done]], done)
                    else:  # it reads an odd length only at the end of the file
                        count = os.preadv(direct, [buffer], done)
                except OSError as error:
                    if direct < 0 or error.errno != errno.EINVAL:
                        raise
                    os.close(direct)
                    direct = -1
                    continue
                if count == 0:
                    raise OSError(errno.EIO, "the file is shorter than it was")
                count = min(count, span.stop - done)
                with buffer[:count] as part:
                    yield part
                done += count
        finally:
            buffer.release()
            if direct >= 0:
                os.close(direct)


def _open_direct(fd: int) -> int:
    """Return a descriptor of the file of `fd` that reads past the page cache; -1 if it cannot be had."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:  # not supported, or no /proc
        return -1


@contextmanager
def idly() -> Iterator[None]:
    """Let this thread use the disk only when nobody else does, where the kernel can tell: ioprio_set(2)."""
    number = _IOPRIO_SET.get(os.uname().machine)
    if number is None:
        yield
        return
    _libc.syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE)
    try:
        yield
    finally:
        _libc.syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_NONE)


def punch(fd: int, start: int, length: int) -> bool:
    """Give the disk space of ``[start, start + length)`` back; it reads as zeros from now on.

    The file keeps its size; `length` may reach beyond it. Returns False where the file system cannot.
    """
    if _libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, start, length) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number))


def sync_file_system(fd: int, seconds: float) -> bool:
    """Return whether everything written to the file system of `fd` is on its disk within `seconds`.

    That is what all programs have written, and syncfs(2) cannot be interrupted, not even by SIGKILL: a
    process of its own calls it, which is left to itself when the time is over.
    """
    child = os.posix_spawn(
        sys.executable, [sys.executable, "-ISc", _SYNC], {}, file_actions=[(os.POSIX_SPAWN_DUP2, fd, 3)]
    )
    ended = os.pidfd_open(child)
    try:
        if not select.select([ended], [], [], seconds)[0]:
            return False
    finally:
        os.close(ended)
    number = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if number:
        raise OSError(number, os.strerror(number))
    return True


def sync_directory(directory: Path) -> None:
    """Wait until the names in `directory` are on the disk."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Put `content` into the file at `path` (0600); after a crash it is the old or, with `sync`, the new."""
    new = path.with_name(path.name + ".new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write(fd, memoryview(content), 0)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)
    new.replace(path)
    if sync:
        sync_directory(path.parent)

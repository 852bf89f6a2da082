"""What tests have another process do with a mounted tree: one system call after the other, as they say.

`main` is that process. It obeys pickled calls of `ACTIONS` on its standard input. An
answer is what the action returned, or the errno it failed with. A page fault that fails kills a process: so
memory maps are read in a child of its own, and one that SIGBUS ends counts as ``EIO``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import pickle
import select
import signal
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

PATIENCE = 120.0
"""Seconds after which a call counts as one that hangs for ever."""

ALIGNED = 4096
"""Bytes to which direct reads must be aligned on the disks of tests."""

_DIRENT = struct.Struct("=QqHB")
_LIBC = ctypes.CDLL(None, use_errno=True)
_GETDENTS64 = {"x86_64": 217, "aarch64": 61}[os.uname().machine]


class Status(NamedTuple):
    """What stat(2) says: `kind` is that of the mode, `size` of a directory is 0."""

    kind: str
    size: int
    links: int
    ino: int


class Named(NamedTuple):
    """A name as a listing shows it."""

    name: str
    kind: str
    ino: int


_KINDS = {stat.S_IFDIR: "directory", stat.S_IFREG: "file", stat.S_IFLNK: "link"}


# -- ways to read ``[offset, offset + length)`` of a file; fewer bytes only at its end ---------------------


def pread(fd: int, offset: int, length: int) -> bytes:
    return os.pread(fd, length, offset)


def vectors(fd: int, offset: int, length: int) -> bytes:
    """preadv(2) into buffers of odd lengths."""
    buffers = [bytearray(length // 3), bytearray(1), bytearray(length - length // 3)]
    got = os.preadv(fd, buffers, offset)
    return b"".join(buffers)[: min(got, length)]


def at_once(fd: int, offset: int, length: int) -> bytes:
    """preadv2(2) with RWF_NOWAIT: what is not there at once is ``EAGAIN`` or a short read.

    FUSE has ``EOPNOTSUPP`` for it.
    """
    buffer = bytearray(length)
    done = 0
    try:
        done = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
    return bytes(buffer[:done]) + os.pread(fd, length - done, offset + done)


def seeking(fd: int, offset: int, length: int) -> bytes:
    """lseek(2) and read(2)."""
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, length)


def direct(fd: int, offset: int, length: int) -> bytes:
    """O_DIRECT with everything aligned; the part that was asked for is cut out."""
    start = offset - offset % ALIGNED
    room = -(-(offset + length - start) // ALIGNED) * ALIGNED
    with mmap.mmap(-1, max(room, ALIGNED)) as buffer, _reopened(fd, os.O_DIRECT) as again:
        got = os.preadv(again, [buffer], start)
        return buffer[offset - start : min(got, offset + length - start)]


def mapped(fd: int, offset: int, length: int) -> bytes:
    return _mapped(fd, offset, length, mmap.MAP_SHARED, mmap.MADV_NORMAL)


def mapped_privately(fd: int, offset: int, length: int) -> bytes:
    return _mapped(fd, offset, length, mmap.MAP_PRIVATE, mmap.MADV_RANDOM)


def mapped_ahead(fd: int, offset: int, length: int) -> bytes:
    return _mapped(fd, offset, length, mmap.MAP_SHARED, mmap.MADV_WILLNEED)


def _mapped(fd: int, offset: int, length: int, flags: int, advice: int) -> bytes:
    size = os.fstat(fd).st_size
    if offset >= size or not length:
        return b""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            start = offset - offset % mmap.ALLOCATIONGRANULARITY
            stop = min(offset + length, size)
            pages = mmap.mmap(fd, stop - start, flags, mmap.PROT_READ, offset=start)
            pages.madvise(advice)
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(pages[offset - start :])
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGBUS:
        raise OSError(errno.EIO, "SIGBUS")
    if status:
        raise RuntimeError(f"the reader of a memory map ended with status {status}")
    return data


def sent(fd: int, offset: int, length: int) -> bytes:
    """sendfile(2) into a file in memory."""
    target = os.memfd_create("sent")
    try:
        while length and (count := os.sendfile(target, fd, offset, length)):
            offset, length = offset + count, length - count
        return os.pread(target, os.fstat(target).st_size, 0)
    finally:
        os.close(target)


def spliced(fd: int, offset: int, length: int) -> bytes:
    """splice(2) through a pipe."""
    reading, writing = os.pipe()
    parts = []
    try:
        while length and (count := os.splice(fd, writing, min(length, 65536), offset_src=offset)):
            parts.append(os.read(reading, count))
            offset, length = offset + len(parts[-1]), length - len(parts[-1])
        return b"".join(parts)
    finally:
        os.close(reading)
        os.close(writing)


def copied(fd: int, offset: int, length: int) -> bytes:
    """copy_file_range(2) to a local file; programs copy by hand where the kernel has ``EXDEV`` for it."""
    with tempfile.TemporaryFile() as target:
        try:
            while length and (count := os.copy_file_range(fd, target.fileno(), length, offset)):
                offset, length = offset + count, length - count
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            target.write(os.pread(fd, length, offset))
        target.seek(0)
        return target.read()


WAYS: Mapping[str, Callable[[int, int, int], bytes]] = {
    way.__name__: way
    for way in (
        *(pread, vectors, at_once, seeking, direct, mapped, mapped_privately, mapped_ahead),
        *(sent, spliced, copied),
    )
}
"""Name → way to read a span of an open file."""


@contextlib.contextmanager
def _reopened(fd: int, flags: int) -> Any:
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | flags)
    try:
        yield again
    finally:
        os.close(again)


# -- actions ----------------------------------------------------------------------------------------------

_FILES: dict[int, int] = {}
"""Open files by the number that the test gave them."""


def status(path: str) -> Status:
    found = os.lstat(path)
    kind = _KINDS[stat.S_IFMT(found.st_mode)]
    return Status(kind, 0 if kind == "directory" else found.st_size, found.st_nlink, found.st_ino)


def names(path: str) -> list[Named]:
    """Return what readdir(3) says, in its order."""
    with os.scandir(path) as found:
        return [Named(entry.name, _KINDS[_mode(entry)], entry.inode()) for entry in found]


def _mode(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return stat.S_IFLNK
    return stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else stat.S_IFREG


def pieces(path: str, room: int, back: list[int]) -> list[str]:
    """Return the names that getdents64(2) gives into a buffer of `room` bytes.

    `back` are indices of names: from each it goes back there once, and must come to the same names again.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    buffer = ctypes.create_string_buffer(room)
    try:
        found: list[tuple[str, int]] = []
        while page := _page(fd, buffer):
            found += page
        for index in back if found else ():
            index %= len(found)
            os.lseek(fd, found[index][1], os.SEEK_SET)
            again = _page(fd, buffer)
            if again != found[index + 1 :][: len(again)] or bool(again) != bool(found[index + 1 :]):
                raise RuntimeError(f"after {found[index]}: {again}, not {found[index + 1 :]}")
        os.lseek(fd, 0, os.SEEK_SET)
        if back and (again := _page(fd, buffer)) != found[: len(again)]:
            raise RuntimeError(f"from the beginning: {again}, not {found}")
        return [name for name, _ in found if name not in (".", "..")]
    finally:
        os.close(fd)


def _page(fd: int, buffer: Any) -> list[tuple[str, int]]:
    """Return the next names, and the place after each."""
    count = _LIBC.syscall(_GETDENTS64, fd, buffer, len(buffer))
    if count < 0:
        raise OSError(ctypes.get_errno(), "getdents64")
    found, at = [], 0
    while at < count:
        _, place, length, _ = _DIRENT.unpack_from(buffer.raw, at)
        name = buffer.raw[at + _DIRENT.size : at + length].partition(b"\0")[0]
        found.append((os.fsdecode(name), place))
        at += length
    return found


def access(path: str, mode: int) -> bool:
    return os.access(path, mode)


def readlink(path: str) -> str:
    return os.readlink(path)


def whole(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def open_as(number: int, path: str, flags: int) -> int:
    """Open a file under `number`; return its size."""
    fd = os.open(path, os.O_RDONLY | flags)
    _FILES[number] = fd
    return os.fstat(fd).st_size


def close(number: int) -> None:
    os.close(_FILES.pop(number))


def read(number: int, way: str, offset: int, length: int) -> bytes:
    return WAYS[way](_FILES[number], offset, length)


def seek(number: int, offset: int, whence: int) -> int:
    return os.lseek(_FILES[number], offset, whence)


def advise(number: int, advice: int) -> None:
    os.posix_fadvise(_FILES[number], 0, 0, advice)


ACTIONS: Mapping[str, Callable[..., Any]] = {
    action.__name__: action
    for action in (
        *(status, names, pieces, access, readlink, whole),
        *(open_as, close, read, seek, advise),
    )
}


class Actor:
    """The process; a context manager that ends it."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.mount.actor import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def do(self, action: str, *args: object) -> Any:
        """Return what an action returned; OSError as it failed.

        Raises:
            TimeoutError: there is no answer after `PATIENCE`.

        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((action, args), self._process.stdin)
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            raise TimeoutError(f"{action}{args} has no answer after {PATIENCE} s")
        answer, failure = pickle.load(self._process.stdout)
        if failure is not None:
            raise failure
        return answer

    def attempt(self, action: str, *args: object) -> Any:
        """Return what `do` returns, or the OSError that it raises."""
        try:
            return self.do(action, *args)
        except OSError as error:
            return error


def main() -> None:
    """Obey until standard input ends."""
    while True:
        try:
            action, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = ACTIONS[action](*args), None
        except OSError as error:
            answer = None, OSError(error.errno, error.strerror)
        except RuntimeError as error:
            answer = None, error
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()

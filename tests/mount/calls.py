"""Calls that a read-only tree refuses, or answers in a way that programs rely on, in the manner of xfstests.

``python -m tests.mount.calls ROOT`` does each in the tree of test_conformance.py and prints what it answers:
the name of an errno, or the value.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import sys
from collections.abc import Callable
from typing import Any


def p(path: str) -> str:
    return os.path.join(sys.argv[1], path)


def with_fd(path: str, use: Callable[[int], Any]) -> Any:
    fd = os.open(p(path), os.O_RDONLY)
    try:
        return use(fd)
    finally:
        os.close(fd)


def copy_into_it() -> Any:
    return with_fd("one.dat", lambda s: with_fd("small.json", lambda t: os.copy_file_range(s, t, 10)))


CALLS: dict[str, Callable[[], Any]] = {
    "write": lambda: os.open(p("small.json"), os.O_WRONLY),
    "read and write": lambda: os.open(p("small.json"), os.O_RDWR),
    "append": lambda: os.open(p("small.json"), os.O_WRONLY | os.O_APPEND),
    "truncate at open": lambda: os.open(p("small.json"), os.O_RDONLY | os.O_TRUNC),
    "create": lambda: os.open(p("new"), os.O_WRONLY | os.O_CREAT),
    "create what is there": lambda: os.open(p("small.json"), os.O_RDONLY | os.O_CREAT),
    "create anew what is there": lambda: os.open(p("small.json"), os.O_RDONLY | os.O_CREAT | os.O_EXCL),
    "create for reading": lambda: os.open(p("new"), os.O_RDONLY | os.O_CREAT),
    "create in what is not there": lambda: os.open(p("none/new"), os.O_WRONLY | os.O_CREAT),
    "temporary file": lambda: os.open(p("directory"), os.O_TMPFILE | os.O_WRONLY),
    "write a directory": lambda: os.open(p("directory"), os.O_WRONLY),
    "directory that is a file": lambda: os.open(p("small.json"), os.O_RDONLY | os.O_DIRECTORY),
    "link not followed": lambda: os.open(p("to-directory"), os.O_RDONLY | os.O_NOFOLLOW),
    "read a directory": lambda: os.read(os.open(p("directory"), os.O_RDONLY), 10),
    "unlink": lambda: os.unlink(p("small.json")),
    "unlink what is not there": lambda: os.unlink(p("none")),
    "unlink a directory": lambda: os.unlink(p("directory")),
    "unlink .": lambda: os.unlink(p(".")),
    "rename": lambda: os.rename(p("small.json"), p("new")),
    "rename over another": lambda: os.rename(p("small.json"), p("one.dat")),
    "rename to itself": lambda: os.rename(p("small.json"), p("small.json")),
    "rename what is not there": lambda: os.rename(p("none"), p("new")),
    "rename a directory into itself": lambda: os.rename(p("directory"), p("directory/sub/new")),
    "rename from elsewhere": lambda: os.rename("/dev/null", p("new")),
    "mkdir": lambda: os.mkdir(p("new")),
    "mkdir of what is there": lambda: os.mkdir(p("directory")),
    "mkdir in what is not there": lambda: os.mkdir(p("none/new")),
    "rmdir": lambda: os.rmdir(p("directory/sub")),
    "rmdir of a file": lambda: os.rmdir(p("small.json")),
    "rmdir of what is not there": lambda: os.rmdir(p("none")),
    "rmdir .": lambda: os.rmdir(p("directory/.")),
    "symlink": lambda: os.symlink("x", p("new")),
    "symlink over another": lambda: os.symlink("x", p("small.json")),
    "link": lambda: os.link(p("small.json"), p("new")),
    "link a directory": lambda: os.link(p("directory"), p("new")),
    "mknod": lambda: os.mknod(p("new"), 0o600 | stat.S_IFREG),
    "fifo": lambda: os.mkfifo(p("new")),
    "device": lambda: os.mknod(p("new"), 0o600 | stat.S_IFCHR, os.makedev(1, 3)),
    "chmod": lambda: os.chmod(p("small.json"), 0o600),
    "chown": lambda: os.chown(p("small.json"), 1, 1),
    "chown to nobody new": lambda: os.chown(p("small.json"), -1, -1),
    "utime": lambda: os.utime(p("small.json")),
    "utime to given times": lambda: os.utime(p("small.json"), (1, 1)),
    "fchmod": lambda: with_fd("small.json", lambda fd: os.fchmod(fd, 0o600)),
    "futime": lambda: with_fd("small.json", lambda fd: os.utime(fd)),
    "truncate": lambda: os.truncate(p("small.json"), 0),
    "truncate a directory": lambda: os.truncate(p("directory"), 0),
    "ftruncate": lambda: with_fd("small.json", lambda fd: os.ftruncate(fd, 0)),
    "write what is open for reading": lambda: with_fd("small.json", lambda fd: os.write(fd, b"x")),
    "fallocate": lambda: with_fd("small.json", lambda fd: os.posix_fallocate(fd, 0, 10)),
    "copy into it": copy_into_it,
    "setxattr": lambda: os.setxattr(p("small.json"), "user.x", b"1"),
    "removexattr": lambda: os.removexattr(p("small.json"), "user.x"),
    "getxattr that is not there": lambda: os.getxattr(p("small.json"), "user.none"),
    "trusted xattr": lambda: os.getxattr(p("small.json"), "trusted.none"),
    "shared writable map": lambda: with_fd("small.json", lambda fd: mmap.mmap(fd, 0)),
    "stat what is not there": lambda: os.stat(p("none")),
    "stat in what is not there": lambda: os.stat(p("none/none")),
    "stat in a file": lambda: os.stat(p("small.json/none")),
    "a file with a slash": lambda: os.stat(p("small.json/")),
    "a file with a slash and a dot": lambda: os.stat(p("small.json/.")),
    "open a file with a slash": lambda: os.open(p("small.json/"), os.O_RDONLY),
    "what is not there with a slash": lambda: os.stat(p("none/")),
    "mkdir with a slash": lambda: os.mkdir(p("new/")),
    "create with a slash": lambda: os.open(p("new/"), os.O_WRONLY | os.O_CREAT),
    "unlink with a slash": lambda: os.unlink(p("small.json/")),
    "a link to a directory with a slash": lambda: stat.S_ISDIR(os.lstat(p("to-directory/")).st_mode),
    "a link to a directory without": lambda: stat.S_ISLNK(os.lstat(p("to-directory")).st_mode),
    "up again": lambda: os.stat(p("directory/../small.json")).st_size,
    "no name": lambda: os.stat(""),
    "a long name": lambda: os.stat(p("n" * 256)),
    "a long name of something new": lambda: os.mkdir(p("n" * 256)),
    "the longest name": lambda: os.stat(p("directory/" + "n" * 255)).st_size,
    "a long path": lambda: os.stat(p("directory/" * 600)),
    "a path as long as can be": lambda: stat.S_ISDIR(os.stat(p("." + "/." * 1000)).st_mode),
    "a loop of links": lambda: os.stat(p("to-directory/../" * 60)),
    "links of a file": lambda: os.stat(p("small.json")).st_nlink,
    "links of a directory": lambda: os.stat(p("directory")).st_nlink,
    "links of a directory without others": lambda: os.stat(p("other")).st_nlink,
    "readlink of a file": lambda: os.readlink(p("small.json")),
    "readlink": lambda: os.readlink(p("to-directory")),
    "execute": lambda: os.execv(p("small.json"), ["x"]),
    "access to write": lambda: os.access(p("small.json"), os.W_OK),
    "access to execute": lambda: os.access(p("small.json"), os.X_OK),
    "access to search": lambda: os.access(p("directory"), os.X_OK),
    "seek behind the end": lambda: with_fd("small.json", lambda fd: os.lseek(fd, 9999, os.SEEK_DATA)),
    "the hole at the end": lambda: with_fd("small.json", lambda fd: os.lseek(fd, 0, os.SEEK_HOLE)),
    "data of an empty file": lambda: with_fd("empty", lambda fd: os.lseek(fd, 0, os.SEEK_DATA)),
    "seek before the beginning": lambda: with_fd("small.json", lambda fd: os.lseek(fd, -1, os.SEEK_SET)),
    "read behind the end": lambda: with_fd("small.json", lambda fd: os.pread(fd, 10, 9999)),
    "read before the beginning": lambda: with_fd("small.json", lambda fd: os.pread(fd, 10, -1)),
    "sync": lambda: with_fd("small.json", os.fsync),
    "sync data": lambda: with_fd("small.json", os.fdatasync),
    "sync a directory": lambda: with_fd("directory", os.fsync),
    "flock": lambda: with_fd("small.json", lambda fd: fcntl.flock(fd, 2)),
    "read lock": lambda: with_fd("small.json", lambda fd: fcntl.lockf(fd, 1)),
    "write lock": lambda: with_fd("small.json", lambda fd: fcntl.lockf(fd, 2)),
    "read-only": lambda: bool(os.statvfs(p("")).f_flag & os.ST_RDONLY),
    "the longest name there can be": lambda: os.statvfs(p("")).f_namemax,
}


def answer(call: Callable[[], Any]) -> Any:
    """Return what a call answers; an errno by its name."""
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


if __name__ == "__main__":
    for name, call in CALLS.items():
        print(f"{name}: {answer(call)}")

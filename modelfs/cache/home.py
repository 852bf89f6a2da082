"""The directory of a cache before anything is in it: whose it is, who uses it, which format it has."""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path

from modelfs.cache import disk
from modelfs.errors import CacheLocked, CacheUnusable

FORMAT = 1
"""Version of what lies in the directory; a higher one is not touched."""


def prepare(directory: Path) -> None:
    """Make `directory`, or see that it is ours and empty or a cache."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = directory.stat()
    if os.geteuid() not in (0, facts.st_uid):
        raise CacheUnusable(
            f"{directory} belongs to another user ({facts.st_uid}); name a directory of your own, "
            f"for example {directory / 'modelfs'}"
        )
    if not (directory / "format").exists():
        strangers = {path.name for path in directory.iterdir()} - {"lock", "format.new", "lost+found"}
        if strangers:
            raise CacheUnusable(
                f"{directory} holds something else ({min(strangers)!r}); name an empty or a new directory, "
                f"for example {directory / 'modelfs'}"
            )
    if facts.st_mode & 0o077:
        directory.chmod(0o700)


def lock(directory: Path) -> int:
    """Take the lock of `directory` for as long as the returned descriptor is open."""
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
            raise CacheLocked(
                f"{directory} is in use by process {holder}; stop it or name another directory as cache.dir",
                pid=int(holder) if holder.isdecimal() else None,
            ) from None
        os.ftruncate(fd, 0)
        disk.write(fd, memoryview(b"%d\n" % os.getpid()), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_format(directory: Path) -> None:
    """Write the version of the format into a new directory; raise CacheUnusable if it is another."""
    path = directory / "format"
    try:
        text = path.read_text(errors="replace").strip()
    except FileNotFoundError:
        disk.replace(path, b"%d\n" % FORMAT)
        return
    if text != str(FORMAT):
        raise CacheUnusable(
            f"{directory} is a cache of format {text[:20]!r}, this modelfs writes {FORMAT}; "
            "use the modelfs that wrote it, name another directory as cache.dir or remove this one"
        )


def boot() -> str:
    """Return the id of this boot of the machine; where there is none, one that no other call returns."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(uuid.uuid4())

"""The two files of an object: made, opened, replaced and removed.

The concurrency argument is in the docstring of :mod:`modelfs.cache`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path

from modelfs.cache import disk, table, verity
from modelfs.cache.generation import Block, Generation, Owner
from modelfs.types import BLOCK, block_count

_log = logging.getLogger(__name__)


def replaced(old: Generation) -> Generation:
    """Return a generation without blocks and with new files in place of those that `old` had."""
    old.die()
    return create(old.path.with_suffix(""), old.size, old.owner)


def create(stem: Path, size: int, owner: Owner) -> Generation:
    """Return a generation without blocks, its files in place of any that were there.

    If the disk refuses (it is full, broken, gone, or has no files of this size) the generation is volatile.
    """
    key, path = stem.name, stem.with_suffix(".data")
    now = Generation(path, size, owner)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        if size > 2**63 - 1:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        stem.parent.mkdir(mode=0o700, exist_ok=True)
        remove(stem)
        try:
            now.data = os.open(path, flags, 0o600 if size else 0o400)
            now.writable = True
            os.ftruncate(now.data, size)
            now.table = os.open(stem.with_suffix(".table"), flags, 0o600)
            disk.write(now.table, memoryview(table.header(size, verified=False)), 0)
        except OSError:
            remove(stem)
            raise
    except OSError as error:
        owner.metrics.cache_errors.inc()
        _log.warning("%s", disk.failure("make a file in the cache", path, error))
        owner.index.forget(key)
        return Generation(path, size, owner)
    now.row = owner.index.put(key, size=size, present=0, allocated=table.footprint(size), trusted=True)
    return now


def load(stem: Path, size: int, owner: Owner, *, used: bool = True) -> Generation:
    """Return the generation whose files are there; without blocks if there are none or they are damaged.

    Unless that is for it to be `used`, its place in the order of eviction stays.
    """
    row = owner.index.get(stem.name)
    now = Generation(stem.with_suffix(".data"), size, owner)
    try:
        _open_files(now, stem, trusted=row is not None and row.trusted)
    except FileNotFoundError:
        return create(stem, size, owner)
    except ValueError as error:
        owner.metrics.cache_errors.inc()
        _log.warning("%s: %s; it is removed from the cache", stem, error)
        return create(stem, size, owner)
    except OSError as error:
        owner.metrics.cache_errors.inc()
        _log.warning("%s", disk.failure("open a file in the cache", stem, error))
        return Generation(now.path, size, owner)
    present = table.present_bytes(now.blocks, size)
    allocated = present + table.footprint(size)
    now.row = owner.index.put(
        stem.name,
        size=size,
        present=present,
        allocated=allocated,
        trusted=not now.unchecked,
        used=used,
    )
    return now


def remove(stem: Path) -> None:
    """Remove the files of an object; the table first, for data without a table is nothing."""
    stem.with_suffix(".table").unlink(missing_ok=True)
    stem.with_suffix(".data").unlink(missing_ok=True)


def _open_files(now: Generation, stem: Path, *, trusted: bool) -> None:
    """Open the files of `now` and take in what the table says; ValueError if that cannot be used."""
    now.table, _ = _open(stem.with_suffix(".table"))
    content = table.parse(os.pread(now.table, os.fstat(now.table).st_size, 0))
    if content.size != now.size:
        raise ValueError(f"it has {content.size} bytes instead of {now.size}")
    now.data, now.writable = _open(now.path, writable=not content.complete)
    facts = os.fstat(now.data)
    if facts.st_size != now.size:
        raise ValueError("its data file has the wrong size")
    now.sealed = not now.writable and verity.is_enabled(now.data)
    if now.sealed and not content.complete:
        raise ValueError("it is sealed but not complete")
    now.verified = content.verified
    now.blocks = {block: Block(crc, checked=trusted) for block, crc in content.crcs.items()}
    now.unchecked = 0 if trusted else len(now.blocks)
    now.occupied = set(now.blocks)
    if now.writable and facts.st_blocks * 512 > table.present_bytes(now.blocks, now.size):
        # Blocks that were being written when the last session ended use space that nothing accounts for.
        last = -1
        for block in [*sorted(now.blocks), block_count(now.size)]:
            if block > last + 1:
                disk.punch(now.data, (last + 1) * BLOCK, (block - last - 1) * BLOCK)
            last = block


def _open(path: Path, *, writable: bool = True) -> tuple[int, bool]:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    if writable:
        try:
            return os.open(path, os.O_RDWR | flags), True
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
    fd = os.open(path, os.O_RDONLY | flags)
    if writable:
        # It was complete, and is protected against accidents: a daemon without capabilities cannot write.
        with contextlib.suppress(OSError):  # a disk gone read-only still serves what it has
            os.fchmod(fd, 0o600)
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
            os.close(fd)
            return again, True
    return fd, False

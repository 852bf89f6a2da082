"""The files of one object: made, opened, removed, and what is known about their bytes while they are open."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from modelfs.cache import disk, table
from modelfs.cache.index import Row
from modelfs.types import BLOCK, Span, block_count

_uses = itertools.count(1)


class Block:
    """A present block: its checksum, whether it was compared in this session, when it was last read."""

    __slots__ = ("checked", "crc", "used")

    def __init__(self, crc: int, *, checked: bool) -> None:
        self.crc = crc
        self.checked = checked
        self.touch()

    def touch(self) -> None:
        """Make this the block that was read last."""
        self.used = next(_uses)


class Generation:
    """The two files behind an object from one discard to the next, and what is known about their bytes.

    The files stay open as long as anybody holds the generation, so that an operation that still runs when
    the object is closed or discarded never meets a reused file descriptor.

    Attributes:
        data: descriptor of the data file; -1 if there is no place on disk ("volatile").
        table: descriptor of the block table.
        writable: whether `data` can be written.
        row: of the index; None if volatile.
        blocks: present blocks.
        arrived: per block that is being written, the spans whose bytes are in the file.
        occupied: blocks that (may) use disk space.
        unchecked: how many blocks are present but must be checked before they are served.
        verified: whether the content matched its published digest.
        tainted: whether the table on disk may claim a block that is not there.
        lent: how many loans let somebody else read the data file.
        epoch: counts the moments at which blocks began or finished to disappear.
        dead: whether the files are no longer this generation's to change.
        lock: taken by every change of the above; reading them takes none.

    """

    def __init__(self) -> None:
        self.data = -1
        self.table = -1
        self.writable = False
        self.row: Row | None = None
        self.blocks: dict[int, Block] = {}
        self.arrived: dict[int, tuple[Span, ...]] = {}
        self.occupied: set[int] = set()
        self.unchecked = 0
        self.verified = False
        self.tainted = False
        self.lent = 0
        self.epoch = 0
        self.dead = False
        self.lock = threading.RLock()
        self._superseded = -1

    def __del__(self) -> None:
        for fd in (self.data, self.table, self._superseded):
            if fd >= 0:
                os.close(fd)

    def make_writable(self) -> None:
        """Open the data file of an object that was complete for writing, once; `lock` is held."""
        if not self.writable:
            os.fchmod(self.data, 0o600)
            # The old descriptor stays open: a read in another thread may be using it.
            self._superseded = self.data
            self.data = os.open(f"/proc/self/fd/{self.data}", os.O_RDWR | os.O_CLOEXEC)
            self.writable = True


def create(stem: Path, size: int) -> Generation:
    """Make the files of an object without blocks, in place of any that are there.

    Raises:
        OSError: also if the file system has no files of this size.

    """
    if size > 2**63 - 1:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    now = Generation()
    stem.parent.mkdir(mode=0o700, exist_ok=True)
    remove(stem)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        now.data = os.open(stem.with_suffix(".data"), flags, 0o600 if size else 0o400)
        now.writable = True
        os.ftruncate(now.data, size)
        now.table = os.open(stem.with_suffix(".table"), flags, 0o600)
        disk.write(now.table, memoryview(table.header(size, verified=False)), 0)
    except OSError:
        remove(stem)
        raise
    return now


def load(stem: Path, size: int, *, trusted: bool) -> Generation | None:
    """Open the files of an object, or return None if there are none.

    Raises:
        ValueError: they are damaged, or those of an object of another size.
        OSError: they cannot be opened or read.

    """
    now = Generation()
    try:
        now.table, _ = _open(stem.with_suffix(".table"))
        content = table.parse(os.pread(now.table, os.fstat(now.table).st_size, 0))
        if content.size != size:
            raise ValueError(f"it has {content.size} bytes instead of {size}")
        now.data, now.writable = _open(stem.with_suffix(".data"), writable=not content.complete)
    except FileNotFoundError:
        return None
    if os.fstat(now.data).st_size != size:
        raise ValueError("its data file has the wrong size")
    now.verified = content.verified
    now.blocks = {block: Block(crc, checked=trusted) for block, crc in content.crcs.items()}
    now.unchecked = 0 if trusted else len(now.blocks)
    now.occupied = set(now.blocks)
    if not trusted and now.writable:
        # Blocks that were being written when the last session ended use space that nothing accounts for.
        end = block_count(size)
        last = -1
        for block in [*sorted(now.blocks), end]:
            if block > last + 1:
                disk.punch(now.data, (last + 1) * BLOCK, (block - last - 1) * BLOCK)
            last = block
    return now


def remove(stem: Path) -> None:
    """Remove the files of an object; the table first, for data without a table is nothing."""
    stem.with_suffix(".table").unlink(missing_ok=True)
    stem.with_suffix(".data").unlink(missing_ok=True)


def _open(path: Path, *, writable: bool = True) -> tuple[int, bool]:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    if writable:
        try:
            return os.open(path, os.O_RDWR | flags), True
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
    return os.open(path, os.O_RDONLY | flags), False  # a disk gone read-only still serves what it has


def merged(spans: Iterable[Span], new: Span) -> tuple[Span, ...]:
    """Return `spans` (disjoint, not touching) with `new` added, again sorted, disjoint and not touching."""
    start, stop = new.start, new.stop
    apart = []
    for span in spans:
        if span.stop < start or stop < span.start:
            apart.append(span)
        else:
            start, stop = min(start, span.start), max(stop, span.stop)
    return tuple(sorted([*apart, Span(start, stop)]))

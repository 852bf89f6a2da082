"""The files of one object: made, opened, changed, removed, and what is known about their bytes.

The concurrency argument is in the docstring of :mod:`modelfs.cache`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from modelfs.cache import disk, table
from modelfs.cache.index import Index, Row
from modelfs.errors import CacheError
from modelfs.metrics import Metrics
from modelfs.types import BLOCK, Hasher, Span, block_count, block_span, crc32c

_log = logging.getLogger(__name__)
_uses = itertools.count(1)


class Owner(Protocol):
    """What the files of an object need of the cache they belong to."""

    metrics: Metrics
    index: Index

    def reserve(self, row: Row, length: int) -> None:
        """Count `length` bytes more for `row`; evict for them if need be.

        Raises:
            CacheError: there is no room and none can be made.

        """


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
    """The two files behind an object from one opening or discard to the next.

    They stay open as long as anybody holds the generation, so that an operation that still runs when the
    object is closed or discarded never meets a reused file descriptor. Made volatile, without files;
    :func:`create` and :func:`load` make others.

    Attributes:
        size: bytes of the whole object.
        path: of the data file.
        data: descriptor of the data file; -1 if volatile.
        table: descriptor of the block table; -1 if volatile.
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

    def __init__(self, path: Path, size: int, owner: Owner) -> None:
        self.path = path
        self.size = size
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
        self._owner = owner
        self._count = block_count(size)
        self._superseded = -1

    def __del__(self) -> None:
        for fd in (self.data, self.table, self._superseded):
            if fd >= 0:
                os.close(fd)

    # Looking.

    @property
    def complete(self) -> bool:
        """Whether every block is present. Loop-safe."""
        return len(self.blocks) == self._count

    def covers(self, span: Span) -> bool:
        """Return whether each byte of `span` is in a present block or was written. Loop-safe."""
        for block in span.blocks():
            if block in self.blocks:
                continue
            whole = block_span(block, self.size)
            start, stop = max(whole.start, span.start), min(whole.stop, span.stop)
            extents = self.arrived.get(block, ())
            # A commit between the two looks moves the block from the second place to the first.
            if not any(e.start <= start and stop <= e.stop for e in extents) and block not in self.blocks:
                return False
        return True

    def doubtful(self, span: Span) -> list[int]:
        """Return the blocks of `span` that are present but must be checked first. Loop-safe."""
        if not self.unchecked:
            return []
        found = ((block, self.blocks.get(block)) for block in span.blocks())
        return [block for block, record in found if record is not None and not record.checked]

    def touch(self, span: Span) -> None:
        """Note that the blocks of `span` were read. Loop-safe."""
        for block in span.blocks():
            record = self.blocks.get(block)
            if record is not None:
                record.touch()

    # Reading. The caller compares epochs, or the Block before and after.

    def read(self, span: Span) -> bytes:
        """Return what the file holds at `span`.

        Raises:
            CacheError: not all of it is covered, or it cannot be read; then its blocks are dropped.

        """
        if not self.covers(span):
            raise CacheError(
                f"{self.path}: bytes {span.start} to {span.stop} are not in the cache; fetch them"
            )
        try:
            return disk.read(self.data, span)
        except OSError as error:
            self.drop(span.blocks())
            raise self._failure("read from the cache", error) from error

    def check(self, block: int, hasher: Hasher | None = None, *, afresh: bool = False) -> bool | None:
        """Compare `block` with its checksum; return whether it is good, None if it is not there (any more).

        A bad one is dropped.

        Args:
            block: its index.
            hasher: takes in the bytes, good or bad.
            afresh: read from the disk and not from the page cache.

        """
        record = self.blocks.get(block)
        if record is None:
            return None
        try:
            crc = 0
            for part in disk.chunks(self.data, block_span(block, self.size), afresh=afresh):
                crc = crc32c(part, crc)
                if hasher is not None:
                    hasher.update(part)
            good = crc == record.crc
        except OSError as error:
            _log.warning("%s", self._failure(f"read block {block}", error))
            good = False
        if afresh:
            self._owner.metrics.verified_bytes.inc(len(block_span(block, self.size)))
        with self.lock:
            if self.blocks.get(block) is not record:
                return None  # it disappeared meanwhile, so what was read says nothing
            if good:
                if not record.checked:
                    record.checked = True
                    self.unchecked -= 1
                return True
            self._owner.metrics.bad_blocks.inc()
            _log.warning("%s: block %d does not match its checksum; %s", self.path, block, _again(1))
            self.drop([block])
            return False

    def check_table(self) -> list[int]:
        """Compare the table on the disk with what is known; return the blocks it lost, which are dropped."""
        with self.lock:
            if self.row is None or self.dead:
                return []
            try:
                crcs = table.parse(os.pread(self.table, os.fstat(self.table).st_size, 0)).crcs
            except OSError as error:
                _log.warning("%s", self._failure("read a block table", error))
                return []
            except ValueError:
                crcs = {}
            lost = [block for block, record in self.blocks.items() if crcs.get(block) != record.crc]
            if lost:
                self._owner.metrics.bad_blocks.inc(len(lost))
                _log.warning("%s: the block table is damaged; %s", self.path, _again(len(lost)))
                self.drop(lost)
                with contextlib.suppress(OSError):  # then the next opening removes it
                    disk.write(self.table, memoryview(table.header(self.size, verified=False)), 0)
            return lost

    # Writing.

    def write(self, block: int, part: Span, data: memoryview) -> None:
        """Put `data` at `part`, which lies in `block`, unless that is present.

        Raises:
            CacheError: the disk is full, broken or gone.

        """
        while block not in self.blocks:
            self._occupy(block)
            epoch = self.epoch
            with self._disk_errors("write to the cache"):
                disk.write(self.data, data, part.start)
            with self.lock:
                # Else something disappeared meanwhile, perhaps these very bytes: write them again.
                if self.epoch == epoch and block in self.occupied:
                    if block not in self.blocks:
                        self.arrived[block] = merged(self.arrived.get(block, ()), part)
                    return

    def commit(self, block: int) -> None:
        """Make `block` present, all of whose bytes have been written.

        Raises:
            CacheError: bytes are missing, or the disk is full, broken or gone.

        """
        span = block_span(block, self.size)
        while block not in self.blocks:
            extents = self.arrived.get(block)
            if extents != (span,):
                raise CacheError(f"{self.path}: block {block} is not all written; fetch it again")
            with self._disk_errors("write to the block table"):
                crc = disk.crc(self.data, span)
                with self.lock:
                    if self.arrived.get(block) is extents:
                        self._record(block, crc)

    def conclude(self, matches: bool, epoch: int) -> None:
        """Count that the content was compared with its published digest, and note it if it `matches`.

        It is noted only of a complete object of which nothing was dropped since `epoch`.
        """
        self._owner.metrics.verified.labels("match" if matches else "mismatch").inc()
        with self.lock:
            if not (matches and self.complete and self.epoch == epoch) or self.row is None or self.dead:
                return
            if self.verified:
                return
            self.verified = True
            try:
                disk.write(self.table, memoryview(table.header(self.size, verified=True)), 0)
            except OSError as error:  # then it is verified again in the next session
                _log.warning("%s", self._failure("write to the block table", error))

    # Taking away.

    def drop(self, blocks: Iterable[int]) -> int:
        """Make `blocks` absent: in memory, then in the table, then in the data; return the bytes freed."""
        freed = 0
        with self.lock:
            gone = [block for block in blocks if block in self.blocks or block in self.arrived]
            dropped = [(block, self.blocks.pop(block)) for block in gone if block in self.blocks]
            for block in gone:
                self.arrived.pop(block, None)
            self.unchecked -= sum(not record.checked for _, record in dropped)
            self.epoch += 1
            if gone and self.row is not None and not self.dead:
                lost = sum(len(block_span(block, self.size)) for block, _ in dropped)
                self._owner.index.change(self.row, present=-lost)
                try:
                    self._erase([block for block, _ in dropped])
                    self._make_writable()
                    if not self.lent:  # the reader of a loan would see zeros
                        freed = sum(self._release(block) for block in gone)
                except OSError as error:
                    self.tainted = True
                    _log.warning("%s", self._failure("remove a block", error))
            self.epoch += 1
        return freed

    def retire(self, *, used: bool = True) -> None:
        """Change the files no more, and leave them and the index as the next opening wants them.

        Unless the object was `used`, its place in the order of eviction stays.
        """
        with self.lock:
            self._die()
            row = self.row
            if row is None:
                return
            with contextlib.suppress(OSError):  # what is not given back now is at the next unclean start
                for block in self.occupied - self.blocks.keys():
                    self._release(block)
            row.trusted = not self.unchecked and not self.tainted
            if not used:
                return
            self._owner.index.touch(row)
            with contextlib.suppress(OSError):  # only the order of eviction after an unclean stop needs it
                os.utime(self.table, ns=(row.stamp, row.stamp))

    def replace(self) -> Generation:
        """Change the files no more, and return a generation without blocks, with new files in their place."""
        with self.lock:
            self._die()
        return create(self.path.with_suffix(""), self.size, self._owner)

    def without_files(self) -> Generation:
        """Return a volatile generation of the same object."""
        return Generation(self.path, self.size, self._owner)

    # How.

    def _die(self) -> None:
        self.dead = True
        self.epoch += 1

    def _failure(self, doing: str, error: OSError) -> CacheError:
        self._owner.metrics.cache_errors.inc()
        return disk.failure(doing, self.path, error)

    @contextlib.contextmanager
    def _disk_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failure(doing, error) from error

    def _occupy(self, block: int) -> None:
        """Reserve the space of `block`. Takes no lock while it evicts: that may punch this very object."""
        if block in self.occupied and not self.dead:
            return
        if self.row is None:
            raise CacheError(f"{self.path}: there is no place for it on the cache disk; check this disk")
        length = len(block_span(block, self.size))
        self._owner.reserve(self.row, length)
        with self.lock:
            if not self.dead and block not in self.occupied:
                self.occupied.add(block)
                return
        self._owner.index.change(self.row, allocated=-length)  # another thread was faster
        self._check_alive()

    def _check_alive(self) -> None:
        if self.dead:
            raise CacheError(f"{self.path}: the object was closed or discarded meanwhile; fetch it again")

    def _record(self, block: int, crc: int) -> None:
        """Write the record of `block` and make it present; the lock is held."""
        self._check_alive()
        disk.write(self.table, memoryview(table.record(block, crc)), table.record_offset(block))
        self.blocks[block] = Block(crc, checked=True)
        del self.arrived[block]
        if self.row is not None:
            self._owner.index.change(self.row, present=len(block_span(block, self.size)))
        if self.complete:
            with contextlib.suppress(OSError):  # only a protection against accidents
                os.fchmod(self.data, 0o400)

    def _erase(self, blocks: list[int]) -> None:
        """Take `blocks` out of the table on disk."""
        if self.verified:
            self.verified = False
            disk.write(self.table, memoryview(table.header(self.size, verified=False)), 0)
        for block in blocks:
            disk.write(self.table, memoryview(table.ABSENT), table.record_offset(block))

    def _make_writable(self) -> None:
        """Open the data file of an object that was complete for writing, once."""
        if not self.writable:
            os.fchmod(self.data, 0o600)
            writable = os.open(f"/proc/self/fd/{self.data}", os.O_RDWR | os.O_CLOEXEC)
            # The old descriptor stays open: a read in another thread may be using it.
            self._superseded, self.data, self.writable = self.data, writable, True

    def _release(self, block: int) -> int:
        """Give the space of `block` back; return how much that is."""
        if self.row is None or block not in self.occupied or not disk.punch(self.data, block * BLOCK, BLOCK):
            return 0
        self.occupied.remove(block)
        length = len(block_span(block, self.size))
        self._owner.index.change(self.row, allocated=-length)
        return length


def _again(count: int) -> str:
    return "it will be fetched again" if count == 1 else f"{count} blocks will be fetched again"


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

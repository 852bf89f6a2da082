"""The files of one object while they are open: what is known about their bytes, and how that changes.

The concurrency argument is in the docstring of :mod:`modelfs.cache`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from modelfs.cache import disk, table, verity
from modelfs.cache.index import Index, Row
from modelfs.errors import CacheError
from modelfs.metrics import Metrics
from modelfs.types import BLOCK, Hasher, Span, block_count, block_span, crc32c

_log = logging.getLogger(__name__)
_uses = itertools.count(1)


class Owner(Protocol):
    """What the files of an object need of the cache they belong to.

    Attributes:
        metrics: what is counted.
        index: what all objects amount to.
        unsealable: why no file can have fs-verity here; None if it can.

    """

    metrics: Metrics
    index: Index
    unsealable: str | None

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
    :mod:`modelfs.cache.files` makes others.

    Attributes:
        size: bytes of the whole object.
        path: of the data file.
        owner: the cache.
        data: descriptor of the data file; -1 if volatile.
        table: descriptor of the block table; -1 if volatile.
        writable: whether `data` can be written.
        sealed: whether the kernel checks the data file (fs-verity), and lets nobody change it any more.
        row: of the index; None if volatile.
        blocks: present blocks.
        arrived: per block that is being written, the spans whose bytes are in the file.
        occupied: blocks that (may) use disk space.
        unchecked: how many blocks are present but must be checked before they are served.
        verified: whether the content matched its published digest.
        tainted: whether the table on disk may claim a block that is not there.
        lent: how many loans let somebody else read the data file.
        epoch: counts the moments at which blocks began or finished to disappear.
        dropped: the same per block that was dropped.
        dead: whether the files are no longer this generation's to change.
        lock: taken by every change of the above; reading them takes none.

    """

    def __init__(self, path: Path, size: int, owner: Owner) -> None:
        self.path = path
        self.size = size
        self.data = -1
        self.table = -1
        self.writable = False
        self.sealed = False
        self.row: Row | None = None
        self.blocks: dict[int, Block] = {}
        self.arrived: dict[int, tuple[Span, ...]] = {}
        self.occupied: set[int] = set()
        self.unchecked = 0
        self.verified = False
        self.tainted = False
        self.lent = 0
        self.epoch = 0
        self.dropped: dict[int, int] = {}
        self.dead = False
        self.lock = threading.RLock()
        self.owner = owner
        self._count = block_count(size)

    def __del__(self) -> None:
        for fd in (self.data, self.table):
            if fd >= 0:
                os.close(fd)

    # Looking.

    @property
    def complete(self) -> bool:
        """Whether every block is present. Loop-safe."""
        return len(self.blocks) == self._count

    @property
    def linked(self) -> bool:
        """Whether the data file has a name outside of the cache, so that its bytes must stay."""
        return self.data >= 0 and os.fstat(self.data).st_nlink > 1

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

    def gaps(self, block: int) -> list[Span]:
        """Return the spans of `block` that were not written, in their order; none if present. Loop-safe."""
        whole = block_span(block, self.size)
        extents = (whole,) if block in self.blocks else self.arrived.get(block, ())
        starts = [whole.start, *(extent.stop for extent in extents)]
        stops = [*(extent.start for extent in extents), whole.stop]
        return [Span(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]

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
            self.owner.metrics.verified_bytes.inc(len(block_span(block, self.size)))
        with self.lock:
            if self.blocks.get(block) is not record:
                return None  # it disappeared meanwhile, so what was read says nothing
            if good:
                if not record.checked:
                    record.checked = True
                    self.unchecked -= 1
                return True
            self.owner.metrics.bad_blocks.inc()
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
                self.owner.metrics.bad_blocks.inc(len(lost))
                _log.warning("%s: the block table is damaged; %s", self.path, _again(len(lost)))
                self.drop(lost)
                with contextlib.suppress(OSError):  # then the next opening removes it
                    disk.write(self.table, memoryview(table.header(self.size, verified=False)), 0)
            return lost

    # Writing.

    def write(self, block: int, part: Span, data: memoryview | disk.Pipe) -> None:
        """Put `data`, or the next bytes of a pipe, at `part`, which lies in `block`, unless that is present.

        Raises:
            CacheError: the disk is full, broken or gone, or what was written disappeared meanwhile and the
                pipe does not have it any more.

        """
        while block not in self.blocks:
            self._occupy(block)
            before = self.dropped.get(block, 0)
            with self._disk_errors("write to the cache"):
                if isinstance(data, disk.Pipe):
                    data.move(self.data, part.start, len(part))
                else:
                    disk.write(self.data, data, part.start)
            with self.lock:
                # Else the block was dropped meanwhile, perhaps with these very bytes: write them again.
                if self.dropped.get(block, 0) == before and block in self.occupied and not self.dead:
                    if block not in self.blocks:
                        self.arrived[block] = merged(self.arrived.get(block, ()), part)
                    return
            if isinstance(data, disk.Pipe):
                self._check_alive()
                raise CacheError(f"{self.path}: block {block} was dropped while it came in; fetch it again")
        if isinstance(data, disk.Pipe):
            data.take(len(part))

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
        """Count that the content was compared with its published digest; note and seal it if it `matches`.

        That is done only to a complete object of which nothing was dropped since `epoch`.
        """
        self.owner.metrics.verified.labels("match" if matches else "mismatch").inc()
        with self.lock:
            if not (matches and self.complete and self.epoch == epoch) or self.row is None or self.dead:
                return
            sealing = self._begin_seal()  # first: who borrows a verified file shall not be able to write it
            if not self.verified:
                self.verified = True
                try:
                    disk.write(self.table, memoryview(table.header(self.size, verified=True)), 0)
                except OSError as error:  # then it is verified again in the next session
                    _log.warning("%s", self._failure("write to the block table", error))
        if sealing >= 0:
            self._seal(sealing)

    # Sealing.

    def _begin_seal(self) -> int:
        """Prepare the data file for fs-verity; return a descriptor for `_seal`, -1 if that cannot be.

        From here on the file counts as sealed, so that nobody changes it meanwhile.
        """
        if self.owner.unsealable is not None or self.sealed or not self.size:
            return -1
        try:
            if self.writable:
                self._reopen(os.O_RDONLY)
                self.writable = False
            sealing = os.dup(self.data)
        except OSError as error:
            _log.info("%s: not sealed: %s", self.path, error.strerror)
            return -1
        self.sealed = True
        return sealing

    def _seal(self, sealing: int) -> None:
        """Enable fs-verity, which reads the whole file; no lock is held. Closes the descriptor."""
        try:
            before = os.fstat(sealing)
            refused = None
            try:
                os.fchmod(sealing, 0o600)  # the kernel asks whether we could write
                try:
                    verity.enable(sealing)
                finally:
                    os.fchmod(sealing, 0o400)
            except OSError as error:
                refused = error
                _log.info("%s: not sealed: %s", self.path, error.strerror)
            with self.lock:
                after = os.fstat(sealing)
                if not self.sealed or os.fstat(self.data).st_ino != after.st_ino:
                    return  # it has been replaced
                if refused is not None:
                    self.sealed = False
                elif self.row is not None:
                    self.owner.index.change(self.row, allocated=(after.st_blocks - before.st_blocks) * 512)
        finally:
            os.close(sealing)

    # Taking away.

    def drop(self, blocks: Iterable[int]) -> int:
        """Make `blocks` absent: in memory, then in the table, then in the data; return the bytes freed.

        A sealed object loses all of its blocks with any: its file cannot be changed, only replaced.
        """
        freed = 0
        with self.lock:
            gone = [block for block in blocks if block in self.blocks or block in self.arrived]
            if gone and self.sealed:
                gone = list(self.blocks)
            dropped = [(block, self.blocks.pop(block)) for block in gone if block in self.blocks]
            for block in gone:
                self.arrived.pop(block, None)
            self.unchecked -= sum(not record.checked for _, record in dropped)
            self._count_drop(gone)
            if gone and self.row is not None and not self.dead:
                lost = sum(len(block_span(block, self.size)) for block, _ in dropped)
                self.owner.index.change(self.row, present=-lost)
                try:
                    self._erase([block for block, _ in dropped])
                    if self.sealed:
                        freed = self._unseal()
                    else:
                        self._make_writable()
                        if not self.lent:  # the reader of a loan would see zeros
                            freed = sum(self._release(block) for block in gone)
                except OSError as error:
                    self.tainted = True
                    _log.warning("%s", self._failure("remove a block", error))
            self._count_drop(gone)
        return freed

    def retire(self, *, used: bool = True) -> None:
        """Change the files no more, and leave them and the index as the next opening wants them.

        Unless the object was `used`, its place in the order of eviction stays.
        """
        with self.lock:
            self.die()
            row = self.row
            if row is None:
                return
            with contextlib.suppress(OSError):  # what is not given back now is at the next unclean start
                for block in self.occupied - self.blocks.keys():
                    self._release(block)
            row.trusted = not self.unchecked and not self.tainted
            if not used:
                return
            self.owner.index.touch(row)
            with contextlib.suppress(OSError):  # only the order of eviction after an unclean stop needs it
                os.utime(self.table, ns=(row.stamp, row.stamp))

    def die(self) -> None:
        """Change the files no more."""
        with self.lock:
            self.dead = True
            self.epoch += 1

    def without_files(self) -> Generation:
        """Return a volatile generation of the same object."""
        return Generation(self.path, self.size, self.owner)

    # How.

    def _count_drop(self, blocks: Iterable[int]) -> None:
        self.epoch += 1
        for block in blocks:
            self.dropped[block] = self.dropped.get(block, 0) + 1

    def _failure(self, doing: str, error: OSError) -> CacheError:
        self.owner.metrics.cache_errors.inc()
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
        self.owner.reserve(self.row, length)
        with self.lock:
            if not self.dead and block not in self.occupied:
                self.occupied.add(block)
                return
        self.owner.index.change(self.row, allocated=-length)  # another thread was faster
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
            self.owner.index.change(self.row, present=len(block_span(block, self.size)))
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
        """Open the data file of an object that was complete for writing."""
        if not self.writable:
            os.fchmod(self.data, 0o600)
            self._reopen(os.O_RDWR)
            self.writable = True

    def _reopen(self, access: int) -> None:
        """Open the data file in another way, under the same descriptor: others may be using it."""
        fd = os.open(f"/proc/self/fd/{self.data}", access | os.O_CLOEXEC)
        self._become(fd)

    def _become(self, fd: int) -> None:
        """Let the descriptor of the data file stand for what `fd` does, which is closed."""
        try:
            os.dup2(fd, self.data, inheritable=False)
        finally:
            os.close(fd)

    def _unseal(self) -> int:
        """Put a new data file in the place of a sealed one, all of whose blocks are gone; return bytes freed.

        Who reads the old one through a loan goes on.
        """
        if self.row is None:
            return 0
        self.path.unlink(missing_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, self.size)
        self._become(fd)
        self.sealed, self.writable = False, True
        self.occupied.clear()
        freed = self.row.allocated - table.footprint(self.size)
        self.owner.index.change(self.row, allocated=-freed)
        return freed

    def _release(self, block: int) -> int:
        """Give the space of `block` back; return how much that is."""
        if self.row is None or block not in self.occupied or not disk.punch(self.data, block * BLOCK, BLOCK):
            return 0
        self.occupied.remove(block)
        length = len(block_span(block, self.size))
        self.owner.index.change(self.row, allocated=-length)
        return length


def _again(count: int) -> str:
    return "it will be fetched again" if count == 1 else f"{count} blocks will be fetched again"


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

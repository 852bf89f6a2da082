"""One object on disk: its blocks come and go here, and every byte a reader gets passes through here.

The concurrency argument is in the docstring of :mod:`modelfs.cache`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from modelfs.cache import disk, table
from modelfs.cache.files import Block, Generation, create, merged
from modelfs.cache.index import Index, Row
from modelfs.errors import CacheError
from modelfs.metrics import Metrics
from modelfs.types import BLOCK, Digest, Span, block_count, block_span

_log = logging.getLogger(__name__)


class Owner(Protocol):
    """What an object needs of the cache it belongs to."""

    metrics: Metrics
    index: Index

    def reserve(self, row: Row, length: int) -> None:
        """Count `length` bytes more for `row`; evict for them if need be.

        Raises:
            CacheError: there is no room and none can be made.

        """

    def forget_open(self, item: CacheObject) -> None:
        """Take note that nobody has `item` open any more; called with the object's guard held."""


class CacheObject:
    """The content of one object, as far as it is on this disk; shared by everybody who has it open.

    :meth:`modelfs.cache.Cache.object` makes it; every such call is matched by one :meth:`close`.

    Methods marked *loop-safe* take microseconds, wait for no lock and no disk. All others belong in a thread.
    None takes part in cancellation: a thread that was given up finishes its operation harmlessly, also
    after the object was closed.

    A **volatile** object has no place on the disk: it holds nothing, and :meth:`write` raises.

    Attributes:
        key: the content's name.
        size: bytes of the whole content.
        path: of the data file; meaningful while the object is open and not discarded.

    """

    def __init__(
        self, key: str, size: int, path: Path, generation: Generation, guard: threading.Lock, owner: Owner
    ) -> None:
        self.key = key
        self.size = size
        self.path = path
        self._now = generation
        self._guard = guard
        self._owner = owner
        self._count = block_count(size)
        self._refs = 1

    def __repr__(self) -> str:
        return f"<CacheObject {self.key} {self.cached_bytes} of {self.size} bytes>"

    # What is there. All loop-safe.

    @property
    def volatile(self) -> bool:
        """Whether the object has no place on the disk. Loop-safe."""
        return self._now.data < 0

    @property
    def cached_bytes(self) -> int:
        """Bytes of all present blocks. Loop-safe."""
        row = self._now.row
        return row.present if row else 0

    @property
    def complete(self) -> bool:
        """Whether every block is present. Loop-safe."""
        return len(self._now.blocks) == self._count

    @property
    def verified(self) -> bool:
        """Whether the complete content matched its published digest, in whatever session. Loop-safe."""
        return self._now.verified

    @property
    def unchecked(self) -> int:
        """How many present blocks must be compared with their checksum before they are served. Loop-safe."""
        return self._now.unchecked

    @property
    def lent(self) -> bool:
        """Whether somebody reads the data file without us, so that its bytes must stay. Loop-safe."""
        return self._now.lent > 0

    def has(self, block: int) -> bool:
        """Return whether `block` is present. Loop-safe."""
        return block in self._now.blocks

    def missing(self, blocks: Iterable[int]) -> list[int]:
        """Return those of `blocks` that are not present, in their order. Loop-safe."""
        present = self._now.blocks
        return [block for block in blocks if block not in present]

    def covers(self, span: Span) -> bool:
        """Return whether :meth:`read` can serve `span`. Loop-safe.

        That is: each of its bytes lies in a present block or was written in this session.
        """
        return self._covers(self._now, span)

    def last_use(self) -> list[tuple[int, int]]:
        """Return ``(tick, block)`` of all present blocks; a block with a smaller tick was read longer ago."""
        now = self._now
        with now.lock:
            return [(record.used, block) for block, record in now.blocks.items()]

    # Reading.

    def read_now(self, span: Span) -> bytearray | None:
        """Return the bytes of `span` if that needs no waiting, else None. Loop-safe.

        None also means that a block is absent or waits for its check, or that the file system cannot tell
        whether it would wait (tmpfs).
        """
        self._check_span(span)
        now = self._now
        epoch = now.epoch
        for block in span.blocks():
            record = now.blocks.get(block)
            if record is not None and not record.checked:
                return None
        if not self._covers(now, span):
            return None
        data = disk.read_resident(now.data, span)
        if data is None or now.epoch != epoch:
            return None
        self._touch(now, span)
        return data

    def read(self, span: Span) -> bytes:
        """Return the bytes of `span`, which may come from memory or disk.

        Raises:
            CacheError: a block is absent, failed its check or cannot be read. In the last two cases it
                has been dropped: fetch it again.

        """
        self._check_span(span)
        while True:
            now = self._now
            epoch = now.epoch
            for block in span.blocks():
                record = now.blocks.get(block)
                if record is not None and not record.checked:
                    self._check(now, block)
            data = self._read(now, span)
            if now.epoch == epoch:
                self._touch(now, span)
                return data

    def check(self, block: int) -> bool:
        """Read `block` and compare it with its checksum; a bad one is dropped.

        Returns whether the block is present and good.
        """
        return self._check(self._now, block)

    def lend(self) -> Loan:
        """Let somebody read the data file without us, for example the kernel.

        Until the loan is closed the object counts as open and no byte of the file goes away. Whether an
        object may be lent that is not `verified` is for the caller to decide.

        Raises:
            CacheError: a block is absent or unchecked.

        """
        with self._guard:
            now = self._now
            with now.lock:
                if now.data < 0 or now.unchecked or len(now.blocks) != self._count:
                    raise CacheError(
                        f"{self.path}: not all of it is here and checked; read it through the cache"
                    )
                now.lent += 1
            self._refs += 1
        return Loan(self, now)

    # Writing.

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put the bytes `data` at `offset`; they can be read from now on, and are kept after :meth:`commit`.

        Bytes for blocks that are already present are not written: equal keys mean equal bytes.

        Raises:
            CacheError: the disk is full, broken or gone.

        """
        view = memoryview(data).cast("B")
        span = Span(offset, offset + len(view))
        self._check_span(span)
        now = self._now
        with self._disk_errors("write to the cache"):
            for block in span.blocks():
                whole = block_span(block, self.size)
                part = Span(max(whole.start, span.start), min(whole.stop, span.stop))
                self._write(now, block, part, view[part.start - offset : part.stop - offset])

    def commit(self, block: int) -> None:
        """Make `block`, all of whose bytes have been written, present.

        Its checksum is taken from the file, and its record in the table is written after that.

        Raises:
            CacheError: bytes of the block are missing, or the disk is full, broken or gone.

        """
        now = self._now
        span = block_span(block, self.size)
        with self._disk_errors("write to the block table"):
            while block not in now.blocks:
                extents = now.arrived.get(block)
                if extents != (span,):
                    raise CacheError(f"{self.path}: block {block} is not all written; fetch it again")
                crc = disk.crc(now.data, span)
                with now.lock:
                    if now.arrived.get(block) is extents:
                        self._record(now, block, crc)

    def punch(self, blocks: Iterable[int]) -> int:
        """Make `blocks` absent and give their disk space back; returns the bytes freed.

        Nothing happens to an object that is lent. On a file system without holes nothing is freed.
        """
        now = self._now
        return 0 if now.lent else self._drop(now, blocks)

    def discard(self) -> None:
        """Make all blocks absent, for everybody who has the object open.

        The files are replaced by new ones; whoever reads through a loan goes on with the old.
        A disk that does not allow it leaves the object volatile.
        """
        with self._guard:
            if self._now.row is None:
                return
            old, self._now = self._now, Generation()
            with old.lock:
                old.dead = True
                old.epoch += 1
            self._now = self.start_over(self.key, self.size, self.path.with_suffix(""), self._owner)

    @staticmethod
    def start_over(key: str, size: int, stem: Path, owner: Owner) -> Generation:
        """Return a generation without blocks, a volatile one if the disk refuses; the guard is held."""
        try:
            now = create(stem, size)
        except OSError as error:
            owner.metrics.cache_errors.inc()
            _log.warning("%s", disk.failure("make a file in the cache", stem, error))
            owner.index.forget(key)
            return Generation()
        used = table.footprint(size)
        now.row = owner.index.put(key, size=size, present=0, allocated=used, trusted=True)
        return now

    # Opening and closing.

    def reopen(self) -> CacheObject:
        """Count one more user; the guard is held."""
        self._refs += 1
        return self

    def close(self) -> None:
        """Give the object back; who closes it last ends it.

        Blocks that are written but not committed are lost with the last close.
        """
        with self._guard:
            if self._refs <= 0:
                raise ValueError(f"{self.key} is closed more often than it was opened")
            self._refs -= 1
            if self._refs == 0:
                self.retire()
                self._owner.forget_open(self)

    def retire(self) -> None:
        """Let go of the files and leave the index as they are; the guard is held."""
        now, self._now = self._now, Generation()
        with now.lock:
            now.dead = True
            now.epoch += 1
            row = now.row
            if row is None:
                return
            with contextlib.suppress(OSError):  # what is not given back now is at the next unclean start
                for block in now.occupied - now.blocks.keys():
                    self._release(now, block)
            row.trusted = not now.unchecked and not now.tainted
            self._owner.index.touch(row)
            with contextlib.suppress(OSError):  # only the order of eviction after an unclean stop needs it
                os.utime(now.table, ns=(row.stamp, row.stamp))

    def verifier(self, digest: Digest) -> Verifier:
        """Return something that compares the whole content with `digest` while the blocks arrive."""
        return Verifier(self, digest)

    # The same on one generation.

    def _check_span(self, span: Span) -> None:
        if span.stop > self.size:
            raise ValueError(f"[{span.start}, {span.stop}) is beyond the {self.size} bytes of {self.key}")

    @contextlib.contextmanager
    def _disk_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._owner.metrics.cache_errors.inc()
            raise disk.failure(doing, self.path, error) from error

    def _covers(self, now: Generation, span: Span) -> bool:
        for block in span.blocks():
            if block in now.blocks:
                continue
            whole = block_span(block, self.size)
            start, stop = max(whole.start, span.start), min(whole.stop, span.stop)
            extents = now.arrived.get(block, ())
            # A commit between the two looks moves the block from the second place to the first.
            if not any(e.start <= start and stop <= e.stop for e in extents) and block not in now.blocks:
                return False
        return True

    def _touch(self, now: Generation, span: Span) -> None:
        for block in span.blocks():
            record = now.blocks.get(block)
            if record is not None:
                record.touch()

    def _read(self, now: Generation, span: Span) -> bytes:
        """Return what the file holds at `span`, all of which is covered; the caller compares epochs."""
        if not self._covers(now, span):
            raise CacheError(
                f"{self.path}: bytes {span.start} to {span.stop} are not in the cache; fetch them"
            )
        try:
            return disk.read(now.data, span)
        except OSError as error:
            self._drop(now, span.blocks())
            self._owner.metrics.cache_errors.inc()
            raise disk.failure("read from the cache", self.path, error) from error

    def _check(self, now: Generation, block: int) -> bool:
        record = now.blocks.get(block)
        if record is None:
            return False
        try:
            good = disk.crc(now.data, block_span(block, self.size)) == record.crc
        except OSError as error:
            self._owner.metrics.cache_errors.inc()
            _log.warning("%s", disk.failure(f"read block {block}", self.path, error))
            good = False
        with now.lock:
            if now.blocks.get(block) is not record:
                return False  # it disappeared meanwhile, so what was read says nothing
            if good:
                if not record.checked:
                    record.checked = True
                    now.unchecked -= 1
                return True
            self._owner.metrics.bad_blocks.inc()
            _log.warning(
                "%s: block %d does not match its checksum; it will be fetched again", self.path, block
            )
            self._drop(now, [block])
            return False

    def _write(self, now: Generation, block: int, part: Span, data: memoryview) -> None:
        while block not in now.blocks:
            self._occupy(now, block)
            epoch = now.epoch
            disk.write(now.data, data, part.start)
            with now.lock:
                # Else something disappeared meanwhile, perhaps these very bytes: write them again.
                if now.epoch == epoch and block in now.occupied:
                    if block not in now.blocks:
                        now.arrived[block] = merged(now.arrived.get(block, ()), part)
                    return

    def _occupy(self, now: Generation, block: int) -> None:
        """Reserve the space of `block`. Takes no lock while it evicts: that may punch this very object."""
        if block in now.occupied and not now.dead:
            return
        if now.row is None:
            raise CacheError(f"{self.path}: there is no place for it on the cache disk; check this disk")
        length = len(block_span(block, self.size))
        self._owner.reserve(now.row, length)
        with now.lock:
            if not now.dead and block not in now.occupied:
                now.occupied.add(block)
                return
        self._owner.index.change(now.row, allocated=-length)  # another thread was faster
        if now.dead:
            raise CacheError(f"{self.path}: the object was closed or discarded meanwhile; fetch it again")

    def _record(self, now: Generation, block: int, crc: int) -> None:
        """Write the record of `block` and make it present; the lock is held."""
        if now.dead or now.row is None:
            raise CacheError(f"{self.path}: the object was closed or discarded meanwhile; fetch it again")
        disk.write(now.table, memoryview(table.record(block, crc)), table.record_offset(block))
        now.blocks[block] = Block(crc, checked=True)
        del now.arrived[block]
        self._owner.index.change(now.row, present=len(block_span(block, self.size)))
        if len(now.blocks) == self._count:
            with contextlib.suppress(OSError):  # only a protection against accidents
                os.fchmod(now.data, 0o400)

    def _drop(self, now: Generation, blocks: Iterable[int]) -> int:
        """Make `blocks` absent: in memory, then in the table, then in the data; returns the bytes freed."""
        freed = 0
        with now.lock:
            gone = [block for block in blocks if block in now.blocks or block in now.arrived]
            dropped = [(block, now.blocks.pop(block)) for block in gone if block in now.blocks]
            for block in gone:
                now.arrived.pop(block, None)
            now.unchecked -= sum(not record.checked for _, record in dropped)
            now.epoch += 1
            if gone and now.row is not None and not now.dead:
                lost = sum(len(block_span(block, self.size)) for block, _ in dropped)
                self._owner.index.change(now.row, present=-lost)
                try:
                    self._erase(now, [block for block, _ in dropped])
                    now.make_writable()
                    if not now.lent:  # the reader of a loan would see zeros
                        freed = sum(self._release(now, block) for block in gone)
                except OSError as error:
                    now.tainted = True
                    self._owner.metrics.cache_errors.inc()
                    _log.warning("%s", disk.failure("remove a block", self.path, error))
            now.epoch += 1
        return freed

    def _erase(self, now: Generation, blocks: list[int]) -> None:
        """Take `blocks` out of the table on disk."""
        if now.verified:
            now.verified = False
            disk.write(now.table, memoryview(table.header(self.size, verified=False)), 0)
        for block in blocks:
            disk.write(now.table, memoryview(table.ABSENT), table.record_offset(block))

    def _release(self, now: Generation, block: int) -> int:
        """Give the space of `block` back; returns how much that is."""
        if now.row is None or block not in now.occupied or not disk.punch(now.data, block * BLOCK, BLOCK):
            return 0
        now.occupied.remove(block)
        length = len(block_span(block, self.size))
        self._owner.index.change(now.row, allocated=-length)
        return length


class Loan:
    """The data file of a complete object, lent to somebody who reads it without the cache."""

    def __init__(self, item: CacheObject, generation: Generation) -> None:
        self._item = item
        self._generation: Generation | None = generation

    def fileno(self) -> int:
        """Return the descriptor of the data file, valid until :meth:`close`."""
        if self._generation is None:
            raise ValueError("the loan is closed")
        return self._generation.data

    def close(self) -> None:
        """End the loan; blocks for moments (it may close the object). Closing again does nothing."""
        generation, self._generation = self._generation, None
        if generation is not None:
            with generation.lock:
                generation.lent -= 1
            self._item.close()


class Verifier:
    """Compares an object with a published digest, in file order, as far as its blocks have arrived.

    The object must stay open meanwhile. If it is discarded, hashing starts over.
    """

    def __init__(self, item: CacheObject, digest: Digest) -> None:
        self._item = item
        self._digest = digest
        self._lock = threading.Lock()
        self._restart()

    def _restart(self) -> None:
        self._generation = self._item._now
        self._epoch = self._generation.epoch
        self._hasher = self._digest.hasher(self._item.size)
        self._done = 0
        self._result: bool | None = None

    @property
    def hashed(self) -> int:
        """Bytes from the start that have been hashed. Loop-safe."""
        return self._done

    def result(self) -> bool | None:
        """Return whether the content has the digest; None until all of it was hashed. Loop-safe."""
        return self._result

    def advance(self) -> bool | None:
        """Hash what has become present since the last time; return :meth:`result`.

        Runs in a thread, mostly without the GIL; a second call at the same time waits for the first. A match
        makes the object `verified`, unless a block of it was dropped since hashing began. A mismatch is for
        the caller to act on: discard the object.
        """
        item = self._item
        with self._lock:
            if self._generation is not item._now:
                self._restart()
            now = self._generation
            while self._result is None:
                if self._done == item.size:
                    self._finish(now)
                    break
                block = self._done // BLOCK
                record = now.blocks.get(block)
                if record is None or not (record.checked or item._check(now, block)):
                    break
                span = Span(self._done, min(self._done + disk.CHUNK, block_span(block, item.size).stop))
                try:
                    data = item._read(now, span)
                except CacheError as error:
                    _log.warning("%s", error)
                    break
                if now.blocks.get(block) is not record:
                    break  # it disappeared meanwhile; the bytes may be zeros
                self._hasher.update(data)
                self._done = span.stop
            return self._result

    def _finish(self, now: Generation) -> None:
        item = self._item
        self._result = self._hasher.hexdigest() == self._digest.value
        item._owner.metrics.verified.labels("match" if self._result else "mismatch").inc()
        if not self._result:
            return
        with now.lock:
            if now.dead or now.epoch != self._epoch or len(now.blocks) != item._count or now.row is None:
                return
            now.verified = True
            try:
                disk.write(now.table, memoryview(table.header(item.size, verified=True)), 0)
            except OSError as error:
                item._owner.metrics.cache_errors.inc()
                _log.warning("%s", disk.failure("write to the block table", item.path, error))

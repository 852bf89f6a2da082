"""One object as its users see it: who has it open, what it holds, its loans and its digest.

The concurrency argument is in the docstring of :mod:`modelfs.cache`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from modelfs.cache import disk, files
from modelfs.cache.audit import Audit
from modelfs.cache.generation import Generation
from modelfs.errors import CacheError
from modelfs.types import BLOCK, Digest, Span, block_span

_log = logging.getLogger(__name__)


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
        path: of the data file; meaningful while the object is open and not volatile.

    """

    def __init__(
        self,
        key: str,
        generation: Generation,
        guard: threading.Lock,
        closed: Callable[[CacheObject], None],
        *,
        used: bool = True,
    ) -> None:
        self.key = key
        self.size = generation.size
        self.path = generation.path
        self._now = generation
        self._guard = guard
        self._closed = closed
        self._refs = 1
        self._used = used

    def __repr__(self) -> str:
        return f"<CacheObject {self.key} {self.cached_bytes} of {self.size} bytes>"

    # What is there.

    @property
    def volatile(self) -> bool:
        """Whether the object has no place on the disk. Loop-safe."""
        return self._now.row is None

    @property
    def cached_bytes(self) -> int:
        """Bytes of all present blocks. Loop-safe."""
        row = self._now.row
        return row.present if row else 0

    @property
    def complete(self) -> bool:
        """Whether every block is present. Loop-safe."""
        return self._now.complete

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

    def gaps(self, block: int) -> list[Span]:
        """Return the spans of `block` that must be written before :meth:`commit`, in order. Loop-safe."""
        return self._now.gaps(block)

    def covers(self, span: Span) -> bool:
        """Return whether :meth:`read` can serve `span`. Loop-safe.

        That is: each of its bytes lies in a present block or was written since the object was opened.
        """
        return self._now.covers(span)

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
        if now.doubtful(span) or not now.covers(span):
            return None
        data = disk.read_resident(now.data, span)
        if data is None or now.epoch != epoch:
            return None
        now.touch(span)
        return data

    def place(self, span: Span) -> Place | None:
        """Return where the bytes of `span` lie if taking them from there needs no waiting. Loop-safe.

        For who can move them without reading them. None means the same as with :meth:`read_now`.
        """
        self._check_span(span)
        now = self._now
        epoch = now.epoch
        if now.doubtful(span) or not now.covers(span) or not disk.is_resident(now.data, span):
            return None
        now.touch(span)
        return Place(now, epoch, span)

    def read(self, span: Span) -> bytes:
        """Return the bytes of `span`, from memory or disk.

        Raises:
            CacheError: a block is absent, failed its check or cannot be read. In the last two cases it
                has been dropped: fetch it again.

        """
        self._check_span(span)
        while True:
            now = self._now
            epoch = now.epoch
            for block in now.doubtful(span):
                now.check(block)
            data = now.read(span)
            if now.epoch == epoch:
                now.touch(span)
                return data

    def check(self, block: int) -> bool:
        """Read `block` and compare it with its checksum; a bad one is dropped.

        Returns whether the block is present and good.
        """
        return self._now.check(block) is True

    # Writing.

    def write(self, offset: int, data: disk.Data) -> None:
        """Put the bytes `data` at `offset`; they can be read from now on, and are kept after :meth:`commit`.

        Makes room in the cache by itself. Bytes for blocks that are already present are not written: equal
        keys mean equal bytes.

        Raises:
            CacheError: the cache or its disk is full, broken or gone, or the object was closed or discarded.

        """
        source = data if isinstance(data, disk.Pipe) else memoryview(data).cast("B")
        span = Span(offset, offset + len(source))
        self._check_span(span)
        now = self._now
        for block in span.blocks():
            whole = block_span(block, self.size)
            part = Span(max(whole.start, span.start), min(whole.stop, span.stop))
            if isinstance(source, disk.Pipe):
                now.write(block, part, source)
            else:
                now.write(block, part, source[part.start - offset : part.stop - offset])

    def commit(self, block: int) -> None:
        """Make `block`, all of whose bytes have been written, present.

        Its checksum is taken from the file, and its record in the table is written after that.

        Raises:
            CacheError: bytes of the block are missing, the disk is full, broken or gone, or the object was
                closed or discarded.

        """
        self._now.commit(block)

    def punch(self, blocks: Iterable[int]) -> int:
        """Make `blocks` absent and give their disk space back; returns the bytes freed.

        Nothing happens to an object that is lent, or whose file has another name (`Loan.link`). On a file
        system without holes nothing is freed.
        """
        now = self._now
        return 0 if now.lent or now.linked else now.drop(blocks)

    def discard(self) -> None:
        """Make all blocks absent, for everybody who has the object open.

        The files are replaced by new ones; whoever reads through a loan goes on with the old. A disk that
        does not allow it leaves the object volatile. Operations that were running come to nothing: end
        those that write bytes of unwanted content before, for what they write later goes to the new files.
        """
        with self._guard:
            old, self._now = self._now, self._now.without_files()
            if old.row is not None:
                self._now = files.replaced(old)

    # Opening, lending and closing.

    def reopen(self, *, used: bool = True) -> CacheObject:
        """Count one more user; for the cache, which holds the guard."""
        self._refs += 1
        self._used |= used
        return self

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
                if now.row is None or now.unchecked or not now.complete:
                    raise CacheError(
                        f"{self.path}: not all of it is here and checked; read it through the cache"
                    )
                try:
                    fd = os.dup(now.data)
                except OSError as error:
                    raise CacheError(f"{self.path}: cannot be lent: {error.strerror}") from error
                now.lent += 1
            self._refs += 1
        return Loan(self, now, fd)

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
                self._closed(self)

    def retire(self) -> None:
        """Let go of the files for good; for the cache, which holds the guard."""
        old, self._now = self._now, self._now.without_files()
        old.retire(used=self._used)

    def audit(self, digest: Digest | None, lost: int) -> Audit:
        """Return what reads the object again; for the cache, which knows how much was `lost` when it opened.

        The audit's end closes the object.
        """
        return Audit(self.key, self._now, digest, lost, self.close)

    def verifier(self, digest: Digest) -> Verifier:
        """Return something that compares the whole content with `digest` while the blocks arrive."""
        return Verifier(self, digest)

    def _check_span(self, span: Span) -> None:
        if span.stop > self.size:
            raise ValueError(f"[{span.start}, {span.stop}) is beyond the {self.size} bytes of {self.key}")


class Place:
    """Bytes of an object in its data file, good to take as long as `holds` says so. Loop-safe.

    Attributes:
        span: of the data file.

    """

    __slots__ = ("_epoch", "_generation", "span")

    def __init__(self, generation: Generation, epoch: int, span: Span) -> None:
        self._generation = generation
        self._epoch = epoch
        self.span = span

    def __len__(self) -> int:
        return len(self.span)

    def fileno(self) -> int:
        """Return the descriptor of the data file, valid as long as this place is referred to."""
        return self._generation.data

    def holds(self) -> bool:
        """Return whether what was taken until now are the object's bytes: none of them had gone away."""
        return self._generation.epoch == self._epoch


class Loan:
    """The data file of a complete object, lent to somebody who reads it without the cache."""

    def __init__(self, item: CacheObject, generation: Generation, fd: int) -> None:
        self._item = item
        self._generation: Generation | None = generation
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor of the data file, valid until :meth:`close`."""
        if self._generation is None:
            raise ValueError("the loan is closed")
        return self._fd

    def link(self, path: Path) -> None:
        """Give the data file the name `path` too, for good: its bytes stay, whatever becomes of the object.

        In a thread.

        Raises:
            OSError: `path` is there, or on another file system.

        """
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:  # link() would link to the link in /proc; with a directory it becomes linkat(), which follows it
            os.link(f"/proc/self/fd/{self.fileno()}", path.name, dst_dir_fd=directory)
        finally:
            os.close(directory)

    def close(self) -> None:
        """End the loan, in a thread: it may close the object. Closing again does nothing."""
        generation, self._generation = self._generation, None
        if generation is not None:
            os.close(self._fd)
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
        self._hashed = 0
        self._result: bool | None = None

    @property
    def hashed(self) -> int:
        """Bytes from the start that have been hashed. Loop-safe."""
        return self._hashed

    def result(self) -> bool | None:
        """Return whether the content has the digest; None until all of it was hashed. Loop-safe."""
        return self._result

    def advance(self) -> bool | None:
        """Hash what has become present since the last time; return :meth:`result`.

        Runs in a thread, mostly without the GIL; a second call at the same time waits for the first. A match
        makes the object `verified`, unless a block of it was dropped since hashing began. A mismatch is for
        the caller to act on: discard the object.
        """
        with self._lock:
            if self._generation is not self._item._now:
                self._restart()
            while self._result is None and self._hashed < self._item.size:
                if not self._hash_chunk():
                    return None
            if self._result is None:
                self._result = self._hasher.hexdigest() == self._digest.value
                self._generation.conclude(self._result, self._epoch)
            return self._result

    def _hash_chunk(self) -> bool:
        """Hash the next bytes; return False if their block is not there."""
        now, block = self._generation, self._hashed // BLOCK
        record = now.blocks.get(block)
        if record is None or not (record.checked or now.check(block)):
            return False
        stop = min(self._hashed + disk.CHUNK, block_span(block, self._item.size).stop)
        try:
            data = now.read(Span(self._hashed, stop))
        except CacheError as error:
            _log.warning("%s", error)
            return False
        if now.blocks.get(block) is not record:
            return False  # it disappeared meanwhile; the bytes may be zeros
        self._hasher.update(data)
        self._hashed = stop
        return True

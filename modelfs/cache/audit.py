"""One object read again from the disk and compared with everything that is known about it.

What ``modelfs verify`` and the scrubber do to each object; what is bad is dropped on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from modelfs.cache import disk
from modelfs.cache.generation import Generation
from modelfs.types import Digest, block_span


class Audit:
    """The second reading of one object; made by :meth:`modelfs.cache.Cache.audit`.

    The object stays open meanwhile and can be used as ever; that it is audited does not count as a use.
    Not for several threads at once.

    Attributes:
        key: of the object.
        total: bytes there were to read at the beginning.
        done: bytes that have been read or found missing.
        faults: what was bad, a line each.
        dropped: bytes that were bad.
        mismatch: whether all blocks are good and yet the content does not have its digest. Nothing was
            dropped for that: discard the object.

    """

    def __init__(
        self, key: str, generation: Generation, digest: Digest | None, lost: int, close: Callable[[], None]
    ) -> None:
        self.key = key
        self.done = 0
        self.faults: list[str] = []
        self.dropped = 0
        self.mismatch = False
        self._now = generation
        self._close: Callable[[], None] | None = close
        if lost:
            self._fault(f"the block table is damaged: {lost} bytes are lost", lost)
        for block in generation.check_table():
            length = len(block_span(block, generation.size))
            self._fault(f"the block table has lost block {block}", length)
        self._epoch = generation.epoch
        self._left = sorted(generation.blocks, reverse=True)
        self.total = self.done + sum(len(block_span(block, generation.size)) for block in self._left)
        self._digest = digest if generation.complete else None
        self._hasher = self._digest.hasher(generation.size) if self._digest else None

    def _fault(self, text: str, length: int) -> None:
        self.faults.append(text)
        self.dropped += length
        self.done += length

    def step(self, *, idly: bool = False) -> bool:
        """Read the next block; return whether there is more to do.

        With `idly` others may use the disk first.
        Content that is discarded, replaced or closed by others meanwhile is audited no further.
        """
        with disk.idly() if idly else nullcontext():
            return self._step()

    def _step(self) -> bool:
        now = self._now
        if now.dead:
            return False
        if self._left:
            block = self._left.pop()
            length = len(block_span(block, now.size))
            if now.check(block, self._hasher, afresh=True) is False:
                self._fault(f"block {block} does not match its checksum", length)
            else:
                self.done += length
            return True
        if self._digest is not None and self._hasher is not None and now.epoch == self._epoch:
            matches = self._hasher.hexdigest() == self._digest.value
            now.conclude(matches, self._epoch)
            if not matches:
                self.mismatch = True
                self.faults.append(f"the content does not have its digest {self._digest}")
                self.dropped = now.size
        return False

    def close(self) -> None:
        """Give the object back, in a thread. Closing again does nothing."""
        close, self._close = self._close, None
        if close is not None:
            close()

"""One open handle on the content of an entry: its bytes, as soon as they are there."""

from __future__ import annotations

import io
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import trio

from modelfs.cache import Loan, Place
from modelfs.errors import CacheError, ModelfsError
from modelfs.fetch.download import Download, Flight
from modelfs.fetch.planner import advance
from modelfs.metrics import Metrics
from modelfs.types import Span, block_span

log = logging.getLogger(__name__)

T = TypeVar("T")

Buffer = bytes | bytearray
"""What a read returns; the caller may keep it, nobody changes it any more."""

COMPLETED = 16 * 1024 * 1024
"""Bytes up to which content is completed before it is lent: its readers never need the daemon again."""

COMPLETING = 5.0
"""Seconds for which a loan waits for content to be completed; without it the reader waits in its reads."""


class Feeder(Protocol):
    """What a reader needs of the fetch path.

    Attributes:
        metrics: what is counted.
        deadline: seconds a reader waits before it gets an error.
        disk: how many threads may wait for the disk.

    """

    metrics: Metrics
    deadline: float
    disk: trio.CapacityLimiter

    def pump_for(self, download: Download) -> None:
        """Start what `download` needs now, if it needs anything."""

    def in_memory(self, download: Download, block: int, piece: Span) -> Flight | None:
        """Return the flight whose buffer holds `piece`, if the cache disk could not take it."""

    def start_checking(self, download: Download) -> None:
        """Compare what an unclean stop left with its checksums in the background."""

    async def check(self, download: Download) -> None:
        """Compare what an unclean stop left with its checksums, so that it can be lent."""

    def release(self, download: Download) -> None:
        """Count one reader less."""


class Reader:
    """One open handle on the content of an entry; made by ``Fetcher.open``."""

    def __init__(self, fetcher: Feeder, download: Download) -> None:
        self._fetcher = fetcher
        self._download = download
        self._closed = False
        reads = fetcher.metrics.reads
        self._hits, self._misses = (reads.labels(download.source.scheme, how) for how in ("hit", "miss"))

    def close(self) -> None:
        """Let go; prefetching ends with the last reader of the object."""
        if not self._closed:
            self._closed = True
            self._fetcher.release(self._download)

    def _within(self, start: int, size: int) -> Span:
        end = self._download.entry.size
        return Span(min(start, end), min(start + size, end))

    async def read(self, start: int, size: int) -> Buffer:
        """Return the bytes ``[start, start + size)``, fewer only at the end of the content.

        Cancelling leaves what is on its way on its way.

        Raises:
            StoreError: the bytes cannot be had: retries ended, or the deadline passed.
            Corrupt: the content does not have its published digest.

        """
        download = self._download
        span = self._within(start, size)
        hit = self._begin(span)
        data: Buffer | None = download.object.read_now(span) if hit else None
        if data is None:
            arrived: Buffer = await self._patiently(span, self._collect)
            data = arrived
        self._served(span, hit=hit)
        return data

    def place_now(self, start: int, size: int) -> Place | bytes | None:
        """Return where the bytes lie that `read` would return, or None if that needs waiting.

        Bytes instead of a place are all there is, as at the end of the content.
        """
        download = self._download
        span = self._within(start, size)
        if not span:
            return b""
        if not self._serves(span):
            return None
        place = download.object.place(span)
        if place is not None:
            self._begin(span)
            self._served(span, hit=True)
        return place

    async def place(self, start: int, size: int) -> Place | Buffer:
        """Return where the bytes lie that `read` would return, or the bytes; raise what `read` raises."""
        span = self._within(start, size)
        hit = self._begin(span)
        found: Place | Buffer = await self._patiently(span, self._place)
        self._served(span, hit=hit)
        return found

    async def _place(self, span: Span) -> Place | Buffer | None:
        place = self._download.object.place(span) if self._serves(span) else None
        return await self._collect(span) if place is None else place

    def _serves(self, span: Span) -> bool:
        return self._download.error is None and self._download.serves(span)

    def _begin(self, span: Span) -> bool:
        """Note that `span` is read; return whether its bytes are there."""
        download = self._download
        if not download.object.complete:
            download.streams = advance(download.streams, span)
            for block in span.blocks():
                download.touched.setdefault(block)
        return bool(span) and self._serves(span)

    def _served(self, span: Span, *, hit: bool) -> None:
        self._download.seen |= bool(span) and not self._download.object.verified
        self._fetcher.metrics.read_bytes.inc(len(span))
        (self._hits if hit else self._misses).inc()
        if hit:
            self._fetcher.metrics.hit_bytes.inc(len(span))
        self._fetcher.pump_for(self._download)

    async def fetch(self, came: Callable[[], Awaitable[None]]) -> None:
        """Return when all of the content is in the cache and has its published digest, if there is one.

        One block after the other is waited for like by any reader; what prefetching brings meanwhile leaves
        connections free for others. Cancelling leaves what is on its way on its way.

        Args:
            came: called after each block.

        Raises:
            StoreError: the bytes cannot be had: retries ended, or the deadline passed.
            CacheError: the cache did not keep them.

        """
        download = self._download
        era = -1
        while era != download.era:  # what is found to be wrong comes again from another store
            era, download.prefetch = download.era, True
            for block in download.blocks:
                if not download.object.has(block):
                    await self._patiently(block_span(block, download.entry.size), self._arrived)
                await came()
            while download.flights or download.verifying:
                await download.changed()
        if download.error:
            raise download.error
        if not download.object.complete:
            raise CacheError(
                f"{download.entry.path}: the cache did not keep all of it: see its limit in modelfs status"
            )

    async def _arrived(self, span: Span) -> bool:
        return True

    async def lend(self) -> Loan | None:
        """Return the data file for somebody who reads it without us, or None if that cannot be now.

        It can once the content is complete, checked and verified. Content of up to `COMPLETED` bytes is
        brought there first, for at most `COMPLETING` seconds; of larger content what is there is checked in
        the background. Who gets a loan closes it, in a thread.
        """
        download = self._download
        cached, small = download.object, download.entry.size <= COMPLETED
        if small and not cached.complete:
            with trio.move_on_after(COMPLETING):
                try:
                    await self._arrival(Span(0, download.entry.size))
                    while download.flights:  # what has arrived becomes part of the cache
                        await download.changed()
                except ModelfsError as error:
                    log.info("%s: not completed at open: %s", download.entry.path, error)
        if not cached.complete or download.error:
            return None
        if cached.unchecked:
            if not small:
                self._fetcher.start_checking(download)
                return None
            await self._fetcher.check(download)
        if download.digest is not None and not cached.verified:
            return None
        try:
            return await trio.to_thread.run_sync(cached.lend, limiter=self._fetcher.disk)
        except CacheError as error:
            log.info("%s: read through the daemon: %s", download.entry.path, error)
            return None

    async def _patiently(self, span: Span, take: Callable[[Span], Awaitable[T | None]]) -> T:
        """Return what `take` gets of `span` once its bytes are there, waiting for the disk and the store."""
        download = self._download
        with self._fetcher.metrics.waits.one(), trio.move_on_after(self._fetcher.deadline):
            while True:
                era = download.era
                if not download.serves(span):
                    await self._arrival(span)
                taken = await take(span)
                if taken is not None and era == download.era:
                    return taken
        raise download.source.unavailable(
            f"{download.entry.path} {span.start}-{span.stop}", self._fetcher.deadline
        )

    async def _arrival(self, span: Span) -> None:
        """Return when all of `span` is there; raise what keeps it from coming."""
        download = self._download
        pieces = download.pieces(span)
        seen: set[Flight] = set()
        # The time of a flight that was under way before us is not ours: when it ends, another begins.
        older = set(download.flights.values())
        wanted: list[int] = []
        try:
            while True:
                if download.error:
                    raise download.error
                missing = [(block, piece) for block, piece in pieces if not self._there(block, piece)]
                if not missing:
                    return
                for flight in seen:
                    if flight.error and not (flight in older and flight.error.retryable):
                        raise flight.error
                for block, piece in missing:
                    if block not in wanted and not download.object.has(block):
                        wanted.append(block)
                        download.want(block, piece.start)
                self._fetcher.pump_for(download)
                for block, piece in missing:
                    if block in download.flights:
                        seen.add(download.flights[block])
                    for coming in download.coming(block):
                        coming.needs = (*coming.needs, piece.stop)
                if all(not self._there(block, piece) for block, piece in missing):
                    await download.changed()
        finally:
            for block in wanted:
                download.unwant(block)

    def _there(self, block: int, piece: Span) -> bool:
        download = self._download
        return download.serves(piece) or self._fetcher.in_memory(download, block, piece) is not None

    async def _collect(self, span: Span) -> Buffer | None:
        """Return the bytes of `span` from disk and memory; None if some are no longer there."""
        download = self._download
        if download.error:
            raise download.error
        if download.serves(span):
            return await self._read_disk(span)
        parts: list[Buffer] = []
        for block, piece in download.pieces(span):
            flight = self._fetcher.in_memory(download, block, piece)
            if flight is not None and flight.buffer is not None:
                start = piece.start - block_span(block, download.entry.size).start
                parts.append(flight.buffer[start : start + len(piece)])
            elif download.serves(piece) and (data := await self._read_disk(piece)):
                parts.append(data)
            else:
                return None
        return b"".join(parts)

    async def _read_disk(self, span: Span) -> bytes | None:
        download = self._download
        try:
            return await trio.to_thread.run_sync(download.object.read, span, limiter=self._fetcher.disk)
        except CacheError as error:
            # The cache dropped the block: it will be fetched again.
            log.warning("%s", error)
            return None


class ReaderFile(io.RawIOBase):
    """The `size` bytes of a reader as a file, for a thread of trio; read raises what `Reader.read` does."""

    def __init__(self, reader: Reader, size: int) -> None:
        self._reader = reader
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to `offset`, which may be past the end: there is nothing to be read there."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`, which is cut short only at the end."""
        data = trio.from_thread.run(self._reader.read, self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

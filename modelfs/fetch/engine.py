"""The fetch path: readers in, range requests out, single flight per block.

How it hangs together
---------------------
A :class:`Fetcher` holds one :class:`Download` per open object. Readers wait on the download; `planner.plan`
says which blocks to get; a :class:`Flight` is one block on its way, a task of the fetcher's nursery that runs
until the block is in the cache or has failed for good.

Concurrency
-----------
Everything in this package belongs to the trio thread, but for the sinks of `transfer`, whose methods run in
a worker thread of the range client. They share with the trio thread only the flight's `done` counters and
`needs`:

- the worker stores `done` and then looks at `needs`; a waiter stores its need and then looks at `done`. In
  either order one of the two sees the other's write, so no wake-up is lost (the GIL orders both);
- the worker alone writes the bytes of a flight's range, and no reader looks at bytes before `done` says that
  they are there;
- everything else crosses over with ``run_sync_soon`` (progress) or ``from_thread.run_sync`` (a store that
  ignores ranges changes what a flight covers, which only the trio thread may decide).

No lock is held across I/O. Bytes go to the cache file: what is on its way takes no more memory than the
buffers of the connections, 768 KiB each, 12 MiB for 16 of them. Only while the cache disk fails do blocks
stay in memory: `MEMORY_BLOCKS`, and as many on their way, 64 MiB.

What a reader may get
---------------------
Bytes of a block that is in the cache, or that have already arrived for a block on its way. Of an object
whose store publishes a digest one block is shown to nobody until the digest was checked: nobody reads a whole
object and ends up with wrong bytes, and small files are always checked before their first byte.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from functools import partial

import trio

from modelfs.cache import Cache
from modelfs.errors import CacheError, Corrupt, ModelfsError
from modelfs.fetch.client import RangeClient
from modelfs.fetch.download import PER_OBJECT, Download, Flight
from modelfs.fetch.planner import Priority, Step, is_weights
from modelfs.fetch.reader import Reader
from modelfs.fetch.source import Source
from modelfs.fetch.transfer import Transfer
from modelfs.metrics import Metrics
from modelfs.types import BLOCK, Digest, Entry, Span

log = logging.getLogger(__name__)

RESERVED = {Priority.DEMAND: 0, Priority.READAHEAD: 2, Priority.PREFETCH: 4}
"""Connections each priority leaves free for more urgent work."""

MEMORY_BLOCKS = 4
"""Blocks kept in memory while the cache disk cannot take them, and as many more on their way."""

DISK_PAUSE = 30.0
"""Seconds for which a cache disk that failed is not tried again."""

AHEAD_SECONDS = 30.0
"""How long the next shard goes on being fetched after the one before it was closed."""

WATCH_SECONDS = 0.5
"""How often it is looked whether a flight stands still."""

STILL_SECONDS = 2.0
"""So long no byte came for a flight that is waited for, while others moved: its connection is given up."""

RENEWALS = 3
"""How often the connection of one flight is given up; after that the client's own timeouts count."""

PREFETCH_PAUSE = 15.0
"""Seconds for which an object is not prefetched after a block of it failed."""


class Fetcher:
    """The fetch path of one daemon.

    Args:
        nursery: where flights run; cancelling it ends them.
        cache: where blocks are kept.
        client: what moves the bytes.
        metrics: what is counted.
        connections: most requests at once; the client's own number.
        read_deadline: seconds a reader waits before it gets an error.

    """

    def __init__(
        self,
        nursery: trio.Nursery,
        cache: Cache,
        client: RangeClient,
        metrics: Metrics,
        *,
        connections: int = 16,
        read_deadline: float = 300.0,
    ) -> None:
        self._nursery = nursery
        self._cache = cache
        self._transfer = Transfer(client, metrics, read_deadline, self.committed, self.goes_on)
        self.metrics = metrics
        self._connections = connections
        self.deadline = read_deadline
        metrics.read_deadline.set(read_deadline)
        self._downloads: OrderedDict[str, Download] = OrderedDict()
        self._active = 0
        self._closing = False
        self._watching = False
        self._disk_paused_until = -math.inf
        self._memory: OrderedDict[tuple[str, int], Flight] = OrderedDict()
        self._memory_slots = trio.Semaphore(MEMORY_BLOCKS)
        self._tainted: set[str] = set()
        self.disk = trio.CapacityLimiter(16)

    @property
    def nursery(self) -> trio.Nursery:
        """Where work of the fetch path runs that outlives those who asked for it."""
        return self._nursery

    @property
    def in_flight(self) -> int:
        """How many data requests are under way."""
        return self._active

    @property
    def busy(self) -> bool:
        """Whether anybody waits for the disk or a store."""
        return self._active > 0 or self.disk.borrowed_tokens > 0

    # -- readers ---------------------------------------------------------------------------------------

    async def open(self, source: Source, entry: Entry, following: Entry | None = None) -> Reader:
        """Return a reader of `entry`; a weight file begins to stream into the cache.

        Once nothing of it is left to fetch, `following`, the next shard, is fetched while there is room.

        Raises:
            CacheError: never for a broken disk; only if this daemon is closing.

        """
        key = source.key(entry)
        download = self._downloads.get(key)
        if download is None or download.error:
            cached = await trio.to_thread.run_sync(self._cache.object, key, entry.size, limiter=self.disk)
            current = self._downloads.get(key)
            if current is not None and not current.error:
                await trio.to_thread.run_sync(cached.close, limiter=self.disk)
                download = current
            else:
                download = self._downloads[key] = Download(source, entry, cached)
                self._start_verifying(download)
        download.readers += 1
        download.add_name(source, entry)
        if is_weights(entry.path) and self._fits(entry):
            download.prefetch = True
            download.following = following
            if not download.object.complete:
                download.order = await self._learned_order(download)
            self.pump()
            self._look_ahead(download)
        return Reader(self, download)

    async def _learned_order(self, download: Download) -> list[int]:
        """Return the blocks in the order in which the last load from this store read them."""
        order = await trio.to_thread.run_sync(self._cache.get_meta, _order(download), limiter=self.disk)
        return [block for block in order if isinstance(block, int)] if isinstance(order, list) else []

    def _learn_order(self, download: Download) -> None:
        """Keep the order in which blocks were first read, if it is not the one in which they lie."""
        touched = list(download.touched)
        if len(touched) > 1 and touched != sorted(touched) and touched != download.order:
            keep = partial(self._cache.set_meta, _order(download), touched)
            self._nursery.start_soon(partial(trio.to_thread.run_sync, keep, limiter=self.disk))

    def _look_ahead(self, download: Download) -> None:
        """Begin with the next shard if nothing of this one is left to fetch."""
        entry = download.following
        if entry is None or download.error or not download.readers:
            return
        if next(download.steps(trio.current_time()), None) is None and len(download.flights) < PER_OBJECT:
            download.following = None
            if self._cached(download.source, entry) < entry.size and self._has_room_for(download, entry):
                self._nursery.start_soon(self._pull, download, entry)

    async def _pull(self, download: Download, entry: Entry) -> None:
        """Keep the next shard open, which fetches it, as long as this one is read and a while longer."""
        reader = await self.open(download.source, entry)
        await download.left.wait()
        await trio.sleep(AHEAD_SECONDS)
        reader.close()

    def _cached(self, source: Source, entry: Entry) -> int:
        return self._cache.cached_bytes(source.key(entry), entry.size)

    def _has_room_for(self, download: Download, entry: Entry) -> bool:
        coming = download.entry.size - download.object.cached_bytes
        limit = self._cache.limit
        return limit is None or self._cache.used() + coming + entry.size <= limit

    def keeps_pages(self, source: Source, entry: Entry) -> bool:
        """Return whether the kernel may keep its pages of `entry` over the open that asks.

        False once after the content was found corrupt: what was read before must not be read again.
        """
        key = source.key(entry)
        tainted = key in self._tainted
        self._tainted.discard(key)
        return not tainted

    def release(self, download: Download) -> None:
        """Count one reader less; with the last one go prefetch, streams and, when quiet, the object."""
        download.readers -= 1
        if download.readers == 0:
            download.left.set()
            self._learn_order(download)
            download.prefetch = False
            download.streams = ()
            for flight in set(download.flights.values()):
                if flight.buffer is not None:
                    flight.scope.cancel()
            self._retire(download)

    def _retire(self, download: Download) -> None:
        busy = download.flights or download.express or download.verifying or download.checking
        if download.readers or busy or download.closed:
            return
        download.closed = True
        key = download.object.key
        if self._downloads.get(key) is download:
            del self._downloads[key]
        for held in [k for k in self._memory if k[0] == key]:
            del self._memory[held]
        self._nursery.start_soon(partial(trio.to_thread.run_sync, download.object.close, limiter=self.disk))

    def start_checking(self, download: Download) -> None:
        """Compare what an unclean stop left with its checksums in the background."""
        if not download.checking:
            download.checking = True
            self._nursery.start_soon(self.check, download)

    async def check(self, download: Download) -> None:
        """Compare what an unclean stop left with its checksums, so that it can be lent."""
        for block in download.blocks:
            await trio.to_thread.run_sync(download.object.check, block, limiter=self.disk)
        download.checking = False
        self._retire(download)

    def in_memory(self, download: Download, block: int, piece: Span) -> Flight | None:
        """Return the flight whose buffer holds `piece`, if the cache disk could not take it."""
        flight = self._memory.get((download.object.key, block)) or download.flights.get(block)
        return flight if flight is not None and flight.buffer is not None and flight.holds(piece) else None

    # -- scheduling ------------------------------------------------------------------------------------

    def pump_for(self, download: Download) -> None:
        """Start what `download` needs now, if it needs anything."""
        if not download.object.complete:
            for priority in Priority:
                self._start_steps(download, priority)

    def pump(self) -> None:
        """Start flights while there are connections: demand of all objects first, then the rest in turn."""
        for priority in Priority:
            for key, download in list(self._downloads.items()):
                if self._room(priority) <= 0:
                    break
                if self._start_steps(download, priority):
                    self._downloads.move_to_end(key)

    def _room(self, priority: Priority, download: Download | None = None) -> int:
        """Return how many flights may start, of `download` or of anything."""
        if self._closing:
            return 0
        if download is not None and download.feed is not None:
            return PER_OBJECT  # they wait for flights of another object, and must not be in their way
        return self._connections - RESERVED[priority] - self._active

    def _start_steps(self, download: Download, priority: Priority) -> bool:
        """Start what `download` needs at `priority` or more urgently; return whether anything started."""
        now = trio.current_time()
        started = False
        if self._room(priority, download) <= 0 or (priority and now < self._disk_paused_until):
            return started
        for step in download.steps(now):
            full = step.priority and len(download.flights) >= PER_OBJECT
            if full or step.priority > priority or self._room(priority, download) <= 0:
                break
            self._start(download, step)
            started = True
        return started

    def goes_on(self, download: Download, flight: Flight) -> bool:
        """Return whether `flight` should bring the rest of its block too, now that a part of it is there.

        Not if nobody waits for it and it holds one of the last connections: they are for who waits. Who was
        waiting for what has arrived may not have noticed yet, so it is asked for the bytes.
        """
        waited = any(not download.object.covers(Span(need - 1, need)) for need in flight.needs)
        return waited or self._active <= self._connections - RESERVED[Priority.READAHEAD]

    def _start(self, download: Download, step: Step) -> None:
        connections = 1 if download.feed is None else 0
        if step.block in download.flights:
            flight = Flight(step.block, step.priority, [download.piece(step.block)], connections)
            download.express[step.block] = flight
        else:
            flight = Flight(step.block, step.priority, download.parts(step.block), connections)
            download.flights[step.block] = flight
        self._active += flight.connections
        self._nursery.start_soon(self._fly, download, flight)
        if not self._watching:
            self._watching = True
            self._nursery.start_soon(self._watch)

    def _fits(self, entry: Entry) -> bool:
        return self._cache.limit is None or entry.size <= self._cache.limit

    # -- flights ---------------------------------------------------------------------------------------

    async def _fly(self, download: Download, flight: Flight) -> None:
        try:
            with flight.scope:
                await self._land(download, flight)
        except ModelfsError as error:
            flight.error = error
            download.paused_until = trio.current_time() + PREFETCH_PAUSE
            level = logging.WARNING if download.demand else logging.INFO
            log.log(level, "%s: %s: %s", download.source.url, download.entry.path, error)
        except trio.Cancelled:
            self._closing = True  # not by the flight's own scope: all flights end, none may begin
            raise
        finally:
            self._active -= flight.connections
            for flights in (download.flights, download.express):
                for block in flight.blocks:
                    if flights.get(block) is flight:
                        del flights[block]
            download.wake()
            if flight.stopped:
                self._nursery.start_soon(self._pump_later)
            else:
                self.pump()
            self._look_ahead(download)
            self._retire(download)

    async def _pump_later(self) -> None:
        """Let those who were woken say first that they have what they waited for."""
        await trio.lowlevel.checkpoint()
        self.pump()

    async def _watch(self) -> None:
        """Renew the connection of flights that stand still while somebody waits for them."""
        seen: dict[Flight, tuple[int, float]] = {}
        while self._active:
            await trio.sleep(WATCH_SECONDS)
            now = trio.current_time()
            flights = [(d, f) for d in self._downloads.values() for f in set(d.flights.values())]
            moved = False
            still: list[Flight] = []
            for download, flight in flights:
                done, since = seen.get(flight, (-1, now))
                if flight.done != done:
                    seen[flight] = flight.done, now
                    moved = True
                elif (
                    flight.connections
                    and any(block in download.demand for block in flight.blocks)
                    and now - since >= STILL_SECONDS
                ):
                    still.append(flight)
            for flight in still if moved else ():
                if flight.renewed < RENEWALS:
                    flight.renewed += 1
                    seen[flight] = flight.done, now
                    log.info("a connection stands still while others do not: asking again on another one")
                    flight.attempt.cancel()
        self._watching = False

    async def _land(self, download: Download, flight: Flight) -> None:
        """Bring the flight's bytes in and make them part of the cache, or of the memory without one."""
        if trio.current_time() >= self._disk_paused_until:
            try:
                flight.stopped = not await self._transfer.run(download, flight)
                if flight.stopped:
                    return
                for block in flight.blocks:
                    if download.flights.get(block) is flight and not download.object.has(block):
                        await trio.to_thread.run_sync(download.object.commit, block, limiter=self.disk)
            except CacheError as error:
                log.warning("%s; streaming without the cache for %g s", error, DISK_PAUSE)
                self._disk_paused_until = trio.current_time() + DISK_PAUSE
            else:
                self.committed(download)
                return
        mine = (block for block in flight.blocks if download.flights.get(block) is flight)
        wanted = next((block for block in mine if block in download.demand), None)
        if wanted is not None:
            async with self._memory_slots:
                await self._land_in_memory(download, flight, wanted)

    async def _land_in_memory(self, download: Download, flight: Flight, block: int) -> None:
        """Bring `block` in, and keep it while it is among the last few."""
        for other in flight.blocks:
            if other != block and download.flights.get(other) is flight:
                del download.flights[other]
        flight.cover(range(block, block + 1), download.entry.size)
        flight.buffer = bytearray(len(flight.ranges[0].span))
        await self._transfer.run(download, flight)
        self._memory[(download.object.key, block)] = flight
        if len(self._memory) > MEMORY_BLOCKS:
            self._memory.popitem(last=False)

    # -- digests ---------------------------------------------------------------------------------------

    def committed(self, download: Download) -> None:
        """Go on with the digest after a block came in, and let readers look again."""
        self._start_verifying(download)
        download.wake()

    def _start_verifying(self, download: Download) -> None:
        digest, cached = download.digest, download.object
        if digest is None or cached.verified or download.verifying or not cached.has(0):
            return
        download.verifying = True
        self._nursery.start_soon(self._verify, download, digest)

    async def _verify(self, download: Download, digest: Digest) -> None:
        """Hash on, in file order, as far as blocks have come in; judge the object when all are there."""
        verifier = download.verifier
        if verifier is None or verifier.result() is not None:  # a block that it had hashed was dropped
            verifier = download.verifier = download.object.verifier(digest)
        verdict = None
        while verdict is None and (verifier.hashed == 0 or download.object.has(verifier.hashed // BLOCK)):
            verdict = await trio.to_thread.run_sync(verifier.advance, limiter=self.disk)
        if verdict is False and not await self._begin_again(download):
            await self._condemn(download)
        download.verifying = False
        if verdict:
            self._start_verifying(download)  # unless it is verified now
        download.wake()
        self._retire(download)

    async def _begin_again(self, download: Download) -> bool:
        """Discard wrong content that nobody saw and fetch it from the next store that has it; False if not.

        Whoever was shown a part of it must get an error: what follows would not fit to that.
        """
        if not download.copies.blame() or not download.withhold():
            return False
        if await download.copies.other(download.digest, ()) is None:
            return False
        log.warning("%s: the bytes do not have the published digest: trying the next store", _where(download))
        flights = {*download.flights.values(), *download.express.values()}
        for flight in flights:
            flight.scope.cancel()
        while download.flights or download.express:
            await download.changed()
        await trio.to_thread.run_sync(download.object.discard, limiter=self.disk)
        download.start_over()
        self._nursery.start_soon(self._pump_later)
        return True

    async def distrust(self, key: str, *, discard: bool) -> None:
        """Act on bad bytes that were found in the object `key`, whose blocks have been dropped.

        The kernel's pages of it go at the next open. What the kernel reads by itself is fetched again now.

        Args:
            key: names the object.
            discard: drop all of it; those who have it open get errors.

        Raises:
            CacheError: its files cannot be removed.

        """
        download = self._downloads.get(key)
        self._tainted.add(key)
        if not discard:
            if download is not None and download.object.lent:
                download.prefetch = True
                self.pump()
        elif download is not None and download.digest is not None:
            await self._condemn(download)
        else:
            await trio.to_thread.run_sync(self._cache.discard, key, limiter=self.disk)

    async def _condemn(self, download: Download) -> None:
        download.error = Corrupt(
            f"{_where(download)}: the bytes do not have the published digest "
            f"{download.digest}; they were discarded and the next open fetches them again"
        )
        log.error("%s", download.error)
        self._tainted.add(download.object.key)
        await trio.to_thread.run_sync(download.object.discard, limiter=self.disk)


def _where(download: Download) -> str:
    return f"{download.source.url}: {download.entry.path}"


def _order(download: Download) -> str:
    return f"order {download.object.key}"

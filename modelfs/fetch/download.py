"""What is known of one object that somebody has open: its readers, and what of it is on its way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import trio

from modelfs.cache import CacheObject, Verifier
from modelfs.errors import Corrupt, ModelfsError
from modelfs.fetch.chain import Copies, Copy
from modelfs.fetch.planner import Priority, Step, Stream, plan
from modelfs.fetch.source import Feed, Source
from modelfs.types import Digest, Entry, Span, block_count, block_span

PER_OBJECT = 12
"""Most blocks of one object that are fetched ahead at once: of 16 connections the rest is for who waits."""

GRAIN = 128 * 1024
"""A block wanted from its middle is fetched from there first, rounded down to this many bytes."""

PIECE = 1024 * 1024
"""Bytes from there that come with a request of their own; what the kernel asks for at once at the most.

A loader that maps a file looks at many places, one after the other. Who brings it one of them is then free
for the next (`Fetcher.goes_on`); the rest of the block comes when its turn has come.
"""


class Range:
    """A part of a flight that arrives in order: `done` bytes of `span` are there."""

    __slots__ = ("done", "span")

    def __init__(self, span: Span) -> None:
        self.span = span
        self.done = 0

    def holds(self, span: Span) -> bool:
        """Return whether all bytes of `span` have arrived by this range."""
        return self.span.start <= span.start and span.stop <= self.span.start + self.done

    @property
    def rest(self) -> Span:
        """What has not arrived yet."""
        return Span(self.span.start + self.done, self.span.stop)


class Flight:
    """One block on its way; after a store ignored ranges, the whole object on its way."""

    __slots__ = (
        "attempt",
        "blocks",
        "buffer",
        "connections",
        "error",
        "needs",
        "priority",
        "ranges",
        "renewed",
        "scope",
        "stopped",
        "whole",
    )

    def __init__(self, block: int, priority: Priority, parts: Iterable[Span], connections: int = 1) -> None:
        self.blocks = range(block, block + 1)
        self.connections = connections
        self.priority = priority
        self.ranges = [Range(part) for part in parts]
        self.needs: tuple[int, ...] = ()
        self.buffer: bytearray | None = None
        self.whole = False
        self.stopped = False
        self.error: ModelfsError | None = None
        self.scope = trio.CancelScope()
        self.attempt = trio.CancelScope()
        self.renewed = 0

    @property
    def done(self) -> int:
        """Bytes that have arrived."""
        return sum(part.done for part in self.ranges)

    def before(self, position: int) -> int:
        """Return how many bytes come in before the one at `position`, in bytes of the object."""
        ahead = 0
        for part in self.ranges:
            if part.span.start <= position < part.span.stop:
                return ahead + max(0, position - part.rest.start)
            ahead += len(part.rest)
        return ahead

    def holds(self, span: Span) -> bool:
        """Return whether all bytes of `span`, a part of this flight's blocks, have arrived."""
        return any(part.holds(span) for part in self.ranges)

    def cover(self, blocks: range, size: int) -> None:
        """Start over as one range over `blocks`."""
        self.blocks = blocks
        stop = block_span(blocks[-1], size).stop
        self.ranges = [Range(Span(block_span(blocks[0], size).start, stop))]


class Download:
    """One object that somebody has open: who reads it, what is on its way."""

    def __init__(self, source: Source, entry: Entry, cached: CacheObject) -> None:
        self.source = source
        self.entry = entry
        self.object = cached
        self.copies = Copies(source, entry, cached.key)
        self.names = {Copy(source, entry): self.copies}
        self.digest: Digest | None = entry.digest
        self.readers = 0
        self.demand: dict[int, int] = {}
        self.origins: dict[int, int] = {}
        self.streams: tuple[Stream, ...] = ()
        self.flights: dict[int, Flight] = {}
        self.express: dict[int, Flight] = {}
        self.prefetch = False
        self.paused_until = -math.inf
        self.no_ranges = False
        self.error: Corrupt | None = None
        self.doubted = False
        self.era = 0
        self.verifier: Verifier | None = None
        self.verifying = False
        self.checking = False
        self.following: Entry | None = None
        self.order: Sequence[int] = ()
        self.touched: dict[int, None] = {}
        self.left = trio.Event()
        self.closed = False
        self._shown = frozenset(block for block in self.blocks if cached.has(block))
        self.seen = bool(self._shown)
        self._changed = trio.lowlevel.ParkingLot()

    def add_name(self, source: Source, entry: Entry) -> None:
        """Take the bytes from `source` as well, which calls the same content `entry`, if others fail.

        Not if a feed brings it: flights of this object may hold connections that feeds wait for.
        """
        copy = Copy(source, entry)
        if copy not in self.names and entry.version not in source.feeds:
            self.names[copy] = Copies(source, entry, self.object.key)

    @property
    def feed(self) -> Feed | None:
        """What brings the bytes, if the range client does not: its flights take no connection."""
        return self.source.feeds.get(self.entry.version)

    @property
    def blocks(self) -> range:
        """All blocks of the object."""
        return range(block_count(self.entry.size))

    def serves(self, span: Span) -> bool:
        """Return whether the cache has all of `span` and readers may see it; then they count as shown.

        Of an object with a published digest one block is shown to nobody until the digest was checked: the
        last that was not shown yet, if all others are there, so that the check is about to be made.
        """
        cached = self.object
        if self.doubted or not cached.covers(span):
            return False
        if self.digest is None or cached.verified:
            return True
        shown = self._shown.union(span.blocks())
        if len(shown) == len(self.blocks):
            others = set(self.blocks).difference(span.blocks())
            if all(cached.covers(block_span(block, self.entry.size)) for block in others):
                return False
        self._shown = shown
        return True

    def pieces(self, span: Span) -> list[tuple[int, Span]]:
        """Return `span` cut at block boundaries, each piece with its block."""
        cut = []
        for block in span.blocks():
            whole = block_span(block, self.entry.size)
            cut.append((block, Span(max(span.start, whole.start), min(span.stop, whole.stop))))
        return cut

    def want(self, block: int, origin: int) -> None:
        """Count one reader more that waits for `block`, first of all for its byte `origin`."""
        self.demand[block] = self.demand.get(block, 0) + 1
        self.origins.setdefault(block, origin)

    def unwant(self, block: int) -> None:
        """Count one reader less that waits for `block`."""
        self.demand[block] -= 1
        if not self.demand[block]:
            del self.demand[block], self.origins[block]

    def coming(self, block: int) -> list[Flight]:
        """Return the flights that bring bytes of `block`."""
        return [flights[block] for flights in (self.flights, self.express) if block in flights]

    def is_far(self, block: int) -> bool:
        """Return whether what is waited for of `block` comes much later than with a request of its own."""
        flight, origin = self.flights.get(block), self.origins.get(block)
        if (
            flight is None
            or origin is None
            or block in self.express
            or flight.whole
            or flight.buffer is not None
        ):
            return False
        return flight.before(origin) > PIECE

    def piece(self, block: int) -> Span:
        """Return the part of `block` that somebody waits for first."""
        whole = block_span(block, self.entry.size)
        origin = self.origins.get(block, whole.start)
        return Span(origin // GRAIN * GRAIN, -(-(origin + PIECE) // GRAIN) * GRAIN) & whole

    def parts(self, block: int) -> list[Span]:
        """Return what is missing of `block`, in the order in which to fetch it: what is waited for first.

        Whoever waits for the first byte of a block goes on as a rule, so it is one part then.
        """
        whole, first = block_span(block, self.entry.size), self.piece(block)
        cuts = [first, Span(first.stop, whole.stop), Span(whole.start, first.start)]
        if first.start == whole.start:
            cuts = [whole]
        return [part for cut in cuts for gap in self.object.gaps(block) if (part := gap & cut)]

    def withhold(self) -> bool:
        """Show nothing from now on, unless a reader got a byte that may be wrong; return whether it is so."""
        if self.seen:
            return False
        self.doubted = True
        self.era += 1
        return True

    def start_over(self) -> None:
        """Take what comes from now on for other content than what was withheld."""
        self.doubted = self.no_ranges = False
        self._shown = frozenset()

    def wake(self) -> None:
        """Let every waiting reader look again; each says anew what it needs."""
        for flight in (*self.flights.values(), *self.express.values()):
            flight.needs = ()
        self._changed.unpark_all()

    async def changed(self) -> None:
        """Wait until `wake` is called."""
        await self._changed.park()

    def steps(self, now: float) -> Iterator[Step]:
        """Yield what to fetch next, most urgent first."""
        if self.error or self.object.complete:
            return iter(())
        if self.no_ranges:
            wanted = [] if self.flights else list(self.demand)[:1]
            return iter([Step(block, Priority.DEMAND) for block in wanted])
        paused = now < self.paused_until
        far = (Step(block, Priority.DEMAND) for block in list(self.demand) if self.is_far(block))
        planned = plan(
            blocks=len(self.blocks),
            absent=lambda block: block not in self.flights and not self.object.has(block),
            demand=self.demand,
            streams=() if paused else self.streams,
            whole=self.prefetch and not paused,
            order=self.order,
        )
        return chain(far, planned)

    def go_whole(self, flight: Flight) -> bool:
        """Turn `flight` into the one stream of the whole object, which a store without ranges sends.

        Return False if another flight already is that stream.
        """
        self.no_ranges = True
        if any(other.whole for other in self.flights.values() if other is not flight):
            return False
        flight.whole = True
        for other in set(self.flights.values()) - {flight}:
            other.scope.cancel()
        flight.cover(self.blocks, self.entry.size)
        for block in flight.blocks:
            if not self.object.has(block):
                self.flights[block] = flight
        return True

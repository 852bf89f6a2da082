"""Moving one flight's bytes: attempts at the range client, and what to do after each kind of failure."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator

import trio

from modelfs.cache import Data, Pipe
from modelfs.errors import AccessDenied, BadAnswer, Expired, NotFound, Stale, StoreError
from modelfs.fetch.chain import Copies, Copy
from modelfs.fetch.client import RangeClient
from modelfs.fetch.download import Download, Flight, Range
from modelfs.fetch.source import Source, delays
from modelfs.metrics import Metrics
from modelfs.types import Span

log = logging.getLogger(__name__)

ATTEMPTS = {Expired: 3, Stale: 2, AccessDenied: 2, BadAnswer: 4}
"""Attempts per block and store for failures that a new location may cure; others: until the deadline."""

PATIENCE = 2
"""Failures in a row of one store after which a flight goes on at another that has the same bytes."""


class _Abort(Exception):  # never an error: it ends a transfer that is no longer wanted
    """Raised in a sink to end a transfer."""


class _Sink:
    """Takes one attempt's bytes in a worker thread: into the cache file, or into memory without one."""

    def __init__(self, transfer: Transfer, download: Download, flight: Flight, part: Range) -> None:
        self._transfer = transfer
        self._download = download
        self._flight = flight
        self._part = part
        self._token = trio.lowlevel.current_trio_token()

    def begin(self, span: Span) -> None:
        if span == self._part.rest or self._flight.buffer is not None:
            return
        goes_on = trio.from_thread.run_sync(self._download.go_whole, self._flight, trio_token=self._token)
        if not goes_on:
            raise _Abort
        self._part = self._flight.ranges[0]

    def write(self, offset: int, data: Data) -> None:
        flight, part, count = self._flight, self._part, len(data)
        if flight.buffer is not None:
            # A store that ignores ranges sends everything: pick this flight's part out of it.
            skip = max(0, part.rest.start - offset)
            view = memoryview(data.take(count) if isinstance(data, Pipe) else data)
            view = view[skip : part.rest.stop - offset]
            start, count = part.done, len(view)
            flight.buffer[start : start + count] = view
        else:
            self._download.object.write(offset, data)
        before = part.span.start + part.done
        part.done += count
        after = part.span.start + part.done
        if any(before < need <= after for need in flight.needs):
            self._token.run_sync_soon(self._download.wake, idempotent=True)
        if flight.buffer is None:
            self._commit(Span(offset, offset + count))
        elif not part.rest:
            raise _Abort

    def _commit(self, written: Span) -> None:
        """Commit the blocks that are all written now: here, where their bytes are in this core's cache."""
        cached = self._download.object
        for block in written.blocks():
            if not cached.has(block) and not cached.gaps(block):
                cached.commit(block)
                if self._flight.whole:
                    self._token.run_sync_soon(self._transfer.committed, self._download)


class _Course:
    """Where a flight gets its bytes, and what went wrong since the last of them.

    Attributes:
        copies: of the name under which the content is asked for.
        copy: what is asked.
        deadline: trio time after which the flight fails.
        failing: stores that were asked in vain in this round.
        over: stores that need not be asked again.
        dead: names under which it need not be asked for again.

    """

    def __init__(self, copies: Copies, copy: Copy, deadline: float) -> None:
        self.deadline = deadline
        self.dead: set[Copies] = set()
        self.turn(copies, copy)
        self.start_over()

    def turn(self, copies: Copies, copy: Copy) -> None:
        """Ask for the content under another name."""
        self.copies, self.copy = copies, copy
        self.failing: set[Source] = set()
        self.over: set[Source] = set()
        self.failures: Counter[tuple[Source, type[StoreError]]] = Counter()

    def start_over(self) -> None:
        """Forget failures: bytes came."""
        self.failures.clear()
        self.pauses: Iterator[float] = delays()

    def failed(self, kind: type[StoreError]) -> int:
        """Count a failure; return how many of this kind there were at this store."""
        self.failures[self.copy.source, kind] += 1
        return self.failures[self.copy.source, kind]

    @property
    def patient(self) -> bool:
        """Whether the store that is asked should be asked again before another is."""
        source = self.copy.source
        failures = sum(count for (where, _), count in self.failures.items() if where is source)
        return source not in self.over and failures < PATIENCE and source.breaker.state == "closed"


class Transfer:
    """Runs the attempts of all flights.

    Args:
        client: what moves the bytes.
        metrics: what is counted.
        deadline: seconds after which a flight fails with its last error.
        committed: called in the trio thread after a block of a whole-object stream became part of the cache.
        goes_on: whether a flight of which a part has arrived should bring the rest as well.

    """

    def __init__(
        self,
        client: RangeClient,
        metrics: Metrics,
        deadline: float,
        committed: Callable[[Download], None],
        goes_on: Callable[[Download, Flight], bool],
    ) -> None:
        self._client = client
        self._metrics = metrics
        self._deadline = deadline
        self.committed = committed
        self._goes_on = goes_on

    async def run(self, download: Download, flight: Flight) -> bool:
        """Run attempts until every range of the flight has arrived, or those that it should bring.

        Returns whether everything has arrived.

        Raises:
            StoreError: no attempt can help, or the deadline passed.
            CacheError: the cache disk failed.

        """
        deadline = trio.current_time() + self._deadline
        copies = download.copies
        course = _Course(copies, await copies.first(download.digest), deadline)
        while True:
            part = next((part for part in flight.ranges if part.rest), None)
            if part is None:
                return True
            begins = part is not flight.ranges[0] and not part.done
            if begins and flight.buffer is None and not self._goes_on(download, flight):
                return False
            before = part.done
            try:
                await self._attempt(download, flight, part, course)
            except _Abort:
                if part.rest:  # another flight brings these blocks
                    flight.scope.cancel()
                    await trio.lowlevel.checkpoint()
            except StoreError as error:
                await self._recover(download, flight, error, course)
            if part.done > before:
                course.start_over()

    async def _attempt(self, download: Download, flight: Flight, part: Range, course: _Course) -> None:
        copy = course.copy
        # Cancelled by who sees that other connections are faster: the rest is asked for on another one.
        with trio.CancelScope() as flight.attempt, copy.source.asked():
            location = await copy.source.location(copy.entry)
            download.digest = download.digest or location.digest
            course.copies.brought[copy.source] = None
            sink = _Sink(self, download, flight, part)
            feed = copy.source.feeds.get(copy.entry.version) or self._client
            ranged = not download.no_ranges
            await feed.fetch(location, part.rest, download.entry.size, sink, ranged=ranged)

    async def _recover(self, download: Download, flight: Flight, error: StoreError, course: _Course) -> None:
        """Return when another attempt makes sense; raise what the reader gets when none does."""
        source, entry = course.copy.source, course.copy.entry
        where = f"{source.url}: {entry.path}"
        if isinstance(error, NotFound):  # it was listed
            error = Stale(f"{where}: the store no longer has this version: {error}")
        kind = type(error)
        failures = course.failed(kind)
        limit = ATTEMPTS.get(kind)
        over = None if error.retryable else error
        if limit is not None:
            source.forget(entry)
            over = error if failures >= limit else None
            if over is not None and kind is Expired:
                over = AccessDenied(f"{where}: the store refuses every new signature: {error}")
        if over is not None:
            course.over.add(source)
        try:
            if not course.copies.alone:
                if await self._go_elsewhere(download, over or error, course):
                    return
            elif over is not None:
                raise over from error
        except StoreError:
            if not await self._turn(download, course, dead=True):
                raise
            return
        pause = max(next(course.pauses), getattr(error, "retry_after", None) or 0.0)
        abandoned = not download.demand and failures >= 3
        if abandoned or trio.current_time() + pause > course.deadline:
            raise error
        self._metrics.retries.labels(source.scheme).inc()
        log.info("%s: %s; again in %.1f s", where, error, pause)
        await trio.sleep(pause)
        if not course.patient:
            await self._turn(download, course)

    async def _turn(self, download: Download, course: _Course, *, dead: bool = False) -> bool:
        """Go on under another name that somebody opened the content by; return whether there is one.

        Args:
            download: the object.
            course: where the flight stands.
            dead: the present name is of no more use.

        """
        if dead:
            course.dead.add(course.copies)
        names = list(download.names.values())
        at = names.index(course.copies)
        others = (other for other in names[at + 1 :] + names[:at] if other not in course.dead)
        copies = next(others, None)
        if copies is None:
            return False
        course.turn(copies, await copies.first(download.digest))
        download.copies = copies
        return True

    async def _go_elsewhere(self, download: Download, error: StoreError, course: _Course) -> bool:
        """Choose another copy if this one failed often enough; return whether it can be asked at once.

        Raises `error` if none is left that could bring the bytes one day.
        """
        source, copies = course.copy.source, course.copies
        if course.patient:
            return False
        if source in course.over and not error.retryable:
            copies.put_aside(source)
            if isinstance(error, Stale) and course.copy is not copies.home:
                source.outdated()
        course.failing.add(source)
        other = None
        with trio.move_on_at(course.deadline):
            other = await copies.other(download.digest, course.failing | course.over)
        if other is not None:
            log.warning("%s: %s; going on at %s", download.entry.path, error, other.source.url)
            self._metrics.fallbacks.labels(source.scheme, other.source.scheme).inc()
            course.copy = other
            return True
        # All fail: begin again with the first, as patiently as if it was the only one.
        course.failing.clear()
        left = copies.left(course.over)
        if left is None:
            raise error
        course.copy = left
        return False

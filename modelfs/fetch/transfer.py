"""Moving one flight's bytes: attempts at the range client, and what to do after each kind of failure."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from modelfs.cache import Data, Pipe
from modelfs.errors import AccessDenied, BadAnswer, Expired, NotFound, Stale, StoreError
from modelfs.fetch.client import RangeClient
from modelfs.fetch.download import Download, Flight, Range
from modelfs.fetch.source import delays
from modelfs.metrics import Metrics
from modelfs.types import Span

log = logging.getLogger(__name__)

ATTEMPTS = {Expired: 3, Stale: 2, AccessDenied: 2, BadAnswer: 4}
"""Attempts per block for failures that a new location may cure; others are retried until the deadline."""


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
        failures: dict[type[StoreError], int] = {}
        pauses = delays()
        while True:
            part = next((part for part in flight.ranges if part.rest), None)
            if part is None:
                return True
            begins = part is not flight.ranges[0] and not part.done
            if begins and flight.buffer is None and not self._goes_on(download, flight):
                return False
            before = part.done
            try:
                await self._attempt(download, flight, part)
            except _Abort:
                if part.rest:  # another flight brings these blocks
                    flight.scope.cancel()
                    await trio.lowlevel.checkpoint()
            except StoreError as error:
                await self._recover(download, flight, error, failures, next(pauses), deadline)
            if part.done > before:
                pauses = delays()
                failures.clear()

    async def _attempt(self, download: Download, flight: Flight, part: Range) -> None:
        location = await download.source.location(download.entry)
        download.digest = download.digest or location.digest
        sink = _Sink(self, download, flight, part)
        # Cancelled by who sees that other connections are faster: the rest is asked for on another one.
        with trio.CancelScope() as flight.attempt:
            feed = download.feed or self._client
            ranged = not download.no_ranges
            await feed.fetch(location, part.rest, download.entry.size, sink, ranged=ranged)

    async def _recover(
        self,
        download: Download,
        flight: Flight,
        error: StoreError,
        failures: dict[type[StoreError], int],
        pause: float,
        deadline: float,
    ) -> None:
        """Return when another attempt makes sense; raise what the reader gets when none does."""
        where = f"{download.source.url}: {download.entry.path}"
        if isinstance(error, NotFound):  # it was listed
            error = Stale(f"{where}: the store no longer has this version: {error}")
        kind = type(error)
        failures[kind] = failures.get(kind, 0) + 1
        limit = ATTEMPTS.get(kind)
        if limit is not None:
            download.source.forget(download.entry)
            if failures[kind] >= limit:
                if kind is Expired:
                    raise AccessDenied(f"{where}: the store refuses every new signature: {error}") from error
                raise error
        elif not error.retryable:
            raise error
        pause = max(pause, getattr(error, "retry_after", None) or 0.0)
        abandoned = not download.demand and failures[kind] >= 3
        if abandoned or trio.current_time() + pause > deadline:
            raise error
        self._metrics.retries.labels(download.source.scheme).inc()
        log.info("%s: %s; again in %.1f s", where, error, pause)
        await trio.sleep(pause)

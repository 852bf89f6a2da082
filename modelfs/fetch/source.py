"""A store as the fetch path sees it: what it listed, locations kept while they are valid, its breaker."""

from __future__ import annotations

import logging
import math
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Protocol, TypeVar

import trio

from modelfs.errors import BadAnswer, StoreError, Unavailable
from modelfs.fetch.breaker import Breaker
from modelfs.fetch.guard import Sink
from modelfs.metrics import Metrics
from modelfs.stores import Store, identity_of, scheme_of
from modelfs.types import Digest, Entry, Location, Snapshot, Span

log = logging.getLogger(__name__)

MARGIN = 30.0
"""Seconds before a location expires at which it is no longer handed out: a block must fit in."""

MAX_LOCATIONS = 10_000
"""Locations kept per store; each is a URL of a few hundred bytes."""

MAX_REFUSED = 1000
"""Objects per store of which it is remembered that it has wrong bytes."""

OUTAGES = (Unavailable, BadAnswer)
"""What counts as the failure of a store; other errors are its answers."""

LIST_SECONDS = 20.0
"""How long a listing may take while a reader waits for it."""

LIST_AGAIN = 15.0
"""Seconds after which a store that failed to list is asked again for a reader."""

T = TypeVar("T")


def delays(first: float = 0.2, longest: float = 15.0) -> Iterator[float]:
    """Yield seconds to wait before each retry: exponential with full jitter, without end.

    Full jitter (https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/) keeps a
    thousand nodes from coming back at the same moment.
    """
    bound = first
    while True:
        yield random.uniform(bound / 2, bound)  # noqa: S311  # not a secret
        bound = min(longest, bound * 2)


async def retrying(call: Callable[[], Awaitable[T]], deadline: float) -> T:
    """Return what `call` returns; repeat it while it raises a retryable StoreError.

    Args:
        call: the attempt; cancelled with the caller.
        deadline: trio time after which the last error is raised.

    Raises:
        StoreError: one that no retry can help, or the last one before the deadline.

    """
    for delay in delays():
        try:
            return await call()
        except StoreError as error:
            pause = max(delay, getattr(error, "retry_after", None) or 0.0)
            if not error.retryable or trio.current_time() + pause > deadline:
                raise
        await trio.sleep(pause)
    raise AssertionError("delays() is endless")


def object_key(store: str, entry: Entry) -> str:
    """Return the name of the cached object that holds the content of `entry`.

    Content with a published SHA-256 is one object whatever store it came from; otherwise it is named by the
    identity of its `store`, its path, version and size.
    """
    if entry.digest and entry.digest.algorithm == "sha256":
        return f"sha256-{entry.digest.value}"
    identity = "\0".join((store, entry.path, entry.version, str(entry.size)))
    return f"v-{sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()}"


def digest_in(key: str) -> Digest | None:
    """Return the digest of the content that the name of a cached object tells; None if it tells none."""
    algorithm, _, value = key.partition("-")
    return Digest("sha256", value) if algorithm == "sha256" else None


class Feed(Protocol):
    """What brings the bytes of entries that are not at the store as they are: members of an archive."""

    async def locate(self, entry: Entry) -> Location:
        """Return a location of `entry` that is good for `fetch`."""

    async def fetch(
        self, location: Location, span: Span, size: int, sink: Sink, *, ranged: bool = True
    ) -> None:
        """Do what ``RangeClient.fetch`` does."""


class Source:
    """One store, with what it listed last and the locations it gave.

    All methods belong to the trio thread. Cancelling a call that is locating leaves other callers alone.

    Args:
        store: the store.
        metrics: what is counted.
        breaker: of the store, shared by all sources of its identity; None for one of its own.
        show: returns what is shown of a listing, or raises a StoreError because it must not be used.

    Attributes:
        chain: the sources of the model, in the order in which they are asked; this is one of them.
        snapshot: what is shown of what the store listed last, if it did.
        why: why the store failed the last time, None after it answered.
        feeds: by the version of the entries that each of them brings.

    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        breaker: Breaker | None = None,
        show: Callable[[Source, Snapshot], Awaitable[Snapshot]] | None = None,
    ) -> None:
        self.store = store
        self.breaker = breaker or Breaker(trio.current_time)
        self.chain: tuple[Source, ...] = (self,)
        self.snapshot: Snapshot | None = None
        self.why: str | None = None
        self._show = show or _packed
        self._list_again = -math.inf
        self._listing = trio.Lock()
        self._refused: OrderedDict[str, None] = OrderedDict()
        self.url = store.url
        self.identity = identity_of(store)
        self.scheme = scheme_of(store.url)
        self.feeds: dict[str, Feed] = {}
        self._metrics = metrics
        self._locations: OrderedDict[tuple[str, str], Location] = OrderedDict()
        self._locks: dict[tuple[str, str], trio.Lock] = {}

    async def resolve(self) -> tuple[Snapshot, Snapshot]:
        """Ask the store for a snapshot; return what it listed and what is shown of it, kept as `snapshot`.

        Raises:
            StoreError: from the store, or because the listing must not be used.

        """
        try:
            listed = await self.store.snapshot()
            self._metrics.resolutions.labels(self.scheme).inc()
            self.snapshot = await self._show(self, listed)
        except StoreError as error:
            self.why = str(error)
            raise
        self.why = None
        return listed, self.snapshot

    async def listed(self) -> Snapshot | None:
        """Return what the store listed last; ask it if it never did. None if it does not say.

        It is asked once for all who wait, for `LIST_SECONDS`, and after a failure not for `LIST_AGAIN`.
        """
        async with self._listing:
            if self.snapshot is None and trio.current_time() >= self._list_again:
                try:
                    with trio.fail_after(LIST_SECONDS):
                        await self.resolve()
                except (StoreError, trio.TooSlowError) as error:
                    self._list_again = trio.current_time() + LIST_AGAIN
                    self.why = str(error) or f"{self.url}: no listing within {LIST_SECONDS:g} s"
                    log.info("%s cannot stand in: %s", self.url, self.why)
            return self.snapshot

    def outdated(self) -> None:
        """Forget what the store listed, for it no longer has all of it; it may be asked again in a while."""
        self.snapshot = None
        self._list_again = trio.current_time() + LIST_AGAIN

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Tell the breaker how the request for bytes ends that is made within."""
        probe = self.breaker.begin()
        try:
            yield
        except OUTAGES as error:
            self.why = str(error)
            self.breaker.failed()
            raise
        except StoreError:
            self.breaker.succeeded()
            raise
        except BaseException:
            self.breaker.released(probe=probe)
            raise
        self.why = None
        self.breaker.succeeded()

    def refuse(self, key: str) -> None:
        """Remember that what this store gave for the object `key` did not have its digest."""
        self._refused[key] = None
        if len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)

    def refused(self, key: str) -> bool:
        """Return whether `refuse` was told of the object `key`."""
        return key in self._refused

    def forgive(self, key: str) -> None:
        """Forget what `refuse` was told of the object `key`."""
        self._refused.pop(key, None)

    async def location(self, entry: Entry) -> Location:
        """Return a location of `entry` that is valid for at least a while; one store call serves all.

        Raises:
            StoreError: from the store's ``locate``.

        """
        feed = self.feeds.get(entry.version)
        if feed is not None:
            return await feed.locate(entry)
        key = (entry.path, entry.version)
        lock = self._locks.setdefault(key, trio.Lock())
        try:
            async with lock:
                known = self._locations.get(key)
                if known is None or (known.expires is not None and known.expires - MARGIN < time.time()):
                    known = self._locations[key] = await self.store.locate(entry)
                    if len(self._locations) > MAX_LOCATIONS:
                        self._locations.popitem(last=False)
                return known
        except StoreError as error:
            self._metrics.store_errors.labels(self.scheme, type(error).__name__).inc()
            raise
        finally:
            if not lock.locked():
                self._locks.pop(key, None)

    def forget(self, entry: Entry) -> None:
        """Drop the location of `entry`: the next `location` asks the store again."""
        self._locations.pop((entry.path, entry.version), None)

    def key(self, entry: Entry) -> str:
        """Return the name of the cached object that holds the content of `entry`."""
        return object_key(self.identity, entry)

    def unavailable(self, what: str, seconds: float) -> Unavailable:
        """Return the error for a reader whose deadline passed while this store was asked for `what`."""
        return Unavailable(f"{self.url}: {what} did not arrive within {seconds:g} s; is the store reachable?")


async def _packed(source: Source, listed: Snapshot) -> Snapshot:
    return await trio.to_thread.run_sync(listed.packed)


def chained(sources: Sequence[Source]) -> Source:
    """Make `sources` the chain of one model, in this order of preference; return the first."""
    for source in sources:
        source.chain = tuple(sources)
    return sources[0]

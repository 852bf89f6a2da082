"""A store as the fetch path sees it: locations kept while they are valid, retries with backoff."""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from hashlib import sha256
from typing import Protocol, TypeVar

import trio

from modelfs.errors import StoreError, Unavailable
from modelfs.fetch.guard import Sink
from modelfs.metrics import Metrics
from modelfs.stores import Store, identity_of, scheme_of
from modelfs.types import Digest, Entry, Location, Span

MARGIN = 30.0
"""Seconds before a location expires at which it is no longer handed out: a block must fit in."""

MAX_LOCATIONS = 10_000
"""Locations kept per store; each is a URL of a few hundred bytes."""

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
    """One store, with the locations it gave.

    Attributes:
        feeds: by the version of the entries that each of them brings.

    All methods belong to the trio thread. Cancelling a call that is locating leaves other callers alone.
    """

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self.store = store
        self.url = store.url
        self.identity = identity_of(store)
        self.scheme = scheme_of(store.url)
        self.feeds: dict[str, Feed] = {}
        self._metrics = metrics
        self._locations: OrderedDict[tuple[str, str], Location] = OrderedDict()
        self._locks: dict[tuple[str, str], trio.Lock] = {}

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

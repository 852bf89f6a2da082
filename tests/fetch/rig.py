"""The fetch path over origins on loopback, for its tests."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from modelfs.cache import Cache
from modelfs.errors import Corrupt
from modelfs.fetch.client import RangeClient
from modelfs.fetch.engine import Fetcher
from modelfs.fetch.source import Source
from modelfs.metrics import Metrics
from modelfs.types import Digest, Entry, Location, Snapshot
from tests.origin import Origin, etag

MIB = 1024 * 1024


def noise(size: int, seed: int = 1) -> bytes:
    source = random.Random(seed)
    pieces = [source.randbytes(min(MIB, size - start)) for start in range(0, size, MIB)]
    return b"".join(pieces)


class OriginStore:
    """The store of an `Origin`: pins ETags, counts how often it is asked where things are."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.url = origin.url
        self.located = 0
        self.refusals: list[Exception] = []
        self.expires: float | None = None

    async def snapshot(self) -> Snapshot:
        return Snapshot.of(self.url, "", [await self.entry(path) for path in self.origin.files])

    async def entry(self, path: str) -> Entry:
        data = self.origin.files[path]
        digest = Digest.parse(f"sha256:{self.origin.digests[path]}") if path in self.origin.digests else None
        return Entry(path, len(data), etag(data), digest)

    async def locate(self, entry: Entry) -> Location:
        self.located += 1
        if self.refusals:
            raise self.refusals.pop(0)
        return Location(self.url + entry.path, etag=entry.version, expires=self.expires)


class Rig:
    """A fetch path over one origin."""

    def __init__(self, fetcher: Fetcher, store: OriginStore, cache: Cache, metrics: Metrics) -> None:
        self.fetcher = fetcher
        self.store = store
        self.origin = store.origin
        self.source = Source(store, metrics)
        self.cache = cache
        self.metrics = metrics

    async def open(self, path: str, following: str | None = None) -> Any:
        ahead = None if following is None else await self.store.entry(following)
        return await self.fetcher.open(self.source, await self.store.entry(path), ahead)

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait until something that happens in other tasks and threads has happened."""
        with trio.fail_after(30):
            while not true():  # noqa: ASYNC110  # bytes arrive in threads that tell nobody
                await trio.sleep(0.01)

    def fetched(self) -> int:
        return int(self.metrics.value("modelfs_fetched_bytes_total"))


@asynccontextmanager
async def rig(
    directory: Path, origin: Origin, *, deadline: float = 60.0, limit: int | None = None
) -> AsyncIterator[Rig]:
    metrics = Metrics()
    cache = Cache(directory, limit=limit, min_free=0, metrics=metrics)
    client = RangeClient(metrics=metrics)
    try:
        async with trio.open_nursery() as nursery:
            fetcher = Fetcher(nursery, cache, client, metrics, read_deadline=deadline)
            yield Rig(fetcher, OriginStore(origin), cache, metrics)
            nursery.cancel_scope.cancel()
    finally:
        client.close()
        cache.close()


def against(origin: Origin, directory: Path, test: Callable[[Rig], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with rig(directory, origin, **options) as own:
            with trio.fail_after(60):
                await test(own)

    trio.run(main)


async def attempt(call: Awaitable[bytes]) -> bytes | Corrupt:
    try:
        return await call
    except Corrupt as error:
        return error

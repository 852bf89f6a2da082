"""What commands do without a daemon, and with the cache directory for themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import trio

from modelfs.cache import Cache
from modelfs.config import CacheSettings, Settings
from modelfs.errors import CacheUnusable, ConfigError, StoreError, unwrapped
from modelfs.fetch import scrub
from modelfs.fetch.chain import answering
from modelfs.fetch.client import RangeClient
from modelfs.fetch.engine import Fetcher
from modelfs.fetch.source import Source, chained, retrying
from modelfs.lockfile import Lock, LockedModel
from modelfs.metrics import Metrics
from modelfs.stores import open_store
from modelfs.types import BLOCK, Digest, Entry, Snapshot
from modelfs.views.filters import filtered

Progress = Callable[[Mapping[str, Any]], None]
"""Takes ``{"name": …, "done": bytes, "total": bytes}`` as the work goes on."""

RESOLVE_SECONDS = 60.0
"""How long resolving a model is retried."""


def verify_directory(directory: Path, progress: Progress) -> dict[str, Any]:
    """Read a cache directory again that no daemon uses; return what `ControlClient.verify` returns.

    Raises:
        CacheError: it is in use, or no cache.

    """
    if not (directory / "format").exists():
        raise CacheUnusable(f"{directory} is no cache: name the directory that was cache.dir of a mount")
    logging.getLogger("modelfs").addHandler(logging.NullHandler())  # the report says it all
    cache = Cache(directory, metrics=Metrics())
    try:
        subjects = scrub.subjects_in(cache)
        total = sum(subject.present for subject in subjects)

        async def show(subject: scrub.Subject, done: int) -> None:
            progress({"name": subject.name, "done": done, "total": total})

        report = trio.run(scrub.verify, cache, subjects, scrub.discard_from(cache), show)
    finally:
        cache.close()
    return report.to_json()


HASHED_AT_ONCE = 8
"""Most files that are fetched to be hashed at the same time."""


def lock(settings: Settings, progress: Progress, *, download: bool) -> Lock:
    """Resolve all models of `settings` and return the lock of what they are now.

    Args:
        settings: whose models, and with `download` whose cache.
        progress: called with ``{"name": …, "done": bytes, "total": bytes}`` while files are fetched.
        download: fetch files without a strong published digest, and compute it.

    Raises:
        ConfigError: there is nothing to lock, or a store is too large to list.
        StoreError: a model cannot be resolved or a file not be fetched; the message names it.
        CacheError: with `download`: the cache cannot be used, or a daemon uses it.

    """
    if not settings.models:
        raise ConfigError("there is no model to lock: name one in the configuration or with --source")
    logging.getLogger("modelfs").addHandler(logging.NullHandler())  # errors say it all
    try:
        return trio.run(_lock, settings, progress, download)
    except BaseExceptionGroup as group:
        raise unwrapped(group) from None


async def _lock(settings: Settings, progress: Progress, download: bool) -> Lock:
    metrics = Metrics()
    found: dict[str, tuple[Source, Snapshot]] = {}
    for model in settings.models:
        stores = ((model.sources[0], model.options), *model.fallbacks)
        chain = chained([Source(open_store(*each), metrics) for each in stores]).chain
        with _naming(model.name):
            ask = partial(answering, chain, None)
            source, snapshot, _ = await retrying(ask, trio.current_time() + RESOLVE_SECONDS)
        if not snapshot.complete:
            raise ConfigError(f"model {model.name}: {snapshot.url} is too large to list: lock a part of it")
        found[model.name] = source, await trio.to_thread.run_sync(filtered, model.face, snapshot)
    models = {name: LockedModel.of(snapshot) for name, (_, snapshot) in found.items()}
    weak = [
        (name, found[name][0], found[name][1].entries[path])
        for name, model in models.items()
        for path, pinned in model.files.items()
        if not pinned.target and not pinned.strong
    ]
    if download and weak:
        with _cache(settings.cache) as cache:
            digests = await _hashed(cache, settings.connections, metrics, weak, progress)
        with _cache(settings.cache) as cache:  # again: now nothing is open
            for name, source, entry in weak:
                pinned = replace(entry, digest=digests[name, entry.path])
                cache.rename(source.key(entry), source.key(pinned))
        models = {
            name: replace(
                model,
                files={
                    path: replace(pinned, digest=digests.get((name, path), pinned.digest), version="")
                    for path, pinned in model.files.items()
                },
            )
            for name, model in models.items()
        }
    return Lock(settings.lock, models)


@contextmanager
def _naming(model: str) -> Iterator[None]:
    """Let errors of stores begin with the model."""
    try:
        yield
    except StoreError as error:
        raise StoreError(f"model {model}: {error}") from error


@contextmanager
def _cache(settings: CacheSettings) -> Iterator[Cache]:
    cache = Cache(settings.directory, limit=settings.size, min_free=settings.min_free, metrics=Metrics())
    try:
        yield cache
    finally:
        cache.close()


async def _hashed(
    cache: Cache,
    connections: int,
    metrics: Metrics,
    wanted: Sequence[tuple[str, Source, Entry]],
    progress: Progress,
) -> dict[tuple[str, str], Digest]:
    """Fetch `wanted`, (model, source, entry) each, through `cache`; return the SHA-256 by model and path."""
    total, done = sum(entry.size for _, _, entry in wanted), 0
    digests: dict[tuple[str, str], Digest] = {}
    client = RangeClient(metrics=metrics, connections=connections)
    slots = trio.Semaphore(HASHED_AT_ONCE)

    async def hash_one(fetcher: Fetcher, name: str, source: Source, entry: Entry) -> None:
        nonlocal done
        hasher = sha256()
        async with slots:
            reader = await fetcher.open(source, entry)
            try:
                for start in range(0, entry.size, BLOCK):
                    with _naming(name):
                        data = await reader.read(start, BLOCK)
                    await trio.to_thread.run_sync(hasher.update, data)
                    done += len(data)
                    progress({"name": f"{name}/{entry.path}", "done": done, "total": total})
            finally:
                reader.close()
        digests[name, entry.path] = Digest("sha256", hasher.hexdigest())

    try:
        async with trio.open_nursery() as flights:
            fetcher = Fetcher(flights, cache, client, metrics, connections=connections)
            async with trio.open_nursery() as nursery:
                for each in wanted:
                    nursery.start_soon(hash_one, fetcher, *each)
            flights.cancel_scope.cancel()
    finally:
        client.close()
    return digests

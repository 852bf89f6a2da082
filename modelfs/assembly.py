"""What settings amount to: cache, fetch path and catalog, for a mount and for a process without one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from modelfs.cache import Cache
from modelfs.catalog import Catalog
from modelfs.config import Settings, options_for
from modelfs.fetch.client import RangeClient
from modelfs.fetch.engine import Fetcher
from modelfs.lockfile import Lock
from modelfs.metrics import Metrics
from modelfs.tree import Change, Tree


async def cache_of(settings: Settings, metrics: Metrics) -> Cache:
    """Open the cache that `settings` describe.

    Raises:
        CacheError: it cannot be used; CacheLocked while another process holds it.

    """
    opened = partial(
        Cache,
        settings.cache.directory,
        limit=settings.cache.size,
        min_free=settings.cache.min_free,
        metrics=metrics,
    )
    return await trio.to_thread.run_sync(opened)


def fetcher_of(
    settings: Settings, nursery: trio.Nursery, cache: Cache, client: RangeClient, metrics: Metrics
) -> Fetcher:
    """Return the fetch path over `cache` as `settings` describe it; what it does goes on in `nursery`."""
    return Fetcher(
        nursery,
        cache,
        client,
        metrics,
        connections=settings.connections,
        read_deadline=settings.read_deadline,
    )


def catalog_of(
    settings: Settings,
    tree: Tree,
    cache: Cache,
    fetcher: Fetcher,
    metrics: Metrics,
    changed: Callable[[list[Change]], None],
) -> Catalog:
    """Return a catalog of all models and namespaces of `settings`, none of them resolved yet.

    Raises:
        ConfigError: a store refuses its URL or options, or the lock cannot be read.

    """
    catalog = Catalog(
        tree,
        cache,
        fetcher,
        metrics,
        partial(options_for, store_options=settings.store_options),
        changed,
        Lock.read(settings.lock) if settings.locked else None,
        pickles=settings.pickles,
        limits=settings.archives,
    )
    for model in settings.models:
        catalog.add(
            model.name,
            model.sources[0],
            model.options,
            fallbacks=model.fallbacks,
            optional=model.optional,
            pinned=model.pin,
            pickles=model.pickles,
            face=model.face,
        )
    for namespace in settings.namespaces:
        catalog.add_namespace(namespace)
    return catalog

"""What settings amount to: the catalog of their models, for a mount and for a process without one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from modelfs.cache import Cache
from modelfs.catalog import Catalog
from modelfs.config import Settings, options_for
from modelfs.fetch.engine import Fetcher
from modelfs.lockfile import Lock
from modelfs.metrics import Metrics
from modelfs.tree import Change, Tree


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

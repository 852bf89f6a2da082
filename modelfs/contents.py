"""What is cached of the models, for who runs the mount: fetched ahead and given up."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import trio

from modelfs.cache import Cache
from modelfs.catalog import Catalog
from modelfs.errors import CacheError, ConfigError, ModelfsError, NotFound, Unavailable
from modelfs.fetch.engine import Fetcher
from modelfs.model import Model
from modelfs.types import Entry, Snapshot
from modelfs.views import Face
from modelfs.views.filters import shows

AT_ONCE = 4
"""Most files that are fetched ahead at the same time."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to be fetched ahead: its `name` for people is MODEL/PATH."""

    name: str
    model: Model
    entry: Entry


@dataclass(slots=True)
class Fetched:
    """What came of fetching `files` files of `bytes` bytes in all, of which `fetched` were not there yet.

    `failed` has a ``{"name", "why"}`` for each that is still not all there.
    """

    files: int
    bytes: int
    fetched: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the answer of ``POST /v1/prefetch`` as docs/status.md describes it."""
        return asdict(self)


Progress = Callable[[str, int, int], Awaitable[None]]
"""Called with a name, the bytes that are there of everything wanted, and how many that will be."""


class Contents:
    """The cached contents of the models of `catalog`, in `cache`, brought there by `fetcher`."""

    def __init__(self, catalog: Catalog, cache: Cache, fetcher: Fetcher) -> None:
        self._catalog = catalog
        self._cache = cache
        self._fetcher = fetcher

    # -- ahead -----------------------------------------------------------------------------------------

    async def wanted(self, name: str, globs: Sequence[str]) -> list[Wanted]:
        """Return the files of the model `name` that `globs` match, or all; those in archives one by one.

        Raises:
            NotFound: there is no such model or file.
            ConfigError: its store is too large to list.
            CacheError: they are more than the cache may hold.
            StoreError: the model cannot be resolved, or an archive not be read.

        """
        model = await self._catalog.look_up(name)
        for archive in list(model.archives.values()):
            await archive.finish()
        chosen = _chosen(model, globs, model.snapshot)
        found = [Wanted(_name(model, entry), model, entry) for entry in chosen]
        size, limit = sum(each.entry.size for each in found), self._cache.limit
        if limit is not None and size > limit:
            raise CacheError(
                f"{name}: {size} bytes are wanted, and the cache may hold {limit}: "
                "raise cache.size, or name fewer files"
            )
        return found

    async def fetch(self, wanted: Sequence[Wanted], progress: Progress) -> Fetched:
        """Fetch `wanted` into the cache, behind what readers need. Cancelling ends it."""
        there = {each.name: self._catalog.files.cached_bytes(each.model, each.entry) for each in wanted}
        before = sum(there.values())
        report = Fetched(len(wanted), sum(each.entry.size for each in wanted))
        left = iter(wanted)

        async def note(each: Wanted) -> None:
            now = self._catalog.files.cached_bytes(each.model, each.entry)
            report.fetched += now - there[each.name]
            there[each.name] = now
            await progress(each.name, before + report.fetched, report.bytes)

        async def fetch_some() -> None:
            for each in left:
                try:
                    reader = await self._fetcher.open(each.model.source_of(each.entry), each.entry)
                    try:
                        await reader.fetch(partial(note, each))
                    finally:
                        reader.close()
                except ModelfsError as error:
                    report.failed.append({"name": each.name, "why": str(error)})
                await note(each)

        async with trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(fetch_some)
        return report

    # -- given up --------------------------------------------------------------------------------------

    async def evict(self, name: str, globs: Sequence[str]) -> dict[str, Any]:
        """Evict what is cached of the model `name`, or of its files that `globs` match.

        What is open or pinned stays. Returns the answer of ``POST /v1/evict`` as docs/status.md describes it.

        Raises:
            NotFound: there is no such model or file.
            ConfigError: its store is too large to list.

        """
        (model,) = self._catalog.named(name)
        return await trio.to_thread.run_sync(self._evict, model, globs)

    def _evict(self, model: Model, globs: Sequence[str]) -> dict[str, Any]:
        shown, listed = model.snapshot, model.listed  # the packed archives too
        entries = {model.source_of(entry).key(entry): entry for entry in _chosen(model, globs, shown, listed)}
        freed = self._cache.evict(entries)
        evicted = [{"name": _name(model, entries[key]), "bytes": count} for key, count in freed.items()]
        kept = [
            {"name": _name(model, entry), "why": why}
            for key, entry in entries.items()
            if self._catalog.files.cached_bytes(model, entry) and (why := self._cache.holder(key))
        ]
        return {"evicted": evicted, "kept": kept}

    async def collect(self, older_than: float, *, dry_run: bool) -> dict[str, Any]:
        """Evict everything that nobody used for `older_than` seconds, of whatever model, if any.

        What is open or pinned stays. With `dry_run` all does. Returns the answer of ``POST /v1/gc`` as
        docs/status.md describes it.
        """
        return await trio.to_thread.run_sync(self._collect, time.time() - older_than, dry_run)

    def _collect(self, since: float, dry_run: bool) -> dict[str, Any]:
        unused = self._cache.unused(since)
        if not dry_run:
            freed = self._cache.evict([each.key for each in unused])
            unused = [each for each in unused if each.key in freed]
        names = {
            model.source_of(entry).key(entry): _name(model, entry)
            for model in self._catalog.named()
            for entry in (model.snapshot.entries.values() if model.snapshot else ())
            if entry.kind == "file"
        }
        rows = [
            {"name": names.get(each.key, each.key), "bytes": each.bytes, "used": each.used} for each in unused
        ]
        return {"evicted": rows, "dry_run": dry_run}


def _name(model: Model, entry: Entry) -> str:
    return f"{model.name}/{entry.path}"


def _chosen(model: Model, globs: Sequence[str], *snapshots: Snapshot | None) -> list[Entry]:
    """Return the files in `snapshots` of `model` that `globs`, as filters have them, match, or all."""
    matches = shows(Face(include=tuple(globs)))
    entries: dict[str, Entry] = {}
    for snapshot in snapshots:
        if snapshot is None:
            raise Unavailable(f"model {model.name}: {model.why}")
        if not snapshot.complete:
            raise ConfigError(f"model {model.name}: its store is too large to list")
        entries |= snapshot.entries
    found = [entry for entry in entries.values() if entry.kind == "file" and matches(entry.path)]
    if globs and not found:
        raise NotFound(f"model {model.name} has no file {' or '.join(map(repr, globs))}")
    return found

"""The files of models: opened for readers, described, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import trio

from modelfs.cache import Cache
from modelfs.fetch.chain import standing
from modelfs.fetch.engine import Fetcher
from modelfs.fetch.planner import following
from modelfs.fetch.reader import Reader
from modelfs.fetch.scrub import Subject, subjects_in
from modelfs.fetch.source import Source
from modelfs.model import Model
from modelfs.screen import Screen
from modelfs.tree import File
from modelfs.types import Entry, Snapshot
from modelfs.unpacked import states


class Files:
    """The files of all models of one mount.

    Args:
        cache: where their contents are.
        fetcher: the fetch path for contents.

    """

    def __init__(self, cache: Cache, fetcher: Fetcher) -> None:
        self._cache = cache
        self._fetcher = fetcher
        self._screen = Screen(cache, fetcher)

    async def run(self) -> None:
        """Look into the pickles that nobody waits for; never returns."""
        await self._screen.run()

    async def open(self, node: File[Model]) -> tuple[Reader, bool]:
        """Return a reader of a file, and whether the kernel may keep its pages of it.

        Raises:
            AccessDenied: it is a pickle that the policy of its model denies.
            StoreError: the bytes that decide about that cannot be had.

        """
        source, snapshot = node.model.source_of(node.entry), node.model.snapshot
        await self._screen.admit(source, node.entry, node.model.pickles)
        keep = self._fetcher.keeps_pages(source, node.entry)
        shard = following(node.entry.path)
        ahead = snapshot.entries.get(shard) if shard and snapshot else None
        return await self._fetcher.open(source, node.entry, ahead), keep

    def cached_bytes(self, model: Model, entry: Entry) -> int:
        """Return how many bytes of `entry` are in the cache."""
        return self._cache.cached_bytes(model.source_of(entry).key(entry), entry.size)

    def subjects(self, models: Iterable[Model], *, also_old: bool) -> list[Subject]:
        """Return what is cached of `models`, with `also_old` all else that is cached, to be read again."""
        found: dict[str, Subject] = {}
        for model in models:
            for entry in model.snapshot.entries.values() if model.snapshot else ():
                key, present = model.source.key(entry), self.cached_bytes(model, entry)
                if entry.kind == "file" and present:
                    found.setdefault(key, Subject(key, f"{model.name}/{entry.path}", present, entry.digest))
        for subject in subjects_in(self._cache) if also_old else ():
            found.setdefault(subject.key, subject)
        return list(found.values())

    def attributes(self, node: File[Model]) -> dict[str, Callable[[], str]]:
        """Return the extended attributes of a file: name → function that returns the value."""
        entry, model = node.entry, node.model
        source = model.source_of(entry)
        found: dict[str, Callable[[], str]] = {
            "user.modelfs.source": partial(str, source.url),
            "user.modelfs.version": partial(str, entry.version),
            "user.modelfs.cached_bytes": lambda: str(self.cached_bytes(model, entry)),
        }
        if entry.digest is not None:
            found[f"user.modelfs.{entry.digest.algorithm}"] = partial(str, entry.digest.value)
        imports = self._screen.imports(source, entry)
        if imports is not None:
            found["user.modelfs.pickle"] = lambda: imports.suspicion or "harmless"
        return found

    async def report(self, model: Model) -> dict[str, Any]:
        """Return what ``modelfs status`` says about a model."""
        snapshot = model.snapshot
        sums = await trio.to_thread.run_sync(self._sums, model.source, snapshot) if snapshot else {}
        return {
            "name": model.name,
            "source": model.source.url,
            "sources": standing(model.source),
            "state": model.state,
            "why": model.why,
            "revision": snapshot.revision if snapshot else None,
            "resolved_at": model.resolved_at,
            "offline": model.offline,
            "files": snapshot.listing.totals.files if snapshot else 0,
            "size": snapshot.size if snapshot else 0,
            "cached_bytes": 0,
            "rejected": len(snapshot.rejected) if snapshot else 0,
            "hidden": snapshot.hidden if snapshot else 0,
            "repositories": list(model.repositories),
            "pinned": model.stays,
            "pickles": model.pickles,
            "suspicious": {},
            "archives": states(model.archives.values()),
            **sums,
        }

    def _sums(self, source: Source, snapshot: Snapshot) -> dict[str, Any]:
        """Return what `report` says of a model's files: what is cached of them, and which look suspicious."""
        cached, suspicious = 0, {}
        for entry in snapshot.entries.values():
            if entry.kind == "file":
                cached += self._cache.cached_bytes(source.key(entry), entry.size)
                imports = self._screen.imports(source, entry)
                if imports is not None and imports.suspicion:
                    suspicious[entry.path] = imports.suspicion
        return {"cached_bytes": cached, "suspicious": suspicious}

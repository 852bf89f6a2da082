"""What of a mount's models is on disk, for a start before or without their stores, and for a successor."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from itertools import chain

import trio

from modelfs.cache import Cache
from modelfs.errors import StoreError
from modelfs.faces import Faces
from modelfs.fetch.source import Source
from modelfs.layouts import artifact
from modelfs.model import Model
from modelfs.snapshots import Snapshots
from modelfs.tree import Change, Node, difference, leaf
from modelfs.types import Snapshot

log = logging.getLogger(__name__)

FOUND = "found on demand"
"""Name under which the models that were found on demand are kept on disk: path → URL."""


class Records:
    """Snapshots of models as they were shown, and which models were found on demand.

    Args:
        cache: where they are kept.
        faces: what becomes of what a store has listed.

    """

    def __init__(self, cache: Cache, faces: Faces) -> None:
        self._cache = cache
        self._faces = faces
        self._snapshots = Snapshots(cache)

    async def save(self, model: Model, listed: Snapshot | None) -> None:
        """Keep what the store listed, not what is shown of it: models that differ in that may share it."""
        if listed is not None:
            await trio.to_thread.run_sync(
                self._snapshots.save, model.source.identity, listed, model.resolved_at or 0.0
            )

    async def load(self, model: Model) -> tuple[Snapshot, float] | None:
        """Return the snapshot that was shown last, and when it was resolved; `source` is its store then."""
        latest: tuple[Snapshot, float] | None = None
        for source in model.source.chain:
            saved = await trio.to_thread.run_sync(self._snapshots.load, source.identity)
            if saved is None:
                continue
            listed, resolved_at = saved
            shown = await self._shown(model, source, listed)
            if shown is not None:
                source.snapshot = shown
                if latest is None or resolved_at > latest[1]:
                    latest, model.source = (shown, resolved_at), source
        return latest

    async def load_more(self, model: Model, snapshot: Snapshot) -> None:
        """Know of a model with a `snapshot` from disk what other layouts show of it."""
        model.is_for_ollama = await self._faces.is_for_ollama(model.source, snapshot, offline=True)
        if model.repositories:
            past = await trio.to_thread.run_sync(self._snapshots.past, model.source.identity)
            model.before = await self._shown(model, model.source, past) if past else None

    async def untold(self, model: Model) -> list[Change]:
        """Return what is new in the snapshot on disk: who saved it may have died before the kernel knew."""
        past = await trio.to_thread.run_sync(self._snapshots.past, model.source.identity)
        if past is None or model.snapshot is None:
            return []
        with contextlib.suppress(StoreError):  # then it is all names that were not shown as well
            past = await self._faces.shown(model.name, model.source, model.face, past, offline=True)
        return await trio.to_thread.run_sync(difference, model.name, past.listing, model.snapshot.listing)

    async def past(self, model: Model, inos: set[int]) -> list[Node]:
        """Return those files of the snapshot before the present one that have these numbers."""
        return await trio.to_thread.run_sync(self._past, model, inos)

    def _past(self, model: Model, inos: set[int]) -> list[Node]:
        found: list[Node] = []
        for source in model.source.chain:
            shown = source.snapshot if source is not model.source else None
            for snapshot in filter(None, (self._snapshots.past(source.identity), shown)):
                entries = (entry for entry in snapshot.entries.values() if entry.kind != "directory")
                plain = (leaf(model.name, entry, model) for entry in entries)
                packed = (node for _, node in artifact(model, source.url, snapshot))
                found += (node for node in chain(plain, packed) if node.ino in inos)
        return found

    async def _shown(self, model: Model, source: Source, snapshot: Snapshot) -> Snapshot | None:
        try:
            return await self._faces.shown(model.name, source, model.face, snapshot, offline=True)
        except StoreError as error:
            log.warning("%s: the snapshot on disk cannot be used: %s", model.name, error)
            return None

    async def note_found(self, models: Mapping[str, Model]) -> None:
        """Note what was found on demand, for a successor."""
        found = {path: model.source.url for path, model in models.items() if model.on_demand}
        await trio.to_thread.run_sync(self._cache.set_meta, FOUND, found)

    async def found(self) -> dict[str, str]:
        """Return what was noted: path → URL."""
        noted = await trio.to_thread.run_sync(self._cache.get_meta, FOUND)
        return noted if isinstance(noted, dict) else {}

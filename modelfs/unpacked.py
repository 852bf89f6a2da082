"""Snapshots with directories in the place of archives, as far as is known what is in them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import trio

from modelfs.archives import Limits
from modelfs.cache import Cache
from modelfs.errors import unwrapped
from modelfs.fetch.engine import Fetcher
from modelfs.fetch.source import Source
from modelfs.fetch.unpack import Archive
from modelfs.stores.manifest import layers_in
from modelfs.types import Entry, Snapshot
from modelfs.views import Face
from modelfs.views.archives import chosen, with_layers, with_members
from modelfs.views.filters import shows


class Archives:
    """All archives of one mount that are directories.

    Args:
        fetcher: the fetch path.
        cache: where indexes are kept.
        limits: what no archive may exceed.
        settled: called with the source of an archive of which everything is known from now on.

    """

    def __init__(
        self, fetcher: Fetcher, cache: Cache, limits: Limits, settled: Callable[[Source], Awaitable[None]]
    ) -> None:
        self._fetcher = fetcher
        self._cache = cache
        self._limits = limits
        self._settled = settled

    async def unpacked(
        self, source: Source, snapshot: Snapshot, face: Face
    ) -> tuple[Snapshot, Mapping[str, Archive | Image]]:
        """Return `snapshot` with what is known of its archives in their place, and all of these by path.

        Archives that an earlier snapshot of `source` had are not looked into any further.
        """
        directory, paths = layers_in(snapshot.entries)
        if paths and face.archives is not False:
            layers = [await self._archive(source, snapshot.entries[path], "", directory) for path in paths]
            self._stop(source, layers)
            facts = [(one.entry, one.version, one.contents) for one in layers]
            image = Image(layers)
            show = partial(with_layers, snapshot, facts, directory, shows(face), known=image.done)
            return await trio.to_thread.run_sync(show), {"": image}
        archives = {
            prefix: await self._archive(source, entry, prefix)
            for entry, prefix in chosen(source.url, snapshot, face)
        }
        if not archives and not source.feeds:
            return snapshot, {}
        self._stop(source, archives.values())
        known = {path: (one.entry, one.version, one.contents) for path, one in archives.items()}
        return await trio.to_thread.run_sync(with_members, snapshot, known), archives

    def _stop(self, source: Source, archives: Iterable[Archive]) -> None:
        """End the passes over all other archives of `source`."""
        versions = {archive.version for archive in archives}
        for version, archive in source.feeds.items():
            if version not in versions and isinstance(archive, Archive):
                archive.stop()

    async def _archive(self, source: Source, entry: Entry, prefix: str, directory: str = "") -> Archive:
        async def settled() -> None:
            await self._settled(source)

        archive = Archive(self._fetcher, self._cache, source, entry, prefix, self._limits, settled, directory)
        known = source.feeds.get(archive.version)
        if isinstance(known, Archive):
            return known
        await trio.to_thread.run_sync(archive.load)
        source.feeds[archive.version] = archive
        return archive


class Image:
    """The layers of an image, bottom first: to whoever looks for names they are one archive.

    What a layer has may be replaced or removed by one above it, so nothing is known before all were passed.
    """

    def __init__(self, layers: Sequence[Archive]) -> None:
        self.layers = layers

    @property
    def done(self) -> bool:
        """Whether everything is known, and shown."""
        return all(layer.done for layer in self.layers)

    async def find(self, path: str) -> Entry | None:
        """Return None once everything is shown: what is at `path` is then in the listing.

        Raises:
            ModelfsError: it cannot be found out.

        """
        await self.finish()
        return None

    async def finish(self) -> None:
        """Return when everything is known, and shown.

        Raises:
            ModelfsError: it cannot be found out.

        """
        try:
            async with trio.open_nursery() as nursery:
                for layer in self.layers:
                    nursery.start_soon(layer.finish)
        except BaseExceptionGroup as group:
            raise unwrapped(group) from None


def states(archives: Iterable[Archive | Image]) -> list[dict[str, Any]]:
    """Return what ``modelfs status`` says about archives."""
    flat = [layer for one in archives for layer in (one.layers if isinstance(one, Image) else [one])]
    return [_state(archive) for archive in flat]


def _state(archive: Archive) -> dict[str, Any]:
    contents = archive.contents
    return {
        "path": archive.prefix or archive.entry.path,
        "state": "failed" if archive.error else "ready" if archive.done else "pending",
        "why": str(archive.error) if archive.error else None,
        "members": len(contents.members),
        "rejected": len(contents.rejected),
    }

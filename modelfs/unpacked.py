"""Snapshots with directories in the place of archives, as far as is known what is in them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from modelfs.archives import Limits
from modelfs.cache import Cache
from modelfs.fetch.engine import Fetcher
from modelfs.fetch.source import Source
from modelfs.fetch.unpack import Archive
from modelfs.types import Entry, Snapshot
from modelfs.views import Face
from modelfs.views.archives import chosen, with_members


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
    ) -> tuple[Snapshot, Mapping[str, Archive]]:
        """Return `snapshot` with what is known of its archives in their place, and all of these by path.

        Archives that an earlier snapshot of `source` had are not looked into any further.
        """
        archives = {
            prefix: await self._archive(source, entry, prefix)
            for entry, prefix in chosen(source.url, snapshot, face)
        }
        if not archives and not source.feeds:
            return snapshot, {}
        versions = {archive.version for archive in archives.values()}
        for version, archive in source.feeds.items():
            if version not in versions and isinstance(archive, Archive):
                archive.stop()
        known = {path: (one.entry, one.version, one.contents) for path, one in archives.items()}
        return await trio.to_thread.run_sync(with_members, snapshot, known), archives

    async def _archive(self, source: Source, entry: Entry, prefix: str) -> Archive:
        async def settled() -> None:
            await self._settled(source)

        archive = Archive(self._fetcher, self._cache, source, entry, prefix, self._limits, settled)
        known = source.feeds.get(archive.version)
        if isinstance(known, Archive):
            return known
        await trio.to_thread.run_sync(archive.load)
        source.feeds[archive.version] = archive
        return archive


def state(archive: Archive) -> dict[str, Any]:
    """Return what ``modelfs status`` says about an archive."""
    contents = archive.contents
    return {
        "path": archive.prefix or archive.entry.path,
        "state": "failed" if archive.error else "ready" if archive.done else "pending",
        "why": str(archive.error) if archive.error else None,
        "members": len(contents.members),
        "rejected": len(contents.rejected),
    }

"""What the tree shows of what stores list: held to the lock, filtered, with a link to the latest version."""

from __future__ import annotations

import logging
from functools import partial
from hashlib import sha256

import trio

from modelfs.cache import Cache
from modelfs.errors import StoreError
from modelfs.fetch.engine import Fetcher
from modelfs.fetch.source import Source
from modelfs.lockfile import Lock
from modelfs.types import Entry, Snapshot
from modelfs.views import Face, ollama
from modelfs.views.filters import filtered
from modelfs.views.versions import marker, with_latest

log = logging.getLogger(__name__)

TEXT_SECONDS = 20.0
"""How long the content of a file is waited for that decides about what is shown."""

MAX_MANIFEST = 1 << 20
"""Bytes of the largest manifest that is looked into."""


class Faces:
    """Makes what is shown of the listings of one mount; all methods belong to the trio thread.

    Args:
        cache: where the content of markers and manifests is remembered, for a start without network.
        fetcher: reads them.
        lock: what every model must be; None if they may be anything.

    """

    def __init__(self, cache: Cache, fetcher: Fetcher, lock: Lock | None) -> None:
        self._cache = cache
        self._fetcher = fetcher
        self._lock = lock
        self._last: dict[tuple[str, str], tuple[bytes, Snapshot]] = {}
        """By model and store: a hash of the last listing and its marker, and what was shown of it."""

    async def shown(
        self, name: str, source: Source, face: Face, listed: Snapshot, *, offline: bool = False
    ) -> Snapshot:
        """Return what the model `name` shows of what its store `listed`, packed.

        Args:
            name: of the model.
            source: its store.
            face: how it is to be shown.
            listed: what is there.
            offline: do not ask the store for the content of a marker; it counts if it was read before.

        Raises:
            NotLocked: it is not what the lock says.
            NotFound: there is no such version as the configuration names.
            StoreError: the store does not say now what is in its marker.

        """
        own = await trio.to_thread.run_sync(marker, listed)
        marked = await self._text(source, own, offline=offline) if own else ""
        return await trio.to_thread.run_sync(self._shown, name, source.identity, face, listed, marked)

    def _shown(self, name: str, store: str, face: Face, listed: Snapshot, marked: str) -> Snapshot:
        token = _hash(listed, marked)
        before, shown = self._last.get((name, store), (b"", listed))
        if before != token:  # most listings are what they were a minute ago
            shown = self._made(name, face, listed, marked)
            self._last[name, store] = token, shown
        return shown

    def _made(self, name: str, face: Face, listed: Snapshot, marked: str) -> Snapshot:
        kept = filtered(face, listed)
        if kept.hidden and not kept.listing.totals.files:
            log.warning("%s: nothing is shown: its filters hide all %d files", name, kept.hidden)
        held = kept if self._lock is None else self._lock.hold(name, kept)
        return with_latest(held.packed(), face.latest, marked).packed()

    async def is_for_ollama(self, source: Source, snapshot: Snapshot, *, offline: bool = False) -> bool:
        """Return whether `snapshot` is an artifact as Ollama packs them, under a name that Ollama can say.

        Raises:
            StoreError: the store does not say now what is in its manifest.

        """
        own = snapshot.entries.get(ollama.MANIFEST) if snapshot.complete else None
        if own is None or own.size > MAX_MANIFEST or ollama.manifest_of(source.url) is None:
            return False
        return ollama.is_artifact(await self._text(source, own, offline=offline))

    async def _text(self, source: Source, own: Entry, *, offline: bool) -> str:
        """Return the content of a small file, from disk if it was read before; "" if it cannot be had."""
        key = f"text {source.key(own)}"
        known = await trio.to_thread.run_sync(self._cache.get_meta, key)
        if isinstance(known, str):
            return known
        if offline:
            return ""
        try:
            content = await self._content(source, own)
        except StoreError as error:
            if error.retryable:
                raise
            log.warning("%s: what %s says does not count: %s", source.url, own.path, error)
            return ""
        text = content.decode("utf-8", "replace")
        await trio.to_thread.run_sync(partial(self._cache.set_meta, key, text))
        return text

    async def _content(self, source: Source, entry: Entry) -> bytes:
        with trio.move_on_after(TEXT_SECONDS):
            reader = await self._fetcher.open(source, entry)
            try:
                return bytes(await reader.read(0, entry.size))
            finally:
                reader.close()
        raise source.unavailable(entry.path, TEXT_SECONDS)


def _hash(listed: Snapshot, marked: str) -> bytes:
    words = (listed.url, listed.revision, str(listed.complete), str(listed.rejected), marked)
    return sha256("\n".join((*words, *listed.listing.lines)).encode("utf-8", "surrogateescape")).digest()

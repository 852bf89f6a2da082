"""Whether a file that loaders unpickle may be opened: what it would import is looked at first.

Content is scanned once and the result kept on disk under the name of its object: the same bytes are not
scanned again for another model, by a successor or after the next start.
"""

from __future__ import annotations

import io
import logging

import trio

from modelfs.cache import Cache
from modelfs.errors import AccessDenied, ModelfsError
from modelfs.fetch.engine import Fetcher
from modelfs.fetch.reader import ReaderFile
from modelfs.fetch.source import Source
from modelfs.pickles import Imports, is_pickle, scan
from modelfs.types import Entry, PicklePolicy

log = logging.getLogger(__name__)

RULES = 1
"""Version of the scan; results of another one are not used again."""

PIECE = 64 * 1024
"""Bytes that a scan reads at once."""

WAITING = 1000
"""Files that wait to be scanned for a warning; more are not scanned before they are opened again."""


class Screen:
    """Scans pickles of one mount; all methods belong to the trio thread."""

    def __init__(self, cache: Cache, fetcher: Fetcher) -> None:
        self._cache = cache
        self._fetcher = fetcher
        self._found: dict[str, Imports] = {}
        self._scanning: dict[str, trio.Lock] = {}
        self._thread = trio.CapacityLimiter(1)  # it is all Python: two would only share the time of one
        self._send, self._receive = trio.open_memory_channel[tuple[Source, Entry]](WAITING)

    async def run(self) -> None:
        """Scan what was opened under the policy ``warn``, one file after the other; never returns."""
        async for source, entry in self._receive:
            try:
                await self._imports(source, entry)
            except ModelfsError as error:
                log.info("%s: %s could not be scanned: %s", source.url, entry.path, error)

    async def admit(self, source: Source, entry: Entry, policy: PicklePolicy) -> None:
        """Return if `entry` may be opened; under ``warn`` it may, and is scanned meanwhile.

        Raises:
            AccessDenied: it would import what is not known to be harmless, or cannot be scanned to its end.
            StoreError: the bytes to look at cannot be had.

        """
        if policy == "allow" or not is_pickle(entry.path):
            return
        if policy == "warn":
            try:
                self._send.send_nowait((source, entry))
            except trio.WouldBlock:
                log.info("%s: %s is not scanned: too many files wait", source.url, entry.path)
            return
        imports = await self._imports(source, entry)
        if imports.suspicion:
            raise AccessDenied(
                f"{source.url}: {entry.path!r} is not opened: {imports.suspicion}; "
                "set pickles: warn for this model if you trust it"
            )

    def imports(self, source: Source, entry: Entry) -> Imports | None:
        """Return what `entry` would import; None if it was not scanned since this daemon began."""
        if not self._found or not is_pickle(entry.path):
            return None
        return self._found.get(source.key(entry))

    async def _imports(self, source: Source, entry: Entry) -> Imports:
        key = source.key(entry)
        lock = self._scanning.setdefault(key, trio.Lock())
        try:
            async with lock:
                if key not in self._found:
                    imports = await self._remembered(key) or await self._scan(source, entry)
                    self._found[key] = imports
                    if imports.suspicion:
                        log.warning(
                            "%s: %r is a suspicious pickle: %s", source.url, entry.path, imports.suspicion
                        )
                return self._found[key]
        finally:
            if not lock.locked():
                self._scanning.pop(key, None)

    async def _remembered(self, key: str) -> Imports | None:
        saved = await trio.to_thread.run_sync(self._cache.get_meta, f"pickle {key}")
        if not isinstance(saved, dict) or saved.get("rules") != RULES:
            return None
        return Imports(tuple(saved["globals"]), saved["fault"])

    async def _scan(self, source: Source, entry: Entry) -> Imports:
        reader = await self._fetcher.open(source, entry)

        def look() -> Imports:
            return scan(io.BufferedReader(ReaderFile(reader, entry.size), PIECE))

        try:
            imports = await trio.to_thread.run_sync(look, limiter=self._thread)
        finally:
            reader.close()
        row = {"rules": RULES, "globals": list(imports.globals), "fault": imports.fault}
        await trio.to_thread.run_sync(self._cache.set_meta, f"pickle {source.key(entry)}", row)
        return imports

"""MemoryStore, whose files a test changes at will, and FaultyStore, which fails when the test says so."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Literal

from modelfs.errors import Stale, StoreError
from modelfs.stores import Store, entry_in
from modelfs.types import Digest, Entry, Location, Snapshot

Verb = Literal["snapshot", "entry", "locate"]
"""One of the three verbs of a store."""


class MemoryStore:
    """A store whose files are in memory and can be changed between snapshots.

    Content is located by ``data:`` URLs and versioned by its SHA-256, so bytes that are put back have their
    old version again. Every file keeps the modification time given to the constructor.

    Args:
        url: the store's identity, for example ``memory://bert``.
        files: content by path; copied.
        digests: whether entries publish their SHA-256.
        mtime: modification time of every file, seconds since the epoch.

    """

    def __init__(
        self, url: str, files: Mapping[str, bytes], *, digests: bool = True, mtime: float = 1_700_000_000.0
    ) -> None:
        self.url = url
        self._files = dict(files)
        self._digests = digests
        self._mtime = mtime

    def put(self, path: str, data: bytes) -> None:
        """Add the file at `path`, or replace its content."""
        self._files[path] = data

    def remove(self, path: str) -> None:
        """Remove the file at `path`; KeyError if it is not there."""
        del self._files[path]

    async def snapshot(self) -> Snapshot:
        """Return what the store holds now; the revision is derived from it."""
        return Snapshot.of(self.url, "", [self._entry(path) for path in self._files])

    async def entry(self, path: str) -> Entry:
        """Return the entry at `path` as it is now; NotFound if there is none."""
        return entry_in(await self.snapshot(), path)

    async def locate(self, entry: Entry) -> Location:
        """Return the content as a ``data:`` URL; Stale if `entry` was changed or removed."""
        data = self._files.get(entry.path)
        if data is None or self._entry(entry.path).version != entry.version:
            raise Stale(f"{self.url}: {entry.path!r} was changed: refresh the model")
        return Location.inline(data)

    def _entry(self, path: str) -> Entry:
        data = self._files[path]
        value = hashlib.sha256(data).hexdigest()
        digest = Digest("sha256", value) if self._digests else None
        return Entry(path, len(data), value, digest, self._mtime)


class FaultyStore:
    """Any store, failing by a script: the same calls always meet the same failures.

    The n-th call of a verb meets the n-th item of that verb's plan: an error is raised instead of asking the
    inner store, None lets the call through, and so does the end of the plan. ``itertools.repeat(error)`` is
    a verb that never works again. ::

        FaultyStore(store, {"locate": [None, Unavailable("come back later")]})

    Attributes:
        calls: how often each verb was called.

    """

    def __init__(self, inner: Store, plan: Mapping[Verb, Iterable[StoreError | None]]) -> None:
        self.url = inner.url
        self.calls: dict[Verb, int] = {"snapshot": 0, "entry": 0, "locate": 0}
        self._inner = inner
        self._plan = {verb: iter(faults) for verb, faults in plan.items()}

    async def snapshot(self) -> Snapshot:
        """Return the inner store's snapshot, or fail as planned."""
        self._meet("snapshot")
        return await self._inner.snapshot()

    async def entry(self, path: str) -> Entry:
        """Return the inner store's entry, or fail as planned."""
        self._meet("entry")
        return await self._inner.entry(path)

    async def locate(self, entry: Entry) -> Location:
        """Return the inner store's location, or fail as planned."""
        self._meet("locate")
        return await self._inner.locate(entry)

    def _meet(self, verb: Verb) -> None:
        self.calls[verb] += 1
        fault = next(self._plan.get(verb, iter(())), None)
        if fault is not None:
            raise fault

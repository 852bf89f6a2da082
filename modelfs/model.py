"""One model of a mount: where it comes from, and what is known of it at the moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import trio

from modelfs.fetch.source import Source
from modelfs.fetch.unpack import Archive
from modelfs.types import Entry, PicklePolicy, Snapshot
from modelfs.unpacked import Image
from modelfs.views import Face

State = Literal["resolving", "ready", "unavailable"]


@dataclass(eq=False)
class Model:
    """One top-level directory: where it comes from and what of it is known.

    Attributes:
        name: its path in the tree, ``NAME``, ``ORG/NAME`` or a path in an on-demand namespace.
        source: the store whose snapshot is shown, or the first of its chain.
        optional: the mount goes on without it.
        pinned: what is cached of it stays, the configuration says.
        kept: what is cached of it stays, a command said.
        listed: what its face leaves of what its store has; None until it is resolved for the first time.
        snapshot: what is shown of that now, with members in the place of their archives.
        state: see :data:`State`.
        why: why it is unavailable, or why the snapshot on disk is used.
        resolved_at: when `snapshot` was resolved, seconds since the epoch.
        offline: whether `snapshot` came from disk and the store has not confirmed it since.
        on_demand: whether it was found in an on-demand namespace.
        pickles: what becomes of suspicious ones.
        face: what of it is shown, and how.
        repositories: as which it is found in a Hub cache.
        before: what was shown before `snapshot`, of a model that is a repository.
        is_for_ollama: whether `snapshot` is an artifact that Ollama can run.
        archives: those that are shown as directories, by path.

    """

    name: str
    source: Source
    optional: bool = False
    pinned: bool = False
    kept: bool = False
    snapshot: Snapshot | None = None
    state: State = "resolving"
    why: str | None = None
    resolved_at: float | None = None
    offline: bool = False
    on_demand: bool = False
    pickles: PicklePolicy = "allow"
    face: Face = field(default_factory=Face)
    repositories: tuple[str, ...] = ()
    before: Snapshot | None = None
    is_for_ollama: bool = False
    listed: Snapshot | None = None
    archives: Mapping[str, Archive | Image] = field(default_factory=dict)
    lock: trio.Lock = field(default_factory=trio.Lock)

    @property
    def stays(self) -> bool:
        """Whether what is cached of it is not evicted."""
        return self.pinned or self.kept

    def source_of(self, entry: Entry) -> Source:
        """Return the store that lists `entry`, which may be of a snapshot that is no longer shown."""
        if len(self.source.chain) > 1:
            for source in (self.source, *self.source.chain):
                if source.snapshot is not None and source.snapshot.entries.get(entry.path) == entry:
                    return source
        return self.source

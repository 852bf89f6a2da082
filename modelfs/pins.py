"""Models whose cached contents are not evicted: the configuration pins them, or a command did."""

from __future__ import annotations

from collections.abc import Mapping

import trio

from modelfs.cache import Cache
from modelfs.model import Model

PINNED = "pinned by command"
"""Name under which those are kept that were pinned by command: name → URL if found on demand, else empty."""


class Pins:
    """What is pinned of the models of a mount.

    Args:
        cache: what does not evict it, and where it is noted what was pinned by command.
        models: all of them, by name; their `kept` is told here.

    Attributes:
        names: those that were pinned by command, with their URLs if they were found on demand, else "".

    """

    def __init__(self, cache: Cache, models: Mapping[str, Model]) -> None:
        self._cache = cache
        self._models = models
        self.names: Mapping[str, str] = {}

    async def load(self) -> None:
        """Learn what commands have pinned before this process began."""
        noted = await trio.to_thread.run_sync(self._cache.get_meta, PINNED)
        self._tell(noted if isinstance(noted, dict) else {})

    async def add(self, model: Model) -> None:
        """Pin a model, now and after every restart."""
        await self._note({**self.names, model.name: model.source.url if model.on_demand else ""})

    async def remove(self, name: str) -> None:
        """Undo `add`."""
        await self._note({kept: url for kept, url in self.names.items() if kept != name})

    async def hold(self) -> None:
        """Keep what is cached of the pinned models, at the snapshots that are shown now, from eviction."""
        shown = [
            (model.source, model.snapshot)
            for model in self._models.values()
            if model.stays and model.snapshot is not None
        ]

        def pin() -> None:
            self._cache.pin(
                source.key(entry)
                for source, snapshot in shown
                for entry in snapshot.entries.values()
                if entry.kind == "file"
            )

        await trio.to_thread.run_sync(pin)

    def _tell(self, names: Mapping[str, str]) -> None:
        self.names = names
        for model in self._models.values():
            model.kept = model.name in names

    async def _note(self, names: dict[str, str]) -> None:
        self._tell(names)
        await trio.to_thread.run_sync(self._cache.set_meta, PINNED, names)
        await self.hold()

"""Snapshots on disk: what a mount shows when it starts, before or without its stores.

The lines of a listing are kept in pieces, each under the hash of its text: reading or writing one piece is
short, and what two snapshots of a store have in common is written once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any

from modelfs.cache import Cache
from modelfs.types import Snapshot

log = logging.getLogger(__name__)

PIECE = 4000
"""Lines kept together, some 100 bytes each."""


class Snapshots:
    """The last two snapshots of each store; all methods block and belong in a thread.

    Args:
        cache: where they are kept.

    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def load(self, identity: str) -> tuple[Snapshot, float] | None:
        """Return the last snapshot of a store and when it was resolved; None if it is not there any more."""
        return self._read(identity, _present(identity))

    def past(self, identity: str) -> Snapshot | None:
        """Return the snapshot before the last one."""
        found = self._read(identity, _past(identity))
        return found[0] if found else None

    def save(self, identity: str, snapshot: Snapshot, resolved_at: float) -> None:
        """Keep a snapshot of the store `identity`; the last one, if it differs, becomes the one before it."""
        before = self._cache.get_meta(_present(identity))
        oldest = self._cache.get_meta(_past(identity))
        data = snapshot.to_json()
        pieces = dict(_pieces(identity, data.pop("lines")))
        data |= {"pieces": list(pieces), "resolved_at": resolved_at}
        known = {*_names(before), *_names(oldest)}
        for name, text in pieces.items():
            if name not in known:
                self._cache.set_meta(name, text)
        if before is not None and {**before, "resolved_at": resolved_at} != data:
            self._cache.set_meta(_past(identity), before)
            oldest = before
        self._cache.set_meta(_present(identity), data)
        for name in known - pieces.keys() - {*_names(oldest)}:
            self._cache.set_meta(name, None)

    def _read(self, identity: str, key: str) -> tuple[Snapshot, float] | None:
        saved = self._cache.get_meta(key)
        if saved is None:
            return None
        try:
            lines = [line for name in _names(saved) for line in self._piece(identity, name)]
            return Snapshot.from_json({**saved, "lines": lines}), float(saved["resolved_at"])
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s: the snapshot on disk cannot be used: %s", identity, error)
            return None

    def _piece(self, identity: str, name: str) -> list[str]:
        text = self._cache.get_meta(name)
        if not isinstance(text, str) or _name(identity, text) != name:
            raise ValueError("a piece of it is not there any more")
        return text.split("\n")


def _present(identity: str) -> str:
    return f"listing {identity}"


def _past(identity: str) -> str:
    return f"past listing {identity}"


def _name(identity: str, text: str) -> str:
    return f"lines {sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()} {identity}"


def _names(saved: Mapping[str, Any] | None) -> list[str]:
    return saved.get("pieces", []) if isinstance(saved, dict) else []


def _pieces(identity: str, lines: list[str]) -> Iterator[tuple[str, str]]:
    for start in range(0, len(lines), PIECE):
        text = "\n".join(lines[start : start + PIECE])
        yield _name(identity, text), text

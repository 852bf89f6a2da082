"""What is known of an archive, on disk: a mount that starts again needs no second pass.

Members are kept in pieces, each written once, as the pass finds them. All methods block.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from modelfs.archives import Member
from modelfs.cache import Cache

log = logging.getLogger(__name__)

PIECE = 4000
"""Most members in one piece, some 150 bytes each."""


class Kept(NamedTuple):
    """What lay on disk: members in their order, what was refused, and whether that is all."""

    members: list[Member]
    rejected: list[tuple[str, str]]
    done: bool


class Shelf:
    """The place of one archive's index in the cache's metadata.

    Args:
        cache: where it is kept.
        name: of the archive's content.

    """

    def __init__(self, cache: Cache, name: str) -> None:
        self._cache = cache
        self._name = name
        self._pieces = 0

    def load(self) -> Kept | None:
        """Return what is known; None if that is nothing, or not what was written."""
        head = self._cache.get_meta(self._key())
        if head is None:
            return None
        try:
            pieces = [self._cache.get_meta(self._key(n)) for n in range(int(head["pieces"]))]
            members = [Member.checked(fields) for piece in pieces for fields in piece or ()]
            rejected = [(str(path), str(reason)) for path, reason in head["rejected"]]
            self._pieces = len(pieces)
            return Kept(members, rejected, head["done"] is True)
        except (ValueError, KeyError, TypeError) as error:
            log.warning("the index of an archive on disk cannot be used: %s", error)
            return None

    def append(self, members: list[Member]) -> None:
        """Keep more members of an archive of which not all is known."""
        for start in range(0, len(members), PIECE):
            self._cache.set_meta(self._key(self._pieces), members[start : start + PIECE])
            self._pieces += 1
        self._head([], done=False)

    def finish(self, members: list[Member], rejected: list[tuple[str, str]]) -> None:
        """Keep all members, in the place of those that were known before."""
        before, self._pieces = self._pieces, 0
        for start in range(0, len(members), PIECE):
            self._cache.set_meta(self._key(self._pieces), members[start : start + PIECE])
            self._pieces += 1
        self._head(rejected, done=True)
        for number in range(self._pieces, before):
            self._cache.set_meta(self._key(number), None)

    def clear(self) -> None:
        """Forget everything."""
        head = self._cache.get_meta(self._key())
        known = head.get("pieces") if isinstance(head, dict) else 0
        pieces = max(self._pieces, known if isinstance(known, int) else 0)
        self._cache.set_meta(self._key(), None)
        for number in range(pieces):
            self._cache.set_meta(self._key(number), None)
        self._pieces = 0

    def _head(self, rejected: list[tuple[str, str]], *, done: bool) -> None:
        head: dict[str, Any] = {"pieces": self._pieces, "rejected": rejected, "done": done}
        self._cache.set_meta(self._key(), head)

    def _key(self, *parts: object) -> str:
        return " ".join(map(str, ("archive", self._name, *parts)))

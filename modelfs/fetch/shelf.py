"""What is known of an archive, on disk: a mount that starts again needs no second pass.

Members are kept in pieces, each written once, as the pass finds them. All methods block.
"""

from __future__ import annotations

import base64
import logging
from typing import Any, NamedTuple

from modelfs.archives import Member
from modelfs.archives.streams import Checkpoint
from modelfs.cache import Cache

log = logging.getLogger(__name__)

PIECE = 4000
"""Most members in one piece, some 150 bytes each."""


class Kept(NamedTuple):
    """What lay on disk: members in their order, what was refused, checkpoints, whether that is all."""

    members: list[Member]
    rejected: list[tuple[str, str]]
    points: list[Checkpoint]
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
            points = [Checkpoint(int(at), int(packed), int(bits)) for at, packed, bits in head["points"]]
            self._pieces = len(pieces)
            return Kept(members, rejected, points, head["done"] is True)
        except (ValueError, KeyError, TypeError) as error:
            log.warning("the index of an archive on disk cannot be used: %s", error)
            return None

    def append(self, members: list[Member]) -> None:
        """Keep more members of an archive of which not all is known."""
        for start in range(0, len(members), PIECE):
            self._cache.set_meta(self._key(self._pieces), members[start : start + PIECE])
            self._pieces += 1
        self._head([], [], done=False)

    def finish(
        self, members: list[Member], rejected: list[tuple[str, str]], points: list[Checkpoint]
    ) -> None:
        """Keep all members, in the place of those that were known before, and the places of checkpoints."""
        before, self._pieces = self._pieces, 0
        for start in range(0, len(members), PIECE):
            self._cache.set_meta(self._key(self._pieces), members[start : start + PIECE])
            self._pieces += 1
        self._head(rejected, [point[:3] for point in points], done=True)
        for number in range(self._pieces, before):
            self._cache.set_meta(self._key(number), None)

    def mark(self, point: Checkpoint) -> None:
        """Keep the window of a checkpoint."""
        window = base64.b64encode(point.window).decode()
        self._cache.set_meta(self._key("window", point.unpacked), window)

    def marked(self, point: Checkpoint) -> Checkpoint | None:
        """Return `point` with its window; None if that is not there any more."""
        window: Any = self._cache.get_meta(self._key("window", point.unpacked))
        try:
            return point._replace(window=base64.b64decode(window, validate=True))
        except (TypeError, ValueError):
            return None

    def clear(self, points: list[Checkpoint]) -> None:
        """Forget everything, the windows of `points` too."""
        self._cache.set_meta(self._key(), None)
        for number in range(self._pieces):
            self._cache.set_meta(self._key(number), None)
        for point in points:
            self._cache.set_meta(self._key("window", point.unpacked), None)
        self._pieces = 0

    def _head(self, rejected: list[tuple[str, str]], points: list[Any], *, done: bool) -> None:
        head = {"pieces": self._pieces, "rejected": rejected, "points": points, "done": done}
        self._cache.set_meta(self._key(), head)

    def _key(self, *parts: object) -> str:
        return " ".join(map(str, ("archive", self._name, *parts)))

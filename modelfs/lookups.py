"""Names that are looked up at a store: each once for all who ask, and not again soon if it is absent."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable

import trio

from modelfs.errors import NotFound
from modelfs.tree import Node

log = logging.getLogger(__name__)

ABSENT_SECONDS = 30.0
"""How long a name that a store did not have is not asked for again."""

MAX_ABSENT = 10_000
"""Names remembered as absent: whoever makes names up shall not fill the memory."""

Key = tuple[int, str]
"""A name, in the directory of this inode number."""


class Lookups:
    """The names that are being looked up, and those that were absent."""

    def __init__(self) -> None:
        self._absent: dict[Key, float] = {}
        self._asking: dict[Key, trio.Lock] = {}

    async def ask(
        self, key: Key, known: Callable[[], Node | None], find: Callable[[], Awaitable[Node | None]]
    ) -> Node | None:
        """Return what is `known`, once nobody else looks for it, or else what `find` returns.

        None if `find` raises NotFound, now or `ABSENT_SECONDS` ago. Cancelling lets the next who waits ask.

        Raises:
            StoreError: the store failed to say whether there is such a name.

        """
        lock = self._asking.setdefault(key, trio.Lock())
        try:
            async with lock:
                node = known()
                if node is not None or self._absent.get(key, -math.inf) > trio.current_time():
                    return node
                try:
                    return await find()
                except NotFound as error:
                    log.info("%s", error)
                    if len(self._absent) >= MAX_ABSENT:
                        self._absent.clear()
                    self._absent[key] = trio.current_time() + ABSENT_SECONDS
                    return None
        finally:
            if not lock.locked():
                self._asking.pop(key, None)

    def forget(self) -> None:
        """Let every absent name be asked for again."""
        self._absent.clear()

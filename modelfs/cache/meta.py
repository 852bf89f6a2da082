"""Small JSON values on disk: listings, manifests, archive indexes, pins.

What cannot be read counts as never written, and a damaged database is replaced by an empty one: everything
in here can be asked for again.
"""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diskcache

from modelfs.metrics import Metrics

_log = logging.getLogger(__name__)

# Primary result codes (https://www.sqlite.org/rescode.html) that only a damaged database gives: ERROR (a
# table is missing), CORRUPT, NOTADB. A full or read-only disk gives others and loses nothing.
_DAMAGED = {1, 11, 26}


class _JsonOnly(diskcache.JSONDisk):  # type: ignore[misc]  # diskcache has no types
    """JSONDisk that never unpickles.

    JSONDisk writes JSON only, but reads what the database says it is, and a row may say it is a pickle:
    loading that runs code of whoever wrote it.
    """

    def get(self, key: Any, raw: Any) -> Any:
        if not raw:
            raise ValueError("the key is not JSON")
        return super().get(key, raw)

    def fetch(self, mode: Any, filename: Any, value: Any, read: Any) -> Any:
        if mode not in (diskcache.core.MODE_RAW, diskcache.core.MODE_BINARY):
            raise ValueError("the value is not JSON")
        return super().fetch(mode, filename, value, read)


class Meta:
    """A persistent mapping of names to JSON values; all methods block and are safe from any thread.

    One thread of its own holds the one connection to the database: diskcache opens one per calling thread,
    each with its own memory, and closes only that of the thread that calls ``close``.
    """

    def __init__(self, directory: Path, metrics: Metrics) -> None:
        self._directory = directory
        self._metrics = metrics
        self._store: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="modelfs-meta")

    def get(self, key: str) -> Any | None:
        """Return the value of `key`; None if there is none or it cannot be read."""
        return self._thread.submit(self._attempt, f"read {key!r}", lambda store: store.get(key)).result()

    def set(self, key: str, value: Any | None) -> None:
        """Keep `value` under `key`; None removes it. A broken disk is logged, and the value is not kept.

        Raises:
            TypeError: if `value` is not JSON.

        """
        json.dumps(value)  # a mistake of the caller must not look like a broken disk
        change = (lambda store: store.delete(key)) if value is None else (lambda store: store.set(key, value))
        self._thread.submit(self._attempt, f"write {key!r}", change).result()

    def close(self) -> None:
        """Close the database; further calls are a mistake."""
        self._thread.submit(self._close).result()
        self._thread.shutdown()

    def _attempt(self, doing: str, action: Callable[[Any], Any]) -> Any | None:
        try:
            try:
                return action(self._opened())
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGED:
                    raise
                _log.warning(
                    "%s: the database is damaged (%s); starting with an empty one", self._directory, error
                )
                self._close()
                shutil.rmtree(self._directory)
                return action(self._opened())
        except Exception as error:  # whatever lies in that file, it must not stop a mount
            self._metrics.cache_errors.inc()
            _log.warning("%s: cannot %s: %s: %s", self._directory, doing, type(error).__name__, error)
            return None

    def _opened(self) -> Any:
        if self._store is None:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            self._store = diskcache.Cache(
                str(self._directory),
                disk=_JsonOnly,
                eviction_policy="none",
                cull_limit=0,
                sqlite_mmap_size=0,  # a truncated file would be a SIGBUS instead of an error
                sqlite_cache_size=1024,  # pages: 4 MiB
            )
        return self._store

    def _close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.close()

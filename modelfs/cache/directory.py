"""The cache directory: who owns it, what is in it, how much of it, and what has to go."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from modelfs.cache import disk, files, home, verity
from modelfs.cache.audit import Audit
from modelfs.cache.generation import Generation
from modelfs.cache.index import Index, Row
from modelfs.cache.meta import Meta
from modelfs.cache.objects import CacheObject
from modelfs.errors import CacheError, CacheUnusable
from modelfs.metrics import Metrics
from modelfs.types import Digest, crc32c

_log = logging.getLogger(__name__)
_KEY = re.compile(r"[a-z0-9-]{1,100}")
_PINS = "cache/pins"
_STRIPES = 64

SYNC_SECONDS = 5.0
"""How long a clean stop waits for the disk, on which others may write gigabytes."""


@dataclass(frozen=True, slots=True)
class Usage:
    """How full the cache is.

    Attributes:
        used: bytes of disk that objects use.
        limit: bytes they may use; None if only the disk limits them.
        free: bytes the disk has left for us.
        objects: how many objects there are.
        pinned: how many keys are pinned, present or not.
        unsealable: why the kernel cannot check files by fs-verity; None if it does.
        unclean_start: whether blocks from earlier sessions are checked before they are first served.

    """

    used: int
    limit: int | None
    free: int
    objects: int
    pinned: int
    unsealable: str | None
    unclean_start: bool


@dataclass(frozen=True, slots=True)
class Unused:
    """An object that may go: its key, the bytes of disk it uses, its last use in seconds since the epoch."""

    key: str
    bytes: int
    used: float


class Cache:
    """The objects in one directory, owned by this process until :meth:`close`.

    Methods marked *loop-safe* take microseconds and wait for no disk; all others, the constructor included,
    belong in a thread. All may be called from several threads at once.

    Args:
        directory: made (0700) if it is not there; may be empty or an earlier cache, nothing else.
        limit: bytes of disk that objects may use; None for no limit.
        min_free: what must stay free on the disk, in bytes or, below 1.0, as a share of the disk.
        metrics: counts evictions, bad blocks and disk errors.

    Raises:
        CacheLocked: another process owns the directory.
        CacheUnusable: it cannot be made or written, holds something else or was written by a newer modelfs.

    """

    def __init__(
        self, directory: Path, *, limit: int | None = None, min_free: float = 0, metrics: Metrics
    ) -> None:
        self.directory = directory.absolute()
        self.limit = limit
        self.min_free = min_free
        self.metrics = metrics
        self._objects = self.directory / "objects"
        self._open: dict[str, CacheObject] = {}
        self._guards = [threading.Lock() for _ in range(_STRIPES)]
        self._room = threading.Lock()
        self._pinning = threading.Lock()
        self._closed = False
        self._unclean = False
        try:
            home.prepare(self.directory)
            self._lock_fd = home.lock(self.directory)
            try:
                home.check_format(self.directory)
                self._objects.mkdir(mode=0o700, exist_ok=True)
                self._dir = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    self.index = self._load_index()
                    self._begin_session()
                    self._can_punch = disk.punch(self._lock_fd, 1 << 20, 4096)
                    self.unsealable = verity.refusal(self.directory)
                    metrics.cache_min_free.set(self._free()[1])
                except BaseException:
                    os.close(self._dir)
                    raise
            except BaseException:
                os.close(self._lock_fd)
                raise
        except OSError as error:
            raise CacheUnusable(
                f"{self.directory} cannot hold the cache: {error.strerror or error}; "
                "name another directory as cache.dir or mend its rights and mount"
            ) from error
        self._meta = Meta(self.directory / "meta", metrics)
        self.metrics.cache_bytes.set_function(self.used)
        self.metrics.cache_limit.set_function(lambda: math.inf if self.limit is None else self.limit)
        self.metrics.cache_free.set_function(lambda: self.usage().free)
        self.metrics.cache_objects.set_function(lambda: len(self.index))
        pins = self._meta.get(_PINS)
        self._pins = frozenset(pins if isinstance(pins, list) else ())

    # Objects.

    def object(self, key: str, size: int) -> CacheObject:
        """Return the object `key` of `size` bytes, opened; match every call with ``CacheObject.close``.

        Everybody who has a key open shares one CacheObject. What lies on disk but is damaged or has another
        size is removed, and the object starts empty. If the disk refuses, or the key is open with another
        size (a store lies), the object is volatile.

        Raises:
            CacheError: the cache is closed.
            ValueError: `key` is not of the form ``[a-z0-9-]{1,100}`` or `size` is negative.

        """
        if size < 0:
            raise ValueError(f"negative size of {key}")
        stem = self._stem(key)
        guard = self._guard(key)
        with guard:
            self._check_open()
            item = self._open.get(key)
            if item is not None and item.size == size:
                return item.reopen()
            if item is not None:
                _log.warning("%s: opened with %d bytes while open with %d", stem, size, item.size)
                volatile = Generation(stem.with_suffix(".data"), size, self)
                return CacheObject(key, volatile, threading.Lock(), self._forget_open)
            now = files.load(stem, size, self)
            item = self._open[key] = CacheObject(key, now, guard, self._forget_open)
            return item

    def audit(self, key: str, digest: Digest | None = None) -> Audit | None:
        """Return what reads the object `key` again; None if nothing of it is there.

        All of it is compared with `digest` if it is complete. Whoever asks closes it. The place of the object
        in the order of eviction stays.

        Raises:
            CacheError: the cache is closed.

        """
        stem = self._stem(key)
        guard = self._guard(key)
        with guard:
            self._check_open()
            row, item = self.index.get(key), self._open.get(key)
            if row is None:
                return None
            known, lost = row.present, 0
            if item is None:
                now = files.load(stem, row.size, self, used=False)
                item = self._open[key] = CacheObject(key, now, guard, self._forget_open, used=False)
                lost = max(0, known - item.cached_bytes)
            else:
                item.reopen(used=False)
        return item.audit(digest, lost)

    def _forget_open(self, item: CacheObject) -> None:
        if self._open.get(item.key) is item:
            del self._open[item.key]

    def cached_bytes(self, key: str, size: int) -> int:
        """Return how many bytes of the object `key` of `size` bytes are present. Loop-safe."""
        row = self.index.get(key)
        return row.present if row is not None and row.size == size else 0

    def contents(self) -> list[tuple[str, int]]:
        """Return ``(key, bytes present)`` of all objects of which something is present."""
        rows = (self.index.get(key) for key in self.index.oldest())
        return [(row.key, row.present) for row in rows if row is not None and row.present]

    def discard(self, key: str) -> None:
        """Remove the object from the disk, open or not, pinned or not; the pin itself stays.

        Raises:
            CacheError: its files cannot be removed.

        """
        stem = self._stem(key)
        with self._guard(key):
            self._check_open()
            item = self._open.get(key)
            if item is None:
                self._remove(key, stem)
        if item is not None:
            item.discard()

    def rename(self, key: str, new: str) -> None:
        """File the object `key` under the name `new`; does nothing if either is open or `new` is there.

        Raises:
            CacheError: its files cannot be moved.

        """
        stem, goal = self._stem(key), self._stem(new)
        guards = {id(guard): guard for guard in (self._guard(key), self._guard(new))}
        with ExitStack() as held:
            for guard in sorted(guards.values(), key=self._guards.index):
                held.enter_context(guard)
            self._check_open()
            row = self.index.get(key)
            if row is None or self.index.get(new) or self._open.keys() & {key, new}:
                return
            try:
                goal.parent.mkdir(mode=0o700, exist_ok=True)
                for suffix in (".data", ".table"):  # data without a table is nothing
                    stem.with_suffix(suffix).rename(goal.with_suffix(suffix))
            except OSError as error:
                self.metrics.cache_errors.inc()
                raise disk.failure("rename an object", stem, error) from error
            self.index.forget(key)
            self.index.put(
                new, size=row.size, present=row.present, allocated=row.allocated, trusted=row.trusted
            )

    def _remove(self, key: str, stem: Path) -> int:
        try:
            files.remove(stem)
        except OSError as error:
            self.metrics.cache_errors.inc()
            raise disk.failure("remove an object", stem, error) from error
        return self.index.forget(key)

    # Room.

    def used(self) -> int:
        """Return the bytes of disk that objects use, blocks still being written included. Loop-safe."""
        return self.index.used

    def usage(self) -> Usage:
        """Return how full the cache is."""
        try:
            free = self._free()[0]
        except OSError:  # the disk is gone: nothing is free on it, and status must go on
            free = 0
        return Usage(
            self.index.used,
            self.limit,
            free,
            len(self.index),
            len(self._pins),
            self.unsealable,
            self._unclean,
        )

    def room_for(self, length: int) -> bool:
        """Return whether `length` bytes more respect both the limit and the minimum of free disk."""
        if self.limit is not None and self.index.used + length > self.limit:
            return False
        free, minimum = self._free()
        return free - length >= minimum

    def make_room(self, wanted: int) -> int:
        """Evict until there is :meth:`room_for` `wanted` bytes or nothing can go; return the bytes freed.

        First whole objects, least recently used first, never one that is open or pinned. Then blocks of
        open objects that are neither pinned nor lent, those read longest ago first, complete objects last.
        :meth:`CacheObject.write` does this by itself.
        """
        with self._room:
            return self._make_room(wanted)

    def evict(self, keys: Iterable[str]) -> dict[str, int]:
        """Remove those of `keys` that are neither open nor pinned; return the bytes freed by each that went.

        Raises:
            CacheError: the cache is closed.

        """
        self._check_open()
        freed = {key: self._evict(key) for key in keys if self.index.get(key) is not None}
        self.metrics.evicted_bytes.inc(sum(freed.values()))
        return {key: count for key, count in freed.items() if self.index.get(key) is None}

    def unused(self, since: float) -> list[Unused]:
        """Return what nobody has open or pinned, and nobody used after `since`, the longest unused first.

        An object counts as used when it is opened or closed, and when it is read through the cache.
        """
        rows = (self.index.get(key) for key in self.index.oldest())
        return [
            Unused(row.key, row.allocated, row.stamp / 1e9)
            for row in rows
            if row is not None and row.stamp / 1e9 <= since and self.holder(row.key) is None
        ]

    def holder(self, key: str) -> str | None:
        """Return what keeps `key` from eviction, ``open`` or ``pinned``; None if nothing does. Loop-safe."""
        return "pinned" if key in self._pins else "open" if key in self._open else None

    def reserve(self, row: Row, length: int) -> None:
        """Count `length` bytes more for `row`, an open object's; evict for them if need be.

        Raises:
            CacheError: there is no room and none can be made.

        """
        with self._room:
            try:
                # Objects are opened meanwhile, and each takes the space of its table.
                while not self.room_for(length):
                    if self._make_room(length) == 0 and not self.room_for(length):
                        raise OSError(errno.ENOSPC, "all that is in it is in use or pinned")
            except OSError as error:
                raise disk.failure("make room in the cache", self.directory, error) from error
            self.index.change(row, allocated=length)

    def _make_room(self, wanted: int) -> int:
        freed = 0
        for evict in self._victims():
            if self._closed or self.room_for(wanted):
                break
            freed += evict()
        self.metrics.evicted_bytes.inc(freed)
        return freed

    def _victims(self) -> Iterator[Callable[[], int]]:
        """Give what may go, in the order of going, as functions that remove it and return the bytes freed."""
        for count in (64, None):  # mostly the first few are enough; copying 100,000 keys takes 10 ms
            for key in self.index.oldest(count):
                if not self.holder(key):
                    yield partial(self._evict, key)
        if not self._can_punch:
            return
        blocks = [
            (item.complete, tick, block, item)
            for item in list(self._open.values())
            if item.key not in self._pins and not item.lent
            for tick, block in item.last_use()
        ]
        for _, _, block, item in sorted(blocks, key=lambda row: row[:2]):
            yield partial(item.punch, [block])

    def _evict(self, key: str) -> int:
        with self._guard(key):
            if self.holder(key):
                return 0
            try:
                freed = self._remove(key, self._stem(key))
            except CacheError as error:
                _log.warning("%s", error)
                return 0
        self.metrics.evicted_objects.inc()
        return freed

    def _free(self) -> tuple[int, int]:
        """Return the free bytes of the disk, and how many must stay so."""
        facts = os.fstatvfs(self._dir)
        minimum = self.min_free * facts.f_blocks * facts.f_frsize if self.min_free < 1 else self.min_free
        return facts.f_bavail * facts.f_frsize, int(minimum)

    # Pins and metadata.

    def pin(self, keys: Iterable[str]) -> None:
        """Keep exactly the objects `keys` (there or to come) from eviction, in later sessions too."""
        wanted = frozenset(key for key in keys if self._stem(key))
        with self._pinning:
            if wanted != self._pins:
                self._set_pins(wanted)

    def pinned(self, key: str) -> bool:
        """Return whether `key` is pinned. Loop-safe."""
        return key in self._pins

    def get_meta(self, key: str) -> Any | None:
        """Return what was kept under `key`; None if there is nothing or it cannot be read.

        Raises:
            CacheError: the cache is closed.

        """
        self._check_open()
        return self._meta.get(key)

    def set_meta(self, key: str, value: Any | None) -> None:
        """Keep the JSON value `value` under `key`; None removes it. Names under ``cache/`` are ours.

        If the disk refuses, that is logged and the value is not kept.

        Raises:
            CacheError: the cache is closed.
            TypeError: `value` is not JSON.

        """
        self._check_open()
        self._meta.set(key, value)

    # The end.

    def close(self, *, sync: bool = True) -> None:
        """Leave the directory so that the next start trusts what is in it. Closing again does nothing.

        Objects that are still open lose their blocks for whoever holds them.

        Args:
            sync: wait until everything is on the disk, but no longer than `SYNC_SECONDS`. Without, it is
                trusted only until the machine is restarted: right for handing over to a successor, who must
                not wait for gigabytes.

        """
        with self._room:
            if self._closed:
                return
            self._closed = True
        for guard in self._guards:  # whoever is opening or removing something finishes first
            with guard:
                pass
        for item in list(self._open.values()):
            with self._guard(item.key):
                item.retire()
        self._meta.close()
        try:
            synced = sync and disk.sync_file_system(self._dir, SYNC_SECONDS)
            if synced != sync:
                _log.warning("%s: the disk is busy; if the machine stops now, all is checked", self.directory)
            clean = self.index.dump(boot=home.boot(), synced=synced)
            disk.replace(self.directory / "clean", clean, sync=synced)
        except OSError as error:
            self.metrics.cache_errors.inc()
            _log.warning("%s", disk.failure("leave the cache clean", self.directory, error))
        finally:
            os.close(self._dir)
            os.close(self._lock_fd)  # the last: a successor may start at once

    def _check_open(self) -> None:
        if self._closed:
            raise CacheError(f"{self.directory}: the cache is closed")

    def _guard(self, key: str) -> threading.Lock:
        return self._guards[crc32c(key.encode()) % _STRIPES]

    def _stem(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"not a key: {key!r}")
        return self._objects / f"{crc32c(key.encode()) & 0xFF:02x}" / key

    def _set_pins(self, keys: frozenset[str]) -> None:
        self._check_open()
        self._pins = keys
        self._meta.set(_PINS, sorted(keys))

    def _load_index(self) -> Index:
        clean = self.directory / "clean"
        try:
            raw = clean.read_bytes()
        except FileNotFoundError:
            raw = None
        if raw is not None:
            # Before anything changes, and for good: a power failure must not bring it back.
            clean.unlink()
            disk.sync_directory(self.directory)
            try:
                return Index.load(raw, boot=home.boot())
            except ValueError as error:
                _log.warning("%s: %s; every block is checked before it is served", clean, error)
        survived = raw is None and self._is_of_this_boot()
        index = Index.scan(self._objects, self.metrics, trusted=survived)
        self._unclean = len(index) > 0 and not survived
        if raw is None and len(index):
            what = (
                "its process ended, the machine did not" if survived else "every block is checked before use"
            )
            _log.info("%s was not left cleanly; %s", self.directory, what)
        self._trusting = survived or not len(index)
        return index

    def _is_of_this_boot(self) -> bool:
        """Return whether the last session began in this boot of the machine, trusting what it found.

        If its process was killed since, all that it had written is in the page cache or on the disk, in
        the order of writing: a block in a table is whole. Only a restart of the machine may lose that.
        """
        try:
            return (self.directory / "session").read_text() == home.boot()
        except (FileNotFoundError, UnicodeDecodeError):
            return False

    def _begin_session(self) -> None:
        content = home.boot().encode() if self.index.trusted else b""
        disk.replace(self.directory / "session", content, sync=False)

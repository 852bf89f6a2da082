"""What every object in the cache amounts to, in memory: sizes, recency, trust.

The index answers status questions about a hundred thousand objects without touching the disk, and orders
eviction. A clean stop writes it to the file ``clean``, which the next start reads and removes. Without that
file nothing is known about how the last session ended: the tables are read one by one (about 30 µs each)
and no block is trusted.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from modelfs.cache import table
from modelfs.metrics import Metrics
from modelfs.types import crc32c

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Row:
    """One object.

    Attributes:
        key: names it.
        size: bytes of the whole object.
        present: bytes of its present blocks.
        allocated: bytes of disk its files use, blocks still being written included.
        stamp: when it was last used, nanoseconds since the epoch, never repeated and never going back.
        trusted: whether its present blocks need no check before they are served in the next session.

    """

    key: str
    size: int
    present: int
    allocated: int
    stamp: int
    trusted: bool


class Index:
    """Key → row, least recently used first.

    Reading is safe from any thread and takes no lock; changes take a lock that is never held across I/O.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows = OrderedDict((row.key, row) for row in sorted(rows, key=lambda row: row.stamp))
        self._lock = threading.Lock()
        self._last = next(reversed(self._rows.values())).stamp if self._rows else 0
        self.used = sum(row.allocated for row in self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> Row | None:
        """Return the row of `key`, if there is one."""
        return self._rows.get(key)

    def put(
        self, key: str, *, size: int, present: int, allocated: int, trusted: bool, used: bool = True
    ) -> Row:
        """Add or replace the row of `key`; as the most recently used, or if not `used` where it was."""
        with self._lock:
            old = self._rows.get(key)
            stamp = self._tick() if used or old is None else old.stamp
            row = self._rows[key] = Row(key, size, present, allocated, stamp, trusted)
            if used:
                self._rows.move_to_end(key)
            self.used += allocated - (old.allocated if old else 0)
            return row

    def forget(self, key: str) -> int:
        """Remove the row of `key`; return the disk space it stood for."""
        with self._lock:
            row = self._rows.pop(key, None)
            allocated = row.allocated if row else 0
            self.used -= allocated
            return allocated

    def change(self, row: Row, *, present: int = 0, allocated: int = 0) -> None:
        """Add to the numbers of `row`; one that was replaced or forgotten no longer counts towards `used`."""
        with self._lock:
            row.present += present
            row.allocated += allocated
            if self._rows.get(row.key) is row:
                self.used += allocated

    def touch(self, row: Row) -> None:
        """Make `row` the most recently used."""
        with self._lock:
            row.stamp = self._tick()
            if self._rows.get(row.key) is row:
                self._rows.move_to_end(row.key)

    @property
    def trusted(self) -> bool:
        """Whether all of it is trusted."""
        with self._lock:
            return all(row.trusted for row in self._rows.values())

    def oldest(self, count: int | None = None) -> list[str]:
        """Return the `count` least recently used keys, or all, least recently used first."""
        with self._lock:
            return list(itertools.islice(self._rows, count))

    def _tick(self) -> int:
        # The clock may jump; the order of use may not.
        self._last = max(self._last + 1, time.time_ns())
        return self._last

    def dump(self, *, boot: str, synced: bool) -> bytes:
        """Return the content of ``clean``.

        Args:
            boot: the id of this boot of the machine.
            synced: whether all data is on the disk; if not, the index holds only until the next boot.

        """
        with self._lock:
            lines = [
                f"{row.key} {row.size} {row.present} {row.allocated} {row.stamp} {row.trusted:d}"
                for row in self._rows.values()
            ]
        body = "\n".join([f"{boot} {synced:d}", *lines]).encode()
        return b"%08x\n" % crc32c(body) + body

    @classmethod
    def load(cls, raw: bytes, *, boot: str) -> Index:
        """Return the index that `dump` wrote.

        Raises:
            ValueError: if `raw` is damaged, or was left by an earlier boot without being on the disk.

        """
        checksum, _, body = raw.partition(b"\n")
        if checksum != b"%08x" % crc32c(body):
            raise ValueError("the index is damaged")
        first, *lines = body.decode().split("\n")
        written, synced = first.split(" ")
        if synced != "1" and written != boot:
            raise ValueError("the machine was restarted before everything was on the disk")
        return cls(_parse_row(line) for line in lines)

    @classmethod
    def scan(cls, objects: Path, metrics: Metrics, *, trusted: bool) -> Index:
        """Return the index of what lies under `objects`, all of it `trusted` or nothing.

        Files without their counterpart and damaged tables are removed.

        Raises:
            OSError: if a directory cannot be read.

        """
        rows: list[Row] = []
        with os.scandir(objects) as shelves:
            for shelf in shelves:
                if shelf.is_dir(follow_symlinks=False):
                    rows += _scan_shelf(shelf.path, metrics, trusted)
        return cls(rows)


def _parse_row(line: str) -> Row:
    key, size, present, allocated, stamp, trusted = line.split(" ")
    return Row(key, int(size), int(present), int(allocated), int(stamp), trusted == "1")


def _scan_shelf(shelf: str, metrics: Metrics, trusted: bool) -> list[Row]:
    rows = []
    with os.scandir(shelf) as entries:
        files = {entry.name: entry for entry in entries}
    for key in {name.rpartition(".")[0] for name in files}:
        pair = [files.get(f"{key}.table"), files.get(f"{key}.data")]
        try:
            if pair[0] is None or pair[1] is None:
                raise ValueError("one of its two files is missing")
            rows.append(_row(key, pair[0], pair[1], trusted))
        except OSError as error:
            metrics.cache_errors.inc()
            _log.warning("%s/%s: cannot be read: %s; check this disk", shelf, key, error)
        except ValueError as error:
            metrics.cache_errors.inc()
            _log.warning("%s/%s: %s; it is removed from the cache", shelf, key, error)
            for entry in pair:
                if entry is not None:
                    _remove(entry)
    return rows


def _row(key: str, table_file: os.DirEntry[str], data_file: os.DirEntry[str], trusted: bool) -> Row:
    fd = os.open(table_file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        facts = os.fstat(fd)
        content = table.parse(os.pread(fd, facts.st_size, 0))
    finally:
        os.close(fd)
    data = data_file.stat(follow_symlinks=False)
    if data.st_size != content.size:
        raise ValueError("its data file has the wrong size")
    allocated = (data.st_blocks + facts.st_blocks) * 512
    return Row(
        key,
        content.size,
        table.present_bytes(content.crcs, content.size),
        allocated,
        facts.st_mtime_ns,
        trusted,
    )


def _remove(entry: os.DirEntry[str]) -> None:
    try:
        Path(entry.path).unlink()
    except OSError as error:
        _log.warning("%s: cannot be removed: %s", entry.path, error)

"""A reader that compares: ``python -m chaos.reader MODEL ORIGINALS SEED`` reads until its input ends.

It reads the files of the directory MODEL in every way there is, in an order that SEED decides, and compares
each byte with the file of the same name in ORIGINALS. In the end it prints what it found as JSON. Errors are
noted and it goes on; only a page fault that fails (SIGBUS) ends it.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

PIECE = 1 << 20
"""Bytes read at once when a file is read from end to end."""

SPAN = 256 << 10
"""The longest span of random reads."""

SPANS = 16
"""Random reads of one file in a row."""

KEPT = 4
"""Files that are kept open for a long time."""

MOST_ERRORS = 5
"""Errors that are told word for word."""


@dataclass(slots=True)
class Found:
    """What a reader found.

    Attributes:
        reads: reads that were compared.
        bytes: of these.
        wrong: bytes that were not those of the original, missing ones too.
        failed: reads, opens and listings that failed.
        errors: the first failures, in words.
        longest: seconds of the longest of all calls.

    """

    reads: int = 0
    bytes: int = 0
    wrong: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    longest: float = 0.0


class Reader:
    """One reader of the files in `model`, which are those in `originals`."""

    def __init__(self, model: Path, originals: Path, chance: random.Random) -> None:
        self.found = Found()
        self._model = model
        self._chance = chance
        self._originals: dict[str, mmap.mmap] = {}
        for path in originals.iterdir():
            with path.open("rb") as file:
                self._originals[path.name] = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._kept: list[tuple[str, int]] = []

    def step(self) -> None:
        """Read something."""
        name = self._chance.choice(list(self._originals))
        way = self._chance.choice(WAYS)
        try:
            way(self, name)
        except OSError as error:
            self.found.failed += 1
            if len(self.found.errors) < MOST_ERRORS:
                self.found.errors.append(f"{way.__name__} {name}: {error.strerror or error}")

    def _compare(self, name: str, start: int, length: int, read: Callable[[int, int], bytes]) -> None:
        began = time.monotonic()
        try:
            data = read(start, length)
        finally:
            self.found.longest = max(self.found.longest, time.monotonic() - began)
        expected = self._originals[name][start : start + length]
        self.found.reads += 1
        self.found.bytes += len(data)
        if data != expected:
            same = sum(a == b for a, b in zip(data, expected, strict=False))
            self.found.wrong += max(len(data), len(expected)) - same

    def _open(self, name: str) -> int:
        began = time.monotonic()
        try:
            return os.open(self._model / name, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            self.found.longest = max(self.found.longest, time.monotonic() - began)

    def _spans(self, name: str) -> list[tuple[int, int]]:
        size = len(self._originals[name])
        starts = [self._chance.randrange(size) for _ in range(SPANS)]
        return [(start, min(self._chance.randint(1, SPAN), size - start)) for start in starts]

    def whole(self, name: str) -> None:
        """Read a file from end to end; often not from the page cache."""
        fd = self._open(name)
        try:
            if self._chance.random() < 0.5:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            for start in range(0, len(self._originals[name]), PIECE):
                length = min(PIECE, len(self._originals[name]) - start)
                self._compare(name, start, length, partial(_pread, fd))
        finally:
            os.close(fd)

    def spans(self, name: str) -> None:
        """Read at random places."""
        fd = self._open(name)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            for start, length in self._spans(name):
                self._compare(name, start, length, partial(_pread, fd))
        finally:
            os.close(fd)

    def mapped(self, name: str) -> None:
        """Read at random places of a memory map."""
        fd = self._open(name)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as pages:
                for start, length in self._spans(name):
                    self._compare(name, start, length, lambda at, count: pages[at : at + count])
        finally:
            os.close(fd)

    def kept(self, name: str) -> None:
        """Read from files that were opened long ago, over several daemons; open this one for later."""
        self._kept.append((name, self._open(name)))
        for old, fd in self._kept:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            for start, length in self._spans(old)[:2]:
                self._compare(old, start, length, partial(_pread, fd))
        if len(self._kept) > KEPT:
            os.close(self._kept.pop(0)[1])

    def listing(self, name: str) -> None:
        """List the directory and compare names and sizes."""
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self._model)}
        if sizes != {name: len(data) for name, data in self._originals.items()}:
            raise OSError(f"the listing is {sizes}")


def _pread(fd: int, start: int, length: int) -> bytes:
    return os.pread(fd, length, start)


WAYS = (Reader.whole, Reader.spans, Reader.mapped, Reader.kept, Reader.listing)


def main(model: str, originals: str, seed: str) -> None:
    """Read until standard input ends."""
    reader = Reader(Path(model), Path(originals), random.Random(int(seed)))
    while not select.select([sys.stdin], [], [], 0)[0]:
        reader.step()
    print(json.dumps(asdict(reader.found)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

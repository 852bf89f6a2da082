"""Threads that read, write, punch and discard at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelfs.cache import Cache, CacheObject, disk
from modelfs.errors import CacheError
from modelfs.types import BLOCK, Span
from tests.cache import (
    cache_at,
    content,
    in_threads,
    opened,
    put,
    whole,
)


def test_a_read_racing_with_holes_never_returns_zeros(cache: Cache) -> None:
    data = content(BLOCK)
    item = opened(cache, "k", data)
    done = threading.Event()
    served = [0, 0]

    def read(number: int, call: Callable[[Span], bytes | bytearray | None]) -> None:
        start = 0
        while not done.is_set():
            start = (start + 1_234_567) % (BLOCK - 70_000)
            try:
                got = call(Span(start, start + 65_536))
            except CacheError:
                continue
            if got is not None:
                served[number] += 1
                assert got == data[start : start + 65_536]

    def punch_and_fill() -> None:
        try:
            for _ in range(60):
                item.punch([0])
                put(item, data)
        finally:
            done.set()

    in_threads([lambda: read(0, item.read), lambda: read(1, item.read_now), punch_and_fill])
    assert served[0]
    assert whole(item) == data
    item.close()


def test_bytes_whose_hole_was_punched_while_they_were_written_are_written_again(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(100_000)
    item = cache.object("k", len(data))
    write = disk.write

    def overtaken(fd: int, view: memoryview, offset: int) -> None:
        write(fd, view, offset)
        monkeypatch.setattr(disk, "write", write)
        put(item, data)
        item.punch([0])

    monkeypatch.setattr(disk, "write", overtaken)
    item.write(0, data[:50_000])
    assert item.read(Span(0, 50_000)) == data[:50_000]
    item.close()


def test_an_operation_that_outlives_its_object_leaves_the_next_one_alone(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(BLOCK)
    late = opened(cache, "k", data)
    chunks = disk.chunks
    next_one: list[CacheObject] = []

    def wrong_and_late(fd: int, span: Span, *, afresh: bool) -> Iterator[memoryview]:
        late.close()
        next_one.append(cache.object("k", BLOCK))
        yield from chunks(fd, Span(1, span.stop), afresh=afresh)

    monkeypatch.setattr(disk, "chunks", wrong_and_late)
    assert not late.check(0)
    assert whole(next_one[0]) == data
    next_one[0].close()
    again = cache.object("k", BLOCK)
    assert again.complete
    again.close()


def test_writes_racing_with_holes_and_discards_are_never_half_there(cache: Cache) -> None:
    data = content(600_000)
    item = cache.object("k", len(data))
    done = threading.Event()

    def fill() -> None:
        while not done.is_set():
            try:
                put(item, data)
                assert whole(item) == data
            except CacheError:
                continue

    def take_away() -> None:
        try:
            for number in range(300):
                item.discard() if number % 10 == 0 else item.punch([0])
        finally:
            done.set()

    in_threads([fill, fill, take_away])
    put(item, data)
    assert whole(item) == data
    used = cache.used()
    item.close()
    cache.discard("k")
    assert (used > len(data), cache.used()) == (True, 0)


def test_opening_writing_and_evicting_at_once_keeps_the_limit_and_the_bytes(tmp_path: Path) -> None:
    limit = 40 * 12_288
    with cache_at(tmp_path / "c", limit=limit) as cache:

        def work(seed: int) -> None:
            for step in range(120):
                number = (step * 31 + seed * 17) % 60
                data = content(8192, number)
                item = cache.object(f"k{number}", len(data))
                try:
                    if not item.complete:
                        put(item, data)
                    assert whole(item) == data
                except CacheError as error:
                    if "fetch" not in str(error):  # somebody else's eviction took its block
                        raise
                finally:
                    item.close()
                # Every open object's table is there before its blocks have asked for room.
                assert cache.used() <= limit + 4 * 4096

        in_threads([lambda s=s: work(s) for s in range(4)])
        assert cache.metrics.value("modelfs_evicted_bytes_total") > 0
        used = cache.used()
    (tmp_path / "c" / "clean").unlink()
    with cache_at(tmp_path / "c") as cache:
        assert cache.used() <= used

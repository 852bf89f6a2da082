"""What goes when room is needed, and what stays."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path

import pytest

from modelfs.cache import Cache
from modelfs.errors import CacheError
from modelfs.types import BLOCK, Span
from tests.cache import (
    cache_at,
    content,
    opened,
    put,
    stored,
    table_file,
    whole,
)


def test_the_least_recently_used_object_goes_first(tmp_path: Path) -> None:
    data = content(BLOCK)
    with cache_at(tmp_path / "c", limit=3 * BLOCK + 100_000) as cache:
        for key in "abc":
            stored(cache, key, data)
        cache.object("a", BLOCK).close()
        stored(cache, "d", data)
        assert [key for key in "abcd" if cache.cached_bytes(key, BLOCK)] == ["a", "c", "d"]
        assert cache.used() <= 3 * BLOCK + 100_000
        assert cache.metrics.value("modelfs_evicted_bytes_total") >= BLOCK


@pytest.mark.parametrize("crash", [False, True])
def test_the_order_of_use_survives_a_restart(tmp_path: Path, crash: bool) -> None:
    directory = tmp_path / "c"
    with cache_at(directory) as cache:
        for key in "abc":
            stored(cache, key, b"x")
        cache.object("a", 1).close()
    if crash:
        (directory / "clean").unlink()
    with cache_at(directory, limit=2 * 8192) as cache:
        cache.make_room(0)
        assert [key for key in "abc" if cache.cached_bytes(key, 1)] == ["a", "c"] or not crash
        cache.make_room(8192)
        assert cache.cached_bytes("b", 1) == 0
        assert cache.cached_bytes("a", 1) == 1


def test_the_order_of_use_ignores_a_clock_that_jumps(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    with cache_at(directory) as cache:
        stored(cache, "future", b"x")
    (directory / "clean").unlink()
    os.utime(table_file(directory, "future"), (2**33, 2**33))
    with cache_at(directory) as cache:
        stored(cache, "now", b"x")
        cache.limit = cache.used() - 1
        cache.make_room(0)
        assert cache.cached_bytes("future", 1) == 0
        assert cache.cached_bytes("now", 1) == 1


def test_open_and_pinned_objects_stay(tmp_path: Path) -> None:
    with cache_at(tmp_path / "c") as cache:
        for key in ("pinned", "free"):
            stored(cache, key, b"abc")
        cache.pin({"pinned"})
        item = opened(cache, "open", b"abc")
        loan = item.lend()
        cache.limit = 0
        assert cache.make_room(0) > 0
        assert cache.cached_bytes("free", 3) == 0
        assert cache.cached_bytes("pinned", 3) == 3
        assert whole(item) == b"abc"
        loan.close()
        item.close()


def test_what_is_asked_for_is_evicted_unless_it_is_open_or_pinned(cache: Cache) -> None:
    for key in ("free", "pinned", "open"):
        opened(cache, key, content(BLOCK)).close()
    cache.pin({"pinned"})
    with closing(cache.object("open", BLOCK)):
        assert [cache.holder(key) for key in ("free", "pinned", "open")] == [None, "pinned", "open"]
        before = cache.used()
        freed = cache.evict(["pinned", "free", "absent", "open"])
        assert freed == {"free": before - cache.used()}
        assert freed["free"] >= BLOCK
    assert cache.metrics.value("modelfs_evicted_bytes_total") == freed["free"]
    assert cache.metrics.value("modelfs_evicted_objects_total") == 1
    assert {key for key, _ in cache.contents()} == {"pinned", "open"}


def test_what_was_unused_for_a_while_is_found_in_the_order_of_use(cache: Cache) -> None:
    began = time.time()
    for key in ("pinned", "first", "second", "third"):
        opened(cache, key, content(1000)).close()
    cache.pin({"pinned"})
    opened(cache, "first", content(1000)).close()
    unused = cache.unused(time.time())
    assert [each.key for each in unused] == ["second", "third", "first"]
    assert all(began <= each.used <= time.time() and each.bytes >= 1000 for each in unused)
    assert [each.key for each in cache.unused(unused[1].used)] == ["second", "third"]
    assert cache.unused(began) == []
    with closing(cache.object("third", 1000)):
        assert [each.key for each in cache.unused(time.time())] == ["second", "first"]


def test_pins_survive_a_restart_and_can_be_taken_back(tmp_path: Path) -> None:
    with cache_at(tmp_path / "c") as cache:
        cache.pin({"a", "b"})
        cache.pin({"b"})
    with cache_at(tmp_path / "c") as cache:
        assert not cache.pinned("a")
        assert cache.pinned("b")
        assert cache.usage().pinned == 1


def test_an_object_larger_than_the_limit_streams_through_it(tmp_path: Path) -> None:
    data = content(8 * BLOCK)
    limit = 3 * BLOCK + 8192
    with cache_at(tmp_path / "c", limit=limit) as cache:
        item = cache.object("k", len(data))
        for block in range(8):
            put(item, data, block)
            assert item.read(Span(block * BLOCK, block * BLOCK + 10)) == data[block * BLOCK :][:10]
            assert cache.used() <= limit
            assert os.stat(item.path).st_blocks * 512 <= 3 * BLOCK
        assert item.missing(range(8)) == [0, 1, 2, 3, 4]
        item.close()


def test_blocks_read_longest_ago_are_punched_first(tmp_path: Path) -> None:
    data = content(4 * BLOCK)
    with cache_at(tmp_path / "c", limit=3 * BLOCK + 8192) as cache:
        item = cache.object("k", len(data))
        put(item, data, 0, 1, 2)
        item.read(Span(0, 1))
        put(item, data, 3)
        assert item.missing(range(4)) == [1]
        item.close()


def test_a_limit_below_one_block_refuses_and_harms_nobody(tmp_path: Path) -> None:
    with cache_at(tmp_path / "c", limit=BLOCK - 1) as cache:
        item = cache.object("k", BLOCK)
        with pytest.raises(CacheError, match=r"cache\.size"):
            item.write(0, b"x")
        assert not item.covers(Span(0, 1))
        item.close()


def test_punching_frees_the_disk(cache: Cache) -> None:
    data = content(2 * BLOCK + 4097)
    item = opened(cache, "k", data)
    full = os.stat(item.path).st_blocks * 512
    used = cache.used()
    assert item.punch([0, 2]) == BLOCK + 4097
    assert os.stat(item.path).st_blocks * 512 <= full - BLOCK - 4097
    assert os.stat(item.path).st_size == len(data)
    assert used - cache.used() == BLOCK + 4097
    assert item.read(Span(BLOCK, 2 * BLOCK)) == data[BLOCK : 2 * BLOCK]
    with pytest.raises(CacheError):
        item.read(Span(0, 1))
    put(item, data, 0, 2)
    assert whole(item) == data
    item.close()


def test_usage_says_how_full_it_is(tmp_path: Path) -> None:
    with cache_at(tmp_path / "c", limit=1 << 30) as cache:
        stored(cache, "k", b"abc")
        usage = cache.usage()
        assert (usage.limit, usage.objects, usage.pinned) == (1 << 30, 1, 0)
        assert 0 < usage.used == cache.used() < 10_000
        assert usage.free > 0
        cache.discard("k")
        assert cache.used() == 0
        assert not list((tmp_path / "c" / "objects").glob("*/*"))

"""A disk that is full, broken or gone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from modelfs.errors import CacheError
from modelfs.types import BLOCK, Span
from tests.cache import (
    cache_at,
    content,
    mounted,
    open_cache,
    opened,
    put,
    read_only,
    stored,
    whole,
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


@needs_root
def test_a_full_disk_refuses_the_block_and_keeps_serving(tmp_path: Path) -> None:
    data = content(BLOCK)
    with mounted(tmp_path / "small", "-o", "size=12m") as small, cache_at(small / "c") as cache:
        first = opened(cache, "first", data)
        cache.pin({"first"})
        second = cache.object("second", BLOCK)
        with pytest.raises(CacheError, match=r"cache\.size"):
            second.write(0, data)
        assert not second.has(0)
        assert whole(first) == data
        first.close()
        cache.pin(())
        put(second, data)
        assert whole(second) == data
        assert cache.cached_bytes("first", BLOCK) == 0
        second.close()


@needs_root
def test_a_disk_that_others_fill_refuses_the_bytes(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "-o", "size=12m") as small, cache_at(small / "c") as cache:
        item = cache.object("k", BLOCK)
        item.write(0, b"x")  # the space of the block is reserved from here on, but not used yet
        with (small / "hog").open("wb") as hog, contextlib.suppress(OSError):
            for _ in range(200):
                hog.write(bytes(100_000))
                hog.flush()
        with pytest.raises(CacheError, match="free space"):
            item.write(0, content(BLOCK))
        assert cache.metrics.value("modelfs_cache_errors_total") == 1
        assert item.read(Span(0, 1)) == content(1)
        item.close()


@needs_root
@pytest.mark.parametrize("min_free", [20 << 20, 20 / 32])
def test_the_minimum_of_free_disk_is_kept(tmp_path: Path, min_free: float) -> None:
    data = content(BLOCK)
    with (
        mounted(tmp_path / "small", "-o", "size=32m") as small,
        cache_at(small / "c", min_free=min_free) as cache,
    ):
        stored(cache, "a", data)
        stored(cache, "b", data)
        assert (cache.cached_bytes("a", BLOCK), cache.cached_bytes("b", BLOCK)) == (0, BLOCK)
        assert not cache.room_for(BLOCK)
        assert cache.usage().free >= 20 << 20


@needs_root
def test_a_disk_gone_read_only_serves_what_it_has(tmp_path: Path) -> None:
    data = content(BLOCK + 5)
    with cache_at(tmp_path / "c") as cache:
        stored(cache, "complete", data)
        stored(cache, "stays", b"abc")
        item = cache.object("partial", len(data))
        put(item, data, 0)
        item.close()
        with read_only(tmp_path / "c" / "objects"):
            complete, partial = cache.object("complete", len(data)), cache.object("partial", len(data))
            assert whole(complete) == data
            assert partial.read(Span(0, BLOCK)) == data[:BLOCK]
            with pytest.raises(CacheError, match="check this disk"):
                partial.write(BLOCK, data[BLOCK:])
            fresh = cache.object("fresh", 3)
            assert fresh.volatile
            cache.limit = 0
            assert cache.make_room(0) == 0
            with pytest.raises(CacheError, match="cannot remove"):
                cache.discard("stays")
            assert cache.cached_bytes("stays", 3) == 3
            for each in (complete, partial, fresh):
                each.close()


def test_a_directory_that_vanishes_leaves_open_objects_readable(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    cache = open_cache(directory)
    item = opened(cache, "k", b"abc")
    directory.rename(tmp_path / "elsewhere")
    assert whole(item) == b"abc"
    fresh = cache.object("fresh", 3)
    assert fresh.volatile
    with pytest.raises(CacheError, match="no place"):
        fresh.write(0, b"abc")
    fresh.close()
    item.close()
    cache.close()
    assert cache.metrics.value("modelfs_cache_errors_total") >= 1

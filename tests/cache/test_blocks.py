"""What a cached object is, block by block."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from modelfs.cache import Cache
from modelfs.errors import CacheError
from modelfs.types import BLOCK, Digest, Span
from tests.cache import (
    content,
    opened,
    put,
    whole,
)


def test_a_block_is_present_once_it_is_committed(cache: Cache) -> None:
    data = content(2 * BLOCK + 100)
    item = cache.object("k", len(data))
    assert item.missing(range(3)) == [0, 1, 2]
    put(item, data, 2, 0)
    assert [item.has(block) for block in range(3)] == [True, False, True]
    assert item.missing(range(3)) == [1]
    assert item.cached_bytes == cache.cached_bytes("k", len(data)) == BLOCK + 100
    assert not item.complete
    put(item, data, 1)
    assert item.complete
    assert whole(item) == data
    assert item.read(Span(BLOCK - 3, BLOCK + 3)) == data[BLOCK - 3 : BLOCK + 3]
    item.close()


def test_bytes_can_be_read_as_soon_as_they_are_written(cache: Cache) -> None:
    data = content(BLOCK)
    item = cache.object("k", BLOCK)
    item.write(1000, data[1000:2000])
    item.write(3000, data[3000:4000])
    assert item.covers(Span(1000, 2000))
    assert not item.covers(Span(1000, 3001))
    item.write(2000, data[2000:3000])
    assert item.covers(Span(1000, 4000))
    assert item.read(Span(1500, 3500)) == data[1500:3500]
    assert not item.has(0)
    with pytest.raises(CacheError, match="fetch"):
        item.read(Span(999, 1001))
    item.close()


def test_a_block_with_a_gap_cannot_be_committed(cache: Cache) -> None:
    item = cache.object("k", 100)
    item.write(0, b"x" * 50)
    item.write(51, b"x" * 49)
    with pytest.raises(CacheError, match="not all written"):
        item.commit(0)
    item.write(50, b"x")
    item.commit(0)
    assert whole(item) == b"x" * 100
    item.close()


def test_blocks_that_were_not_committed_are_absent_in_the_next_open(cache: Cache) -> None:
    item = cache.object("k", BLOCK)
    item.write(0, content(BLOCK))
    before = cache.used()
    item.close()
    assert before - cache.used() == BLOCK
    item = cache.object("k", BLOCK)
    assert not item.covers(Span(0, 1))
    assert os.stat(item.path).st_blocks == 0
    item.close()


def test_one_key_is_one_object(cache: Cache) -> None:
    first, second = cache.object("k", 10), cache.object("k", 10)
    assert first is second
    first.write(0, b"0123456789")
    first.commit(0)
    first.close()
    assert whole(second) == b"0123456789"
    second.close()
    with pytest.raises(ValueError, match="more often"):
        second.close()


def test_a_present_block_is_not_overwritten(cache: Cache) -> None:
    item = opened(cache, "k", b"right")
    item.write(0, b"wrong")
    assert whole(item) == b"right"
    item.close()


def test_an_empty_object_is_complete(cache: Cache) -> None:
    item = cache.object("k", 0)
    assert item.complete
    assert whole(item) == b""
    assert item.read_now(Span(0, 0)) == b""
    assert item.verifier(Digest("sha256", hashlib.sha256().hexdigest())).advance() is True
    assert item.verified
    item.close()


def test_spans_beyond_the_end_are_a_mistake(cache: Cache) -> None:
    item = cache.object("k", 10)
    for call in (item.read, item.read_now):
        with pytest.raises(ValueError, match="beyond"):
            call(Span(5, 11))
    with pytest.raises(ValueError, match="beyond"):
        item.write(9, b"ab")
    item.close()


@pytest.mark.parametrize("key", ["", "../x", "a/b", "A", "a.data", "x" * 101, "ä", "a\n"])
def test_keys_are_checked(cache: Cache, key: str) -> None:
    for call in (lambda: cache.object(key, 1), lambda: cache.discard(key), lambda: cache.pin({key})):
        with pytest.raises(ValueError, match="not a key"):
            call()


def test_a_read_that_would_wait_gives_none(cache: Cache, tmp_path: Path) -> None:
    data = content(BLOCK + 10)
    item = cache.object("k", len(data))
    assert item.read_now(Span(0, 1)) is None
    put(item, data)
    span = Span(BLOCK - 5, BLOCK + 5)
    probe = tmp_path / "probe"
    probe.write_bytes(b"x")
    with probe.open("rb") as file:
        try:
            supported = os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except OSError:
            supported = False
    assert item.read_now(span) == (data[span.start : span.stop] if supported else None)
    item.close()


def test_content_larger_than_any_disk_is_volatile_and_costs_no_memory(cache: Cache) -> None:
    for size in (2**62, 2**70):
        item = cache.object("huge", size)
        assert item.volatile
        assert not item.covers(Span(0, 1))
        assert item.missing(range(2)) == [0, 1]
        with pytest.raises(CacheError, match="no place"):
            item.write(0, b"x")
        item.close()

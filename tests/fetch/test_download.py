"""Which bytes of an object readers may see before its digest was checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelfs.cache import Cache, CacheObject
from modelfs.fetch.download import Download
from modelfs.metrics import Metrics
from modelfs.types import BLOCK, Digest, Entry, Span, block_span

SIZE = 3 * BLOCK
DATA = bytes(SIZE)


@pytest.fixture
def item(tmp_path: Path) -> Iterator[CacheObject]:
    cache = Cache(tmp_path, metrics=Metrics())
    item = cache.object("k", SIZE)
    yield item
    item.close()
    cache.close()


def download(item: CacheObject) -> Download:
    source: Any = None  # nothing is fetched here
    digest = Digest("sha256", hashlib.sha256(DATA).hexdigest())
    return Download(source, Entry("w.bin", SIZE, "1", digest), item)


def arrive(item: CacheObject, *blocks: int) -> None:
    for block in blocks:
        span = block_span(block, SIZE)
        item.write(span.start, DATA[span.start : span.stop])


def test_one_block_is_kept_back_although_none_is_part_of_the_cache_yet(item: CacheObject) -> None:
    own = download(item)
    arrive(item, 0, 1, 2)
    shown = [own.serves(block_span(block, SIZE)) for block in (1, 2, 0, 1)]
    assert shown == [True, True, False, True]


def test_a_read_of_everything_is_kept_back(item: CacheObject) -> None:
    own = download(item)
    arrive(item, 0, 1, 2)
    assert not own.serves(Span(0, SIZE))


def test_what_earlier_readers_may_have_seen_counts(item: CacheObject) -> None:
    arrive(item, 0, 1)
    item.commit(0)
    item.commit(1)
    own = download(item)
    arrive(item, 2)
    assert [own.serves(block_span(block, SIZE)) for block in (2, 0)] == [False, True]


def test_once_it_was_checked_everything_is_shown(item: CacheObject) -> None:
    own = download(item)
    arrive(item, 0, 1, 2)
    for block in range(3):
        item.commit(block)
    assert own.digest is not None
    assert item.verifier(own.digest).advance() is True
    assert own.serves(Span(0, SIZE))


def test_content_that_does_not_fit_into_the_cache_is_not_kept_back(item: CacheObject) -> None:
    own = download(item)
    arrive(item, 0, 1)
    item.commit(0)
    assert own.serves(block_span(0, SIZE))
    assert own.serves(block_span(1, SIZE))
    item.punch([0])
    arrive(item, 2)
    assert own.serves(block_span(2, SIZE))

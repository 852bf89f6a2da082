"""Content as a whole: discarded, lent, compared with its digest."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from modelfs.cache import Cache
from modelfs.errors import CacheError
from modelfs.types import BLOCK, Digest, Span
from tests.cache import (
    cache_at,
    content,
    crash_image,
    damage,
    data_file,
    opened,
    put,
    stored,
    whole,
)


def test_a_discard_empties_the_object_for_everybody(cache: Cache) -> None:
    first, second = opened(cache, "k", b"abc"), cache.object("k", 3)
    inode = os.stat(first.path).st_ino
    second.discard()
    assert first.missing([0]) == [0]
    assert cache.cached_bytes("k", 3) == 0
    with pytest.raises(CacheError):
        first.read(Span(0, 3))
    put(first, b"xyz")
    assert whole(second) == b"xyz"
    assert os.stat(first.path).st_ino != inode
    first.close()
    second.close()


def test_a_loan_outlives_eviction_and_discard(cache: Cache) -> None:
    data = content(BLOCK + 1)
    item = cache.object("k", len(data))
    put(item, data, 0)
    with pytest.raises(CacheError, match="not all"):
        item.lend()
    put(item, data, 1)
    loan = item.lend()
    assert item.lent
    item.close()
    assert item.punch([0, 1]) == 0
    cache.limit = 0
    assert cache.make_room(0) == 0
    cache.discard("k")
    assert os.pread(loan.fileno(), len(data), 0) == data
    assert not item.lent
    loan.close()
    loan.close()
    with pytest.raises(ValueError, match="closed"):
        loan.fileno()


def test_a_bad_block_of_a_loan_is_dropped_without_a_hole(cache: Cache) -> None:
    item = opened(cache, "k", content(BLOCK))
    loan = item.lend()
    damage(item.path, 77)
    assert not item.check(0)
    assert item.missing([0]) == [0]
    assert os.pread(loan.fileno(), 50, 0) == content(50)
    put(item, content(BLOCK))
    assert os.pread(loan.fileno(), BLOCK, 0) == content(BLOCK)
    loan.close()
    item.close()


def test_a_digest_is_computed_while_blocks_arrive(cache: Cache, tmp_path: Path) -> None:
    data = content(3 * BLOCK - 7)
    item = cache.object("k", len(data))
    verifier = item.verifier(Digest("sha256", hashlib.sha256(data).hexdigest()))
    assert verifier.advance() is None
    put(item, data, 1)
    assert (verifier.advance(), verifier.hashed) == (None, 0)
    put(item, data, 0)
    assert (verifier.advance(), verifier.hashed) == (None, 2 * BLOCK)
    assert not item.verified
    put(item, data, 2)
    assert verifier.advance() is True
    assert verifier.result() is True
    assert item.verified
    assert cache.metrics.value("modelfs_verified_objects_total", result="match") == 1
    item.close()
    item = cache.object("k", len(data))
    assert item.verified
    item.punch([2])
    assert not item.verified
    item.close()
    image = crash_image(cache.directory, tmp_path / "image")
    with cache_at(image) as second:
        again = second.object("k", len(data))
        assert not again.verified
        again.close()


def test_a_wrong_digest_is_told_and_a_discard_starts_over(cache: Cache) -> None:
    right = content(BLOCK + 5)
    item = opened(cache, "k", right[:-1] + b"\0")
    header = b"blob %d\0" % len(right)
    digest = Digest("git-sha1", hashlib.sha1(header + right).hexdigest())
    verifier = item.verifier(digest)
    assert verifier.advance() is False
    assert not item.verified
    assert cache.metrics.value("modelfs_verified_objects_total", result="mismatch") == 1
    item.discard()
    assert verifier.advance() is None
    put(item, right)
    assert verifier.advance() is True
    assert item.verified
    item.close()


def test_content_that_lost_a_block_while_it_was_hashed_is_not_called_verified(cache: Cache) -> None:
    data = content(2 * BLOCK)
    item = cache.object("k", len(data))
    put(item, data, 0)
    digest = Digest("md5", hashlib.md5(data).hexdigest())
    verifier = item.verifier(digest)
    verifier.advance()
    item.punch([0])
    put(item, data)
    assert verifier.advance() is True
    assert not item.verified
    assert item.verifier(digest).advance() is True
    assert item.verified
    item.close()


def test_hashing_checks_blocks_of_doubtful_sessions(tmp_path: Path) -> None:
    data = content(BLOCK)
    with cache_at(tmp_path / "c") as cache:
        stored(cache, "k", data)
        image = crash_image(tmp_path / "c", tmp_path / "image")
    damage(data_file(image, "k"), 5)
    with cache_at(image) as cache:
        item = cache.object("k", BLOCK)
        verifier = item.verifier(Digest("md5", hashlib.md5(data).hexdigest()))
        assert verifier.advance() is None
        assert item.missing([0]) == [0]
        put(item, data)
        assert verifier.advance() is True
        item.close()

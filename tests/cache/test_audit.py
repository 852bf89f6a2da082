"""Objects that are read again: what is bad is found and dropped, what is good stays, also in its order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from modelfs.cache import Audit, Cache, disk
from modelfs.errors import CacheError
from modelfs.types import BLOCK, Digest, Span
from tests.cache import cache_at, content, damage, data_file, open_cache, put, table_file, whole

HEADER = 64


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with cache_at(tmp_path / "cache") as cache:
        yield cache


def keep(cache: Cache, key: str, data: bytes) -> None:
    with closing(cache.object(key, len(data))) as item:
        put(item, data)


def audited(cache: Cache, key: str, digest: Digest | None = None) -> Audit:
    audit = cache.audit(key, digest)
    assert audit is not None
    with closing(audit):
        while audit.step():
            pass
    return audit


def sha256(data: bytes) -> Digest:
    return Digest("sha256", hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("size", [0, 1, 4096, 100_001, BLOCK, BLOCK + 1])
def test_good_content_is_verified(cache: Cache, size: int) -> None:
    data = content(size)
    keep(cache, "k", data)
    audit = audited(cache, "k", sha256(data))
    assert (audit.faults, audit.dropped, audit.done, audit.total) == ([], 0, size, size)
    with closing(cache.object("k", size)) as item:
        assert item.verified
        assert whole(item) == data
    assert cache.metrics.value("modelfs_verified_bytes_total") == size
    assert cache.metrics.value("modelfs_verified_objects_total", result="match") == 1


@pytest.mark.parametrize("is_open", [False, True])
def test_a_flipped_bit_costs_its_block(cache: Cache, is_open: bool) -> None:
    data = content(2 * BLOCK + 5)
    keep(cache, "k", data)
    user = cache.object("k", len(data)) if is_open else None
    damage(data_file(cache.directory, "k"), BLOCK + 77)
    audit = audited(cache, "k", sha256(data))
    assert audit.faults == ["block 1 does not match its checksum"]
    assert (audit.dropped, audit.done, audit.mismatch) == (BLOCK, len(data), False)
    assert cache.metrics.value("modelfs_bad_blocks_total") == 1
    item = user or cache.object("k", len(data))
    assert item.missing(range(3)) == [1]
    put(item, data, 1)
    assert whole(item) == data
    item.close()
    assert audited(cache, "k", sha256(data)).faults == []


@pytest.mark.parametrize("is_open", [False, True])
def test_a_flipped_bit_in_a_record_costs_its_block(cache: Cache, is_open: bool) -> None:
    data = content(2 * BLOCK)
    keep(cache, "k", data)
    user = cache.object("k", len(data)) if is_open else None
    damage(table_file(cache.directory, "k"), HEADER + 8)
    audit = audited(cache, "k")
    assert len(audit.faults) == 1
    assert "block table" in audit.faults[0]
    assert (audit.dropped, audit.done) == (BLOCK, 2 * BLOCK)
    item = user or cache.object("k", len(data))
    assert item.missing(range(2)) == [1]
    item.close()
    assert audited(cache, "k").faults == []


@pytest.mark.parametrize("is_open", [False, True])
def test_a_flipped_bit_in_the_header_costs_the_object(cache: Cache, is_open: bool) -> None:
    data = content(BLOCK + 9)
    keep(cache, "k", data)
    user = cache.object("k", len(data)) if is_open else None
    damage(table_file(cache.directory, "k"), 20)
    audit = audited(cache, "k")
    assert audit.faults
    assert audit.dropped == len(data)
    item = user or cache.object("k", len(data))
    assert item.cached_bytes == 0
    put(item, data)
    item.close()
    with closing(cache.object("k", len(data))) as item:  # the table can be read again
        assert whole(item) == data
    assert audited(cache, "k").faults == []


def test_a_data_file_that_is_gone_is_told(cache: Cache) -> None:
    data = content(5000)
    keep(cache, "k", data)
    data_file(cache.directory, "k").unlink()
    assert audited(cache, "k").dropped == 5000


def test_content_of_another_digest_is_told_and_left_to_the_caller(cache: Cache) -> None:
    data = content(BLOCK + 3)
    keep(cache, "k", data)
    audit = audited(cache, "k", sha256(b"something else"))
    assert audit.mismatch
    assert audit.faults == [f"the content does not have its digest {sha256(b'something else')}"]
    assert audit.dropped == len(data)
    assert cache.metrics.value("modelfs_verified_objects_total", result="mismatch") == 1
    cache.discard("k")
    assert cache.audit("k") is None


def test_incomplete_content_is_compared_with_its_checksums_only(cache: Cache) -> None:
    data = content(3 * BLOCK)
    with closing(cache.object("k", len(data))) as item:
        put(item, data, 0, 2)
    audit = audited(cache, "k", sha256(b"of the whole"))
    assert (audit.faults, audit.done, audit.total) == ([], 2 * BLOCK, 2 * BLOCK)


def test_what_is_not_there_cannot_be_audited(cache: Cache) -> None:
    assert cache.audit("k") is None
    cache.close(sync=False)
    with pytest.raises(CacheError, match="closed"):
        cache.audit("k")


def test_being_audited_is_no_use(tmp_path: Path) -> None:
    with cache_at(tmp_path / "cache") as cache:
        for key in "abc":
            keep(cache, key, content(5000))
    with cache_at(tmp_path / "cache") as cache:
        audited(cache, "a")
        assert [key for key, _ in cache.contents()] == ["a", "b", "c"]
        audit = cache.audit("a")
        assert audit is not None
        with closing(audit), closing(cache.object("a", 5000)):  # that is a use
            pass
        assert [key for key, _ in cache.contents()] == ["b", "c", "a"]


def test_what_an_unclean_stop_left_counts_as_checked_once_it_was_audited(tmp_path: Path) -> None:
    data = content(BLOCK + 3)
    with cache_at(tmp_path / "cache") as cache:
        keep(cache, "k", data)
    (tmp_path / "cache" / "clean").unlink()
    (tmp_path / "cache" / "session").write_text("another boot")
    with cache_at(tmp_path / "cache") as cache:
        with closing(cache.object("k", len(data))) as item:
            assert item.unchecked == 2
        assert audited(cache, "k").faults == []
        with closing(cache.object("k", len(data))) as item:
            assert item.unchecked == 0


def test_eviction_in_the_middle_is_no_fault(tmp_path: Path) -> None:
    data = content(3 * BLOCK)
    with closing(open_cache(tmp_path / "cache")) as cache:
        keep(cache, "k", data)
        audit = cache.audit("k", sha256(data))
        assert audit is not None
        with closing(audit):
            assert audit.step()
            with closing(cache.object("k", len(data))) as item:
                assert item.punch([0, 2]) == BLOCK + BLOCK
            while audit.step():
                pass
        assert (audit.faults, audit.mismatch) == ([], False)


def test_a_discard_in_the_middle_ends_it(cache: Cache) -> None:
    keep(cache, "k", content(3 * BLOCK))
    audit = cache.audit("k", sha256(b"other"))
    assert audit is not None
    with closing(audit):
        assert audit.step()
        cache.discard("k")
        assert not audit.step()
    assert audit.faults == []


def test_a_renamed_object_is_the_same_under_another_name(cache: Cache) -> None:
    data = content(BLOCK + 3)
    keep(cache, "k", data)
    used = cache.used()
    cache.rename("k", "other")
    assert (cache.contents(), cache.used()) == ([("other", len(data))], used)
    with closing(cache.object("other", len(data))) as item:
        assert whole(item) == data
        cache.rename("other", "third")  # it is open
        keep(cache, "k", content(5))
        cache.rename("k", "other")  # there is one
        assert whole(item) == data
    assert dict(cache.contents()) == {"other": len(data), "k": 5}
    cache.rename("none", "more")
    assert cache.audit("more") is None


def test_reading_afresh_sees_the_disk_and_leaves_no_pages(tmp_path: Path) -> None:
    data = content(3 * disk.CHUNK + 77)
    file = tmp_path / "file"
    file.write_bytes(data)
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert b"".join(map(bytes, disk.chunks(fd, Span(0, len(data)), afresh=True))) == data
        assert disk.read_resident(fd, Span(0, 4096)) is None
        assert b"".join(map(bytes, disk.chunks(fd, Span(4096, 9000), afresh=True))) == data[4096:9000]
        assert b"".join(map(bytes, disk.chunks(fd, Span(5, 7)))) == data[5:7]
    finally:
        os.close(fd)


def test_reading_afresh_works_where_there_is_no_direct_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    fd = os.open(file, os.O_RDONLY)
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(22, "no O_DIRECT")))
    try:
        assert b"".join(map(bytes, disk.chunks(fd, Span(0, 7), afresh=True))) == b"content"
    finally:
        os.close(fd)

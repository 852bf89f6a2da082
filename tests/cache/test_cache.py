"""What the cache promises: right bytes or none, room that is kept, and a disk that may fail."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from modelfs.cache import Cache, CacheObject, disk
from modelfs.cache.index import Index
from modelfs.errors import CacheError, CacheLocked, CacheUnusable
from modelfs.types import BLOCK, Digest, Span
from tests.cache import cache_at, content, crash_image, damage, data_file, open_cache, put, table_file, whole

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
NOBODY = 65534


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with cache_at(tmp_path / "cache") as cache:
        yield cache


@contextmanager
def mounted(directory: Path, *options: str) -> Iterator[Path]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", *options, "modelfs-test", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Let nobody who opens something in `directory` from now on change it."""
    subprocess.run(["mount", "--bind", str(directory), str(directory)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(directory)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def opened(cache: Cache, key: str, data: bytes) -> CacheObject:
    item = cache.object(key, len(data))
    put(item, data)
    return item


def stored(cache: Cache, key: str, data: bytes) -> None:
    opened(cache, key, data).close()


# Blocks


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


# Stops, clean and otherwise


def test_a_clean_stop_keeps_everything_and_needs_no_check(tmp_path: Path) -> None:
    data = content(BLOCK + 100)
    with closing(open_cache(tmp_path / "c")) as cache:
        stored(cache, "k", data)
        used = cache.used()
    with cache_at(tmp_path / "c") as cache:
        assert cache.used() == used
        assert cache.cached_bytes("k", len(data)) == len(data)
        assert cache.cached_bytes("k", len(data) + 1) == 0
        item = cache.object("k", len(data))
        assert not cache.usage().unclean_start
        assert item.unchecked == 0
        assert whole(item) == data
        item.close()


def test_after_a_kill_of_the_process_alone_nothing_is_checked(tmp_path: Path) -> None:
    data = content(3 * BLOCK)
    with cache_at(tmp_path / "c") as cache:
        item = cache.object("k", len(data))
        put(item, data)
        first = crash_image(tmp_path / "c", tmp_path / "1", machine=False)
        of_machine = crash_image(tmp_path / "c", tmp_path / "2")
        item.close()
    with cache_at(first) as cache:
        assert not cache.usage().unclean_start
        item = cache.object("k", len(data))
        assert item.unchecked == 0
        item.lend().close()
        assert whole(item) == data
        item.close()
    # What an earlier crash of the machine left unchecked is not trusted after a kill either.
    with cache_at(of_machine):
        second = crash_image(of_machine, tmp_path / "3", machine=False)
    with cache_at(second) as cache:
        item = cache.object("k", len(data))
        assert item.unchecked == 3
        item.close()


def test_after_a_crash_blocks_are_checked_before_they_are_served(tmp_path: Path) -> None:
    data = content(2 * BLOCK)
    with cache_at(tmp_path / "c") as cache:
        item = opened(cache, "k", data)
        image = crash_image(tmp_path / "c", tmp_path / "image")
        item.close()
    damage(data_file(image, "k"), BLOCK + 12345)
    with cache_at(image) as cache:
        assert cache.cached_bytes("k", len(data)) == len(data)
        assert cache.usage().unclean_start
        item = cache.object("k", len(data))
        assert item.unchecked == 2
        assert item.read_now(Span(0, 10)) is None
        assert item.read(Span(0, 10)) == data[:10]
        assert item.unchecked == 1
        with pytest.raises(CacheError, match="fetch"):
            item.read(Span(BLOCK, BLOCK + 10))
        assert item.missing(range(2)) == [1]
        assert cache.metrics.value("modelfs_bad_blocks_total") == 1
        put(item, data, 1)
        assert whole(item) == data
        item.close()


def test_a_block_that_was_never_checked_stays_unchecked_through_a_clean_stop(tmp_path: Path) -> None:
    data = content(BLOCK + 1)
    with cache_at(tmp_path / "c") as cache:
        stored(cache, "k", data)
        image = crash_image(tmp_path / "c", tmp_path / "image")
    with cache_at(image) as cache:
        item = cache.object("k", len(data))
        assert item.check(0)
        item.close()
    with cache_at(image) as cache:
        item = cache.object("k", len(data))
        assert item.unchecked == 2
        assert item.check(0)
        assert item.check(1)
        item.close()
    with cache_at(image) as cache:
        item = cache.object("k", len(data))
        assert item.unchecked == 0
        item.close()


def test_a_damaged_record_is_an_absent_block(tmp_path: Path) -> None:
    data = content(BLOCK + 1)
    for offset in range(8):
        with cache_at(tmp_path / f"c{offset}") as cache:
            stored(cache, "k", data)
        damage(table_file(tmp_path / f"c{offset}", "k"), 64 + offset)
        with cache_at(tmp_path / f"c{offset}") as cache:
            item = cache.object("k", len(data))
            assert item.missing(range(2)) == [0]
            item.close()


@pytest.mark.parametrize("crash", [False, True])
def test_a_damaged_header_empties_the_object(tmp_path: Path, crash: bool) -> None:
    directory = tmp_path / "c"
    with cache_at(directory) as cache:
        stored(cache, "k", b"abc")
        stored(cache, "other", b"def")
    if crash:
        (directory / "clean").unlink()
    damage(table_file(directory, "k"), 17)
    with cache_at(directory) as cache:
        item = cache.object("k", 3)
        assert not item.covers(Span(0, 1))
        assert cache.metrics.value("modelfs_cache_errors_total") == 1
        put(item, b"abc")
        assert whole(item) == b"abc"
        item.close()
        assert cache.cached_bytes("other", 3) == 3


def test_another_size_under_the_same_key_empties_the_object(cache: Cache) -> None:
    stored(cache, "k", b"abc")
    item = cache.object("k", 4)
    assert not item.volatile
    assert item.cached_bytes == 0
    liar = cache.object("k", 3)
    assert liar.volatile
    liar.close()
    put(item, b"abcd")
    assert whole(item) == b"abcd"
    item.close()


def test_a_data_file_of_the_wrong_size_is_not_used(tmp_path: Path) -> None:
    with cache_at(tmp_path / "c") as cache:
        stored(cache, "k", b"abcdef")
    os.truncate(data_file(tmp_path / "c", "k"), 5)
    with cache_at(tmp_path / "c") as cache:
        item = cache.object("k", 6)
        assert item.cached_bytes == 0
        item.close()


def test_a_file_that_shrinks_under_us_is_an_error_and_the_block_is_fetched_again(cache: Cache) -> None:
    item = opened(cache, "k", b"abcdef")
    os.truncate(item.path, 3)
    with pytest.raises(CacheError):
        item.read(Span(0, 6))
    assert not item.has(0)
    put(item, b"abcdef")
    assert whole(item) == b"abcdef"
    item.close()


def test_a_damaged_index_is_rebuilt_and_nothing_is_trusted(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    with cache_at(directory) as cache:
        stored(cache, "k", b"abc")
    damage(directory / "clean", 30)
    with cache_at(directory) as cache:
        item = cache.object("k", 3)
        assert item.unchecked == 1
        assert whole(item) == b"abc"
        item.close()


def test_an_index_that_did_not_wait_for_the_disk_holds_until_the_next_boot() -> None:
    index = Index()
    index.put("k", size=3, present=3, allocated=4099, trusted=True)
    hasty = index.dump(boot="this", synced=False)
    assert Index.load(hasty, boot="this").used == 4099
    with pytest.raises(ValueError, match="restarted"):
        Index.load(hasty, boot="next")
    patient = index.dump(boot="this", synced=True)
    assert Index.load(patient, boot="next").used == 4099


def test_a_hasty_stop_is_trusted_by_the_successor(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "c")
    stored(cache, "k", b"abc")
    cache.close(sync=False)
    with cache_at(tmp_path / "c") as cache:
        item = cache.object("k", 3)
        assert item.unchecked == 0
        item.close()


def test_leftovers_of_a_crash_are_removed(tmp_path: Path) -> None:
    data = content(2 * BLOCK)
    with cache_at(tmp_path / "c") as cache:
        item = cache.object("k", len(data))
        put(item, data, 0)
        item.write(BLOCK, data[:4096])
        stored(cache, "orphan", b"abc")
        image = crash_image(tmp_path / "c", tmp_path / "image")
        orphan = data_file(image, "orphan")
        orphan.with_suffix(".table").unlink()
        with cache_at(image) as second:
            assert not orphan.exists()
            assert second.cached_bytes("k", len(data)) == BLOCK
            assert second.usage().objects == 1
            again = second.object("k", len(data))
            assert os.stat(again.path).st_blocks * 512 == BLOCK
            again.close()
        item.close()


def test_closing_twice_is_closing_once(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "c")
    item = opened(cache, "k", b"abc")
    cache.close()
    cache.close()
    with pytest.raises(CacheError):
        item.read(Span(0, 3))
    with pytest.raises(CacheError):
        item.write(0, b"abc")
    item.close()
    for call in (lambda: cache.object("k", 3), lambda: cache.get_meta("x"), lambda: cache.discard("k")):
        with pytest.raises(CacheError, match="closed"):
            call()
    assert cache.make_room(1) == 0
    with cache_at(tmp_path / "c") as cache:
        item = cache.object("k", 3)
        assert whole(item) == b"abc"
        item.close()


def test_many_objects_come_back_with_the_same_numbers(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    with cache_at(directory) as cache:
        for number in range(300):
            stored(cache, f"k{number}", b"%03d" % number)
        usage = cache.usage()
        image = crash_image(directory, tmp_path / "image")
    for place in (directory, image):
        with cache_at(place) as cache:
            assert cache.usage().objects == usage.objects == 300
            assert all(cache.cached_bytes(f"k{number}", 3) == 3 for number in range(300))
            item = cache.object("k77", 3)
            assert whole(item) == b"077"
            item.close()


# The directory


def test_two_daemons_never_share_a_directory(tmp_path: Path) -> None:
    with cache_at(tmp_path / "c"), pytest.raises(CacheLocked, match=f"process {os.getpid()};"):
        open_cache(tmp_path / "c")
    open_cache(tmp_path / "c").close()


def test_only_the_owner_can_read_anything(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    directory.mkdir(mode=0o755)
    with cache_at(directory) as cache:
        item = cache.object("k", BLOCK + 1)
        put(item, content(BLOCK + 1), 0)
        assert os.stat(item.path).st_mode & 0o777 == 0o600
        put(item, content(BLOCK + 1), 1)
        assert os.stat(item.path).st_mode & 0o777 == 0o400
        item.close()
        cache.set_meta("big", "x" * 100_000)
    directories = [path for path in directory.rglob("*") if path.is_dir()]
    outer = [directory, directory / "objects", directory / "meta", *(directory / "objects").iterdir()]
    assert set(outer) <= {directory, *directories}
    assert {path.stat().st_mode & 0o777 for path in outer} == {0o700}


def test_a_file_is_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("")
    with pytest.raises(CacheUnusable, match=r"cache\.dir"):
        open_cache(tmp_path / "c")
    with pytest.raises(CacheUnusable, match=r"cache\.dir"):
        open_cache(tmp_path / "c" / "d")


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    mode = tmp_path.stat().st_mode
    with pytest.raises(CacheUnusable, match="holds something else"):
        open_cache(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert tmp_path.stat().st_mode == mode


def test_a_newer_format_is_left_alone(tmp_path: Path) -> None:
    open_cache(tmp_path / "c").close()
    (tmp_path / "c" / "format").write_text("2\n")
    with pytest.raises(CacheUnusable, match="format '2'"):
        open_cache(tmp_path / "c")
    assert (tmp_path / "c" / "clean").exists()


@needs_root
def test_a_read_only_disk_cannot_hold_a_cache(tmp_path: Path) -> None:
    with mounted(tmp_path / "ro", "-o", "ro") as directory, pytest.raises(CacheUnusable, match="Read-only"):
        open_cache(directory / "c")


@contextmanager
def ordinary_user() -> Iterator[Path]:
    """Be somebody without any rights, and have a directory."""
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, NOBODY, NOBODY)
        os.seteuid(NOBODY)
        try:
            yield Path(name)
        finally:
            os.seteuid(0)


@needs_root
def test_an_ordinary_user_can_drop_and_fetch_blocks_of_a_complete_object() -> None:
    data = content(2 * BLOCK)
    with ordinary_user() as home:
        with cache_at(home / "c") as cache:
            stored(cache, "k", data)
        with cache_at(home / "c") as cache:
            item = cache.object("k", len(data))
            assert os.stat(item.path).st_mode & 0o777 == 0o400
            assert item.punch([1]) == BLOCK
            assert os.stat(item.path).st_mode & 0o777 == 0o600
            put(item, data, 1)
            assert whole(item) == data
            assert os.stat(item.path).st_mode & 0o777 == 0o400
            item.close()


@needs_root
def test_somebody_elses_directory_is_refused(tmp_path: Path) -> None:
    with ordinary_user() as home:
        (home / "mine").mkdir()
        os.seteuid(0)
        os.chown(home / "mine", 1234, 1234)
        os.chmod(home / "mine", 0o777)
        os.seteuid(NOBODY)
        with pytest.raises(CacheUnusable, match="another user"):
            open_cache(home / "mine")


# A disk that is full, broken or gone


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


# Room


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


# Discards and loans


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


# Digests


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


# Metadata


def test_metadata_is_kept_as_json(tmp_path: Path) -> None:
    value = {"entries": [["a", 1, None]], "big": "x" * 100_000}
    with cache_at(tmp_path / "c") as cache:
        assert cache.get_meta("a") is None
        cache.set_meta("a", value)
        cache.set_meta("b", 1)
        cache.set_meta("b", None)
        with pytest.raises(TypeError):
            cache.set_meta("a", object())
    with cache_at(tmp_path / "c") as cache:
        assert cache.get_meta("a") == value
        assert cache.get_meta("b") is None


def test_metadata_can_be_used_from_many_threads(cache: Cache) -> None:
    def work(number: int) -> None:
        cache.set_meta(f"k{number}", number)

    in_threads([lambda n=n: work(n) for n in range(8)])
    assert [cache.get_meta(f"k{number}") for number in range(8)] == list(range(8))


@pytest.mark.parametrize("ruin", ["garbage", "truncated", "no table", "empty"])
def test_a_ruined_database_is_replaced_by_an_empty_one(tmp_path: Path, ruin: str) -> None:
    database = tmp_path / "c" / "meta" / "cache.db"
    with cache_at(tmp_path / "c") as cache:
        cache.set_meta("a", list(range(20_000)))
        cache.set_meta("b", "x" * 20_000)
    match ruin:
        case "garbage":
            database.write_bytes(b"this was a database once" * 1000)
        case "truncated":
            os.truncate(database, 5000)
        case "no table":
            with closing(sqlite3.connect(database)) as connection:
                connection.execute("DROP TABLE Cache")
                connection.execute("CREATE TABLE Cache (x INTEGER)")
                connection.commit()
        case "empty":
            database.write_bytes(b"")
    with cache_at(tmp_path / "c") as cache:
        assert cache.get_meta("b") is None
        cache.set_meta("a", 2)
        assert cache.get_meta("a") == 2


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(Path(tempfile.gettempdir()) / "modelfs-bomb"),)


def test_a_pickle_in_the_database_is_never_loaded(tmp_path: Path) -> None:
    bomb = Bomb()
    target = Path(bomb.__reduce__()[1][0])
    with cache_at(tmp_path / "c") as cache:
        cache.set_meta("a", 1)
    with closing(sqlite3.connect(tmp_path / "c" / "meta" / "cache.db")) as connection:
        pickle_mode = 4
        connection.execute("UPDATE Cache SET mode = ?, value = ?, raw = 1", (pickle_mode, pickle.dumps(bomb)))
        connection.commit()
    with cache_at(tmp_path / "c") as cache:
        assert cache.get_meta("a") is None
        assert not target.exists()
        cache.set_meta("a", 3)
        assert cache.get_meta("a") == 3


# Threads


def in_threads(jobs: list[Callable[[], object]]) -> None:
    """Run all `jobs` at once and raise what any of them raised."""
    failures: list[BaseException] = []

    def run(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


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

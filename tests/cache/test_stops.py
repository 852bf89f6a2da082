"""What is left of a cache after stops, clean and otherwise."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from modelfs.cache import Cache, home
from modelfs.cache.index import Index
from modelfs.errors import CacheError
from modelfs.types import BLOCK, Span
from tests.cache import (
    cache_at,
    content,
    crash_image,
    damage,
    data_file,
    open_cache,
    opened,
    put,
    stored,
    table_file,
    whole,
)


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


def test_a_busy_disk_delays_no_stop_and_costs_a_check_only_after_a_restart_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot = "this"
    monkeypatch.setattr(home, "boot", lambda: boot)
    monkeypatch.setattr("modelfs.cache.directory.SYNC_SECONDS", 0.0)  # no disk is as fast as that
    for boot, unclean in (("this", False), ("this", False), ("next", True)):  # noqa: B007  # seen by `home`
        with closing(open_cache(tmp_path / "c")) as cache:
            assert cache.usage().unclean_start == unclean
            stored(cache, "k", b"abc")


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

"""The scrubber: everything in turn, slowly, not while readers wait, and after a restart where it was."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from modelfs.cache import Cache
from modelfs.fetch import scrub
from modelfs.fetch.scrub import Scrubber, Subject, discard_from, subjects_in
from tests.cache import cache_at, content, damage, data_file, put

SIZE = 5000


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with cache_at(tmp_path / "cache") as cache:
        for key in ("a", "b", "c"):
            with closing(cache.object(key, SIZE)) as item:
                put(item, content(SIZE))
        yield cache


class Rig:
    """A scrubber whose every look at an object is noted."""

    def __init__(self, cache: Cache, *, rate: int = 10**9) -> None:
        self.cache = cache
        self.read: list[str] = []
        self.waiting = False
        self.scrubber = Scrubber(
            cache, lambda: subjects_in(cache), discard_from(cache), self._busy, rate, settle=0
        )

    def _busy(self) -> bool:  # it is asked after each block
        self.read.append("block")
        return self.waiting

    def bytes(self) -> float:
        return self.cache.metrics.value("modelfs_verified_bytes_total")


def scrubbing(rig: Rig, test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(rig.scrubber.run)
                await test()
                nursery.cancel_scope.cancel()

    trio.run(main)


async def until(true: Callable[[], Any]) -> None:
    while not true():  # noqa: ASYNC110  # threads tell nobody
        await trio.sleep(0.005)


def test_bad_blocks_are_found_and_a_pass_is_enough_for_a_week(cache: Cache) -> None:
    damage(data_file(cache.directory, "b"), 7)
    rig = Rig(cache)

    async def test() -> None:
        await until(lambda: cache.get_meta(scrub.STATE) and rig.scrubber.finished)
        assert rig.scrubber.bad == 1
        assert cache.cached_bytes("b", SIZE) == 0
        assert rig.bytes() == 3 * SIZE

    scrubbing(rig, test)
    began = rig.scrubber.began
    again = Rig(cache)

    async def rests() -> None:
        await until(lambda: again.scrubber.began is not None)
        await trio.testing.wait_all_tasks_blocked(0.05)

    scrubbing(again, rests)
    assert (again.scrubber.began, again.scrubber.bad, again.read) == (began, 0, [])


def test_the_next_pass_begins_a_week_after_the_last(cache: Cache) -> None:
    old = time.time() - scrub.PERIOD
    cache.set_meta(scrub.STATE, {"began": old, "finished": old + 5, "after": "c"})
    rig = Rig(cache)

    async def test() -> None:
        await until(lambda: rig.bytes() == 3 * SIZE)

    scrubbing(rig, test)
    assert rig.scrubber.began is not None
    assert rig.scrubber.began > old


def test_a_pass_goes_on_where_it_was(cache: Cache) -> None:
    began = time.time() - 100
    cache.set_meta(scrub.STATE, {"began": began, "finished": began - 100, "after": "b"})
    rig = Rig(cache)

    async def test() -> None:
        await until(lambda: rig.scrubber.finished and rig.scrubber.finished > began)

    scrubbing(rig, test)
    assert rig.scrubber.began == began
    assert rig.bytes() == SIZE


@pytest.mark.parametrize("state", [7, {}, {"began": "x", "finished": None, "after": ""}])
def test_a_note_that_cannot_be_read_is_none(cache: Cache, state: Any) -> None:
    cache.set_meta(scrub.STATE, state)
    rig = Rig(cache)

    async def test() -> None:
        await until(lambda: rig.bytes() == 3 * SIZE)

    scrubbing(rig, test)


def test_it_pauses_while_readers_wait(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "YIELD", 0.001)
    rig = Rig(cache)
    rig.waiting = True

    async def test() -> None:
        await until(lambda: len(rig.read) > 20)
        assert rig.bytes() == SIZE
        rig.waiting = False
        await until(lambda: rig.bytes() == 3 * SIZE)

    scrubbing(rig, test)


def test_it_reads_no_faster_than_it_may(cache: Cache) -> None:
    rig = Rig(cache, rate=20 * SIZE)
    start = time.monotonic()

    async def test() -> None:
        await until(lambda: rig.scrubber.finished)

    scrubbing(rig, test)
    assert time.monotonic() - start >= 3 / 20


def test_what_is_read_names_the_object(cache: Cache) -> None:
    assert subjects_in(cache) == [Subject(key, key, SIZE, None) for key in ("a", "b", "c")]

"""The fetch path against a real origin: single flight, streaming, recovery, digests, a broken cache disk."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from modelfs.errors import AccessDenied, Corrupt, Expired, Stale, Unavailable
from modelfs.fetch.source import Source
from modelfs.types import BLOCK
from tests.fetch.rig import MIB, OriginStore, Rig, against, attempt, noise
from tests.origin import Origin


def test_readers_of_one_block_share_one_request(tmp_path: Path) -> None:
    data = noise(BLOCK)

    async def test(rig: Rig) -> None:
        reader = await rig.open("x.dat")
        got: list[bytes] = []

        async def read(start: int) -> None:
            got.append(await reader.read(start, 100))

        async with trio.open_nursery() as nursery:
            for start in [0] * 20 + [5000] * 20:
                nursery.start_soon(read, start)
        assert sorted(got) == sorted([data[:100]] * 20 + [data[5000:5100]] * 20)
        await rig.until(lambda: rig.fetched() == BLOCK)
        assert len(rig.origin.contents()) == 1

    with Origin({"x.dat": data}) as origin:
        against(origin, tmp_path, test)


def test_a_reader_is_served_as_soon_as_its_bytes_arrived(tmp_path: Path) -> None:
    data = noise(2 * BLOCK)

    async def test(rig: Rig) -> None:
        reader = await rig.open("x.dat")
        assert await reader.read(0, 1000) == data[:1000]
        assert rig.fetched() < BLOCK
        rig.origin.held["x.dat"][1].set()
        assert await reader.read(BLOCK - 10, 20) == data[BLOCK - 10 : BLOCK + 10]

    with Origin({"x.dat": data}) as origin:
        origin.held["x.dat"] = (2 * MIB, threading.Event())
        against(origin, tmp_path, test)


def test_a_block_wanted_from_its_middle_is_fetched_from_there(tmp_path: Path) -> None:
    data = noise(BLOCK)

    async def test(rig: Rig) -> None:
        reader = await rig.open("x.dat")
        assert await reader.read(6 * MIB + 5, 1000) == data[6 * MIB + 5 : 6 * MIB + 1005]
        assert rig.origin.contents()[0][2].startswith(f"bytes={6 * MIB}-")
        assert await reader.read(0, BLOCK) == data
        assert rig.fetched() <= BLOCK + 2 * MIB  # a piece may come past the rest that is under way

    with Origin({"x.dat": data}) as origin:
        against(origin, tmp_path, test)


def test_looks_at_many_places_do_not_wait_for_what_is_fetched_ahead(tmp_path: Path) -> None:
    data = noise(40 * BLOCK)

    async def test(rig: Rig) -> None:
        reader = await rig.open("x.safetensors")
        await rig.until(lambda: rig.fetcher.in_flight >= 8)  # and nothing of it comes in
        for block in range(40):
            start = block * BLOCK + 3 * MIB + block
            assert await reader.read(start, 4096) == data[start : start + 4096]
        event.set()
        assert await reader.read(0, len(data)) == data
        assert rig.fetched() < 1.3 * len(data)  # some of it came twice

    event = threading.Event()
    with Origin({"x.safetensors": data}) as origin:
        origin.long = (2 * MIB, event)
        against(origin, tmp_path, test)


def test_a_look_into_a_large_file_fetches_its_block_only(tmp_path: Path) -> None:
    data = noise(10 * BLOCK)

    async def test(rig: Rig) -> None:
        reader = await rig.open("x.dat")
        await reader.read(5 * BLOCK, 100 * 1024)
        await reader.read(5 * BLOCK, BLOCK)
        assert rig.fetched() <= 2 * BLOCK

    with Origin({"x.dat": data}) as origin:
        against(origin, tmp_path, test)


def test_a_weight_file_is_fetched_whole_from_open(tmp_path: Path) -> None:
    data = noise(5 * BLOCK + 3)

    async def test(rig: Rig) -> None:
        reader = await rig.open("x.safetensors")
        await reader.read(0, 10)
        await rig.until(lambda: rig.fetched() == len(data))
        before = len(rig.origin.contents())
        assert await reader.read(0, len(data)) == data
        assert len(rig.origin.contents()) == before

    with Origin({"x.safetensors": data}) as origin:
        against(origin, tmp_path, test)


def test_the_next_shard_comes_in_while_one_is_read(tmp_path: Path) -> None:
    names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    files = {name: noise(3 * BLOCK, seed) for seed, name in enumerate(names)}

    async def test(rig: Rig) -> None:
        reader = await rig.open(names[0], following=names[1])
        await rig.until(lambda: rig.fetched() == 6 * BLOCK)
        assert {path for _, path, _ in rig.origin.contents()} == set(names[:2])  # and not the one after
        reader.close()

    with Origin(files) as origin:
        against(origin, tmp_path, test)


def test_a_next_shard_without_room_is_left_alone(tmp_path: Path) -> None:
    files = {"a-00001-of-00002.bin": noise(3 * BLOCK), "a-00002-of-00002.bin": noise(3 * BLOCK, 2)}

    async def test(rig: Rig) -> None:
        first, second = files
        reader = await rig.open(first, following=second)
        await rig.until(lambda: rig.fetched() == 3 * BLOCK and not rig.fetcher.in_flight)
        assert await reader.read(0, 3 * BLOCK) == files[first]
        assert {path for _, path, _ in rig.origin.contents()} == {first}

    with Origin(files) as origin:
        against(origin, tmp_path, test, limit=5 * BLOCK)


def test_a_later_load_prefetches_in_the_order_of_the_first(tmp_path: Path) -> None:
    data = noise(40 * BLOCK)
    order = [30, 5, 17, 2]

    async def first(rig: Rig) -> None:
        reader = await rig.open("x.bin")
        for block in order:
            await reader.read(block * BLOCK, 10)
        reader.close()
        await rig.until(lambda: not rig.fetcher.in_flight)
        key = rig.source.key(await rig.store.entry("x.bin"))
        while await trio.to_thread.run_sync(rig.cache.get_meta, f"order {key}") is None:
            """A thread writes it."""

    async def second(rig: Rig) -> None:
        key = rig.source.key(await rig.store.entry("x.bin"))
        await trio.to_thread.run_sync(rig.cache.discard, key)
        rig.origin.log.clear()
        rig.origin.held["x.bin"] = (0, threading.Event())
        reader = await rig.open("x.bin")
        await rig.until(lambda: len(rig.origin.contents()) == 12)  # so many are under way at once
        spans = [span for _, _, span in rig.origin.contents()]
        asked = {int(span.removeprefix("bytes=").split("-")[0]) // BLOCK for span in spans}
        assert asked == {*order, 0, 1, 3, 4, 6, 7, 8, 9}
        reader.close()
        rig.origin.held["x.bin"][1].set()

    with Origin({"x.bin": data}) as origin:
        against(origin, tmp_path, first)
        against(origin, tmp_path, second)


def test_a_connection_that_stands_still_is_given_up_for_another(tmp_path: Path) -> None:
    data, other = noise(2 * BLOCK), noise(200 * MIB, 2)

    async def test(rig: Rig) -> None:
        reader = await rig.open("x.dat")
        _, event = rig.origin.held["x.dat"]
        read: list[bytes] = []

        async def stuck() -> None:
            read.append(await reader.read(0, BLOCK))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stuck)
            await rig.until(lambda: rig.fetched() >= MIB)
            del rig.origin.held["x.dat"]  # the next connection is a good one
            moving = await rig.open("y.dat")
            offset = 0
            while not read:  # others make progress meanwhile
                assert await moving.read(offset, MIB) == other[offset : offset + MIB]
                offset = (offset + MIB) % len(other)
                await trio.sleep(0.05)
        assert read == [data[:BLOCK]]
        spans = [span for _, path, span in rig.origin.contents() if path == "x.dat"]
        asked = [span for span in spans if span.endswith(f"-{BLOCK - 1}")]
        assert asked[0] == f"bytes=0-{BLOCK - 1}"
        assert asked[1] != asked[0]  # only the rest was asked for again
        event.set()

    with Origin({"x.dat": data, "y.dat": other}) as origin:
        origin.held["x.dat"] = (2 * MIB, threading.Event())
        against(origin, tmp_path, test)


def test_prefetch_ends_with_the_last_reader(tmp_path: Path) -> None:
    data = noise(40 * BLOCK)

    async def test(rig: Rig) -> None:
        reader = await rig.open("x.bin")
        await reader.read(0, 10)
        reader.close()
        await rig.until(lambda: not rig.fetcher.in_flight)
        assert rig.fetched() < len(data)

    with Origin({"x.bin": data}) as origin:
        against(origin, tmp_path, test)


def test_many_readers_at_distant_offsets_get_their_bytes(tmp_path: Path) -> None:
    data = noise(12 * BLOCK + 77)

    async def test(rig: Rig) -> None:
        reader = await rig.open("x.dat")

        async def stream(start: int, stop: int) -> None:
            for offset in range(start, stop, 300_001):
                size = min(300_001, stop - offset)
                assert await reader.read(offset, size) == data[offset : offset + size]

        async with trio.open_nursery() as nursery:
            for n in range(8):
                nursery.start_soon(stream, n * len(data) // 8, (n + 1) * len(data) // 8)
        assert len(data) <= rig.fetched() < 1.3 * len(data)  # pieces may come twice, blocks do not

    with Origin({"x.dat": data}) as origin:
        against(origin, tmp_path, test)


@pytest.mark.parametrize("refusal", [0, 400, 416, 501])
@pytest.mark.parametrize("name", ["x.dat", "x.bin"])
def test_a_store_that_sends_no_ranges_is_read_once(tmp_path: Path, name: str, refusal: int) -> None:
    data = noise(6 * BLOCK + 5)

    async def test(rig: Rig) -> None:
        rig.origin.ranges, rig.origin.refusal = False, refusal
        reader = await rig.open(name)
        got: dict[int, bytes] = {}

        async def read(start: int) -> None:
            got[start] = await reader.read(start, 1000)

        async with trio.open_nursery() as nursery:
            for start in (5 * BLOCK, 0, 3 * BLOCK - 500):
                nursery.start_soon(read, start)
        assert got == {start: data[start : start + 1000] for start in got}
        assert await reader.read(0, len(data)) == data
        complete = rig.fetched()
        assert await reader.read(0, len(data)) == data
        assert rig.fetched() == complete

    with Origin({name: data}) as origin:
        against(origin, tmp_path, test)


def test_a_store_that_refused_a_range_is_not_asked_for_one_again(tmp_path: Path) -> None:
    data = noise(3 * BLOCK)

    async def test(rig: Rig) -> None:
        rig.origin.refusal = 501
        rig.origin.cuts["x.dat"] = 2 * BLOCK
        reader = await rig.open("x.dat")
        assert await reader.read(0, 1000) == data[:1000]
        assert await reader.read(2 * BLOCK, 1000) == data[2 * BLOCK : 2 * BLOCK + 1000]
        first, *others = [wanted for _, _, wanted in rig.origin.contents()]
        assert first
        assert others == ["", ""]

    with Origin({"x.dat": data}) as origin:
        against(origin, tmp_path, test)


def test_what_a_retry_can_help_is_retried(tmp_path: Path) -> None:
    data = noise(1000)

    async def test(rig: Rig) -> None:
        reader = await rig.open("x.dat")
        assert await reader.read(0, 1000) == data
        assert rig.metrics.value("modelfs_store_retries_total") == 3

    with Origin({"x.dat": data}) as origin:
        origin.faults["x.dat"] = [503, 500, 429]
        against(origin, tmp_path, test)


def test_an_expired_signature_is_renewed(tmp_path: Path) -> None:
    data = noise(1000)

    async def test(rig: Rig) -> None:
        rig.store.expires = 4e9
        reader = await rig.open("x.dat")
        assert await reader.read(0, 1000) == data
        assert rig.store.located == 2

    with Origin({"x.dat": data}) as origin:
        origin.faults["x.dat"] = [403]
        against(origin, tmp_path, test)


def test_a_store_that_refuses_every_signature_is_access_denied(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.store.expires = 4e9
        reader = await rig.open("x.dat")
        with pytest.raises(AccessDenied):
            await reader.read(0, 1000)

    with Origin({"x.dat": noise(1000)}) as origin:
        origin.faults["x.dat"] = [403] * 10
        against(origin, tmp_path, test)


def test_a_failing_control_plane_is_retried_too(tmp_path: Path) -> None:
    data = noise(1000)

    async def test(rig: Rig) -> None:
        rig.store.refusals = [Unavailable("busy"), Expired("token")]
        reader = await rig.open("x.dat")
        assert await reader.read(0, 1000) == data

    with Origin({"x.dat": data}) as origin:
        against(origin, tmp_path, test)


@pytest.mark.parametrize("change", [lambda data: data[::-1], lambda data: data + b"x", None])
def test_bytes_that_changed_or_went_are_stale(tmp_path: Path, change: Any) -> None:
    data = noise(1000)

    async def test(rig: Rig) -> None:
        reader = await rig.open("x.dat")
        if change is None:
            del rig.origin.files["x.dat"]
        else:
            rig.origin.files["x.dat"] = change(data)
        with pytest.raises(Stale):
            await reader.read(0, 1000)

    with Origin({"x.dat": data}) as origin:
        against(origin, tmp_path, test)


def test_a_silent_store_is_an_error_after_the_deadline(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        reader = await rig.open("x.dat")
        with pytest.raises(Unavailable, match="did not arrive within 1 s"):
            await reader.read(0, 1000)
        rig.origin.silence_over.set()

    with Origin({"x.dat": noise(1000)}) as origin:
        origin.silent.set()
        against(origin, tmp_path, test, deadline=1.0)


def test_a_reader_has_its_own_time_whatever_was_under_way_before(tmp_path: Path) -> None:
    data = noise(1000)

    async def test(rig: Rig) -> None:
        reader = await rig.open("x.dat")
        with pytest.raises(Unavailable):
            await reader.read(0, 1000)
        got: list[bytes] = []

        async def late() -> None:
            got.append(await reader.read(0, 1000))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(late)
            await trio.testing.wait_all_tasks_blocked()
            rig.origin.silent.clear()
            rig.origin.silence_over.set()  # the first one's request breaks, after its time
        assert got == [data]

    with Origin({"x.dat": data}) as origin:
        origin.silent.set()
        against(origin, tmp_path, test, deadline=1.0)


def test_a_reader_that_gives_up_leaves_the_others_alone(tmp_path: Path) -> None:
    data = noise(BLOCK)

    async def test(rig: Rig) -> None:
        reader = await rig.open("x.dat")
        got: list[bytes] = []

        async def patient() -> None:
            got.append(await reader.read(BLOCK - 100, 100))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(patient)
            with trio.move_on_after(0.05):
                await reader.read(BLOCK - 100, 100)
            rig.origin.held["x.dat"][1].set()
        assert got == [data[-100:]]

    with Origin({"x.dat": data}) as origin:
        origin.held["x.dat"] = (0, threading.Event())
        against(origin, tmp_path, test)


@pytest.mark.parametrize("size", [1000, 2 * BLOCK + 9])
def test_wrong_bytes_are_never_read_to_their_end(tmp_path: Path, size: int) -> None:
    data = noise(size)

    async def test(rig: Rig) -> None:
        entry = await rig.store.entry("x.bin")
        reader = await rig.open("x.bin")
        got = 0
        while not isinstance(outcome := await attempt(reader.read(got, MIB)), Corrupt):
            got += len(outcome)
            assert got < size
        with pytest.raises(Corrupt):
            await reader.read(0, 10)
        assert rig.cache.cached_bytes(rig.source.key(entry), size) == 0
        assert not rig.fetcher.keeps_pages(rig.source, entry)
        reader.close()

    with Origin({"x.bin": data}) as origin:
        origin.digests["x.bin"] = hashlib.sha256(b"other").hexdigest()
        against(origin, tmp_path, test)


def test_right_bytes_are_verified_once_and_for_all(tmp_path: Path) -> None:
    data = noise(2 * BLOCK + 9)

    async def test(rig: Rig) -> None:
        reader = await rig.open("x.bin")
        assert await reader.read(0, len(data)) == data
        await rig.until(lambda: rig.metrics.value("modelfs_verified_objects_total", result="match") == 1)
        reader.close()
        again = await rig.open("x.bin")
        assert await again.read(0, len(data)) == data
        assert rig.metrics.value("modelfs_verified_objects_total") == 1

    with Origin({"x.bin": data}) as origin:
        origin.digests["x.bin"] = hashlib.sha256(data).hexdigest()
        against(origin, tmp_path, test)


def test_equal_digests_are_one_object_whatever_the_path(tmp_path: Path) -> None:
    data = noise(BLOCK)

    async def test(rig: Rig) -> None:
        for path in ("a.bin", "b.bin"):
            reader = await rig.open(path)
            assert await reader.read(0, len(data)) == data
            reader.close()
        assert rig.fetched() == len(data)

    with Origin({"a.bin": data, "b.bin": data}) as origin:
        origin.digests = dict.fromkeys(("a.bin", "b.bin"), hashlib.sha256(data).hexdigest())
        against(origin, tmp_path, test)


def test_content_that_is_gone_by_one_name_comes_by_the_other_that_is_open(tmp_path: Path) -> None:
    """Whoever opened the second shares the object, but not the failures of the first."""
    data = noise(2 * BLOCK)

    async def test(rig: Rig) -> None:
        old = await rig.open("a.dat")
        del rig.origin.files["a.dat"]
        with pytest.raises(Stale):
            await old.read(0, 100)
        new = await rig.open("b.dat")
        assert await new.read(0, 100) == data[:100]
        assert await old.read(BLOCK, 100) == data[BLOCK : BLOCK + 100]
        del rig.origin.files["b.dat"]
        third = await rig.open("c.dat")
        assert await third.read(0, len(data)) == data

    with Origin(dict.fromkeys(("a.dat", "b.dat", "c.dat"), data)) as origin:
        origin.digests = dict.fromkeys(origin.files, hashlib.sha256(data).hexdigest())
        against(origin, tmp_path, test)


def test_a_store_that_is_down_keeps_nobody_from_another_model_with_the_same_content(tmp_path: Path) -> None:
    data = noise(1000)

    async def test(rig: Rig) -> None:
        with Origin({"other.dat": data}) as second:
            second.digests = {"other.dat": hashlib.sha256(data).hexdigest()}
            store = OriginStore(second)
            rig.origin.faults["x.dat"] = [503] * 1000
            down = await rig.open("x.dat")
            up = await rig.fetcher.open(Source(store, rig.metrics), await store.entry("other.dat"))
            assert await up.read(0, 1000) == data
            assert await down.read(0, 1000) == data

    with Origin({"x.dat": data}) as origin:
        origin.digests = {"x.dat": hashlib.sha256(data).hexdigest()}
        against(origin, tmp_path, test)


@pytest.mark.parametrize("ranges", [True, False])
def test_without_room_in_the_cache_readers_are_streamed_to(tmp_path: Path, ranges: bool) -> None:
    data = noise(6 * BLOCK + 100)

    async def test(rig: Rig) -> None:
        rig.origin.ranges = ranges
        reader = await rig.open("x.dat")
        for offset in range(0, len(data), MIB):
            assert await reader.read(offset, MIB) == data[offset : offset + MIB]

    with Origin({"x.dat": data}) as origin:
        # No room for a single block: nothing can be cached.
        against(origin, tmp_path, test, limit=BLOCK // 2)


def test_an_object_larger_than_the_cache_is_read_through_it(tmp_path: Path) -> None:
    data = noise(10 * BLOCK)

    async def test(rig: Rig) -> None:
        reader = await rig.open("x.bin")
        for _ in range(2):
            for offset in range(0, len(data), MIB):
                assert await reader.read(offset, MIB) == data[offset : offset + MIB]
        assert rig.cache.used() <= 3 * BLOCK + MIB

    with Origin({"x.bin": data}) as origin:
        against(origin, tmp_path, test, limit=3 * BLOCK + MIB)


def test_a_vanished_cache_directory_is_streaming_not_an_error(tmp_path: Path) -> None:
    data = noise(3 * BLOCK)

    async def test(rig: Rig) -> None:
        os.rename(tmp_path / "cache", tmp_path / "gone")
        reader = await rig.open("x.dat")
        for offset in range(0, len(data), MIB):
            assert await reader.read(offset, MIB) == data[offset : offset + MIB]
        reader.close()

    with Origin({"x.dat": data}) as origin:
        against(origin, tmp_path / "cache", test)


def test_content_that_lost_a_block_is_verified_again_and_read_to_its_end(tmp_path: Path) -> None:
    data = noise(2 * BLOCK)
    with Origin({"f": data}) as origin:
        origin.digests["f"] = hashlib.sha256(data).hexdigest()

        async def test(own: Rig) -> None:
            reader = await own.open("f")
            assert await reader.read(0, len(data)) == data
            entry = await own.store.entry("f")
            with_it = await trio.to_thread.run_sync(own.cache.object, own.source.key(entry), len(data))
            await own.until(lambda: with_it.verified)
            for block in (0, 1):
                await trio.to_thread.run_sync(with_it.punch, [block])
                assert not with_it.verified
                assert await reader.read(block * BLOCK, BLOCK) == data[block * BLOCK :][:BLOCK]
                await own.until(lambda: with_it.verified)
            await trio.to_thread.run_sync(with_it.close)
            reader.close()

        against(origin, tmp_path, test, deadline=20.0)


def test_distrusted_content_is_fetched_again(tmp_path: Path) -> None:
    data = noise(BLOCK)
    with Origin({"f": data}) as origin:
        origin.digests["f"] = hashlib.sha256(data).hexdigest()

        async def test(own: Rig) -> None:
            entry = await own.store.entry("f")
            key = own.source.key(entry)
            for _ in range(2):
                reader = await own.open("f")
                assert await reader.read(0, len(data)) == data
                reader.close()
                await own.until(lambda: own.cache.cached_bytes(key, len(data)) == len(data))
                await own.fetcher.distrust(key, discard=True)
                assert own.cache.cached_bytes(key, len(data)) == 0
                assert not own.fetcher.keeps_pages(own.source, entry)
                assert own.fetcher.keeps_pages(own.source, entry)
            reader = await own.open("f")
            await reader.read(0, len(data))
            await own.fetcher.distrust(key, discard=True)
            with pytest.raises(Corrupt, match="do not have the published digest"):
                await reader.read(0, 1)
            reader.close()
            assert own.fetched() == 3 * len(data)

        against(origin, tmp_path, test)

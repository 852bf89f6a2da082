"""Fallback chains at the fetch path: who is asked, in the middle of a file too, and who is not."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from modelfs.errors import AccessDenied, Corrupt, Expired, NotFound, Stale, StoreError, Unavailable
from modelfs.fetch.breaker import FAILURES
from modelfs.fetch.chain import answering, same_content, standing
from modelfs.fetch.source import Source, chained
from modelfs.metrics import Metrics
from modelfs.types import BLOCK, Digest, Entry, Location, Snapshot
from tests.fetch.rig import MIB, OriginStore, Rig, against, attempt, noise
from tests.origin import Origin


class Chain:
    """The stores of several origins as one chain, read through one fetch path."""

    def __init__(self, rig: Rig, origins: list[Origin]) -> None:
        self.rig = rig
        self.origins = origins
        self.stores = [OriginStore(origin) for origin in origins]
        self.listed: list[str] = []
        self.sources = [Source(self._counted(store), rig.metrics) for store in self.stores]
        chained(self.sources)

    def _counted(self, store: OriginStore) -> OriginStore:
        listing = store.snapshot

        async def snapshot() -> Snapshot:
            self.listed.append(store.url)
            return await listing()

        store.snapshot = snapshot  # type: ignore[method-assign]
        return store

    async def open(self, path: str, at: int = 0) -> Any:
        return await self.rig.fetcher.open(self.sources[at], await self.stores[at].entry(path))

    def asked(self, number: int) -> int:
        return len(self.origins[number].contents())

    def fallbacks(self) -> float:
        return self.rig.metrics.value("modelfs_fallbacks_total")


def chain(
    directory: Path,
    contents: list[Mapping[str, bytes]],
    test: Callable[[Chain], Awaitable[None]],
    *,
    digests: bool = True,
    **options: Any,
) -> None:
    """Run `test` over a chain of one origin for each of `contents`."""
    with ExitStack() as stack:
        origins = [stack.enter_context(Origin(dict(files))) for files in contents]
        for origin in origins if digests else ():
            origin.digests = {path: hashlib.sha256(data).hexdigest() for path, data in origin.files.items()}

        async def run(rig: Rig) -> None:
            await test(Chain(rig, origins))

        against(origins[0], directory, run, **options)


def test_a_chain_whose_first_store_is_well_asks_no_other(tmp_path: Path) -> None:
    data = noise(2 * BLOCK + 5)

    async def test(own: Chain) -> None:
        reader = await own.open("x.bin")
        assert await reader.read(0, len(data)) == data
        assert own.listed == []
        assert own.asked(1) == own.fallbacks() == 0

    chain(tmp_path, [{"x.bin": data}] * 2, test)


def test_a_store_that_fails_in_the_middle_is_followed_by_the_next(tmp_path: Path) -> None:
    data = noise(3 * BLOCK + 5)

    async def test(own: Chain) -> None:
        reader = await own.open("x.dat")
        assert await reader.read(0, MIB) == data[:MIB]
        first = own.origins[0]
        first.faults["x.dat"] = [503] * 1000
        first.held["x.dat"][1].set()
        assert await reader.read(0, len(data)) == data
        assert own.fallbacks() >= 1
        spans = [span for _, _, span in own.origins[1].contents()]
        assert not any(span.startswith("bytes=0-") for span in spans)  # what was there was kept
        assert own.listed == [own.stores[1].url]
        entry = await own.stores[0].entry("x.dat")
        await own.rig.until(
            lambda: own.rig.cache.cached_bytes(own.sources[0].key(entry), len(data)) == len(data)
        )
        await own.rig.until(
            lambda: own.rig.metrics.value("modelfs_verified_objects_total", result="match") == 1
        )

    async def held(own: Chain) -> None:
        own.origins[0].held["x.dat"] = (2 * MIB, threading.Event())
        await test(own)

    chain(tmp_path, [{"x.dat": data}] * 2, held)


@pytest.mark.parametrize(
    "refusal", [Unavailable("down"), AccessDenied("no"), Stale("gone"), NotFound("gone")]
)
def test_a_store_that_cannot_say_where_is_followed_by_the_next(tmp_path: Path, refusal: StoreError) -> None:
    data = noise(1000)

    async def test(own: Chain) -> None:
        own.stores[0].refusals = [refusal] * 100
        reader = await own.open("x.dat")
        assert await reader.read(0, 1000) == data
        assert own.stores[0].located <= 2

    chain(tmp_path, [{"x.dat": data}] * 2, test)


def test_expired_signatures_are_renewed_before_the_next_store_is_asked(tmp_path: Path) -> None:
    data = noise(1000)

    async def test(own: Chain) -> None:
        own.stores[0].refusals = [Expired("token")]
        reader = await own.open("x.dat")
        assert await reader.read(0, 1000) == data
        assert own.asked(1) == 0

    chain(tmp_path, [{"x.dat": data}] * 2, test)


def test_the_same_digest_under_another_path_will_do(tmp_path: Path) -> None:
    data = noise(1000)

    async def test(own: Chain) -> None:
        own.stores[0].refusals = [AccessDenied("no")] * 100
        reader = await own.open("x.dat")
        assert await reader.read(0, 1000) == data

    chain(tmp_path, [{"x.dat": data}, {"x.dat": noise(1000, 2), "blobs/1": data}], test)


@pytest.mark.parametrize("digests", [True, False])
def test_bytes_that_nothing_proves_equal_are_not_taken(tmp_path: Path, digests: bool) -> None:
    data = noise(1000)
    other = data if not digests else data[::-1]

    async def test(own: Chain) -> None:
        own.stores[0].refusals = [AccessDenied("no")] * 100
        reader = await own.open("x.dat")
        with pytest.raises(AccessDenied):
            await reader.read(0, 1000)
        assert own.asked(1) == 0

    chain(tmp_path, [{"x.dat": data}, {"x.dat": other}], test, digests=digests)


def test_a_chain_is_asked_until_one_comes_back(tmp_path: Path) -> None:
    data = noise(1000)

    async def test(own: Chain) -> None:
        for origin in own.origins:
            origin.faults["x.dat"] = [503] * 3
        reader = await own.open("x.dat")
        assert await reader.read(0, 1000) == data

    chain(tmp_path, [{"x.dat": data}] * 2, test)


def test_a_chain_that_fails_is_one_error_after_the_deadline(tmp_path: Path) -> None:
    data = noise(1000)

    async def test(own: Chain) -> None:
        for origin in own.origins:
            origin.faults["x.dat"] = [503] * 1000
        reader = await own.open("x.dat")
        with pytest.raises(Unavailable):
            await reader.read(0, 1000)
        assert own.asked(0) + own.asked(1) < 30

    chain(tmp_path, [{"x.dat": data}] * 2, test, deadline=1.0)


def test_broken_answers_of_all_stores_are_an_error_at_once(tmp_path: Path) -> None:
    data = noise(1000)

    async def test(own: Chain) -> None:
        for store in own.stores:
            store.refusals = [AccessDenied("no")] * 2
        reader = await own.open("x.dat")
        with pytest.raises(AccessDenied):
            await reader.read(0, 1000)
        assert await reader.read(0, 1000) == data  # access was granted meanwhile

    chain(tmp_path, [{"x.dat": data}] * 2, test)


def test_a_breaker_spares_a_store_and_a_probe_brings_it_back(tmp_path: Path) -> None:
    files = {f"{number}.dat": noise(1000, number) for number in range(FAILURES + 4)}

    async def test(own: Chain) -> None:
        first = own.origins[0]
        for path in files:
            first.faults[path] = [503] * 1000
        breaker = own.sources[0].breaker
        for path, data in files.items():
            reader = await own.open(path)
            assert await reader.read(0, 1000) == data
            reader.close()
        assert own.asked(0) < 2 * len(files)
        assert breaker.state == "open"
        rows = standing(own.sources[0])
        assert [(row["state"], row["serving"]) for row in rows] == [("failing", False), ("ready", True)]
        assert "503" in rows[0]["why"]
        first.faults.clear()
        await own.rig.until(lambda: breaker.admits)
        before = own.asked(0)
        for number in (20, 21):
            own.origins[0].files[f"{number}"] = own.origins[1].files[f"{number}"] = noise(100, number)
            reader = await own.open(f"{number}")
            assert await reader.read(0, 100) == noise(100, number)
        assert breaker.state == "closed"
        assert own.asked(0) == before + 2
        assert standing(own.sources[0])[0]["serving"]

    chain(tmp_path, [files] * 2, test)


def wrong(own: Chain, number: int, path: str) -> None:
    """Let a store publish the right digest and have other bytes, of the same length."""
    files = own.origins[number].files
    files[path] = files[path][:-1] + bytes([files[path][-1] ^ 1])


@pytest.mark.parametrize("size", [1000, 2 * BLOCK + 9])
def test_wrong_bytes_that_nobody_saw_are_replaced_by_the_next_store(tmp_path: Path, size: int) -> None:
    data = noise(size)

    async def test(own: Chain) -> None:
        wrong(own, 0, "x.dat")
        reader = await own.open("x.dat")
        assert await reader.read(0, size) == data
        reader.close()
        asked = own.asked(0)
        key = own.sources[0].key(await own.stores[0].entry("x.dat"))
        await own.rig.until(lambda: not own.rig.fetcher.in_flight)
        await trio.to_thread.run_sync(own.rig.cache.discard, key)
        reader = await own.open("x.dat")
        assert await reader.read(0, size) == data
        assert own.asked(0) == asked  # it is known to have other bytes
        assert own.rig.metrics.value("modelfs_verified_objects_total", result="mismatch") == 1

    chain(tmp_path, [{"x.dat": data}] * 2, test)


def test_who_saw_wrong_bytes_gets_an_error_and_the_next_open_those_of_the_next_store(tmp_path: Path) -> None:
    data = noise(2 * BLOCK + 9)

    async def test(own: Chain) -> None:
        wrong(own, 0, "x.dat")
        reader = await own.open("x.dat")
        got = 0
        while not isinstance(outcome := await attempt(reader.read(got, MIB)), Corrupt):
            got += len(outcome)
            assert got < len(data)
        reader.close()
        asked = own.asked(0)
        reader = await own.open("x.dat")
        assert await reader.read(0, len(data)) == data
        assert own.asked(0) == asked

    chain(tmp_path, [{"x.dat": data}] * 2, test)


def test_when_all_stores_have_wrong_bytes_that_is_an_error_and_all_are_asked_again(tmp_path: Path) -> None:
    data = noise(1000)

    async def test(own: Chain) -> None:
        for number in range(3):
            wrong(own, number, "x.dat")
        reader = await own.open("x.dat")
        with pytest.raises(Corrupt):
            await reader.read(0, 1000)
        reader.close()
        assert [own.asked(number) for number in range(3)] == [1, 1, 1]
        own.origins[0].files["x.dat"] = data
        reader = await own.open("x.dat")
        assert await reader.read(0, 1000) == data
        assert [own.asked(number) for number in range(3)] == [2, 1, 1]

    chain(tmp_path, [{"x.dat": data}] * 3, test)


# -- snapshots


class Says:
    """A store that says one thing when it is asked what there is."""

    def __init__(self, name: str, answer: Snapshot | StoreError | None) -> None:
        self.url = f"says://{name}"
        self.answer = answer
        self.asked = 0

    async def snapshot(self) -> Snapshot:
        self.asked += 1
        if self.answer is None:
            await trio.sleep_forever()
        if isinstance(self.answer, StoreError):
            raise self.answer
        assert self.answer is not None
        return self.answer

    async def entry(self, path: str) -> Entry:
        raise AssertionError("only snapshots are asked for")

    async def locate(self, entry: Entry) -> Location:
        raise AssertionError("only snapshots are asked for")


SNAPSHOT = Snapshot.of("says://", "1", [])
DOWN, GONE = Unavailable("it is down"), NotFound("it is gone")


@pytest.mark.parametrize(
    ("answers", "shown", "expected", "asked"),
    [
        ([SNAPSHOT, SNAPSHOT], None, 0, [1, 0]),
        ([SNAPSHOT, SNAPSHOT], 1, 0, [1, 0]),
        ([DOWN, SNAPSHOT, SNAPSHOT], None, 1, [1, 1, 0]),
        ([None, SNAPSHOT], None, 1, [1, 1]),
        ([GONE, SNAPSHOT], None, 1, [1, 1]),
        ([GONE, SNAPSHOT], 0, 1, [1, 1]),
        ([AccessDenied("no"), SNAPSHOT], None, 1, [1, 1]),
        ([DOWN, SNAPSHOT], 0, Unavailable, [1, 0]),
        ([AccessDenied("no"), SNAPSHOT], 0, AccessDenied, [1, 0]),
        ([DOWN, DOWN, SNAPSHOT], 1, Unavailable, [1, 1, 0]),
        ([DOWN, SNAPSHOT], 1, 1, [1, 1]),
        ([GONE, DOWN], None, Unavailable, [1, 1]),
        ([GONE, GONE], None, NotFound, [1, 1]),
        ([AccessDenied("no"), GONE], None, AccessDenied, [1, 1]),
    ],
)
def test_the_first_store_that_answers_has_the_say(
    answers: list[Any], shown: int | None, expected: Any, asked: list[int]
) -> None:
    async def test() -> None:
        stores = [Says(str(number), answer) for number, answer in enumerate(answers)]
        message = ""
        own = chained([Source(store, Metrics()) for store in stores]).chain
        try:
            source, _, snapshot = await answering(own, None if shown is None else own[shown])
            found: Any = own.index(source)
            assert snapshot is source.snapshot  # as shown
        except StoreError as error:
            found = type(error)
            message = str(error)
        assert found == expected
        assert not message or all(str(store.answer) in message for store in stores if store.asked)
        assert [store.asked for store in stores] == asked

    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


def test_equal_content_is_told_by_digests_whatever_the_versions() -> None:
    entry = Entry("a", 3, "1", Digest("sha256", "0" * 64))
    one = Snapshot.of("says://a", "1", [entry, Entry("d", kind="directory")])

    def other(*entries: Entry) -> Snapshot:
        return Snapshot.of("says://b", "2", [*entries, Entry("d", kind="directory")])

    assert same_content(one, other(replace(entry, version="2", mtime=5.0)))
    for different in (
        replace(entry, path="b"),
        replace(entry, size=4),
        replace(entry, version="2", digest=None),
        replace(entry, digest=Digest("sha256", "1" * 64)),
        replace(entry, kind="symlink", target="d"),
    ):
        assert not same_content(one, other(different))
    assert not same_content(one, other(entry, replace(entry, path="c")))
    weak = replace(entry, digest=Digest("crc32", "0" * 8))
    assert not same_content(other(weak), other(replace(weak, version="2")))
    assert same_content(other(weak), other(weak))
